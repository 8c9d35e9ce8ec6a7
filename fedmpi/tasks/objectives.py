"""What a model is trained for: a loss (mean over the batch) and the count behind its metric.

Shape suffixes: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Objective(NamedTuple):
    """Both functions take the model's output and the targets, and work under ``torch.func.vmap``."""

    loss: Callable[[Tensor, Tensor], Tensor]  # mean over the batch, float, shape ()
    correct: Callable[[Tensor, Tensor], Tensor]  # how many are right, int64, shape (): sums over batches
    summary: str


def cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Mean of −log softmax(logits)[y], in nats; ``y_B`` int64 in [0, K)."""
    return F.cross_entropy(logits_BK, y_B)


def top1(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """How many samples have their largest logit at ``y``, int64 ``()``; a tie counts for the first class."""
    return (logits_BK.argmax(-1) == y_B).sum()


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": Objective(cross_entropy, top1, "softmax cross entropy; metric: top-1 accuracy"),
}
