"""What a model is trained for: a loss (mean over what counts), of the table or your own.

What counts is a sample for classes, a pixel or a token for those of them that are not IGNORE, each label or value.

Shape suffixes: C batches, B samples, N samples of all, K classes, L tokens, V words of the vocabulary, P values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedmpi import own
from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks import Options
from fedmpi.tasks.dataset import IGNORE, Data

USAGE = "loss(output: torch.Tensor, targets: torch.Tensor, **options) -> a mean over the batch, shape ()"


class Objective(NamedTuple):
    """The functions take the model's output and the targets, and work under ``torch.func.vmap``.

    Attributes:
      loss: mean over what counts, float, shape ().
      kind: what the targets are: ``classes`` (N,), ``pixels`` (N, H, W), ``tokens`` (N, L), each int64; ``labels``,
        ``values`` (N, …) float32; ``other``.
      metric: a row of :data:`fedmpi.tasks.metrics.METRICS`: what is measured first; "" for none.
      counts: which entries of the targets (..., their dimensions) count, bool.
      pads: a sample whose targets are all IGNORE does not count.
      each: the loss of C batches, (C,), faster than mapped.
      own: the user's, which may not work under ``torch.func.vmap``.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    kind: str
    metric: str
    summary: str
    counts: Callable[[Tensor], Tensor]
    pads: bool = False
    each: Callable[[Tensor, Tensor], Tensor] | None = None
    own: bool = False
    options: type[Options] = Options

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


def squared_error(output_BP: Tensor, y_BP: Tensor) -> Tensor:
    """Mean of the squared differences."""
    return F.mse_loss(output_BP, like(y_BP, output_BP))


def absolute_error(output_BP: Tensor, y_BP: Tensor) -> Tensor:
    """Mean of the differences' absolute values."""
    return F.l1_loss(output_BP, like(y_BP, output_BP))


def binary_cross_entropy(logits_BL: Tensor, y_BL: Tensor) -> Tensor:
    """Mean over samples and labels of −y log σ(logit) − (1 − y) log(1 − σ(logit)), in nats, for y in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits_BL, like(y_BL, logits_BL))


def like(y: Tensor, output: Tensor) -> Tensor:
    """Targets ``(B,)`` for an output ``(B, 1)``, or the other way round, in the output's shape: they would be broadcast
    to ``(B, B)``."""
    if y.shape != output.shape and {y.shape, output.shape} == {(n := len(y),), (n, 1)}:
        return y.reshape(output.shape)
    return y


def pixels(logits_BKHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Cross entropy over the pixels that count."""
    total = F.cross_entropy(logits_BKHW, y_BHW, ignore_index=IGNORE, reduction="sum")
    return total / (y_BHW != IGNORE).sum().clamp(min=1)


def next_token(logits_BLV: Tensor, y_BL: Tensor) -> Tensor:
    """Cross entropy of each token that counts given those before it, in nats; its exponential is the perplexity.

    Logits may end before the targets do, where no token of the batch counts any more.
    """
    next_BL = following(logits_BLV, y_BL)
    total = F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), next_BL.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (next_BL != IGNORE).sum().clamp(min=1)


def following(logits_BLV: Tensor, y_BL: Tensor) -> Tensor:
    """The tokens that the logits but the last are of."""
    return y_BL[:, 1 : logits_BLV.shape[1]]


def _all(y: Tensor) -> Tensor:
    return torch.ones_like(y, dtype=torch.bool)


def _counted(y: Tensor) -> Tensor:
    return y != IGNORE


def _counted_after(y_BL: Tensor) -> Tensor:
    return y_BL[..., 1:] != IGNORE


_LABELS = "float32 in [0, 1], (samples,) or (samples, labels)"
_VALUES = "float32, (samples,) or (samples, values)"
_KINDS: dict[str, tuple[torch.dtype, tuple[int, ...], str]] = {  # dtype, dimensions (any: none), in words
    "classes": (torch.int64, (1,), "int64, (samples,)"),
    "pixels": (torch.int64, (3,), "int64, (samples, height, width)"),
    "tokens": (torch.int64, (2,), "int64, (samples, tokens)"),
    "labels": (torch.float32, (1, 2), _LABELS),
    "values": (torch.float32, (), _VALUES),
}


_ROWS = (
    Objective(
        "cross_entropy",
        cross_entropy,
        "classes",
        "accuracy",
        "softmax cross entropy",
        _counted,
        pads=True,
        each=cross_entropies,
    ),
    Objective(
        "squared_hinge",
        squared_hinge,
        "classes",
        "accuracy",
        "one class against the rest, a linear SVM's",
        _counted,
    ),
    Objective(
        "binary_cross_entropy",
        binary_cross_entropy,
        "labels",
        "accuracy",
        "several labels a sample, each 0 or 1",
        _all,
    ),
    Objective("squared_error", squared_error, "values", "r2", "of values", _all),
    Objective("absolute_error", absolute_error, "values", "r2", "of values", _all),
    Objective("pixels", pixels, "pixels", "accuracy", "cross entropy a pixel", _counted, pads=True),
    Objective(
        "next_token", next_token, "tokens", "accuracy", "language modelling", _counted_after, pads=True
    ),
)
OBJECTIVES = {row.name: row for row in _ROWS}


