"""A link that is not there: one process stands for a rank of many, and counts what their link would take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.errors import CommError

_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


class ImaginedComm(Comm):
    """Rank 0 of ``size``, of which all others do what it does. Nothing waits.

    An all-reduce takes 2 (W - 1) / W of its bytes from each rank and as much to it, as a ring does; a gather the
    others' rows.

    Args:
      bandwidth: bytes a second that a rank sends while it receives as many.
      latency: seconds that a collective takes whatever its size.

    Attributes:
      waited: seconds that the link would have taken so far.
    """

    def __init__(self, size: int, bandwidth: float, latency: float) -> None:
        self.name, self.rank, self.size = "an imagined link", 0, size
        self.local_rank, self.local_size = 0, 1
        self.bandwidth, self.latency, self.waited = bandwidth, latency, 0.0

    def _wait(self, nbytes: float) -> None:
        self.waited += self.latency + nbytes / self.bandwidth

    def _sum(self, tensor: Tensor) -> None:
        tensor.mul_(self.size)
        self._wait(2 * (self.size - 1) / self.size * tensor.nbytes)

    def _allgather_rows(self, row: Tensor, rows: Tensor) -> None:
        rows.copy_(row.expand_as(rows))
        self._wait((self.size - 1) * row.nbytes)

    def _alltoall_rows(self, sent: Tensor, received: Tensor) -> None:
        received.copy_(sent[:1].expand_as(received))
        self._wait(sent[1:].nbytes)

    def _alltoall(self, parts: Sequence[bytes]) -> list[bytes]:
        self._wait(sum(map(len, parts[1:])))
        return [parts[0]] * self.size

    def _broadcast(self, data: bytes, root: int) -> bytes:
        self._wait(len(data))
        return data

    def _gather(self, data: bytes, root: int) -> list[bytes]:
        return self._allgather(data)

    def _allgather(self, data: bytes) -> list[bytes]:
        self._wait((self.size - 1) * len(data))
        return [data] * self.size

    def abort(self) -> None:
        raise SystemExit(1)


def bandwidth(text: str) -> float:
    """Bytes a second of ``100Mbps``, ``1Gbit/s`` or ``2.5 Gb/s``.

    Raises:
      CommError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmg])(?:bps|b/s|bit/s)\s*", text.lower())
    if match is None or float(match[1]) == 0 or re.search(r"[kmgKMG]B", text):
        raise CommError(f"--link: expected bits a second such as 100Mbps or 2.5Gb/s, got {text!r}")
    return float(match[1]) * _BITS[match[2]] / 8


def duration(text: str) -> float:
    """Seconds of ``0.5ms`` or ``80us``.

    Raises:
      CommError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(us|µs|ms|s)\s*", text.lower())
    if match is None:
        raise CommError(f"--latency: expected a time such as 0.5ms or 80us, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]
