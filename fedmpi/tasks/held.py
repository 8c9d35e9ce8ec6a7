"""What clients are tested on themselves: a share of their samples, or the test set's samples of their own groups.

Shape suffix: N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.tasks.dataset import Data
from fedmpi.tasks.partitions import Partition


def hold_out(partition: Partition, share: float) -> tuple[Partition, Partition]:
    """What clients train with, and what each holds out for its own tests: ⌊share · n⌋ of its n samples, at random."""
    sizes = partition.sizes
    held = (sizes * share + 1e-9).long()
    owner_N = torch.arange(partition.clients).repeat_interleave(sizes)
    place_N = torch.arange(len(partition.index_N)) - partition.offset[owner_N]
    out_N = place_N >= (sizes - held)[owner_N]
    return (
        Partition(partition.index_N[~out_N], _offset(sizes - held)),
        Partition(partition.index_N[out_N], _offset(held)),
    )


def by_group(partition: Partition, data: Data) -> Partition:
    """Of each client the test samples of the groups (users, writers) that it trains with; those of others are nobody's.

    Raises:
      ConfigError: the data name no groups of test samples, several clients share one, or no client has any there.
    """
    title, train, test = "client_test: groups", data.train.groups, data.test.groups
    if train is None or test is None:
        raise ConfigError(
            f"{title}: expected data that say whose each sample of both sets is (leaf, femnist, csv with data.group, "
            f"your own), {data.name} does not; expected a share of clients' samples otherwise (0.2, say)"
        )
    owner_N = torch.empty_like(partition.index_N)
    owner_N[partition.index_N] = torch.arange(partition.clients).repeat_interleave(partition.sizes)
    names, of_N = torch.unique(torch.cat([train, test]), return_inverse=True)
    client = torch.full((len(names),), -1).scatter_reduce_(0, of_N[: len(train)], owner_N, "amax")
    least = torch.full((len(names),), partition.clients).scatter_reduce_(
        0, of_N[: len(train)], owner_N, "amin"
    )
    if len(shared := ((client >= 0) & (client != least)).nonzero()[:, 0]):
        raise ConfigError(
            f"{title}: expected partition: natural, which keeps each group with one client; clients "
            f"{int(least[shared[0]])} and {int(client[shared[0]])} share a group"
        )
    test_N = client[of_N[len(train) :]]
    index_N = test_N.argsort(stable=True)[int((test_N < 0).sum()) :]
    if not len(index_N):
        raise ConfigError(f"{title}: expected groups that are in both sets, {data.name} has none")
    return Partition(index_N, _offset(test_N[test_N >= 0].bincount(minlength=partition.clients)))


def _offset(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
