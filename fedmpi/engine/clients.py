"""Which clients take part, where they run, and how one trains.

Shape suffixes: C clients of a chunk, D parameters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmpi import random
from fedmpi.config import Config, Local
from fedmpi.engine.profile import phase
from fedmpi.spec import Spec
from fedmpi.tasks.data import Split
from fedmpi.tasks.partitions import Partition


def cohort(config: Config, partition: Partition, t: int) -> Tensor:
    """The clients of round t, int64, increasing: a function of the seed and the round alone."""
    size, clients = config.cohort_size, config.clients
    if size == clients:
        return torch.arange(clients)
    key = random.key(config.seed, t, -1, "cohort")
    if config.sampling == "uniform":
        chosen = random.sample(key, clients, size)
    elif config.sampling == "weighted":
        chosen = _by_samples(key, partition, size)
    elif config.sampling == "round_robin":
        chosen = (torch.arange(size) + t * size) % clients
    else:
        epoch, turn = divmod(t, config.rounds_per_epoch)
        order = random.permutation(random.key(config.seed, epoch, -1, "cohort"), clients)
        chosen = order[turn * size : (turn + 1) * size]
    return chosen.sort().values


def _by_samples(key: int, partition: Partition, size: int) -> Tensor:
    """``size`` different clients, one after the other with chances proportional to their samples: owners of
    samples in random order. In integers, so that the draw is the same on every machine."""
    samples = random.permutation(key, int(partition.offset[-1]))
    owners = torch.searchsorted(partition.offset, samples, right=True) - 1
    first = torch.full((partition.clients,), len(samples)).scatter_reduce_(
        0, owners, torch.arange(len(samples)), "amin"
    )
    return first.argsort(stable=True)[:size]


def survivors(config: Config, called: Tensor, t: int) -> Tensor:
    """Those of ``called`` whose message arrives. The others drop out after their download, and what they
    keep stays as it was. Somebody always answers: at least the client with the luckiest draw."""
    if not config.dropout or not len(called):
        return called
    draw = random.uniform(random.keys(config.seed, t, called, "dropout"), 1)[:, 0]
    return called[(draw >= config.dropout) | (draw == draw.max())]


def place(clients: Tensor, work: Tensor, ranks: list[int], homes: Tensor | None) -> dict[int, Tensor]:
    """Positions in ``clients`` that each rank trains.

    Args:
      clients: int64, their ids.
      work: what each costs, e.g. its samples.
      ranks: those that train.
      homes: the rank of each, where clients keep state and so always go to the same; else the longest goes first
        to the least loaded rank.
    """
    if homes is not None:
        return {rank: (homes == rank).nonzero()[:, 0] for rank in ranks}
    load = [(0, rank) for rank in ranks]
    positions: dict[int, list[int]] = {rank: [] for rank in ranks}
    for position in work.argsort(descending=True, stable=True).tolist():
        done, rank = heapq.heappop(load)
        positions[rank].append(position)
        heapq.heappush(load, (done + int(work[position]), rank))
    return {rank: torch.tensor(sorted(p), dtype=torch.int64) for rank, p in positions.items()}


class Update(NamedTuple):
    """What C clients computed: accumulated gradients, mean losses, local steps τ."""

    g_CD: Tensor
    loss_C: Tensor
    steps_C: Tensor

    def select(self, rows: Tensor) -> Update:
        """Those of the clients at the positions ``rows``; itself where these are all."""
        return self if len(rows) == len(self.g_CD) else Update(*(value[rows] for value in self))


class Trainer:
    """Local SGD, one client after the other, on one flat parameter vector.

    The accumulated gradient is the sum of the local steps' directions, as in LBGM's Algorithm 1
    (lines 3 and 4); for plain SGD it is (θ₀ − θ_τ)/η, and for one step it is the gradient to the bit.

    A client shuffles its samples afresh in every round, or, ``continuing`` (data-parallel training), goes on
    where it was: it sees each sample once before it sees one again.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        loss: Callable[[Tensor, Tensor], Tensor],
        local: Local,
        seed: int,
        continuing: bool = False,
    ) -> None:
        self.model, self.spec, self.loss, self.local, self.seed = model, spec, loss, local, seed
        self.continuing = continuing
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self.theta_D = torch.empty(spec.size)
        self.grad_D = torch.zeros(spec.size)
        spec.bind(model, self.theta_D, self.grad_D)

    def time(self, data: Split, batch: int, threads: int) -> float:
        """Seconds of a step on ``batch`` samples with so many threads: the best of a few."""
        torch.set_num_threads(threads)
        x, y = data.x[:batch], data.y[:batch]
        self.theta_D.zero_()
        seconds = []
        for _ in range(4):
            started = perf_counter()
            self.grad_D.zero_()
            self.loss(self.model(x), y).backward()
            seconds.append(perf_counter() - started)
        return min(seconds)

    def work(self, sizes: Tensor) -> Tensor:
        """Samples that clients of these sizes (int64) go through in a round, the same shape."""
        batch = sizes if self.local.batch is None else sizes.clamp(max=self.local.batch)
        steps = [self.steps(n) if n else 0 for n in sizes.tolist()]
        return batch * torch.tensor(steps, dtype=torch.int64)

    def steps(self, samples: int) -> int:
        """τ for a client with so many samples."""
        per_epoch = -(-samples // (self.local.batch or samples))
        return self.local.steps or (self.local.epochs or 0) * per_epoch or 1

    def train(
        self,
        theta_D: Tensor,
        data: Split,
        partition: Partition,
        clients_C: Tensor,
        round: int,
        frozen_D: Tensor | None = None,
    ) -> Update:
        """Train each of ``clients_C`` from ``theta_D``, whose entries ``frozen_D`` stay as they are."""
        g_CD = torch.zeros(len(clients_C), self.spec.size)
        losses, steps = [], []
        for row, client in enumerate(clients_C.tolist()):
            index = partition.of(client)
            losses.append(self._one(theta_D, g_CD[row], data, index, client, round, frozen_D))
            steps.append(self.steps(len(index)))
        return Update(g_CD, torch.tensor(losses, dtype=torch.float64), torch.tensor(steps))

    def alone(self, theta_D: Tensor, data: Split, index: Tensor) -> Tensor:
        """The accumulated gradient of somebody who is no client and has the samples ``index``."""
        g_D = torch.zeros_like(theta_D)
        self._one(theta_D, g_D, data, index, client=-1, round=0, frozen_D=None)
        return g_D

    def _one(
        self,
        theta_D: Tensor,
        g_D: Tensor,
        data: Split,
        index: Tensor,
        client: int,
        round: int,
        frozen_D: Tensor | None,
    ) -> float:
        n = len(index)
        batch = min(self.local.batch or n, n)
        self.theta_D.copy_(theta_D)
        self.model.train()
        velocity_D = torch.zeros_like(self.theta_D) if self.local.momentum else None
        total, seen = 0.0, 0
        for step in range(self.steps(n)):
            with phase("load"):
                chosen = self._batch(index, batch, client, round, step)
            self.grad_D.zero_()
            loss = self._backward(data, chosen)
            direction_D = self.grad_D
            if self.local.weight_decay:
                direction_D = direction_D.add(self.theta_D, alpha=self.local.weight_decay)
            if frozen_D is not None:
                direction_D = direction_D.masked_fill(frozen_D, 0)
            if velocity_D is not None:
                direction_D = velocity_D.mul_(self.local.momentum).add_(direction_D)
            g_D.add_(direction_D)
            self.theta_D.add_(direction_D, alpha=-self.local.lr)
            total += loss * len(chosen)
            seen += len(chosen)
        return total / seen

    def _batch(self, index: Tensor, batch: int, client: int, round: int, step: int) -> Tensor:
        """The samples of a step."""
        if batch == len(index):
            return index
        turns = -(-len(index) // batch)
        if self.continuing:  # one step a round
            round, turn = divmod(round, turns)
            shuffle = 0
        else:
            shuffle, turn = divmod(step, turns)
        key = random.key(self.seed, round, client, f"batches {shuffle}")
        if self._orders.get(client, (None,))[0] != key:
            if not self.continuing:
                self._orders.clear()
            self._orders[client] = key, index[random.permutation(key, len(index))]
        return self._orders[client][1][turn * batch : (turn + 1) * batch]

    def _backward(self, data: Split, chosen: Tensor) -> float:
        """Add the gradient of the samples' mean loss, in so many parts as asked for; returns the loss."""
        total = 0.0
        mixed = self.local.precision == "bfloat16"
        for part in chosen.chunk(self.local.accumulate):
            with phase("load"):
                x, y = data.x[part], data.y[part]
            with torch.autocast(self.theta_D.device.type, torch.bfloat16, enabled=mixed):
                loss = self.loss(self.model(x), y)
            share = len(part) / len(chosen)
            (loss if share == 1 else loss * share).backward()
            total += loss.item() * share
        return total
