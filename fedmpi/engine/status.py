"""What a rank counts in a pass of a round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedmpi.comm.base import Comm
from fedmpi.engine.ledger import Bytes
from fedmpi.errors import FedMPIError

SUMMED = ("loss", "upload", "upload_values", "download", "download_values")


class Status:
    """What a rank counts in a pass, and whether it failed: added up over ranks in one small collective."""

    def __init__(self, counters: tuple[str, ...], error: FedMPIError | None) -> None:
        self.total = dict.fromkeys((*SUMMED, *counters), 0)
        self._counters, self.error = counters, error
        self.reset()

    def reset(self) -> None:
        self.loss, self.upload, self.download = 0, Bytes(), Bytes()
        self._counts = dict.fromkeys(self._counters, 0)

    def count(self, counts: dict[str, int]) -> None:
        for name, n in counts.items():
            self._counts[name] += n

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep an error for :meth:`collect`, where all ranks meet."""
        try:
            yield
        except FedMPIError as error:
            self.error = self.error or error

    def collect(self, comm: Comm, asks: tuple[bool, bool]) -> bool:
        """Add this pass's counts of all ranks to :attr:`total`, and ``asks`` up in :attr:`asked`; returns whether any
        rank failed."""
        sent = (self.upload.all, self.upload.values, self.download.all, self.download.values)
        sums = torch.tensor([self.loss, *sent, *self._counts.values(), *asks, self.error is not None])
        comm.sum([sums])
        *counts, stop, save, failed = sums.tolist()
        self.asked = (bool(stop), bool(save))
        for name, n in zip(self.total, counts, strict=True):
            self.total[name] += n
        return bool(failed)
