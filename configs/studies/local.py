"""Loss and bytes of step-wise data-parallel training against local updates, on the byte-level GPT of a configuration.

Every case is a plain torch job of W ranks (threads of this process) with torch's AdamW, clipping, and a rate that rises
over the first sixth of the steps and falls by a cosine to a tenth; ranks have shares of the same text, and the same
batches in every case. What differs is the drop-in: :func:`fedmpi.sync` averages gradients in every step,
:func:`fedmpi.local_sgd` the model once in H. Rates are tuned on the first seed, and what is compared are other seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

import fedmpi
from fedmpi import random
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.config import Config, load
from fedmpi.errors import ConfigError
from fedmpi.tasks import data as tasks
from fedmpi.tasks.dataset import Data
from fedmpi.tasks.models import build
from fedmpi.tasks.objectives import Objective, make
from fedmpi.tasks.partitions import divide

TUNED = 0
"""The seed on which rates are chosen."""


class Case(NamedTuple):
    """One way of averaging.

    Attributes:
      method: of what is averaged: gradients, or with ``outer`` how far ranks came in H steps.
      outer: of :func:`fedmpi.local_sgd`; None: gradients in every step.
    """

    method: Any
    outer: dict[str, Any] | None = None


_DILOCO = {"outer": "nesterov", "lr": 0.7, "beta1": 0.9}
CASES: dict[str, Case] = {
    "DDP": Case("dense"),
    "DiLoCo": Case("dense", _DILOCO),
    "DiLoCo, qsgd 4": Case({"name": "qsgd", "bits": 4}, _DILOCO),
    "DiLoCo, blockwise 4": Case({"name": "blockwise", "bits": 4}, _DILOCO),
    # With error feedback the outer momentum is left out: what arrives late is counted once as it is.
    "local AdamW, topk 5 %": Case(
        {"name": "topk", "ratio": 0.05, "feedback": True}, {"outer": "sgd", "lr": 1.0}
    ),
}
REFERENCE = "DDP"
RATES = (0.0015, 0.003, 0.006, 0.012)


class Task(NamedTuple):
    """What all cases have in common."""

    path: str  # the configuration's
    config: Config
    data: Data
    ranks: int
    steps: int
    every: int

    @property
    def objective(self) -> Objective:
        return make(self.config.loss.name, self.config.loss.options, self.data)

    @classmethod
    def of(cls, path: str, ranks: int, steps: int, every: int) -> Task:
        """
        Raises:
          ConfigError: the last step would not be one that synchronises.
        """
        if steps % every:
            raise ConfigError(f"--steps: expected a multiple of --every, which is {every}, got {steps}")
        config = load(path)
        return cls(path, config, tasks.load(config.data.name, **config.data.options), ranks, steps, every)


def train(task: Task, case: Case, rate: float, seed: int) -> dict[str, float]:
    """The test loss after the last step, and the bytes that a rank sent."""
    return run_ranks(task.ranks, lambda comm: _train(task, case, rate, seed, comm), timeout=3600)[0]


def _train(task: Task, case: Case, rate: float, seed: int, comm: Comm) -> dict[str, float]:
    config, local, split = task.config, task.config.local, task.data.train
    loss = task.objective.loss
    key = random.key(seed, stream="model")
    net = build(config.model.name, task.data.shape, task.data.classes, key, **config.model.options)
    optimizer = torch.optim.AdamW(
        net.parameters(),
        lr=rate,
        betas=(local.beta1, local.beta2),
        eps=local.epsilon,
        weight_decay=local.weight_decay,
    )
    shares = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _share(n, task.steps))
    average: Callable[[], None] = lambda: None  # noqa: E731 - no step's own
    job: Any
    if case.outer is None:
        job = average = fedmpi.sync(net, case.method, comm=comm)
    else:
        job = fedmpi.local_sgd(net, optimizer, case.method, every=task.every, comm=comm, **case.outer)
    index = divide("iid", split, task.ranks, seed).of(comm.rank)
    batch = local.batch or len(index)
    order = index[random.permutation(random.key(seed, client=comm.rank, stream="order"), len(index))]
    for n in range(task.steps):
        chosen = order[torch.arange(n * batch, (n + 1) * batch) % len(order)]
        optimizer.zero_grad()
        loss(net(split.x[chosen]), split.y[chosen]).backward()
        average()
        if local.clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), local.clip)
        optimizer.step()
        shares.step()
    if comm.rank:
        return {}
    return {"loss": _test(task, net), "bytes": job.stats()["payload_bytes"]}


def _share(n: int, steps: int) -> float:
    """Of the rate, in step ``n``."""
    return min(1.0, (n + 1) / (steps // 6)) * (0.1 + 0.45 * (1 + math.cos(math.pi * n / steps)))


@torch.no_grad()
def _test(task: Task, net: torch.nn.Module) -> float:
    """Nats a byte, over the whole test set."""
    split, objective, total = task.data.test, task.objective, 0.0
    net.eval()
    for rows in torch.arange(len(split.y)).split(task.config.test_batch):
        x, y = split.x[rows], split.y[rows]
        total += float(objective.loss(net(x), y)) * objective.count(y)
    return total / objective.count(split.y)


class Study:
    """Runs that are done, and those that are still to do; a :class:`fedmpi.bench.commands.Outcome`.

    Args:
      rates: those that are tried on the first seed; a single one is taken as it is.
      path: the file of the runs, which are added to it one by one; None: they are kept in memory.
    """

    def __init__(self, task: Task, seeds: Sequence[int], rates: Sequence[float], path: Path | None) -> None:
        self.task, self.seeds, self.rates, self._path = task, seeds, sorted(rates), path
        self.about = {
            "config": task.path,
            "data": task.data.name,
            "ranks": task.ranks,
            "steps": task.steps,
            "every": task.every,
            "rates": self.rates,
            "tuned on seed": TUNED if len(self.rates) > 1 else None,
        }
        self.runs: list[dict[str, Any]] = []
        if path is not None and path.exists():
            saved = json.loads(path.read_text())
            if saved["about"] != self.about:
                raise ConfigError(
                    f"--out: {path} has the runs of another study, {saved['about']}; take another folder"
                )
            self.runs = saved["runs"]

    def run(self, say: Callable[[str], None], cases: Sequence[str]) -> None:
        """All of these cases: every rate on the first seed, then the best one on the others."""
        for name in cases if len(self.rates) > 1 else ():
            for rate in self.rates:
                self._one(name, rate, TUNED, say)
        for seed in self.seeds:
            for name in cases:
                self._one(name, self.rate(name), seed, say)

    def _one(self, name: str, rate: float, seed: int, say: Callable[[str], None]) -> None:
        which = {"case": name, "rate": rate, "seed": seed}
        if any(which.items() <= run.items() for run in self.runs):
            return
        found = train(self.task, CASES[name], rate, seed)
        self.runs.append({**which, **found})
        say(f"{name}, rate {rate:g}, seed {seed}: loss {found['loss']:.4f}, {found['bytes']:,} bytes")
        if self._path is not None:
            self._path.write_text(self.json() + "\n")

    def rate(self, name: str) -> float:
        """The best on the first seed; NaN and infinite losses are the worst."""
        if len(self.rates) == 1:
            return self.rates[0]
        tried: dict[float, float] = {
            run["rate"]: run["loss"] for run in self.runs if (run["case"], run["seed"]) == (name, TUNED)
        }
        return min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)

    def compared(self, name: str) -> list[dict[str, Any]]:
        """The runs of the chosen rate, by seed, none of them the one that it was chosen on."""
        own = [run for run in self.runs if run["case"] == name and run["seed"] in self.seeds]
        return sorted((run for run in own if run["rate"] == self.rate(name)), key=lambda run: run["seed"])

    def text(self) -> str:
        """The table, in Markdown."""
        lines = [
            "| case | rate | test loss, nats a byte | against DDP, seed by seed | MB a rank | fewer bytes |",
            "|:--|--:|--:|--:|--:|--:|",
        ]
        reference = {run["seed"]: run for run in self.compared(REFERENCE)}
        for name in CASES:
            if not (runs := self.compared(name)):
                continue
            losses, sent = [run["loss"] for run in runs], mean(run["bytes"] for run in runs)
            more = [
                run["loss"] / reference[run["seed"]]["loss"] - 1 for run in runs if run["seed"] in reference
            ]
            edge = (
                " (edge)"
                if self.rate(name) in (self.rates[0], self.rates[-1]) and len(self.rates) > 1
                else ""
            )
            cells = [
                name,
                f"{self.rate(name):g}{edge}",
                _spread(losses, "{:.3f}"),
                "–" if name == REFERENCE or not more else _spread(more, "{:+.1%}"),
                f"{sent / 1e6:.3f}",
                f"{mean(run['bytes'] for run in reference.values()) / sent:.0f}x" if reference else "–",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps({"about": self.about, "runs": self.runs}, indent=1)

    def missed(self) -> list[str]:
        return []


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(mean(values))} ({form.format(min(values))} … {form.format(max(values))})"
