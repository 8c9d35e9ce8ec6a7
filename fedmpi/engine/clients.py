"""Which clients take part in a round, and where they train."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.config import Config
from fedmpi.tasks.partitions import Partition


def cohort(config: Config, partition: Partition, t: int) -> Tensor:
    """The clients of round t, int64, increasing: a function of the seed and the round alone."""
    size, clients = config.cohort_size, config.clients
    if size == clients and not (config.sampling == "poisson" and config.cohort not in (None, 1.0, clients)):
        return torch.arange(clients)
    key = random.key(config.seed, t, -1, "cohort")
    if config.sampling == "uniform":
        chosen = random.sample(key, clients, size)
    elif config.sampling == "weighted":
        chosen = _by_samples(key, partition, size)
    elif config.sampling == "poisson":
        share = config.cohort if isinstance(config.cohort, float) else size / clients
        chosen = (random.uniform(key, clients) < share).nonzero()[:, 0]
    elif config.sampling == "round_robin":
        chosen = (torch.arange(size) + t * size) % clients
    else:
        epoch, turn = divmod(t, config.rounds_per_epoch)
        key, first = random.key(config.seed, epoch, -1, "cohort"), turn * size
        chosen = random.sample(key, clients, min(size, clients - first), start=first)
    return chosen.sort().values


def _by_samples(key: int, partition: Partition, size: int) -> Tensor:
    """``size`` different clients, one after the other with chances proportional to their samples: owners of
    samples in random order, of which only so many are drawn as name enough owners. Who has no sample comes last,
    in order. In integers, so that the draw is the same on every machine."""
    samples, drawn = int(partition.offset[-1]), 2 * size
    while True:
        drawn = min(2 * drawn, samples)
        order = random.sample(key, samples, drawn)
        owners, index = (torch.searchsorted(partition.offset, order, right=True) - 1).unique(
            return_inverse=True
        )
        if len(owners) >= size or drawn == samples:
            break
    first = torch.full((len(owners),), drawn).scatter_reduce_(0, index, torch.arange(drawn), "amin")
    chosen: Tensor = owners[first.argsort(stable=True)][:size]
    if len(chosen) < size:
        chosen = torch.cat([chosen, (partition.sizes == 0).nonzero()[: size - len(chosen), 0]])
    return chosen


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
    if len(ranks) == 1:
        return {ranks[0]: torch.arange(len(clients))}
    load = [(0, rank) for rank in ranks]
    positions: dict[int, list[int]] = {rank: [] for rank in ranks}
    for position in work.argsort(descending=True, stable=True).tolist():
        done, rank = heapq.heappop(load)
        positions[rank].append(position)
        heapq.heappush(load, (done + int(work[position]), rank))
    return {rank: torch.tensor(sorted(p), dtype=torch.int64) for rank, p in positions.items()}
