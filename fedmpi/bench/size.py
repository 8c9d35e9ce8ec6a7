"""``fedmpi bench size``: methods, rounds, downloads, hooks and start-up at the sizes that users have.

Codings are of one client, and what they take is the thread's CPU time over that of copying the gradients (the least of
several turns: other programs only add to it), and the memory that they take on top of what there is, in vectors of D
float32 numbers. Rounds are against a loop that does the same by hand.

Shape suffixes: C clients, D parameters.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmpi import random
from fedmpi.bench import hooks
from fedmpi.bench.methods import Third, finished, third_round
from fedmpi.bench.rounds import Engine, simulation
from fedmpi.bench.timing import Work, columns
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.method import believed
from fedmpi.spec import Spec

PARTS = ("codings", "downloads", "rounds", "hooks", "start")
_COPIES = 14  # of the vector that are in memory at a time, at most
_ENCODE, _DECODE, _SERVER, _PEAK = 15.0, 5.0, 4.0, 3.0


class Measured(NamedTuple):
    """One case: a ratio or a size, and what it is to be at most."""

    part: str
    case: str
    value: float
    unit: str
    target: float | None = None

    @property
    def met(self) -> bool:
        return self.target is None or self.value <= self.target


class Sizes(NamedTuple):
    """What the benchmark comes to."""

    facts: dict[str, str | int]
    rows: list[Measured]

    def missed(self) -> list[str]:
        return [f"{row.part}: {row.case}" for row in self.rows if not row.met]

    def text(self) -> str:
        lines = [("part", "case", "value", "unit", "target", "")]
        for row in self.rows:
            target = "" if row.target is None else f"≤ {row.target:g}"
            verdict = "" if row.target is None else "met" if row.met else "MISSED"
            lines.append((row.part, row.case, f"{row.value:.2f}", row.unit, target, verdict))
        return f"size: {', '.join(f'{k} {v}' for k, v in self.facts.items())}\n{columns(lines)}"

    def json(self) -> str:
        rows = [{**row._asdict(), "met": row.met} for row in self.rows]
        return json.dumps({"bench": "size", **self.facts, "rows": rows}, indent=2)


# --- codings ------------------------------------------------------------------------------------------

CODINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "bf16": {},
    "fp16": {},
    "bf16, feedback": {"name": "bf16", "feedback": True},
    "signsgd": {},
    "signsgd, feedback": {"name": "signsgd", "feedback": True},
    "topk 1 %": {"name": "topk"},
    "topk 1 %, feedback": {"name": "topk", "feedback": True},
    "topk 1 %, coded": {"name": "topk", "indices": "coded"},
    "randomk 1 %": {"name": "randomk"},
    "rtopk 1 %": {"name": "rtopk"},
    "prune 10 %": {"name": "prune", "keep": 0.1, "inner": {"name": "topk"}},
    "qsgd": {},
    "blockwise": {},
    "blockwise, NF4": {"name": "blockwise", "bits": 4, "levels": "normal"},
    "powersgd": {"name": "powersgd", "rank": 2},
    "powersgd, feedback": {"name": "powersgd", "rank": 2, "feedback": True},
    "lookback": {},
    "intrinsic": {"name": "intrinsic", "dim": 1 << 16},
    "intrinsic, hashed": {"name": "intrinsic", "dim": 1 << 16, "matrix": "hashed"},
    "fetchsgd": {"name": "fetchsgd", "rows": 5, "columns": 1 << 16, "k": 1 << 14},
}
"""By label; atomo's decompositions are of single layers, not of a long vector."""


def least(work: Work, turns: int, clock: Callable[[], float] = time.thread_time) -> float:
    """The least seconds of so many turns."""
    found = []
    for _ in range(turns):
        begin = clock()
        work()
        found.append(clock() - begin)
    return min(found)


