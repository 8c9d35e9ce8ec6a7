"""What a model is trained for: a loss (mean over what counts) and the count behind its metric.

What counts is a sample for classes and points, a pixel or a token for those of them that are not IGNORE.

Shape suffixes: C batches, B samples, N samples of all, K classes, L tokens, V words of the vocabulary, P values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks.dataset import IGNORE, Data

NEAR = 0.02  # of a picture's side: a landmark so near is right


class Objective(NamedTuple):
    """The functions take the model's output and the targets, and work under ``torch.func.vmap``."""

    loss: Callable[[Tensor, Tensor], Tensor]  # mean over what counts, float, shape ()
    correct: Callable[[Tensor, Tensor], Tensor]  # how much is right, int64, shape (): sums over batches
    summary: str
    counts: Callable[[Tensor], Tensor]  # which entries of the targets (..., their dimensions) count, bool
    dtype: torch.dtype = torch.int64  # of the targets
    dims: int = 1  # of the targets, the samples included
    pads: bool = False  # a sample whose targets are all IGNORE does not count
    each: Callable[[Tensor, Tensor], Tensor] | None = None  # the loss of C batches, (C,), faster than mapped

    def count(self, y: Tensor) -> int:
        """How much of targets counts."""
        return int(self.counts(y).sum())

    def weights(self, y_CB: Tensor) -> Tensor:
        """How many samples' worth of the targets of C batches counts, float64 ``(C,)``: all of their samples where
        none is IGNORE."""
        counts_CP = self.counts(y_CB).flatten(1)
        return counts_CP.sum(1).double() * y_CB.shape[1] / max(1, counts_CP.shape[1])

    def losses(self, output_C: Tensor, y_C: Tensor) -> Tensor:
        """The loss of each of C batches of one shape, ``(C,)``."""
        if self.each is not None:
            return self.each(output_C, y_C)
        losses_C: Tensor = vmap(self.loss)(output_C, y_C)
        return losses_C


def cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Mean of −log softmax(logits)[y], in nats, over those of ``y_B`` (int64 in [0, K)) that count; 0 of none."""
    total = F.cross_entropy(logits_BK, y_B, ignore_index=IGNORE, reduction="sum")
    return total / (y_B != IGNORE).sum().clamp(min=1)


def cross_entropies(logits_CBK: Tensor, y_CB: Tensor) -> Tensor:
    """:func:`cross_entropy` of each of C batches, ``(C,)``."""
    each_N = F.cross_entropy(logits_CBK.flatten(0, 1), y_CB.flatten(), ignore_index=IGNORE, reduction="none")
    return each_N.view(y_CB.shape).sum(1) / (y_CB != IGNORE).sum(1).clamp(min=1)


def squared_hinge(scores_BK: Tensor, y_B: Tensor) -> Tensor:
    """Mean over the samples that count of Σ_k max(0, 1 − t_k·score_k)², t_k = 1 for k = y and −1 else: a linear SVM,
    one class against the rest, with the squared hinge."""
    t_BK = 2 * F.one_hot(y_B.clamp(min=0), scores_BK.shape[-1]).to(scores_BK.dtype) - 1
    each_B, counts_B = (1 - t_BK * scores_BK).clamp(min=0).square().sum(-1), y_B != IGNORE
    return each_B.where(counts_B, 0).sum() / counts_B.sum().clamp(min=1)


def top1(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """How many samples have their largest logit at ``y``, int64 ``()``; a tie counts for the first class."""
    return (logits_BK.argmax(-1) == y_B).sum()


def squared_error(output_BP: Tensor, y_BP: Tensor) -> Tensor:
    """Mean of the squared differences."""
    return F.mse_loss(output_BP, y_BP)


def near(output_BP: Tensor, y_BP: Tensor) -> Tensor:
    """How many values are within :data:`NEAR` of their targets, int64 ``()``."""
    return ((output_BP - y_BP).abs() <= NEAR).sum()


def pixels(logits_BKHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Cross entropy over the pixels that count."""
    total = F.cross_entropy(logits_BKHW, y_BHW, ignore_index=IGNORE, reduction="sum")
    return total / (y_BHW != IGNORE).sum().clamp(min=1)


