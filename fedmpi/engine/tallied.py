"""A model on a test set, whose batches ranks share out."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from fedmpi.comm.base import Comm, together
from fedmpi.engine.device import Samples
from fedmpi.tasks.metrics import Measures, Tally


@torch.no_grad()
def tallied(
    model: nn.Module, samples: Samples, measured: Measures, count: int, batch: int, comm: Comm
) -> dict[str, float | None]:
    """Metrics and mean loss on so many ``samples``, the same on every rank.

    Raises:
      FedMPIError: on every rank; the user's loss or metric failed on one.
    """
    batches = torch.arange(count).split(batch)
    tally = Tally(measured, len(batches), count)
    with together(comm, "evaluating") if measured.own else nullcontext():
        for b in range(comm.rank, len(batches), comm.size):
            x, y = samples.take(batches[b])
            tally.add(b, batches[b], model(x), y)
    comm.sum(tally.tensors)
    return tally.values()
