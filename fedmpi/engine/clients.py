"""Which clients take part in a round, and where they train."""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from fedmpi import own, random
from fedmpi.choice import Choice
from fedmpi.config import Config
from fedmpi.engine.draws import generators, seed_all
from fedmpi.errors import ConfigError
from fedmpi.tasks.partitions import Partition

USAGE = "sample(round: int, clients: int, cohort: int, sizes, seed: int, **options) -> different clients"


def cohort(config: Config, partition: Partition, t: int) -> Tensor:
    """The clients of round t, int64, increasing: a function of the seed and the round alone.

    Raises:
      ConfigError: the user's own sampling fails.
    """
    if config.own_sampling is not None:
        return _own_cohort(config.own_sampling, config, partition, t)
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


def check_sampling(config: Config, partition: Partition) -> None:
    """Raises:
    ConfigError: the user's own sampling gives another cohort when it is asked again.
    """
    if config.own_sampling is None:
        return
    first, again = (cohort(config, partition, 0) for _ in range(2))
    if not torch.equal(first, again):
        raise ConfigError(
            f"sampling: {config.own_sampling.name} gives another cohort when it is asked for round 0 again; expected a "
            "function of its arguments alone: no state, no generator of its own without a seed"
        )


def _own_cohort(own_sampling: Choice, config: Config, partition: Partition, t: int) -> Tensor:
    """By a user's function, while all generators stand at a key of the round."""
    path, options = own_sampling.name, own_sampling.options
    arguments = t, config.clients, config.cohort_size, partition.sizes, config.seed
    with generators(True):
        seed_all(random.key(config.seed, t, -1, "cohort"))
        found = own.call("sampling.name", path, *arguments, options=options, usage=USAGE)
    try:
        ids = found if isinstance(found, Tensor) else torch.as_tensor(np.asarray([*found]))
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"sampling.name: {path} returned a {type(found).__name__}, expected {USAGE}"
        ) from None
    ids = ids.long() if not len(ids) else ids
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(
            f"sampling.name: {path} returned shape {tuple(ids.shape)} of {ids.dtype}, expected {USAGE}"
        )
    ids = ids.long()
    if len(wrong := ids[(ids < 0) | (ids >= config.clients)]):
        raise ConfigError(
            f"sampling.name: {path}: expected clients from 0 to {config.clients - 1}, got {int(wrong[0])}"
        )
    values, counts = torch.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise ConfigError(
            f"sampling.name: {path}: expected each client once, got {int(values[counts.argmax()])} "
            f"{int(counts.max())} times"
        )
    called: Tensor = values
    return called


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
