"""``fedmpi analyze positions``: where the largest gradients lie, and whether they stay there.

Source: "Stationarity of Crucial Gradients in Deep Neural Networks": how often top-k and rTop-k choose each index
(figures 2 and 3), the top-k positions of later epochs within the top-m of the first (figures 4 to 7), and the
overlap score of each worker and epoch (equation 4, tables 1 and 2). Figure 8, accuracy against r, is a sweep over
``method.r`` (configs/claims/crucial-r.over.yaml).

Readings. Scores are a worker's, in percent of k, and rank the gradients that workers compute (frequencies count what
they send, which with error feedback is not the same). A worker's gradient of an epoch is the sum over its steps, as
Algorithm 1 trains "for one epoch" before it compresses; that tables 4 and 6 have different baselines (97.82 iid, 88.13
with one label a worker) shows, too, that workers train on their own between messages. Whose first epoch gives the
top-m is contradictory: the aggregated gradient's, section 3.2 says of table 2, whose first column is however 100
for every worker, as a worker's own set would give; table 1's first column is not. So both are scored.

Shape suffixes: W workers, E epochs, D parameters, K and M chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedmpi.analysis.page import Page, Table, png, prepare
from fedmpi.analysis.plots import COLOURS, figure, tidy
from fedmpi.analysis.watch import Watched
from fedmpi.config import Config
from fedmpi.engine.passes import Sent
from fedmpi.errors import ConfigError
from fedmpi.method import believed
from fedmpi.methods import parse
from fedmpi.methods.base import count_of
from fedmpi.methods.topk import TopKOptions
from fedmpi.ops.select import top_k

Reference = Literal["aggregate", "worker"]
REFERENCES: dict[Reference, str] = {
    "aggregate": "score",
    "worker": "own score",
}  # and what the results call it
_TOP = 0.01  # the share of positions whose part in all choices is told


class Seen(NamedTuple):
    """What one run showed."""

    frequency_D: Tensor  # int64, how often each position was sent
    scores_WE: dict[Reference, Tensor]  # percent; NaN where a worker did not take part in an epoch
    kept_D: Tensor  # bool, the first epoch's top-m of the aggregated gradient
    mean_ED: dict[int, Tensor]  # the aggregated gradient of the epochs that are drawn, counted from 1
    accuracy: float


class Watch:
    """Follows a run's gradients, epoch by epoch.

    Args:
      workers: W.
      size: D.
      k: positions that a score looks at.
      m: positions of the first epoch that it looks for, in the aggregated gradient and in the worker's own.
      drawn: epochs whose aggregated gradient is kept, counted from 1.
    """

    def __init__(self, workers: int, size: int, k: int, m: int, drawn: Sequence[int]) -> None:
        self.k, self.m, self.drawn = k, m, drawn
        self.frequency_D = torch.zeros(size, dtype=torch.int64)
        self.sum_WD = torch.zeros(workers, size)
        self.scores: dict[Reference, list[Tensor]] = {reference: [] for reference in REFERENCES}
        self.mean_ED: dict[int, Tensor] = {}
        self.kept_WD: dict[Reference, Tensor] = {}
        self.epochs = 0

    def see(self, sent: Sent) -> None:
        v_CD, _ = sent.codec.decompress(sent.message, believed(sent.codec, sent.before), sent.ctx)
        self.frequency_D += (v_CD != 0).sum(0)
        self.sum_WD.index_add_(0, sent.ctx.clients_C, sent.update.g_CD)

    def end_epoch(self, samples_W: Tensor) -> None:
        """Score the epoch; the first one also says where the top-m are."""
        mean_D = (self.sum_WD * (samples_W / samples_W.sum())[:, None]).sum(0)
        if not self.epochs:
            firsts: dict[Reference, Tensor] = {"aggregate": mean_D[None], "worker": self.sum_WD}
            for reference, first_WD in firsts.items():
                kept_WD = torch.zeros(first_WD.shape, dtype=torch.bool)
                self.kept_WD[reference] = kept_WD.scatter_(1, top_k(first_WD, self.m), True)
        for reference, scores in self.scores.items():
            scores.append(score(self.sum_WD, self.kept_WD[reference], self.k))
        self.epochs += 1
        if self.epochs in self.drawn:
            self.mean_ED[self.epochs] = mean_D
        self.sum_WD.zero_()


def score(g_WD: Tensor, kept_WD: Tensor, k: int) -> Tensor:
    """Overlap score of each worker, percent ``(W,)`` (equation 4): how many of its ``k`` largest gradients lie in
    ``kept_WD`` (or ``(1, D)`` for all). NaN for a gradient of zeros."""
    inside_WK = kept_WD.expand_as(g_WD).gather(1, top_k(g_WD, k))
    return torch.where(g_WD.any(1), 100 * inside_WK.double().mean(1), torch.nan)


def watch(config: Config, k: int, m: int, drawn: Sequence[int], per_epoch: int, quiet: bool) -> Seen:
    """Train as ``config`` says and follow its gradients; epochs of ``per_epoch`` rounds."""
    run = Watched(config, lambda sent: seen.see(sent))
    seen = Watch(config.clients, run.spec.size, k, m, drawn)
    samples_W = run.simulation.partition.sizes

    def after(t: int) -> None:
        if (t + 1) % per_epoch == 0:
            seen.end_epoch(samples_W)

    lines = run.train(config.method.name, quiet, after)
    return Seen(
        seen.frequency_D,
        {reference: torch.stack(scores, 1) for reference, scores in seen.scores.items()},
        seen.kept_WD["aggregate"][0],
        seen.mean_ED,
        lines[-1]["accuracy"],
    )


def analyze(
    config: Config,
    out: Path,
    m: int | None = None,
    r: int | None = None,
    epochs: Sequence[int] = (1, 10, 20, 30),
    rounds_per_epoch: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train twice, with top-k and with rTop-k, and write ``positions.md``, ``.html``, ``.json`` and pictures.

    Args:
      config: a run with method topk, which says k; the second run differs in the method only.
      out: the folder.
      m: how many positions of the first epoch are looked at (default: a tenth of the parameters).
      r: rTop-k's candidates (default: that method's).
      epochs: those that the table and a picture show, counted from 1.
      rounds_per_epoch: default: the rounds in which every client comes once.
      quiet: show no progress.

    Returns:
      What a claim rests on: mean scores by epoch, and how the choices are spread, by method.

    Raises:
      ConfigError: the method is not topk, m or r does not fit, or the run is shorter than an epoch.
      FedMPIError: as the run does, or ``out`` cannot be written.
    """
    if not isinstance(config.method, TopKOptions) or config.method.name != "topk":
        raise ConfigError(f"method: expected topk, whose k this looks at, got {config.method.name}")
    per_epoch = rounds_per_epoch or config.rounds_per_epoch
    if config.rounds < per_epoch:
        raise ConfigError(f"rounds: expected at least an epoch, {per_epoch} rounds, got {config.rounds}")
    size = Watched(config.model_copy(update={"rounds": 1}), lambda sent: None).spec.size
    k = count_of("method.k", config.method.ratio, config.method.k, size)
    m = count_of("--m", 0.1, m, size)
    if m < k:
        raise ConfigError(f"--m: expected at least k = {k}, got {m}")
    shared = {"k": k, "feedback": config.method.feedback}
    methods = {
        "top-k": parse({"name": "topk", **shared}),
        "rTop-k": parse({"name": "rtopk", "r": r, **shared}),
    }
    prepare(out, "--out")
    epochs = [e for e in epochs if e <= config.rounds // per_epoch]
    seen = {
        name: watch(config.model_copy(update={"method": method}), k, m, epochs, per_epoch, quiet)
        for name, method in methods.items()
    }
    summary = _summary(config, seen, k, m, epochs)
    numbers = {
        "summary": summary,
        **{
            f"{called}s": {name: one.scores_WE[reference].tolist() for name, one in seen.items()}
            for reference, called in REFERENCES.items()
        },
        "times chosen": {name: _histogram(one.frequency_D) for name, one in seen.items()},
    }
    _page(config, seen, summary, k, m, epochs).write(out, "positions", numbers)
    return summary


def _summary(config: Config, seen: dict[str, Seen], k: int, m: int, epochs: Sequence[int]) -> dict[str, Any]:
    size = len(seen["top-k"].frequency_D)
    summary: dict[str, Any] = {
        "data": config.data.name,
        "model": config.model.name,
        "partition": config.partition.name,
        "parameters": size,
        "k": k,
        "m": m,
        "rounds": config.rounds,
        "seed": config.seed,
    }
    for reference, called in REFERENCES.items():
        for epoch in epochs:
            summary[f"{called}, epoch {epoch}"] = _mean(seen["top-k"].scores_WE[reference][:, epoch - 1])
    for name, one in seen.items():
        count = max(1, round(_TOP * size))
        most = one.frequency_D.topk(count).values.sum() / one.frequency_D.sum()
        summary[f"{name}: accuracy"] = one.accuracy
        summary[f"{name}: never chosen"] = float((one.frequency_D == 0).double().mean())
        summary[f"{name}: choices on the 1 % most chosen"] = float(most)
    return summary


def _mean(values: Tensor) -> float:
    return float(values[values.isfinite()].mean())


def _histogram(frequency_D: Tensor) -> dict[int, int]:
    """How many positions were chosen so often."""
    times, positions = frequency_D.unique(return_counts=True)
    return dict(zip(times.tolist(), positions.tolist(), strict=True))


def _page(
    config: Config,
    seen: dict[str, Seen],
    summary: dict[str, Any],
    k: int,
    m: int,
    epochs: Sequence[int],
) -> Page:
    page = Page(f"Positions of the largest gradients of {config.model.name} on {config.data.name}")
    page.text(
        f"{config.clients} workers ({config.partition.name}), k = {k}, m = {m} of "
        f"{summary['parameters']:,} parameters, η = {config.local.lr:g}, {config.rounds} rounds, "
        f"error feedback {'on' if config.method.feedback else 'off'}, seed {config.seed}."  # type: ignore[attr-defined]
    )
    whose: dict[Reference, str] = {"aggregate": "the aggregated gradient's", "worker": "the worker's own"}
    for reference, called in REFERENCES.items():
        page.heading(
            f"Overlap {called}: the top k of an epoch within the top m of {whose[reference]} first epoch"
        )
        page.table(_table(seen["top-k"].scores_WE[reference], epochs))
    page.picture("overlap", _scores_picture(seen["top-k"].scores_WE, whose), "Overlap score by epoch, top-k")
    page.picture(
        "drift",
        _drift_picture(seen["top-k"], k),
        "The aggregated gradient of an epoch: the first epoch's top m in green, this epoch's top k in red",
    )
    page.heading("How often each position is chosen")
    rows = [["method", "accuracy", "never chosen", "choices on the 1 % most chosen positions"]]
    for name in seen:
        shares = [summary[f"{name}: {what}"] for what in ("accuracy", "never chosen")]
        shares.append(summary[f"{name}: choices on the 1 % most chosen"])
        rows.append([name, *(f"{100 * share:.2f} %" for share in shares)])
    page.table(rows)
    page.picture(
        "frequency", _frequency_picture(seen), "Times chosen by position (left) and in falling order (right)"
    )
    return page


def _table(scores_WE: Tensor, epochs: Sequence[int]) -> Table:
    columns = [scores_WE[:, epoch - 1] for epoch in epochs]
    rows = [["worker", *(f"epoch {epoch}" for epoch in epochs)]]
    rows += [[f"W {w + 1}", *(f"{float(c[w]):.1f}" for c in columns)] for w in range(len(scores_WE))]
    return [*rows, ["mean", *(f"{_mean(c):.2f}" for c in columns)]]


def _scores_picture(scores: dict[Reference, Tensor], whose: dict[Reference, str]) -> bytes:
    picture = figure(12, 4.5)
    grid = picture.subplots(1, len(scores), sharey=True)
    for axes, (reference, scores_WE) in zip(grid, scores.items(), strict=True):
        x = range(1, scores_WE.shape[1] + 1)
        for i, scores_E in enumerate(scores_WE):
            axes.plot(x, scores_E, color="0.7", linewidth=0.8, label="a worker" if i == 0 else None)
        axes.plot(x, [_mean(s_W) for s_W in scores_WE.T], color=COLOURS[0], linewidth=2, label="mean")
        axes.set(xlabel="epoch", ylim=(0, 103), title=f"top m of {whose[reference]} first epoch")
        tidy(axes)
    grid[0].set_ylabel("overlap score (%)")
    grid[0].legend(frameon=False)
    return png(picture)


def _drift_picture(seen: Seen, k: int) -> bytes:
    picture = figure(12, 2.3 * len(seen.mean_ED))
    grid = picture.subplots(len(seen.mean_ED), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (epoch, mean_D) in zip(grid, seen.mean_ED.items(), strict=True):
        size_D, top_K = mean_D.abs(), top_k(mean_D[None], k)[0]
        kept_M = seen.kept_D.nonzero()[:, 0]
        inside = int(seen.kept_D[top_K].sum())
        axes.plot(kept_M, size_D[kept_M], ".", color=COLOURS[2], markersize=2)
        axes.plot(top_K, size_D[top_K], ".", color=COLOURS[1], markersize=4)
        axes.set(ylabel="|gradient|", title=f"epoch {epoch}: {inside} of {k} inside")
        tidy(axes)
    grid[-1].set_xlabel("position")
    return png(picture)


def _frequency_picture(seen: dict[str, Seen]) -> bytes:
    picture = figure(12, 3 * len(seen))
    grid = picture.subplots(len(seen), 2, squeeze=False, width_ratios=(2, 1))
    for i, (name, one) in enumerate(seen.items()):
        left, right = grid[i]
        chosen = one.frequency_D.nonzero()[:, 0]
        left.vlines(chosen, 0, one.frequency_D[chosen], color=COLOURS[i], linewidth=0.5)
        left.set(title=name, ylabel="times chosen", xlim=(0, len(one.frequency_D)))
        falling = one.frequency_D.sort(descending=True).values
        right.plot(range(1, len(falling) + 1), falling, color=COLOURS[i])
        share = f"{len(chosen):,} of {len(falling):,} ever chosen"
        right.set(xscale="log", yscale="symlog", ylim=(0, None), title=share)
        tidy(left)
        tidy(right)
    grid[-1][0].set_xlabel("position")
    grid[-1][1].set_xlabel("positions, most often chosen first")
    return png(picture)
