"""``fedmpi analyze subspace``: how many directions the gradients of a training need.

Source: Azam et al. 2022 (LBGM), section 2 and Algorithm 2: N95- and N99-PCA by epoch (figure 1), the overlap of
actual and principal gradients (figure 2), the cosines among actual gradients (figure 3), per layer. A
round's gradient is the mean of its clients' accumulated gradients, so a configuration with one client and one
local epoch is Algorithm 2.

Readings. The appendix counts *singular values* up to 95 % of their sum, the authors' code *variances* (their
squares) of the centred gradients; all four combinations are reported. Everything follows from the Gram matrix
K = G Gᵀ of each layer, in float64: the singular values are the roots of its eigenvalues, and with K u = σ² u
the cosine of gradient i and principal direction v = Gᵀ u / σ is σ u_i / ‖g_i‖. So memory is T × D once.

Shape suffixes: T rounds, D parameters, P principal directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedmpi.analysis.page import Page, Table, png, prepare
from fedmpi.analysis.plots import figure, look, maps, tidy
from fedmpi.analysis.watch import Mean, Watched
from fedmpi.config import Config
from fedmpi.engine.passes import Sent
from fedmpi.spec import Spec

Measure = Literal["variance", "singular"]
MEASURES: tuple[Measure, ...] = ("variance", "singular")
SHARES = (0.95, 0.99)
WHOLE = "all layers"

_BLOCK = 1 << 18  # numbers of a row that are made float64 at a time


def eigen(gram_TT: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues σ² ``(T,)``, decreasing, ≥ 0, and eigenvectors u as columns ``(T, T)`` of a Gram matrix.

    ``center``: of the gradients less their mean, H K H with H = I − 1/T.
    """
    if center:
        gram_TT = gram_TT - gram_TT.mean(0)
        gram_TT = gram_TT - gram_TT.mean(1, keepdim=True)
    values_T, vectors_TT = torch.linalg.eigh(gram_TT)
    return values_T.flip(0).clamp(min=0), vectors_TT.flip(1)


def components(values_T: Tensor, share: float, measure: Measure) -> int:
    """N-PCA: the fewest leading components with ``share`` of the variance or of the singular values' sum.

    1 for gradients that are all zero (or, centred, all equal).
    """
    weight_T = values_T if measure == "variance" else values_T.sqrt()
    reached_T = weight_T.cumsum(0) >= share * weight_T.sum() * (1 - 1e-12)  # equality must survive rounding
    return int(reached_T.int().argmax()) + 1


def overlap(gram_TT: Tensor, share: float, measure: Measure, center: bool) -> Tensor:
    """Cosines of the gradients and their leading principal directions, ``(T, P)``.

    A direction's sign is free: its largest cosine is made positive. A zero gradient has cosine 0.
    """
    values_T, vectors_TT = eigen(gram_TT, center)
    count = components(values_T, share, measure)
    u_TP, sigma_P = vectors_TT[:, :count], values_T[:count].sqrt()
    dots_TP = gram_TT @ u_TP  # for centred gradients v = (H G)ᵀ u / σ, and H u = u
    cosine_TP = dots_TP / sigma_P.clamp(min=1e-300) / _norms(gram_TT)[:, None]
    largest_P = cosine_TP.gather(0, cosine_TP.abs().argmax(0, keepdim=True))[0]
    return cosine_TP * torch.where(largest_P < 0, -1.0, 1.0)


def cosines(gram_TT: Tensor) -> Tensor:
    """Pairwise cosines ``(T, T)``; 0 with a zero gradient."""
    norm_T = _norms(gram_TT)
    return gram_TT / norm_T[:, None] / norm_T


def _norms(gram_TT: Tensor) -> Tensor:
    norm_T = gram_TT.diagonal().clamp(min=0).sqrt()
    return norm_T.where(norm_T > 0, torch.inf)


def layers(spec: Spec) -> dict[str, slice]:
    """The parameters of each module (weight and bias together), in the model's order."""
    spans: dict[str, slice] = {}
    start = 0
    for name, size in zip(spec.names, spec.sizes, strict=True):
        module = name.rpartition(".")[0] or name
        first = spans[module].start if module in spans else start
        spans[module] = slice(first, start + size)
        start += size
    return spans


