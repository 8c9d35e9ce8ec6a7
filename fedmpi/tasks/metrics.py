"""What is measured on a test set, beside the loss.

A metric sees one batch after the other, on whatever rank. What it takes of each is counts, which add up exactly in any
order, or sums and scores, which have a place each: so its value is the same at any number of ranks.

Shape suffixes: B samples of a batch, K classes, L labels, P values a sample, S numbers that a metric takes of a batch,
M places: batches, or samples for those that need a score of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmpi import own
from fedmpi.errors import ConfigError
from fedmpi.tasks import Options
from fedmpi.tasks.dataset import IGNORE, Data
from fedmpi.tasks.objectives import Objective, following, like, scalar
from fedmpi.validation import suggest

NEAR = 0.02  # of a picture's side: a landmark so near is right
TEST_LOSS = "test_loss"
USAGE = "metric(output: torch.Tensor, targets: torch.Tensor, **options) -> a mean over the batch, shape ()"


class Task(NamedTuple):
    """What is predicted: a class of K (of a sample, a pixel, a token), labels or values."""

    kind: str  # Objective.kind
    classes: int  # K; of labels and values, how many a sample has


class Metric(NamedTuple):
    """A row of :data:`METRICS`.

    Attributes:
      kinds: of :attr:`Objective.kind`, those that it goes with.
      size: S.
      of: of a batch: int64 or float64 ``(S,)``, or ``(S, B)`` with ``each``.
      value: of what all batches gave, ``(S, 1)`` for int64 and ``(S, M)`` else; NaN where it is not defined.
      share: between 0 and 1 and shown in percent.
      least: the smaller the better.
    """

    summary: str
    kinds: tuple[str, ...]
    size: Callable[[Task], int]
    of: Callable[[Task, Tensor, Tensor], Tensor]
    value: Callable[[Tensor], float]
    dtype: torch.dtype = torch.int64
    each: bool = False
    share: bool = True
    least: bool = False
    options: type[Options] = Options


def _flat(task: Task, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``(M, ≥ K)`` and targets ``(M,)`` of what counts."""
    if task.kind == "tokens":
        output, y = output[:, :-1], following(output, y)
    if task.kind == "pixels":
        output = output.movedim(1, -1)
    counts = y != IGNORE
    return output[counts], y[counts]


def _right(task: Task, output: Tensor, y: Tensor) -> Tensor:
    if task.kind == "labels":
        right = (output > 0) == (like(y, output) > 0.5)
        return torch.tensor([int(right.sum()), right.numel()])
    scores, y_M = _flat(task, output, y)
    return torch.tensor([int((scores.argmax(-1) == y_M).sum()), len(y_M)])


def _right_of_5(task: Task, output: Tensor, y: Tensor) -> Tensor:
    scores, y_M = _flat(task, output, y)
    found = scores.topk(min(5, scores.shape[-1]), -1).indices
    return torch.tensor([int((found == y_M[:, None]).sum()), len(y_M)])


def _near(task: Task, output: Tensor, y: Tensor) -> Tensor:
    near = (output - like(y, output)).abs() <= NEAR
    return torch.tensor([int(near.sum()), near.numel()])


