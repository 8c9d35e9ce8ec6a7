"""Protocol bytes: what clients send and receive, whatever the number of ranks (the papers' metric)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmpi.message import Message
from fedmpi.method import Server, State
from fedmpi.phases import phased


@dataclass(frozen=True)
class Bytes:
    """Bytes in all, and those of values alone (without indices and maps: the papers' tables)."""

    all: int = 0
    values: int = 0

    @classmethod
    def of(cls, message: Message) -> Bytes:
        return cls(message.total_nbytes(), message.total_nbytes(positions=False))

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.all + other.all, self.values + other.values)


class Ledger:
    """Counts the bytes of the clients that this rank serves, measured on their messages.

    Attributes:
      upload, download: int64 ``(clients,)``, bytes so far of each client, as far as this rank counted them.
      seen: int64 ``(clients,)``, the version of the model that each client last downloaded (0: θ₀, which
        every client makes from the seed). The same on every rank.
    """

    def __init__(self, clients: int) -> None:
        self.upload = torch.zeros(clients, dtype=torch.int64)
        self.download = torch.zeros(clients, dtype=torch.int64)
        self.seen = torch.zeros(clients, dtype=torch.int64)

    @phased("server")
    def downloads(self, cohort: Tensor, served: Tensor, server: Server, state: State) -> Bytes:
        """The cohort catches up with the server; returns the bytes of the clients ``served`` of it."""
        # Clients that last saw the same version get the same download.
        versions, which = self.seen[served].unique(return_inverse=True)
        made = [Bytes.of(message) for message in server.sizes(state, versions.tolist())]
        bytes_S, values_S = (
            torch.tensor([getattr(m, n) for m in made], dtype=torch.int64)[which] for n in ("all", "values")
        )
        self.download[served] += bytes_S
        self.seen[cohort] = int(state["version"])
        return Bytes(int(bytes_S.sum()), int(values_S.sum()))

    @phased("server")
    def download_of(self, clients: Tensor, message: Message) -> Bytes:
        """Each of ``clients`` downloads the same ``message``; returns the bytes."""
        return self._each(self.download, clients, message)

    def uploads(self, clients_C: Tensor, message: Message) -> Bytes:
        """Clients sent ``message``; returns its bytes."""
        self.upload.index_add_(0, clients_C, message.nbytes())
        return Bytes.of(message)

    def upload_of(self, clients: Tensor, message: Message) -> Bytes:
        """Each of ``clients`` sent a ``message`` of this size; returns the bytes."""
        return self._each(self.upload, clients, message)

    def _each(self, counted: Tensor, clients: Tensor, message: Message) -> Bytes:
        one = Bytes.of(message)
        counted[clients] += one.all
        return Bytes(one.all * len(clients), one.values * len(clients))


def ratios(full_up: int, full_down: int, up: int, down: int) -> dict[str, float | None]:
    """Uncompressed bytes over sent bytes, up, down, and of the sums of both; None where nothing was sent."""
    pairs = {"upload_ratio": (full_up, up), "download_ratio": (full_down, down)}
    pairs["total_ratio"] = (full_up + full_down, up + down)
    return {name: full / sent if sent else None for name, (full, sent) in pairs.items()}