class Gradients:
    """The gradients of up to T rounds, and each layer's Gram matrix of those so far.

    Args:
      spec: the parameters' layout.
      rounds: T.
      file: keep them in this file instead of in memory (T · D · 4 bytes).
    """

    def __init__(self, spec: Spec, rounds: int, file: Path | None = None) -> None:
        shape = (rounds, spec.size)
        if file is None:
            self.g_TD = torch.empty(shape)
        else:
            self.g_TD = torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))
        self.layers, self.rounds = layers(spec), 0
        self.gram = {name: torch.zeros(rounds, rounds, dtype=torch.float64) for name in self.layers}

    def add(self, g_D: Tensor) -> None:
        """The next round's gradient; one pass over those before it."""
        t = self.rounds
        self.g_TD[t] = g_D
        for name, span in self.layers.items():
            for start in range(span.start, span.stop, _BLOCK):
                block = slice(start, min(start + _BLOCK, span.stop))
                new = self.g_TD[t, block].double()
                for i in range(t + 1):
                    self.gram[name][t, i] += self.g_TD[i, block].double() @ new
            self.gram[name][:t, t] = self.gram[name][t, :t]
        self.rounds += 1

    def grams(self) -> dict[str, Tensor]:
        """Gram matrices of the rounds so far, the whole model's first."""
        n = self.rounds
        parts = {name: gram_TT[:n, :n] for name, gram_TT in self.gram.items()}
        return {WHOLE: torch.stack(list(parts.values())).sum(0), **parts}


def progress(gram_TT: Tensor, measure: Measure, center: bool) -> dict[float, list[int]]:
    """N-PCA of the first 1, 2, … T gradients, by share."""
    found: dict[float, list[int]] = {share: [] for share in SHARES}
    for t in range(1, len(gram_TT) + 1):
        values_T, _ = eigen(gram_TT[:t, :t], center)
        for share in SHARES:
            found[share].append(components(values_T, share, measure))
    return found


