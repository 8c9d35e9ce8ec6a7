"""``fedmpi analyze inversion``: how much of an image a client's message gives away, by method.

Source: the intrinsic compression paper, section 5.1 and figure 3: the attack of Zhu et al. 2019
(:mod:`fedmpi.analysis.leak`) on the full and on the compressed gradient of one image.

Shape suffixes: P channels, H × W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmpi import methods, random
from fedmpi.analysis.leak import Defence, Observed, Victim, attack, observe
from fedmpi.analysis.page import Page, Table, png, prepare
from fedmpi.analysis.plots import figure, mean_error
from fedmpi.analysis.watch import Steps, plain
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.method import Method
from fedmpi.methods import METHODS
from fedmpi.methods.base import Options, Setup
from fedmpi.tasks.data import Split


def options_for(name: str, size: int, pixels: int) -> dict[str, dict[str, Any]]:
    """What a method is attacked with when nothing else is said, by title: one number sent for a hundred of
    ``size`` parameters, and for subspaces also the paper's proportion of dimensions to numbers of an image,
    65,536 to 3 · 224²."""
    few = max(1, size // 100)
    if name == "intrinsic":
        dims = (few, max(1, round(pixels * 65536 / (3 * 224**2))))
        return {f"intrinsic, d={dim}": {"dim": dim} for dim in dims}
    known: dict[str, dict[str, Any]] = {
        "topk": {"ratio": 0.01},
        "randomk": {"ratio": 0.01},
        "rtopk": {"ratio": 0.01},
        "prune": {"keep": 0.1, "inner": {"name": "topk", "ratio": 0.01}},
        "fetchsgd": {"rows": 5, "columns": max(1, few // 5), "k": max(1, few // 10)},
    }
    if name == "lookback":
        return {"lookback, in full": {"threshold": 0.0}, "lookback, scalar": {"threshold": 1.0}}
    return {name: known.get(name, {key: v for key, v in METHODS[name].example.items() if key != "feedback"})}


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared error of two images in [0, 1]."""
    return float((a - b).double().square().mean())


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal images."""
    error = mse(a, b)
    return -10 * math.log10(error) if error else math.inf


def ssim(a_PHW: Tensor, b_PHW: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of two images in [0, 1], the mean over channels and places.

    A Gaussian window of 11 (on smaller images: the largest odd number that fits) and deviation 1.5, no padding.
    """
    size = min(11, *(n - 1 + n % 2 for n in a_PHW.shape[1:]))
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = a_PHW.double()[:, None], b_PHW.double()[:, None]

    def mean(values: Tensor) -> Tensor:
        return nn.functional.conv2d(values, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


class Outcome(NamedTuple):
    """One attack."""

    image: Tensor  # (P, H, W) in [0, 1]
    mse: float
    psnr: float
    ssim: float

    @classmethod
    def of(cls, image: Tensor, truth: Tensor) -> Outcome:
        return cls(image, mse(truth, image), psnr(truth, image), ssim(truth, image))


class Row(NamedTuple):
    """One method's attacks, an image each."""

    title: str
    nbytes: int
    how: str
    outcomes: list[Outcome]


def _unit(x_N: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes the range of these samples to [0, 1]."""
    low, high = float(x_N.min()), float(x_N.max())
    return lambda x: (x - low) / (high - low)


def analyze(
    config: Config,
    out: Path,
    chosen: Sequence[Any] = (),
    images: int = 2,
    iterations: int = 200,
    optimizer: str = "lbfgs",
    clip: float | None = None,
    noise: float = 0.0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Attack every method's message and write ``inversion.md``, ``.html``, ``.json`` and a picture.

    Args:
      config: its data, model, loss and seed.
      out: the folder.
      chosen: methods, names or options (default: all, at about one number sent for a hundred parameters).
      images: how many images are attacked, one message each.
      iterations: of the optimizer.
      optimizer: lbfgs or adam.
      clip: the client's defence: the length that gradients are clipped to; each method is then attacked
        without and with it.
      noise: and the deviation of the noise, in units of ``clip``.
      quiet: show no progress.

    Returns:
      What a claim rests on: mean PSNR, SSIM and MSE by method.

    Raises:
      ConfigError: a method that does not fit, data that are no images, or noise without clip.
      FedMPIError: the data cannot be read, or ``out`` cannot be written.
    """
    if noise < 0 or (noise and clip is None) or (clip is not None and clip <= 0):
        raise ConfigError(
            f"--noise: expected at least 0, and with it a --clip above 0, got {noise:g} and {clip}"
        )
    prepare(out, "--out")
    victim = Victim(plain(config))
    data = victim.data
    if len(data.shape) != 3 or not data.train.x.is_floating_point():
        raise ConfigError(f"data: expected images (channels, height, width), got samples {data.shape}")
    todo = _methods(chosen, victim.spec.size, math.prod(data.shape))
    unit = _unit(data.train.x)
    picked = random.sample(random.key(config.seed, stream="attacked"), len(data.train.y), images + 1)
    pairs = [Split(data.train.x[picked[[-1, i]]], data.train.y[picked[[-1, i]]]) for i in range(images)]
    defences = [None] if clip is None else [None, Defence(clip, noise)]
    steps, rows = Steps(len(todo) * len(defences) * images, quiet), []
    for defence in defences:
        for title, options in todo.items():
            method = methods.build(options, victim.spec, Setup(config.seed))
            title = title if defence is None else f"{title}, clipped + noise"
            outcomes = []
            for i, pair in enumerate(pairs):
                steps.step(f"{title}, image {i + 1}")
                seen, found = _attack(config.seed, victim, method, pair, i, defence, iterations, optimizer)
                outcomes.append(Outcome.of(unit(found).clamp(0, 1), unit(pair.x[1])))
            rows.append(Row(title, seen.nbytes, seen.how, outcomes))
    summary = _summary(config, victim.spec.size, rows, iterations, clip, noise)
    _page(config, rows, [unit(pair.x[1]) for pair in pairs], summary, optimizer).write(
        out, "inversion", {"summary": summary}
    )
    return summary


def _attack(
    seed: int,
    victim: Victim,
    method: Method,
    pair: Split,
    i: int,
    defence: Defence | None,
    iterations: int,
    optimizer: str,
) -> tuple[Observed, Tensor]:
    """The i-th image's message (the second of ``pair``; the first is the round before's) and what it gives away."""

    def gradient(theta_D: Tensor, t: int) -> Tensor:
        g_D = victim.gradient(theta_D, pair.x[t], int(pair.y[t])).float()
        return g_D if defence is None else defence(g_D, random.key(seed, t, i, "privacy noise"))

    theta_D, seen = observe(method, victim.spec, victim.theta_D, gradient, seed)
    key = random.key(seed, client=i, stream="first guess")
    guess = random.normal(key, pair.x[1].numel()).view(pair.x[1].shape)
    return seen, attack(victim, theta_D, seen, int(pair.y[1]), guess, iterations, optimizer)


def _methods(chosen: Sequence[Any], size: int, pixels: int) -> dict[str, Options]:
    """Options by title.

    Raises:
      ConfigError: an unknown method or option.
    """
    todo: dict[str, Options] = {}
    for value in chosen or METHODS:
        if isinstance(value, str) and value in METHODS:
            for title, given in options_for(value, size, pixels).items():
                todo[title] = methods.parse({"name": value, **given}, "METHOD")
        else:
            options = methods.parse(value, "METHOD")
            shown = {} if isinstance(value, str) else {k: v for k, v in value.items() if k != "name"}
            todo[", ".join([options.name, *(f"{k}={v}" for k, v in shown.items())])] = options
    return todo


def _summary(
    config: Config, size: int, rows: Sequence[Row], iterations: int, clip: float | None, noise: float
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "data": config.data.name,
        "model": config.model.name,
        "parameters": size,
        "iterations": iterations,
        "clip": clip,
        "noise": noise,
        "seed": config.seed,
    }
    for row in rows:
        for name in ("psnr", "ssim", "mse"):
            values = [min(getattr(o, name), 100.0) for o in row.outcomes]  # of equal images it is infinite
            summary[f"{row.title}: {name}"] = mean_error(values)[0]
    return summary


def _page(
    config: Config, rows: Sequence[Row], truths: Sequence[Tensor], summary: dict[str, Any], optimizer: str
) -> Page:
    page = Page(f"Images from messages: {config.model.name} on {config.data.name}")
    page.text(
        f"Gradient matching (Zhu et al. 2019) with {optimizer}, {summary['iterations']} iterations, on the message of "
        f"one image's gradient; {summary['parameters']:,} parameters, tanh for ReLU, label known, seed "
        f"{config.seed}. Compared: payload (the guess is compressed, too) or decoded gradient."
    )
    if summary["clip"] is not None:
        page.text(
            f"Defence: clipped to length {summary['clip']:g}, noise {summary['noise']:g} times that an entry."
        )
    page.table(_table(rows, 4 * summary["parameters"]), left=2)
    page.picture("images", _picture(rows, truths), "Original and reconstructions, by method; SSIM below")
    return page


def _table(rows: Sequence[Row], full: int) -> Table:
    table = [["method", "compared", "bytes", "smaller", "PSNR (dB)", "SSIM", "MSE"]]
    for row in rows:
        cells = []
        for name, digits in (("psnr", 1), ("ssim", 3), ("mse", 4)):
            mean, error = mean_error([min(getattr(o, name), 100.0) for o in row.outcomes])
            cells.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(row.outcomes) > 1 else ""))
        table.append([row.title, row.how, f"{row.nbytes:,}", f"{full / row.nbytes:.1f}x", *cells])
    return table


def _picture(rows: Sequence[Row], truths: Sequence[Tensor]) -> bytes:
    across = 6
    cells = len(rows) + 1
    bands = -(-cells // across)
    picture = figure(1.7 * across, 1.95 * bands * len(truths) + 0.2)
    grid: Any = picture.subplots(bands * len(truths), across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, truth in enumerate(truths):
        shown = [("original", truth, "")]
        shown += [(row.title, row.outcomes[i].image, f"{row.outcomes[i].ssim:.2f}") for row in rows]
        for n, (title, image, quality) in enumerate(shown):
            axes = grid[i * bands + n // across][n % across]
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title.replace(", clipped", ",\nclipped"), fontsize=8)
            axes.text(0.5, -0.02, quality, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    return png(picture)
