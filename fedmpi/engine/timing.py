"""Simulated time: how long a round's clients take, who of them comes too late, and how long the round lasts.

A client takes download + compute + upload seconds:

    bytes · 8 / (Mb/s · 10^6 · b_c)  +  seconds a sample · samples · f_c · j_ct  +  bytes · 8 / (Mb/s · 10^6 · b_c)

with the factors b_c (its link), f_c (its processor) and j_ct (the round's own) log-normal around 1. Downloads are
measured. Whether a message comes in time is decided before it is made, so that nobody trains in vain: its bytes are
taken to be the run's mean so far (before the first message: that of its layout, or D float32 where sizes differ).
For a method whose messages have one size, that is exact. The round's length is that of the messages that really came.

All of it is the same on every rank: a function of the seed, the round and bytes that are summed over the ranks.

Shape suffix: C clients of a round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.comm.base import Comm
from fedmpi.engine.ledger import Ledger
from fedmpi.local import TimeConfig


class Clock:
    """One round at a time: :meth:`start`, then :meth:`in_time` after the downloads, :meth:`stop` after the uploads.

    Args:
      plan: the configuration's ``time``.
      seed: the run's.
      work: int64 ``(clients,)``, the samples that each goes through in a round.
      ledger: this rank's counts of bytes.
      first: bytes that a message is taken to have before there was one.
    """

    def __init__(self, plan: TimeConfig, seed: int, work: Tensor, ledger: Ledger, first: int) -> None:
        self.plan, self.seed, self.work, self.ledger, self.first = plan, seed, work, ledger, first

    def start(self, t: int, clients_C: Tensor) -> None:
        """Round ``t`` begins, in which ``clients_C`` have been called and will answer."""
        self._clients_C, self._end = clients_C, 0.0
        spread = self.plan.bandwidth_spread
        link_C = _factors(random.keys(self.seed, 0, clients_C, "simulated link"), spread)
        self._down_C, self._up_C = (8e-6 / (mbps * link_C) for mbps in (self.plan.download, self.plan.upload))
        own_C = _factors(random.keys(self.seed, 0, clients_C, "simulated speed"), self.plan.compute_spread)
        now_C = _factors(random.keys(self.seed, t, clients_C, "simulated jitter"), self.plan.jitter)
        self._compute_C = self.plan.compute * self.work[clients_C].double() * own_C * now_C
        self._before_2C = self._counted()

    def in_time(self, comm: Comm, expected: int) -> Tensor:
        """Positions of the clients whose message of ``expected`` bytes comes in time, int64, increasing: the first
        ``plan.first`` of them, and only those before the deadline, but always the fastest. All ranks call this."""
        down_C, _ = self._moved(comm)
        seconds_C = self._seconds(down_C, torch.full_like(down_C, expected))
        order_C = seconds_C.argsort(stable=True)
        arrived = order_C[: self.plan.first]
        if self.plan.deadline is not None:
            before = seconds_C[arrived] <= self.plan.deadline
            if not bool(before.all()):
                self._end = self.plan.deadline  # the server waits as long, for those that do not come
            before[:1] = True
            arrived = arrived[before]
        self._arrived = arrived.sort().values
        return self._arrived

    def stop(self, comm: Comm) -> float:
        """Seconds that the round took, until the last of the clients that came in time (or until the deadline, if some
        did not meet it). All ranks call this."""
        seconds_C = self._seconds(*self._moved(comm))[self._arrived]
        return max(self._end, float(seconds_C.max())) if len(seconds_C) else self._end

    def _counted(self) -> Tensor:
        return torch.stack([self.ledger.download[self._clients_C], self.ledger.upload[self._clients_C]])

    def _moved(self, comm: Comm) -> Tensor:
        """Bytes down and up since the start, int64 ``(2, C)``: each rank has counted its own clients'."""
        moved_2C = self._counted() - self._before_2C
        comm.sum([moved_2C])
        return moved_2C

    def _seconds(self, down_C: Tensor, up_C: Tensor) -> Tensor:
        return self._compute_C + down_C * self._down_C + up_C * self._up_C


def _factors(keys_C: Tensor, sigma: float) -> Tensor:
    """exp(σ z), float64 ``(C,)``. Multiples of 2^-20: the last bit of an exponential, in which machines differ, must
    not decide who comes first."""
    z_C = random.normal(keys_C, 1)[:, 0].double()
    return (z_C.mul(sigma).exp() * 2.0**20).round().clamp(min=1) * 2.0**-20