def analyze(
    config: Config,
    out: Path,
    measure: Measure = "variance",
    center: bool = True,
    schedule: str = "constant",
    memmap: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train as ``config`` says and write ``subspace.md``, ``.html``, ``.json`` and pictures into ``out``.

    Args:
      config: the run; gradients are those that clients compute, whatever its method makes of them.
      out: the folder.
      measure: the principal directions that are drawn explain 99 % of this.
      center: they are of the centred gradients.
      schedule: of the learning rates: constant, linear or cosine.
      memmap: keep the gradients in a file of ``out`` while it runs, not in memory.
      quiet: show no progress.

    Returns:
      What a claim rests on: N-PCA as a number and as a share of the rounds, by measure and centring.

    Raises:
      FedMPIError: as the run does, or ``out`` cannot be written.
    """
    prepare(out, "--out")
    run = Watched(config, lambda sent: see(sent), schedule)
    mean, sizes = Mean(run.spec.size), run.simulation.partition.sizes
    file = out / "gradients.f32" if memmap else None
    gradients = Gradients(run.spec, config.rounds, file)

    def see(sent: Sent) -> None:
        if sent.codec is run.simulation.method.up:
            mean.add(sent.update.g_CD, sizes[sent.ctx.clients_C])

    try:
        lines = run.train("subspace", quiet, after=lambda t: gradients.add(mean.take()))
    finally:
        if file is not None:
            file.unlink()
    grams = gradients.grams()
    found = {(m, c): progress(grams[WHOLE], m, c) for m, c in itertools.product(MEASURES, (True, False))}
    summary = _summary(config, schedule, grams, found, lines)
    _page(config, gradients, grams, found, lines, (measure, center), summary).write(
        out,
        "subspace",
        {
            "summary": summary,
            "npca": {_called(*k): {f"N{100 * s:.0f}": n for s, n in v.items()} for k, v in found.items()},
            "accuracy": [line["accuracy"] for line in lines],
            "cosine": {name: cosines(gram_TT).tolist() for name, gram_TT in grams.items()},
            "overlap": {
                name: overlap(gram_TT, 0.99, measure, center).tolist() for name, gram_TT in grams.items()
            },
        },
    )
    return summary


def _called(measure: Measure, center: bool) -> str:
    return f"{measure}, {'centred' if center else 'not centred'}"


def _summary(
    config: Config,
    schedule: str,
    grams: dict[str, Tensor],
    found: dict[tuple[Measure, bool], dict[float, list[int]]],
    lines: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    cosine_TT = cosines(grams[WHOLE])
    summary = {
        "data": config.data.name,
        "model": config.model.name,
        "rounds": config.rounds,
        "seed": config.seed,
        "schedule": schedule,
        "accuracy": lines[-1]["accuracy"],
        "consecutive_cosine": float(cosine_TT.diagonal(1).mean()) if len(cosine_TT) > 1 else None,
    }
    for (measure, center), counts in found.items():
        for share, numbers in counts.items():
            name = f"N{100 * share:.0f} ({_called(measure, center)})"
            summary[name] = numbers[-1]
            summary[f"{name} / rounds"] = numbers[-1] / config.rounds
    return summary


def _page(
    config: Config,
    gradients: Gradients,
    grams: dict[str, Tensor],
    found: dict[tuple[Measure, bool], dict[float, list[int]]],
    lines: Sequence[dict[str, Any]],
    shown: tuple[Measure, bool],
    summary: dict[str, Any],
) -> Page:
    page = Page(f"Gradient space of {config.model.name} on {config.data.name}")
    accuracy = 100 * summary["accuracy"]
    page.text(
        f"{config.rounds} gradients of {gradients.g_TD.shape[1]:,} parameters, one a round "
        f"({config.clients} {'client' if config.clients == 1 else 'clients'}, η = {config.local.lr:g}, "
        f"{summary['schedule']} learning rate, seed {config.seed}); accuracy at the end {accuracy:.2f} %."
    )
    page.heading("Components that explain the gradients so far")
    page.table(_table(found, config.rounds))
    page.picture("pca", _progress_picture(found, lines), "N-PCA by round (top) and accuracy (bottom)")
    page.heading("Actual and principal gradients")
    titles = {name: f"{name}\n{_elements(gradients, name):,} elements" for name in grams}
    page.picture(
        "overlap",
        maps(
            {titles[n]: overlap(k, 0.99, *shown) for n, k in grams.items()},
            "principal gradient",
            "round",
            title="cosine",
        ),
        f"Cosine of each round's gradient and the principal gradients with 99 % ({_called(*shown)})",
    )
    page.heading("Consecutive gradients")
    page.picture(
        "cosine",
        maps({titles[n]: cosines(k) for n, k in grams.items()}, "round", "round", title="cosine"),
        "Pairwise cosine of the rounds' gradients",
    )
    if summary["consecutive_cosine"] is not None:
        page.text(f"Mean cosine of two consecutive gradients: {summary['consecutive_cosine']:.3f}.")
    return page


def _elements(gradients: Gradients, name: str) -> int:
    span = gradients.layers.get(name, slice(0, gradients.g_TD.shape[1]))
    return int(span.stop - span.start)


def _table(found: dict[tuple[Measure, bool], dict[float, list[int]]], rounds: int) -> Table:
    names = [f"N{100 * share:.0f}-PCA" for share in SHARES]
    rows = [["counted", *names, *(f"{name} / rounds" for name in names)]]
    for key, counts in found.items():
        last = [counts[share][-1] for share in SHARES]
        rows.append([_called(*key), *map(str, last), *(f"{100 * n / rounds:.0f} %" for n in last)])
    return rows


def _progress_picture(
    found: dict[tuple[Measure, bool], dict[float, list[int]]], lines: Sequence[dict[str, Any]]
) -> bytes:
    picture = figure(8, 7)
    top, bottom = picture.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    rounds = range(1, len(lines) + 1)
    for i, (key, counts) in enumerate(found.items()):
        for share, numbers in counts.items():
            style = {"color": look(i)["color"], "linestyle": "-" if share == SHARES[-1] else "--"}
            top.step(rounds, numbers, where="mid", label=f"N{100 * share:.0f}: {_called(*key)}", **style)
    top.plot(rounds, rounds, color="0.75", linewidth=1, label="as many as gradients")
    top.set_ylim(0, 1.15 * max(max(n) for counts in found.values() for n in counts.values()))
    top.set(ylabel="components", title="Components for 95 % and 99 %")
    top.legend(fontsize=8, frameon=False)
    points = [(line["round"] + 1, 100 * line["accuracy"]) for line in lines if line["accuracy"] is not None]
    bottom.plot(*zip(*points, strict=True), color="black")
    bottom.set(xlabel="round", ylabel="accuracy (%)")
    for axes in (top, bottom):
        tidy(axes)
    return png(picture)
