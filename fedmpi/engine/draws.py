"""Random numbers that a model draws in training: those of its client and step, whoever trains it.

torch (on each device), NumPy and Python have one generator each for the whole process, and ranks may be threads of
one. A model may hold generators of its own besides.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmpi.message import CPU

_LOCK = threading.Lock()
_KINDS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def held(model: nn.Module) -> tuple[Any, ...]:
    """Generators of NumPy, Python and torch that a model's modules keep: as attributes, or named by the functions that
    they run (their ``forward``, and functions among their attributes)."""
    found: dict[int, Any] = {}
    for module in model.modules():
        attributes = [*vars(module).values()]
        functions = [a for a in (*attributes, type(module).forward) if isinstance(a, FunctionType)]
        for function in functions:
            attributes += [function.__globals__.get(name) for name in function.__code__.co_names]
            for cell in function.__closure__ or ():
                try:
                    attributes.append(cell.cell_contents)
                except ValueError:  # nothing in it yet
                    continue
        found |= {id(a): a for a in attributes if isinstance(a, _KINDS)}
    return tuple(found.values())


def seed_held(generators: Iterable[Any], key: int) -> None:
    """Let a model's own generators begin at ``key``, each at another number of its own."""
    for i, one in enumerate(generators):
        seed = (key + i) & (1 << 63) - 1
        if isinstance(one, np.random.Generator):
            one.bit_generator.state = type(one.bit_generator)(seed).state
        elif isinstance(one, np.random.RandomState):
            one.set_state(np.random.RandomState(seed % (1 << 32)).get_state())
        elif isinstance(one, torch.Generator):
            one.manual_seed(seed)
        else:
            one.seed(seed)


def standing(one: Any) -> str:
    """Where a generator stands: another text after a draw."""
    if isinstance(one, np.random.Generator):
        return repr(one.bit_generator.state)
    if isinstance(one, torch.Generator):
        return str(one.get_state().tolist())
    return repr(one.get_state() if isinstance(one, np.random.RandomState) else one.getstate())


@contextmanager
def generators(taken: bool, device: torch.device = CPU) -> Iterator[None]:
    """All of them, with torch's of the ``device``, for this thread alone, where they are ``taken``; in the end they
    stand as before."""
    if not taken:
        yield
        return
    with _LOCK:
        there = None if device == CPU else getattr(torch, device.type)
        own = None if there is None else there.get_rng_state(device)
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            yield
        finally:
            if there is not None:
                there.set_rng_state(own, device)
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])


def seed_all(key: int, device: torch.device = CPU, own: Iterable[Any] = ()) -> None:
    """Let all of them, and a model's ``own``, begin at ``key``, an int64. A device's numbers are not the CPU's."""
    torch.default_generator.manual_seed(key & (1 << 63) - 1)
    if device.type == "cuda":  # this one's alone
        torch.cuda.default_generators[device.index].manual_seed(key & (1 << 63) - 1)
    elif device != CPU:
        getattr(torch, device.type).manual_seed_all(key & (1 << 63) - 1)
    np.random.seed(key % (1 << 32))  # noqa: NPY002 - the one that a model's forward may draw from
    random.seed(key)
    seed_held(own, key)
