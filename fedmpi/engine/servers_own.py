"""What the server computes on samples of its own, before the first round.

Shape suffixes: D parameters, X numbers that all share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.comm.base import Comm, together
from fedmpi.engine.trainer import Trainer
from fedmpi.errors import NumericalError
from fedmpi.message import Message, from_bytes, to_bytes
from fedmpi.phases import phased
from fedmpi.tasks.data import Split


@phased("compute")
def servers_own(trainer: Trainer, x_X: Tensor, data: Split, samples: int, comm: Comm) -> Tensor:
    """The accumulated gradient ``(X,)`` of the server on so many samples of its own, drawn from the training set.
    Rank 0 makes it for all: another rank's machine may differ in the last bits.

    Raises:
      NumericalError: on every rank; it is not finite.
    """
    g_X = torch.zeros_like(x_X)
    with together(comm, "the server's own training"):
        if comm.rank == 0:
            index = random.sample(random.key(trainer.seed, stream="server data"), len(data.y), samples)
            g_D = trainer.alone(x_X, data, index)
            if not bool(g_D.isfinite().all()):
                raise NumericalError(
                    f"server: its own gradient is not finite; try a smaller local.lr than {trainer.local.lr:g}"
                )
            g_X[: len(g_D)] = g_D
    sent = comm.broadcast(to_bytes(Message({"gradient": g_X[None]})))
    return from_bytes(sent, device=trainer.device).arrays["gradient"][0]
