"""What a model comes to on a test set, and how it is saved.

Shape suffix: X numbers that all share.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, together
from fedmpi.engine.trainer import Trainer
from fedmpi.message import CPU
from fedmpi.phases import phased
from fedmpi.tasks.data import Split
from fedmpi.tasks.metrics import Measures, Tally


def agreed(measured: Measures, comm: Comm) -> AbstractContextManager[None]:
    """An error of the user's code on one rank ends all."""
    return together(comm, "evaluating") if measured.own else nullcontext()


@torch.no_grad()
@phased("evaluate")
def evaluate(
    trainer: Trainer, measured: Measures, x_X: Tensor, test: Split, batch: int, comm: Comm
) -> dict[str, float | None]:
    """Metrics and mean loss of ``x_X`` on a test set, whose batches the ranks share out."""
    model = trainer.load(x_X).eval()
    batches = torch.arange(len(test.y)).split(batch)
    tally, samples = Tally(measured, len(batches), len(test.y)), trainer.samples(test)
    with agreed(measured, comm):
        for b in range(comm.rank, len(batches), comm.size):
            x, y = samples.take(batches[b])
            tally.add(b, batches[b], model(x), y)
    comm.sum(tally.tensors)
    return tally.values()


@torch.no_grad()
def state_dict(trainer: Trainer, x_X: Tensor) -> dict[str, Tensor]:
    """The model's with ``x_X``, which it loads strictly, on the CPU; no two tensors share memory."""
    tensors = trainer.load(x_X).state_dict()
    return {
        name: value.clone(memory_format=torch.contiguous_format).to(CPU) for name, value in tensors.items()
    }