def _hits(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """True positives, predicted and actual ones of each class or label, ``(3·K,)``."""
    if task.kind == "labels":
        found, true = (t.reshape(len(y), -1) for t in (output > 0, like(y, output) > 0.5))
        return torch.cat([t.sum(0) for t in (found & true, found, true)])
    scores, y_M = _flat(task, output, y)
    found_M = scores.argmax(-1)

    def count(classes_M: Tensor) -> Tensor:
        return torch.bincount(classes_M, minlength=task.classes)[: task.classes]

    return torch.cat([count(y_M[found_M == y_M]), count(found_M), count(y_M)])


def _ratio(sums_SM: Tensor) -> float:
    total, count = sums_SM.sum(1).tolist()
    return total / count if count else math.nan


def _f1(sums_SM: Tensor) -> float:
    """The mean over classes of 2·TP / (predicted + actual); classes that never occur in either do not count."""
    hits_K, found_K, true_K = sums_SM.sum(1).view(3, -1).double()
    return _mean(2 * hits_K / (found_K + true_K))


def _iou(sums_SM: Tensor) -> float:
    """The mean over classes of TP / (predicted + actual − TP); classes that never occur in either do not count."""
    hits_K, found_K, true_K = sums_SM.sum(1).view(3, -1).double()
    return _mean(hits_K / (found_K + true_K - hits_K))


def _mean(values: Tensor) -> float:
    """Of those that are numbers."""
    return float(values.nanmean())


def _scores(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """Each sample's scores, then whether each label is so, ``(2·K, B)``; NaN for a sample that does not count."""
    if task.kind == "labels":
        return torch.cat([t.reshape(len(y), -1).double().T for t in (output, like(y, output) > 0.5)])
    scores_KB = output.double().softmax(-1)[:, : task.classes].T
    true_KB = torch.arange(task.classes, device=y.device)[:, None] == y
    return torch.cat([scores_KB, true_KB.double()]).where(y != IGNORE, math.nan)


def _auc(rows_SM: Tensor) -> float:
    """The mean over labels, or classes against the rest, of the chance that a positive sample scores above a negative
    one (a tie counts half: Mann and Whitney 1947); those without either do not count."""
    scores_KM, true_KM = rows_SM[:, ~rows_SM[-1].isnan()].chunk(2)
    if not bool(scores_KM.isfinite().all()):
        return math.nan
    areas = []
    for scores_M, true_M in zip(scores_KM, true_KM > 0.5, strict=True):
        _, place_M, count = scores_M.unique(return_inverse=True, return_counts=True)
        rank_M = (count.cumsum(0) - (count - 1) / 2.0)[place_M].double()
        positive = int(true_M.sum())
        pairs = positive * (len(true_M) - positive)
        above = float(rank_M[true_M].sum()) - positive * (positive + 1) / 2
        areas.append(above / pairs if pairs else math.nan)
    return _mean(torch.tensor(areas, dtype=torch.float64))


def _tokens(task: Task, output: Tensor, y: Tensor) -> Tensor:
    scores, y_M = _flat(task, output, y)
    total = F.cross_entropy(scores, y_M, reduction="sum")
    return torch.tensor([float(total), len(y_M)], dtype=torch.float64)


def _errors(power: int, task: Task, output: Tensor, y: Tensor) -> Tensor:
    error = (output.double() - like(y, output)).abs() ** power
    return torch.tensor([float(error.sum()), error.numel()], dtype=torch.float64)


def _variances(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """Samples, and of each value its mean, its squared deviations from it and its squared errors, ``(1 + 3·P,)``."""
    found_BP, y_BP = (t.reshape(len(y), -1).double() for t in (output, like(y, output)))
    mean_P = y_BP.mean(0)
    spread_P, error_P = ((y_BP - of).square().sum(0) for of in (mean_P, found_BP))
    return torch.cat([y_BP.new_tensor([len(y)]), mean_P, spread_P, error_P])


def _r2(sums_SM: Tensor) -> float:
    """The mean over values of 1 − squared errors / squared deviations from the mean; values that are the same in all
    samples do not count."""
    count_M, rest = sums_SM[0], sums_SM[1:]
    mean_PM, spread_PM, error_PM = rest[:, count_M > 0].view(3, len(rest) // 3, -1)
    count_M = count_M[count_M > 0]
    mean_P = (mean_PM * count_M).sum(1, keepdim=True) / count_M.sum()
    spread_P = spread_PM.sum(1) + (count_M * (mean_PM - mean_P).square()).sum(1)
    return _mean(1 - (error_PM.sum(1) / spread_P).where(spread_P > 0, math.nan))


def _exp(sums_SM: Tensor) -> float:
    return float(torch.tensor(_ratio(sums_SM), dtype=torch.float64).exp())


def _two(task: Task) -> int:
    return 2


_CLASSES = ("classes", "pixels", "tokens")
_sums = partial(Metric, dtype=torch.float64, share=False)

METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "share of samples, pixels, tokens or labels that are right",
        (*_CLASSES, "labels"),
        _two,
        _right,
        _ratio,
    ),
    "top5": Metric(
        "share whose class is among the five likeliest", ("classes", "tokens"), _two, _right_of_5, _ratio
    ),
    "macro_f1": Metric(
        "F1, the mean over classes or labels", (*_CLASSES, "labels"), lambda t: 3 * t.classes, _hits, _f1
    ),
    "iou": Metric(
        "intersection over union (Jaccard), the mean over classes or labels",
        (*_CLASSES, "labels"),
        lambda t: 3 * t.classes,
        _hits,
        _iou,
    ),
    "auc": Metric(
        "area under the ROC curve, the mean over labels, or over classes against the rest",
        ("classes", "labels"),
        lambda t: 2 * t.classes,
        _scores,
        _auc,
        torch.float64,
        each=True,
    ),
    "perplexity": _sums(
        "exp of the mean cross entropy a token", ("tokens",), _two, _tokens, _exp, least=True
    ),
    "r2": _sums("R², the mean over values", ("values",), lambda t: 1 + 3 * t.classes, _variances, _r2),
    "mse": _sums("mean squared error", ("values",), _two, partial(_errors, 2), _ratio, least=True),
    "mae": _sums("mean absolute error", ("values",), _two, partial(_errors, 1), _ratio, least=True),
    "near": Metric(f"share of values within {NEAR} of their targets", ("values",), _two, _near, _ratio),
}


class Measures(NamedTuple):
    """What is measured of a model: the loss, and metrics by name, of which the first is what reports show."""

    objective: Objective
    task: Task
    metrics: dict[str, Metric]

    @property
    def own(self) -> bool:
        """Some of it is the user's code."""
        return self.objective.own or any(name not in METRICS for name in self.metrics)

    @property
    def free(self) -> bool:
        """Only the user's code sees the model's output, which may have any shape."""
        return self.objective.own and not any(name in METRICS for name in self.metrics)

    @property
    def first(self) -> str:
        return next(iter(self.metrics))

    def least(self, name: str) -> bool:
        """Whether less is better of a metric, of clients' or of the loss."""
        metric = self.metrics[self.first] if name.startswith("client_") else self.metrics.get(name)
        return name == TEST_LOSS or (metric is not None and metric.least)


def measures(
    objective: Objective, data: Data, names: Sequence[tuple[str, Mapping[str, object]]] = ()
) -> Measures:
    """What is measured with the loss ``objective``: its own metric, then those asked for (with an own loss, those asked
    for only, where there are some).

    Args:
      names: rows of :data:`METRICS`, or import paths of your own ``metric(output, targets, **options)``; with options.

    Raises:
      ConfigError: one does not go with what the loss is of; names those that do.
    """
    task = Task(objective.kind, data.classes)
    if objective.kind in ("values", "labels"):
        task = Task(objective.kind, data.train.y[0].numel())
    chosen: dict[str, Metric] = {}
    if objective.metric and not (objective.own and names):
        chosen[objective.metric] = METRICS[objective.metric]
    fitting = [name for name, row in METRICS.items() if objective.kind in row.kinds]
    for name, options in names:
        if own.is_path(name):
            chosen[name] = _own(name, options, objective)
        elif name not in fitting:
            raise ConfigError(
                f"metrics: {name} does not go with the loss {objective.name} of {objective.kind}; "
                f"{suggest(name, fitting)}"
            )
        else:
            chosen[name] = METRICS[name]
    if not chosen:
        raise ConfigError(
            f"metrics: expected the import path of your own {USAGE}, with the loss {objective.name} and targets of "
            f"shape {tuple(data.train.y.shape)}, for which there is none here, got none"
        )
    if "top5" in chosen and task.classes <= 5:
        raise ConfigError(f"metrics: top5: expected more than 5 classes, got {task.classes}")
    return Measures(objective, task, chosen)


def _own(path: str, options: Mapping[str, object], objective: Objective) -> Metric:
    function = own.bound("metrics", path, options, USAGE)

    def of(task: Task, output: Tensor, y: Tensor) -> Tensor:
        count = objective.count(y)
        value = scalar("metrics", path, function, output, y, USAGE)
        return torch.tensor([float(value) * count if count else 0.0, count], dtype=torch.float64)

    return _sums("your own", (objective.kind,), _two, of, _ratio)


class Tally:
    """Collects what metrics and the loss take of the batches of a set of samples, each on some rank.

    Args:
      batches, samples: of the whole set.
    """

    def __init__(self, of: Measures, batches: int, samples: int) -> None:
        self._of = of
        self._loss = torch.zeros(2, batches, dtype=torch.float64)
        self._sums = {
            name: torch.zeros(m.size(of.task), _places(m, batches, samples), dtype=m.dtype)
            for name, m in of.metrics.items()
        }

    def add(self, batch: int, rows: Tensor | slice, output: Tensor, y: Tensor) -> None:
        """A batch, whose samples stand at ``rows``."""
        count = self._of.objective.count(y)
        if count:
            self._loss[0, batch] = self._of.objective.loss(output, y).double() * count
            self._loss[1, batch] = count
        for name, metric in self._of.metrics.items():
            sums = self._sums[name]
            taken = metric.of(self._of.task, output, y).to(sums.device)
            if metric.each:
                sums[:, rows] = taken
            elif metric.dtype == torch.int64:
                sums[:, 0] += taken
            else:
                sums[:, batch] = taken

    @property
    def tensors(self) -> list[Tensor]:
        """What the ranks add up: a float64 place is only one rank's, so that the sum is exact in any order."""
        return [self._loss, *self._sums.values()]

    def values(self) -> dict[str, float | None]:
        """Metrics and :data:`TEST_LOSS` by name; None where one is not defined."""
        values = {name: metric.value(self._sums[name]) for name, metric in self._of.metrics.items()}
        values[TEST_LOSS] = _ratio(self._loss)
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _places(metric: Metric, batches: int, samples: int) -> int:
    if metric.dtype == torch.int64:
        return 1
    return samples if metric.each else batches
