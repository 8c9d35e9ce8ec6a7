"""Damaged hook states, for the jobs that load them; a kind of :mod:`tests.jobs.fuzz`.

States that jobs of two ranks really saved are changed, on one rank or on all, where they have structure (keys, names,
shapes, types, numbers) and in their tensors, and loaded on both. Either all ranks refuse with one sentence, and what
they keep has not changed; or all have taken what they were given, which is such a state, and the next step gives all
of them the same gradients. Anything else that comes out, a rank that waits for another included, is a bug.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError
from fedmpi.integrations.job import Job

from .outcomes import Attempt

RANKS = 2
SHAPES = {"conv": (4, 3, 2, 2), "bias": (7,), "fc": (9, 8)}
SETTINGS: dict[str, Any] = {"exact_below": 10}
AUTO = {
    "name": "auto",
    "candidates": ["signsgd", {"name": "topk", "ratio": 0.3, "feedback": True}],
    "steps": 3,
}
# One method of its own for a tensor, an exact one, and the job's method for the rest.
MIXED = {"name": "topk", "ratio": 0.25, "feedback": True}
PARTS = [
    {"match": "conv", "travels": {"name": "signsgd", "feedback": True}},
    {"match": "bias", "travels": "exact"},
]
_ALL: tuple[dict[str, Any], ...] = (
    {"name": "bf16"},
    {"name": "topk", "ratio": 0.3, "feedback": True},
    {"name": "signsgd", "momentum": 0.9},
    {"name": "powersgd", "rank": 2, "feedback": True},
    {"name": "fetchsgd", "k": 10, "rows": 3, "columns": 20},
    {"name": "lookback", "threshold": 0.9},
    {"name": "lookback", "keep": "message", "inner": {"name": "topk", "ratio": 0.3}},
    {"name": "lookback", "scope": "tensor", "keep": "half", "feedback": True},
    AUTO,
    MIXED,
)
METHODS = tuple(method for method in _ALL if method["name"] in methods.METHODS)


def pool(rng: random.Random) -> Any:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    numbers = (-5, -1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 2**100, 1.5, 1.0, float("nan"), True, False)
    return rng.choice(
        (
            *numbers,
            *(None, "", "x" * 10**5, b"fc", [], {}, (), ["fc"], {"residual": 1}, [[9, 8]], Ellipsis, deep),
            *(torch.zeros(()), torch.zeros(1, 1), torch.zeros(3), torch.tensor(4), torch.ones(2, 2)),
        )
    )


def damaged(value: Tensor, rng: random.Random) -> Tensor:
    """Another tensor, or other values in it."""
    if not value.ndim or value.is_meta or value.is_sparse:  # put there before
        return torch.zeros(2, 3)
    flat = value.reshape(-1)
    first = flat[:1].reshape(1, 1)
    bad = value.clone()
    if bad.numel():
        at = rng.randrange(bad.numel())
        number = rng.choice((float("nan"), float("inf"), 3e38, -1.0, 0.0, 255.0, 1e-45))
        if bad.dtype.is_floating_point or 0 <= number < 256:
            bad.view(-1)[at] = number
    noise = torch.randint(0, 256, (value.nbytes,), dtype=torch.uint8).view(value.dtype).reshape(value.shape)
    return rng.choice(
        (
            *(bad, bad, bad, noise, noise, first, flat, flat[: len(flat) // 2], value[None], value[:0]),
            *(value.double(), value.half(), value.long(), value.bool(), value.to(torch.complex64)),
            *(value.to("meta"), value.to_sparse(), first.expand(value.shape) if value.ndim == 2 else first),
            *(torch.stack([value, value], -1)[..., 0], torch.zeros_like(value), value.flip(0)),
        )
    )


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all that a tree holds."""
    found = [path]
    if len(path) > 5:  # put there before
        return found
    if isinstance(tree, dict):
        inside = list(tree.items())
    else:
        inside = list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in inside:
        found += nodes(value, (*path, key))
    return found


