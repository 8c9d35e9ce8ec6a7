"""``fedmpi bench rounds``: rounds of the engine against a bare torch loop that does the same mathematics, and cohorts
of one step against their clients one after the other.

The bare loop is what one would write for a single experiment: a model, its gradients, and nothing around them (no
messages, no bytes counted, no other methods, no ranks). Evaluation is left out of both.

Shape suffixes: N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fedmpi import config
from fedmpi.bench import synthetic
from fedmpi.bench.timing import Row, Table, measure, named, place
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.trainer import Trainer

_CLIENTS, _SAMPLES, _COHORT, _BATCH = 1000, 60, 10, 10
_LR = 0.05


class Bare:
    """Federated averaging of one pass a client over its samples, as a plain loop; for clients of one size. Buffers are
    averaged, too; of counters the largest counts."""

    def __init__(self, like: Simulation) -> None:
        self.config = like.config
        self.model = copy.deepcopy(like.trainer.model)
        start = like.spec.views(like.replica.parameters())
        for name, p in self.model.named_parameters():
            p.data, p.grad = start[name].clone(), None  # of their own, not views of the engine's vector
        device = like.replica.parameters().device
        self.x, self.y, self.parts = (
            like.data.train.x.to(device),
            like.data.train.y.to(device),
            like.partition,
        )
        self.theta = [p.detach().clone() for p in self.model.parameters()]
        self.buffers = [b.detach().clone() for b in self.model.buffers()]

    def rounds(self, count: int) -> None:
        config, parameters, buffers = self.config, list(self.model.parameters()), list(self.model.buffers())
        self.model.train()
        clients, cohort, batch, rate = config.clients, config.cohort_size, config.local.batch, config.local.lr
        for _ in range(count):
            mean, kept = [torch.zeros_like(p) for p in self.theta], [torch.zeros_like(b) for b in buffers]
            for client in torch.randperm(clients)[:cohort].tolist():
                with torch.no_grad():
                    for p, value in zip(parameters + buffers, self.theta + self.buffers, strict=True):
                        p.copy_(value)
                index_N = self.parts.of(client)
                for batch_B in index_N[torch.randperm(len(index_N))].split(batch):
                    F.cross_entropy(self.model(self.x[batch_B]), self.y[batch_B]).backward()
                    with torch.no_grad():
                        for p in parameters:
                            assert p.grad is not None
                            p.sub_(p.grad, alpha=rate)
                            p.grad.zero_()  # fresh memory would cost it more
                with torch.no_grad():
                    for sums, p in zip(mean, parameters, strict=True):
                        sums.add_(p, alpha=1 / cohort)
                    for sums, b in zip(kept, buffers, strict=True):
                        if b.is_floating_point():
                            sums.add_(b, alpha=1 / cohort)
                        else:
                            torch.maximum(sums, b, out=sums)
            self.theta, self.buffers = mean, kept


class Engine:
    """A simulation that goes on from where it is."""

    def __init__(self, of: Simulation) -> None:
        self.of, self.done = of, 0

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.of.round(self.done)
            self.done += 1


def simulation(
    clients: int,
    samples: int,
    cohort: int,
    local: dict[str, Any],
    shape: Sequence[int] = (1, 28, 28),
    **values: Any,
) -> Simulation:
    """The engine, with ``clients`` of so many random images each."""
    data = {"name": synthetic.PATH, "samples": clients * samples, "shape": list(shape)}
    base = {"data": data, "clients": clients, "cohort": cohort, "rounds": 1 << 20, "evaluate_every": 1 << 20}
    base |= {"device": "cpu", "threads": 1}
    return Simulation(config.parse({**base, "local": {"lr": _LR, **local}, **values}), solo())


def _epochs(model: str, target: float, rounds: int, repeats: int, device: torch.device) -> Row:
    """Dense federated averaging against the bare loop."""
    engine = simulation(
        _CLIENTS,
        _SAMPLES,
        _COHORT,
        {"epochs": 1, "batch": _BATCH},
        model=model,
        method="dense",
        device=str(device),
    )
    ours, bare = Engine(engine), Bare(engine)
    name = f"{model.rpartition(':')[2]}, {_CLIENTS} clients × {_SAMPLES} samples, cohort {_COHORT}, batch {_BATCH}"
    return measure(
        name, partial(ours.rounds, rounds), partial(bare.rounds, rounds), 1 / target, repeats, device
    )


def _one_step(
    model: str, method: dict[str, Any], target: float | None, repeats: int, device: torch.device
) -> Row:
    """A cohort of one step, pooled, against the same with each client by itself."""
    clients, samples = 100, 5
    pooled, single = (
        simulation(
            10 * clients, samples, clients, {"steps": 1}, model=model, method=method, device=str(device)
        )
        for _ in range(2)
    )
    single.trainer = Trainer(
        single.trainer.model, single.plan, single.measured.objective, single.config.local, single.config.seed
    )
    single.passes.trainer = single.trainer
    single.passes.observe = lambda sent: None  # which asks for single clients
    name = (
        f"{model}, {' '.join(map(str, method.values()))}, one step of {clients} clients × {samples} samples"
    )
    reference = partial(Engine(single).rounds, 1)
    return measure(name, partial(Engine(pooled).rounds, 1), reference, target and 1 / target, repeats, device)


def run(repeats: int = 5, device: str = "cpu") -> Table:
    """Time all cases, on one thread.

    Raises:
      ConfigError: no such device is here.
    """
    where = place(device)
    torch.set_num_threads(1)
    rows = [
        _epochs("linear", 1.3, 20, repeats, where),
        _epochs("cnn", 0.95, 1, repeats, where),
        _epochs(synthetic.NORM_CNN, 1 / 1.1, 1, repeats, where),
        _epochs(synthetic.NORM_MLP, 1 / 1.1, 10, repeats, where),
        _one_step("linear", {"name": "dense"}, 10, repeats, where),
        _one_step("fcn", {"name": "intrinsic", "dim": 1000}, 10, repeats, where),
        _one_step("cnn", {"name": "intrinsic", "dim": 1000}, None, repeats, where),
    ]
    facts: dict[str, str | int] = {"device": named(where), "threads": 1, "repeats": repeats}
    return Table("rounds", facts, "the bare loop, or one client after the other", rows)
