"""Protocol bytes: what clients send and receive, whatever the number of ranks (the papers' metric)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.message import Message
from fedmpi.method import Server, State


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

    def downloads(self, cohort: Tensor, served: Tensor, server: Server, state: State) -> int:
        """The cohort catches up with the server; returns the bytes of the clients ``served`` of it."""
        total = 0
        sizes: dict[int, int] = {}  # clients that last saw the same version get the same download
        for client in served.tolist():
            seen = int(self.seen[client])
            if seen not in sizes:
                sizes[seen] = int(server.download(state, seen).nbytes()[0])
            self.download[client] += sizes[seen]
            total += sizes[seen]
        self.seen[cohort] = int(state["version"])
        return total

    def download_of(self, clients: Tensor, message: Message) -> int:
        """Each of ``clients`` downloads the same ``message``; returns the bytes."""
        nbytes = int(message.nbytes()[0])
        self.download[clients] += nbytes
        return nbytes * len(clients)

    def uploads(self, clients_C: Tensor, message: Message) -> int:
        """Clients sent ``message``; returns its bytes."""
        nbytes_C = message.nbytes()
        self.upload.index_add_(0, clients_C, nbytes_C)
        return int(nbytes_C.sum())