def mutate(state: Any, others: list[Any], rng: random.Random) -> Any:
    """``state`` with one thing changed."""
    path = rng.choice(nodes(state))
    if not path:
        return rng.choice((copy.deepcopy(rng.choice(others)), state, pool(rng)))
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    what = rng.randrange(8)
    if isinstance(value, Tensor) and what < 6:
        parent[key] = damaged(value, rng)
    elif what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[rng.choice((str(key) + "x", 3, None, "inner.x"))] = parent.pop(key)
    elif what == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), value)
    elif what == 3 and isinstance(parent, dict):
        parent[rng.choice(("more", "residual", "inner.residual", 7))] = pool(rng)
    elif what == 4 and type(value) is int:
        parent[key] = value + rng.choice((-1, 1, 2**40))
    elif what == 5 and isinstance(parent, list):
        rng.shuffle(parent)
    elif what == 6 and isinstance(value, list):
        parent[key] = tuple(value)
    else:
        parent[key] = pool(rng)
    return state


def same(a: Any, b: Any) -> bool:
    """Two states hold the same, bit by bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def started(method: dict[str, Any], comm: Comm) -> Job:
    return Job(SHAPES, method, comm, SETTINGS | ({"parts": PARTS} if method == MIXED else {}))


def step(job: Job, rank: int, t: int) -> str:
    """One step of a job on random gradients; what came of it, in short."""
    generator = torch.Generator().manual_seed(1000 * t + rank)
    parameters = {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator)
    job.between_steps().average(parameters)
    digest = hashlib.sha256()
    for p in parameters.values():
        assert p.grad is not None
        digest.update(p.grad.numpy().tobytes())
    return digest.hexdigest()


def states(method: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """What each rank saved after so many steps."""

    def run(comm: Comm) -> dict[str, Any]:
        job = started(method, comm)
        for t in range(steps):
            step(job, comm.rank, t)
        return job.state_dict()

    return run_ranks(RANKS, run)


def load(
    comm: Comm, method: dict[str, Any], before: list[Any], given: list[Any]
) -> tuple[ConfigError | None, str]:
    """This rank loads ``before``, then what it is given: the error that refused it, and what all ranks tell."""
    job = started(method, comm)
    job.load_state_dict(copy.deepcopy(before[comm.rank]))
    kept = copy.deepcopy(job.state_dict())
    mine, refusal = given[comm.rank], None
    try:
        job.load_state_dict(mine)
    except ConfigError as error:
        refusal = error
    after = job.state_dict()
    assert refusal is None or same(kept, after), f"{refusal}, and yet something changed"
    if refusal is None:
        if mine["measuring"] and method["name"] == "auto":
            assert (after["step"], after["measuring"]) == (mine["step"], True)
        elif mine["ranks"] != RANKS:  # what each rank kept starts afresh, which a warning says
            assert (after["step"], after["ranks"]) == (mine["step"], RANKS)
        else:
            assert same(after, {**mine, "measuring": after["measuring"]}), "something else was loaded"
    return refusal, f"{refusal} {step(job, comm.rank, 7)}"


def prepare(folder: Path) -> Attempt:
    torch.set_num_threads(1)
    foreign = states({"name": "dense"}, 2)
    jobs = [(method, [states(method, 2), states(method, 4), foreign]) for method in METHODS]

    def attempt(rng: random.Random) -> ConfigError | None:
        method, valid = rng.choice(jobs)
        torch.manual_seed(rng.randrange(2**31))
        hurt = rng.choice(([0], [1], [0, 1]))
        given: list[Any] = copy.deepcopy(rng.choice(valid[:2]))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            where = rng.getstate()
            for rank in hurt:
                rng.setstate(where)  # the same on each
                if isinstance(given[rank], dict):
                    given[rank] = mutate(given[rank], [s for others in valid for s in others], rng)
        heard = run_ranks(RANKS, lambda comm: load(comm, method, valid[0], given), timeout=60)
        assert len({told for _, told in heard}) == 1, f"ranks part: {heard}"
        return heard[0][0]

    return attempt
