"""Feeds damaged downloads of every method to its clients: ``python -m tests.jobs.fuzz_messages INPUTS SEED``.

Messages themselves are in :mod:`tests.jobs.fuzz`, whose changes of a frame are used here. Prints what came, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import NamedTuple

import torch

from fedmpi import methods
from fedmpi.engine.downloads import receive
from fedmpi.errors import MessageError
from fedmpi.message import to_bytes
from fedmpi.method import Round, Server, State, play
from fedmpi.methods.base import Setup

from .fuzz import NUMBERS, SPECS, WORDS, anatomy, fitted, options


class Download(NamedTuple):
    """A client and a frame that it takes."""

    name: str
    server: Server
    view: State
    version: int
    frame: bytes
    theta: torch.Tensor


def downloads() -> list[Download]:
    """What a client that saw nothing, and one that saw all rounds but one, get after some rounds of each method."""
    found, spec = [], SPECS[0]
    for name, values in options():
        try:
            method = methods.build(fitted(values, spec), spec, Setup(seed=1))
        except methods.ConfigError:
            continue  # needs a larger model
        server, up, theta = method.server, method.up, torch.linspace(-1, 1, spec.size)
        state, view = server.init(theta), server.view(theta)
        senders, peers = ({n: v[None] for n, v in init().items()} for init in (up.init, up.init_peer))
        for t in range(4):
            g = torch.randn(1, spec.size, generator=torch.Generator().manual_seed(t))
            now = Round(seed=1, t=t, lr=0.1, rounds_per_epoch=2)
            passes = play(method, g, senders, state, now, peers=peers)
            for index, one in enumerate(passes[:-1]):
                view = server.between(view, index, one.mean_S, now)
            last, before = passes[-1], int(state["version"])
            senders, peers, state = last.after, last.peers, server.finish(last.state, last.mean_S, now)
            version = int(state["version"])
            for seen, held_view in ((before, view), (0, server.view(theta))):
                frame = to_bytes(server.download(state, seen))
                found.append(Download(name, server, held_view, version, frame, server.parameters(state)))
            view = server.reconcile(view, server.download(state, before), version)
    return found


def mutated(one: Download, others: list[Download], rng: random.Random) -> bytes:
    frame = bytearray(one.frame)
    fields, _ = anatomy(one.frame)
    how = rng.randrange(6)
    at = rng.randrange(len(frame))
    if how == 0:
        frame[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del frame[at:]
    elif how == 2:
        return rng.choice(others).frame
    elif how == 3:
        field = rng.choice(fields)
        width = rng.choice((1, 2, 4, 8))
        frame[field : field + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    elif how == 4:
        frame[at : at + 4] = rng.choice(WORDS)
    else:
        frame[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    return bytes(frame)


def fuzz(n: int, seed: int) -> None:
    """Raises what a client must not raise, or AssertionError for a view of another shape."""
    rng, targets, seen = random.Random(seed), downloads(), Counter[str]()
    for one in targets:
        new = receive(one.server, one.view, one.frame, one.version)
        assert torch.equal(one.server.parameters(new), one.theta), one.name
    for _ in range(n):
        one = rng.choice(targets)
        frame = mutated(one, targets, rng)
        try:
            new = receive(one.server, one.view, frame, one.version)
        except MessageError:
            seen["refused"] += 1
            continue
        assert one.server.parameters(new).shape == one.theta.shape, one.name
        assert one.server.parameters(new).dtype == torch.float32, one.name
        seen["taken"] += 1
    print(json.dumps(seen))


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
