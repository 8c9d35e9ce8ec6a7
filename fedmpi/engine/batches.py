"""Which samples several clients see in each of their local steps.

Shape suffixes: C clients, B samples of a step, N samples of the largest client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.engine.device import Samples
from fedmpi.local import Local
from fedmpi.tasks.dataset import IGNORE
from fedmpi.tasks.partitions import Partition

_ORDERED = 1 << 22  # places of samples that are shuffled at once


def padded(n: int) -> int:
    """``n`` or up to a quarter more: four values an octave, so that there are few shapes."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


class Step(NamedTuple):
    """The samples of several clients' step.

    Attributes:
      index_CB: int64, rows that end with samples that do not count where a client has fewer than B.
      count_C: int64, how many count.
    """

    index_CB: Tensor
    count_C: Tensor

    def first(self, rows: int) -> Step:
        """Those of the first ``rows`` clients, with more of the last client's at the end if there are not so many."""
        which = torch.arange(rows).clamp(max=len(self.count_C) - 1)
        return Step(self.index_CB[which], self.count_C[which])

    def of(self, data: Samples) -> tuple[Tensor, Tensor]:
        """Inputs and targets, ``(C, B, …)``; targets that do not count are IGNORE."""
        width, (x_CB, y_CB) = self.index_CB.shape[1], data.take(self.index_CB)
        if int(self.count_C.min()) < width:
            beyond_CB = (torch.arange(width) >= self.count_C[:, None]).to(y_CB.device)
            y_CB.masked_fill_(beyond_CB.view(*beyond_CB.shape, *[1] * (y_CB.ndim - 2)), IGNORE)
        return x_CB, y_CB


class Batches:
    """The steps of ``clients_C`` in a round. Each client's samples are shuffled with a key of its own before each pass
    over them, unless a step takes all: the same as :meth:`Trainer._batch` gives for one client."""

    def __init__(
        self, seed: int, partition: Partition, clients_C: Tensor, round: int, batch: int | None
    ) -> None:
        self._seed, self._clients_C, self._round, self._batch = seed, clients_C, round, batch
        self.sizes_C = partition.sizes_of(clients_C)
        self.batch_C = self.sizes_C if batch is None else self.sizes_C.clamp(max=batch)
        self._turns_C = -(-self.sizes_C // self.batch_C)
        self._equal = int(self.sizes_C.min()) == int(self.sizes_C.max())
        self._own_CN = partition.rows(clients_C)
        self._order_CN = self._own_CN.clone()

    def step(self, step: int, clients: int) -> Step:
        """The first ``clients``' samples of the step of this number; to be called for one after the other, with
        ever fewer clients."""
        if self._equal:  # the same as below, with less to do
            passes, turn = divmod(step, int(self._turns_C[0]))
            if turn == 0 and int(self._turns_C[0]) > 1:
                self._shuffle(torch.arange(clients), passes)
            width = int(self.batch_C[0])
            index_CB = self._order_CN[:clients, turn * width : (turn + 1) * width].clone()
            return Step(index_CB, torch.full((clients,), index_CB.shape[1]))
        turn_C = step % self._turns_C[:clients]
        fresh = ((turn_C == 0) & (self._turns_C[:clients] > 1)).nonzero()[:, 0]
        for passes in (step // self._turns_C[fresh]).unique().tolist():
            self._shuffle(fresh[step // self._turns_C[fresh] == passes], passes)
        batch_C, sizes_C = self.batch_C[:clients], self.sizes_C[:clients]
        count_C = torch.minimum(batch_C, sizes_C - turn_C * batch_C)
        most = int(count_C.max())
        alike = int(count_C.min()) == most
        width = most if alike else self._batch or padded(most)
        place_CB = (turn_C * batch_C)[:, None] + torch.arange(width)
        last_C1 = (sizes_C - 1)[:, None]
        return Step(self._order_CN[:clients].gather(1, torch.minimum(place_CB, last_C1)), count_C)

    def _shuffle(self, rows: Tensor, passes: int) -> None:
        """Before these clients' pass of this number."""
        keys_C = random.keys(self._seed, self._round, self._clients_C[rows], f"batches {passes}")
        order_CN = random.permutations(keys_C, self.sizes_C[rows])
        self._order_CN[rows, : order_CN.shape[1]] = self._own_CN[rows].gather(1, order_CN)


class Orders:
    """Which samples one client sees in a step: shuffled afresh for every pass over its own.

    Args:
      continuing: passes go on from round to round, with equally many steps in each.
    """

    def __init__(self, seed: int, local: Local, continuing: bool) -> None:
        self._seed, self._local, self._continuing = seed, local, continuing
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def batch(self, index: Tensor, batch: int, client: int, round: int, step: int) -> Tensor:
        """The samples of a step, of a client's own ``index``."""
        if batch == len(index):
            return index
        turns = -(-len(index) // batch)
        if self._continuing:
            round, turn = divmod(round * (self._local.steps or 1) + step, turns)
            shuffle = 0
        else:
            shuffle, turn = divmod(step, turns)
        key = random.key(self._seed, round, client, f"batches {shuffle}")
        if self._orders.get(client, (None,))[0] != key:
            self._orders[client] = key, index[random.permutation(key, len(index))]
        return self._orders[client][1][turn * batch : (turn + 1) * batch]

    def prepare(self, partition: Partition, clients_C: Tensor, sizes_C: Tensor, round: int) -> None:
        """Shuffle for these clients' first pass at once: one after the other, that takes a tenth of a small model's
        training."""
        if self._continuing:
            return
        several_C = sizes_C > (self._local.batch or sizes_C.max())
        clients, sizes = clients_C[several_C], sizes_C[several_C]
        self._orders = {}
        if not len(clients) or len(clients) * int(sizes.max()) > _ORDERED:
            return
        keys = random.keys(self._seed, round, clients, "batches 0")
        order_CN = random.permutations(keys, sizes)
        for client, key, order_N in zip(clients.tolist(), keys.tolist(), order_CN, strict=True):
            index = partition.of(client)
            self._orders[client] = key, index[order_N[: len(index)]]


def alike(batch_C: Tensor, samples: int, pads: bool) -> Iterator[Tensor]:
    """Positions of clients whose steps take equally many samples, all of them, in parts of about ``samples``; with
    ``pads`` (samples can be left out) also of those that come to as many when they are padded."""
    order = batch_C.argsort(stable=True)
    while len(order):
        least = int(batch_C[order[0]])
        rows = order[: max(1, samples // least)]
        rows = rows[batch_C[rows] <= (padded(least) if pads else least)]
        yield rows
        order = order[len(rows) :]


def local_steps(local: Local, sizes: Tensor) -> Tensor:
    """τ of clients with so many samples (int64), the same shape; 0 for none."""
    if local.steps or not local.epochs:
        steps = torch.full_like(sizes, local.steps or 1)
    else:
        batch = sizes.clamp(min=1) if local.batch is None else local.batch
        steps = local.epochs * -(-sizes // batch)
    return steps.where(sizes > 0, 0)


def work(local: Local, sizes: Tensor) -> Tensor:
    """Samples that clients of these sizes (int64) go through in a round, the same shape."""
    batch = sizes if local.batch is None else sizes.clamp(max=local.batch)
    return batch * local_steps(local, sizes)
