"""``fedmpi bench rounds``: rounds of the engine against a bare torch loop that does the same mathematics, and cohorts
of one step against their clients one after the other.

The bare loop is what one would write for a single experiment: a model, its gradients, and nothing around them (no
messages, no bytes counted, no other methods, no ranks). Evaluation is left out of both.

Shape suffixes: N samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fedmpi import config, random
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.tasks.data import Data, Split

_CLIENTS, _SAMPLES, _COHORT, _BATCH = 1000, 60, 10, 10
_LR = 0.05


def images(samples: int, side: int = 28) -> Data:
    """Random images of one channel with random classes, 10 of them."""
    x = random.uniform(random.key(0, stream="images"), samples * side * side).view(samples, 1, side, side)
    train = Split(x, random.integers(random.key(0, stream="classes"), samples, 10))
    return Data("random images", train, Split(train.x[:100], train.y[:100]), 10)


def simulation(clients: int, samples: int, cohort: int, local: dict[str, Any], **values: Any) -> Simulation:
    """The engine, ready for its first round."""
    data = {"name": "fedmpi.bench.rounds:images", "samples": clients * samples}
    base = {"data": data, "clients": clients, "cohort": cohort, "rounds": 1 << 20, "evaluate_every": 1 << 20}
    return Simulation(config.parse({**base, "threads": 1, "local": {"lr": _LR, **local}, **values}), solo())


def rounds(of: Simulation, count: int) -> None:
    """Go on for so many rounds."""
    for _ in range(count):
        of.round(of.next)
        of.next += 1


class Bare:
    """Federated averaging of one pass a client over its samples, as a plain loop."""

    def __init__(self, like: Simulation, count: int) -> None:
        self.model, self.data, self.parts = like.trainer.model, like.data.train, like.partition
        self.parameters = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.count = count

    def __call__(self) -> None:
        model = _detached(self.model, self.parameters)
        start = [p.detach().clone() for p in model.parameters()]
        for _ in range(self.count):
            total = [torch.zeros_like(p) for p in start]
            for client in torch.randperm(_CLIENTS)[:_COHORT].tolist():
                for p, value in zip(model.parameters(), start, strict=True):
                    p.data.copy_(value)
                index_N = self.parts.of(client)
                for batch in index_N[torch.randperm(len(index_N))].split(_BATCH):
                    loss = F.cross_entropy(model(self.data.x[batch]), self.data.y[batch])
                    loss.backward()
                    with torch.no_grad():
                        for p in model.parameters():
                            p.sub_(p.grad, alpha=_LR)
                            p.grad = None
                for sums, p in zip(total, model.parameters(), strict=True):
                    sums.add_(p.data, alpha=1 / _COHORT)
            start = total