def pixels_right(logits_BKHW: Tensor, y_BHW: Tensor) -> Tensor:
    """How many pixels have the right class, int64 ``()``."""
    return (logits_BKHW.argmax(1) == y_BHW).sum()


def next_token(logits_BLV: Tensor, y_BL: Tensor) -> Tensor:
    """Cross entropy of each token that counts given those before it, in nats; its exponential is the perplexity.

    Logits may end before the targets do, where no token of the batch counts any more.
    """
    following = _following(logits_BLV, y_BL)
    total = F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), following.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (following != IGNORE).sum().clamp(min=1)


def tokens_right(logits_BLV: Tensor, y_BL: Tensor) -> Tensor:
    """How many tokens are the likeliest after those before them, int64 ``()``."""
    return (logits_BLV[:, :-1].argmax(-1) == _following(logits_BLV, y_BL)).sum()


def _following(logits_BLV: Tensor, y_BL: Tensor) -> Tensor:
    return y_BL[:, 1 : logits_BLV.shape[1]]


def _all(y: Tensor) -> Tensor:
    return torch.ones_like(y, dtype=torch.bool)


def _counted(y: Tensor) -> Tensor:
    return y != IGNORE


def _counted_after(y_BL: Tensor) -> Tensor:
    return y_BL[..., 1:] != IGNORE


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": Objective(
        cross_entropy,
        top1,
        "softmax cross entropy; metric: top-1 accuracy",
        _counted,
        pads=True,
        each=cross_entropies,
    ),
    "squared_hinge": Objective(
        squared_hinge, top1, "one class against the rest, a linear SVM's; metric: top-1 accuracy", _counted
    ),
    "squared_error": Objective(
        squared_error,
        near,
        f"of values (landmarks); metric: share within {NEAR}",
        _all,
        torch.float32,
        2,
    ),
    "pixels": Objective(
        pixels, pixels_right, "cross entropy a pixel; metric: share of pixels", _counted, dims=3, pads=True
    ),
    "next_token": Objective(
        next_token,
        tokens_right,
        "language modelling; metric: share of tokens",
        _counted_after,
        dims=2,
        pads=True,
    ),
}


def check(name: str, y: Tensor) -> None:
    """ConfigError when the objective ``name`` cannot have the targets ``y``; names those that can."""
    row = OBJECTIVES[name]
    if (y.dtype, y.dim()) == (row.dtype, row.dims):
        return
    how = ""
    if y.dtype == row.dtype and y.dim() > row.dims == 1 and y.shape[1:].numel() == 1:
        how = "; y.flatten() takes the second away"
    if y.dtype == row.dtype and y.dim() == 1 < row.dims:
        how = "; y[:, None] adds one"
    fitting = [other for other, o in OBJECTIVES.items() if (y.dtype, y.dim()) == (o.dtype, o.dims)]
    raise ConfigError(
        f"loss: {name} expects targets of {row.dims} dimensions and {row.dtype}, the data have {y.dim()} and "
        f"{y.dtype}; fitting: {', '.join(fitting) or 'none'}{how}"
    )


def check_data(name: str, data: Data) -> None:
    """Whether the objective ``name`` can have the targets of ``data``.

    Raises:
      ConfigError: they are of another kind; names the objectives that can.
      DataError: a class that is none of the data's, a value that is no number, or nothing that counts.
    """
    for part, y in (("train", data.train.y), ("test", data.test.y)):
        check(name, y)
        if y.is_floating_point():
            if not bool(y.isfinite().all()):
                raise DataError(f"{data.name}: {part}.y: expected finite targets, got a NaN or an infinity")
            continue
        counted = y != IGNORE
        wrong = y[counted & ((y < 0) | (y >= data.classes))]
        if len(wrong):
            raise DataError(
                f"{data.name}: {part}.y: expected classes from 0 to {data.classes - 1} (or {IGNORE}, which does not "
                f"count), got {int(wrong[0])}; number them from 0, and let classes be how many there are"
            )
        if not int(OBJECTIVES[name].count(y)):
            raise DataError(
                f"{data.name}: {part}.y: expected targets that count for the loss {name}, got none"
            )
