"""How a model is saved.

Shape suffix: X numbers that all share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.engine.trainer import Trainer
from fedmpi.message import CPU


@torch.no_grad()
def state_dict(trainer: Trainer, x_X: Tensor) -> dict[str, Tensor]:
    """The model's with ``x_X``, which it loads strictly, on the CPU; no two tensors share memory."""
    tensors = trainer.load(x_X).state_dict()
    return {
        name: value.clone(memory_format=torch.contiguous_format).to(CPU) for name, value in tensors.items()
    }