def peak(work: Work) -> int | None:
    """Bytes that this process holds at most while ``work`` runs, over what it holds before; None but on Linux."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what was freed and is kept for the next vector counts again
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the largest size starts afresh
    except OSError:
        return None
    before = _resident("VmRSS")
    result = work()
    after = _resident("VmHWM")
    del result
    return max(0, after - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def works(third: Third, g_CD: Tensor) -> dict[str, Work]:
    """A round's encoding, decoding and server."""

    def encode() -> object:
        return [one.codec.compress(g_CD, third.senders, one.ctx) for one in third.passes]

    def decode() -> object:
        return [
            one.codec.decompress(one.message, believed(one.codec, third.senders), one.ctx)
            for one in third.passes
        ]

    return {"encode": encode, "decode": decode, "server": partial(finished, third.method, third.passes)}


def options_of(label: str) -> dict[str, Any]:
    return {"name": label, **CODINGS[label]}


def _codings(size: int, turns: int) -> Iterator[Measured]:
    rows = max(1, size >> 10)
    spec = Spec(("matrix",), ((rows, 1 << 10),))
    noise = random.normal(random.key(0, stream="bench"), 1 << 20)
    g_CD = noise.repeat(-(-spec.size // len(noise)))[: spec.size][None].clone()
    copy_CD = g_CD.clone()
    targets = {"encode": _ENCODE, "decode": _DECODE, "server": _SERVER}
    for label in CODINGS:
        third = third_round(options_of(label), spec, g_CD)
        copy = partial(copy_CD.copy_, g_CD)
        for what, work in works(third, g_CD).items():
            ratio = least(work, turns) / least(copy, turns + 2)
            target = 16.0 if what == "server" and label.startswith("intrinsic") else targets[what]
            yield Measured("codings", f"{label}: {what}", ratio, "memcpy", target)
            if (held := peak(work)) is not None:
                yield Measured("codings", f"{label}: {what}, peak", held / (4 * spec.size), "D", _PEAK)
        del third


# --- downloads ----------------------------------------------------------------------------------------


def _downloads(size: int, turns: int) -> Iterator[Measured]:
    """Bytes of the downloads of 17 versions of a sparse method's model, against making one of them."""
    spec = Spec(("vector",), ((size,),))
    third = third_round(options_of("topk 1 %"), spec, torch.randn(1, size))
    server, state = third.method.server, finished(third.method, third.passes)
    state["changed"] = torch.randint(0, 18, (size,), dtype=torch.int32)
    state["version"] = torch.tensor(17)
    sized = least(lambda: server.sizes(state, range(17)), turns)
    made = least(lambda: [server.download(state, seen) for seen in range(17)], 1)
    yield Measured("downloads", "sizes of 17 versions", sized / made, "of making them", 0.05)


# --- rounds -------------------------------------------------------------------------------------------


class ByHand:
    """The engine's rounds as one would write them for one experiment: a model, its gradients, and the method."""

    def __init__(self, like: Simulation, k: int | None) -> None:
        """Args: k: values that clients send, with error feedback; None: all."""
        self.config, self.model, self.k = like.config, like.trainer.model, k
        self.data, self.parts = like.data.train, like.partition
        self.theta_D = like.replica.parameters().clone()
        self.views = like.spec.views(self.theta_D)
        self.grads = {name: torch.zeros_like(view) for name, view in self.views.items()}
        self.residuals: dict[int, Tensor] = {}

    def rounds(self, count: int) -> None:
        config = self.config
        for _ in range(count):
            mean_D = torch.zeros_like(self.theta_D)
            cohort = torch.randperm(config.clients)[: config.cohort_size].tolist()
            for client in cohort:
                x_D = self.theta_D.clone()
                parameters = like_views(x_D, self.views)
                index_N = self.parts.of(client)
                for _step in range(config.local.steps or 1):
                    batch = index_N[torch.randperm(len(index_N))[: config.local.batch]]
                    for p in parameters.values():
                        p.requires_grad_(True)
                    out = torch.func.functional_call(self.model, parameters, (self.data.x[batch],))
                    loss = F.cross_entropy(out, self.data.y[batch])
                    grads = torch.autograd.grad(loss, list(parameters.values()))
                    with torch.no_grad():
                        for p, g in zip(parameters.values(), grads, strict=True):
                            p.sub_(g, alpha=config.local.lr)
                self._send(mean_D, (self.theta_D - x_D).div_(config.local.lr), client, 1 / len(cohort))
            self.theta_D.sub_(mean_D, alpha=config.local.lr)

    def _send(self, mean_D: Tensor, g_D: Tensor, client: int, weight: float) -> None:
        if self.k is None:
            mean_D.add_(g_D, alpha=weight)
            return
        p_D = g_D.add_(self.residuals[client]) if client in self.residuals else g_D
        index_K = p_D.abs().topk(self.k, sorted=False).indices
        mean_D.index_add_(0, index_K, p_D[index_K], alpha=weight)
        self.residuals[client] = p_D.index_fill_(0, index_K, 0)


def like_views(x_D: Tensor, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves in x's memory, one after the other as those."""
    parts = x_D.split([view.numel() for view in views.values()])
    return {name: part.view(view.shape) for (name, view), part in zip(views.items(), parts, strict=True)}


_MODELS: dict[str, tuple[Any, list[int], int]] = {
    "ResNet-9": ("resnet9", [3, 32, 32], 8),
    "resnet18": ("resnet18", [3, 32, 32], 4),
}


def _rounds(turns: int) -> Iterator[Measured]:
    methods = {"dense": {"name": "dense"}, "topk 1 %, feedback": {"name": "topk", "feedback": True}}
    for label, (model, shape, batch) in _MODELS.items():
        for how, method in methods.items():
            engine = simulation(40, 16, 4, {"steps": 1, "batch": batch}, shape, model=model, method=method)
            k = max(1, round(0.01 * engine.spec.size)) if how != "dense" else None
            ours, bare = Engine(engine), ByHand(engine, k)
            for one in (ours, bare):
                one.rounds(1)
            seconds = [[least(partial(one.rounds, 1), 1) for one in (ours, bare)] for _ in range(turns)]
            ratio = min(own for own, _ in seconds) / min(by_hand for _, by_hand in seconds)
            yield Measured("rounds", f"{label}, {how}", ratio, "of a loop by hand", 1.0)


# --- hooks and start-up -------------------------------------------------------------------------------


def _hooks(turns: int) -> Iterator[Measured]:
    took = hooks.run(turns)
    against = {"bf16": ("bf16", 1.2), "signsgd": ("bf16", 1.2), "powersgd": ("PowerSGD", 0.5)}
    for name in hooks.OURS:
        reference, target = against.get(name, ("bf16", None))
        value = took[name] / took[f"torch: {reference}"]
        yield Measured("hooks", f"{name}, 11 M", value, f"CPU of torch's {reference}", target)


def _start(turns: int) -> Iterator[Measured]:
    base = [sys.executable, "-c", "import torch; from mpi4py import MPI"]
    run = [sys.executable, "-c", _TRIVIAL]
    value = least(partial(subprocess.run, run, check=True), turns, _children) / least(
        partial(subprocess.run, base, check=True), turns, _children
    )
    yield Measured("start", "a run of one round", value, "CPU of importing torch and mpi4py", 1.25)


_TRIVIAL = """
from fedmpi.bench.rounds import Engine, simulation
Engine(simulation(4, 8, 4, {"steps": 1}, model="linear", method="dense")).rounds(1)
"""


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(log2: int = 27, turns: int = 5, parts: tuple[str, ...] = PARTS) -> Sizes:
    """Measure these parts, codings at 2^log2 parameters, on one thread.

    Raises:
      ConfigError: the memory would not do.
    """
    from os import sysconf

    need, there = _COPIES * 4 << log2, sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    if need > there:
        raise ConfigError(
            f"--size: 2^{log2} numbers need about {need >> 20} MiB of memory, there are {there >> 20}"
        )
    torch.set_num_threads(1)
    size = 1 << log2
    made: dict[str, Callable[[], Iterator[Measured]]] = {
        "codings": partial(_codings, size, turns),
        "downloads": partial(_downloads, min(size, 1 << 23), turns),
        "rounds": partial(_rounds, turns),
        "hooks": partial(_hooks, turns),
        "start": partial(_start, turns),
    }
    rows = [row for part in parts for row in made[part]()]
    return Sizes({"parameters": f"2^{log2}", "threads": 1, "turns": turns}, rows)