def make(name: str, options: Mapping[str, object], data: Data) -> Objective:
    """The row ``name`` of :data:`OBJECTIVES`, or your own ``loss(output, targets, **options)`` by its import path.

    Raises:
      ConfigError: there is no such function, or it does not take these options.
    """
    if not own.is_path(name):
        return OBJECTIVES[name]
    function, y = own.bound("loss", name, options, USAGE), data.train.y
    whole = y.dtype == torch.int64
    kind = "values" if not whole else {1: "classes", 3: "pixels"}.get(y.dim(), "other")
    metric = {"values": "r2", "other": ""}.get(kind, "accuracy")

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = function(output, like(targets, output))
        return found

    return Objective(name, loss, kind, metric, "your own", _counted if whole else _all, own=True)


def scalar(
    argument: str, path: str, function: Callable[..., Any], output: Tensor, y: Tensor, usage: str
) -> Tensor:
    """What your own ``function`` of ``path`` makes of a batch.

    Raises:
      ConfigError: it failed, or returned no mean; names ``argument``.
    """
    try:
        value = function(output, like(y, output))
    except Exception as error:
        raise ConfigError(
            f"{argument}: {path} failed on an output of shape {tuple(output.shape)} and targets of shape "
            f"{tuple(y.shape)} and {y.dtype}: {own.said(error)}"
        ) from error
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number or (isinstance(value, Tensor) and not value.dim() and value.is_floating_point())):
        got = (
            f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ConfigError(f"{argument}: expected {usage}, got {got} of {path}")
    return torch.as_tensor(value)


def misfit(objective: Objective, output: Tensor, y_B: Tensor, data: Data) -> str:
    """What of a model's output does not fit the targets, "" where it does; an own loss decides itself, but for what its
    metric needs."""
    got, most, kind = tuple(output.shape), data.classes, objective.kind
    expected: tuple[Any, ...]
    if kind == "other":
        return ""
    if kind in ("values", "labels"):
        expected, fits = tuple(y_B.shape), got == tuple(like(y_B, output).shape)
    elif kind == "tokens":
        most = 1 + max(int(split.y.max()) for split in (data.train, data.test))
        expected = len(y_B), f"up to {y_B.shape[1]} tokens", f"at least {most} words"
        fits = len(got) == 3 and got[1] <= y_B.shape[1] and got[2] >= most
    else:
        expected = len(y_B), f"at least {most} classes", *y_B.shape[1:]
        fits = len(got) == len(expected) and got[1] >= most and got[2:] == expected[2:]
    if fits:
        return ""
    what = "the loss" if not objective.own else f"the metric {objective.metric} of the loss"
    return (
        f"expected an output of shape ({', '.join(map(str, expected))}) for {len(y_B)} samples and {what} "
        f"{objective.name}, got {got}"
    )


def _fits(row: Objective, y: Tensor) -> bool:
    dtype, dims, _ = _KINDS[row.kind]
    return y.dtype == dtype and (not dims or y.dim() in dims)


def check(name: str, y: Tensor) -> None:
    """ConfigError when the objective ``name`` cannot have the targets ``y``; names those that can."""
    row = OBJECTIVES[name]
    if _fits(row, y):
        return
    how = ""
    if row.kind == "classes" and y.dtype == torch.int64 and y.dim() > 1 and y.shape[1:].numel() == 1:
        how = "; y.flatten() takes the second away"
    fitting = [other for other, o in OBJECTIVES.items() if _fits(o, y)]
    raise ConfigError(
        f"loss: {name} expects targets of {_KINDS[row.kind][2]}, the data have {y.dim()} dimensions and "
        f"{y.dtype}; fitting: {', '.join(fitting) or 'none'}{how}"
    )


def check_data(objective: Objective, data: Data) -> None:
    """Whether an objective can have the targets of ``data``.

    Raises:
      ConfigError: they are of another kind; names the objectives that can.
      DataError: a class that is none of the data's, a value that is no number, or nothing that counts.
    """
    for part, y in (("train", data.train.y), ("test", data.test.y)):
        if not objective.own:
            check(objective.name, y)
        if y.is_floating_point():
            if not bool(y.isfinite().all()):
                raise DataError(f"{data.name}: {part}.y: expected finite targets, got a NaN or an infinity")
            if objective.kind == "labels" and bool(((y < 0) | (y > 1)).any()):
                wrong = y[(y < 0) | (y > 1)]
                raise DataError(
                    f"{data.name}: {part}.y: expected labels from 0 to 1, got {float(wrong[0]):g}"
                )
            continue
        counted = y != IGNORE
        wrong = y[counted & ((y < 0) | (y >= data.classes))]
        if len(wrong):
            raise DataError(
                f"{data.name}: {part}.y: expected classes from 0 to {data.classes - 1} (or {IGNORE}, which does not "
                f"count), got {int(wrong[0])}; number them from 0, and let classes be how many there are"
            )
        if not int(objective.count(y)):
            raise DataError(
                f"{data.name}: {part}.y: expected targets that count for the loss {objective.name}, got none"
            )
