"""Who holds what: a partition as a table and a picture.

Shape suffixes: C clients, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.analysis.page import png
from fedmpi.analysis.plots import figure
from fedmpi.engine.record import write_aside, writing

_SHOWN = 20  # clients in the table
_COLUMNS = 100  # clients in the picture, at most


class Holdings(NamedTuple):
    sizes: Tensor  # int64 (C,): samples of each client
    count_CK: Tensor | None  # int64: its samples of each class, where samples have a class


def holdings(index_N: Tensor, offset: Tensor, y_N: Tensor, classes: int) -> Holdings:
    """What each client holds of a partition (samples grouped by client, and where each client's begin)."""
    sizes = offset.diff()
    if y_N.dim() != 1 or y_N.dtype != torch.int64:
        return Holdings(sizes, None)
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    cell = owner * classes + y_N[index_N]
    return Holdings(sizes, cell.bincount(minlength=len(sizes) * classes).view(-1, classes))


def table(held: Holdings) -> str:
    """Sizes, classes a client, and the first clients."""
    sizes = held.sizes
    quartiles = sizes.double().quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
    lines = [
        f"{len(sizes)} clients, {int(sizes.sum())} samples; samples a client (least, quartiles, most): "
        + ", ".join(f"{q:g}" for q in quartiles.tolist())
    ]
    if held.count_CK is not None:
        number, clients = (held.count_CK > 0).sum(1).unique(return_counts=True)
        share = ", ".join(
            f"{n} ({c} clients)" for n, c in zip(number.tolist(), clients.tolist(), strict=True)
        )
        lines.append(f"classes a client: {share}")
        lines.append(f"samples a class: {', '.join(map(str, held.count_CK.sum(0).tolist()))}")
    lines += ["", "client  samples" + ("" if held.count_CK is None else "  class: samples")]
    for client in range(min(_SHOWN, len(sizes))):
        line = f"{client:6}  {int(sizes[client]):7}"
        if held.count_CK is not None:
            row = held.count_CK[client]
            line += "  " + "  ".join(f"{k}: {int(row[k])}" for k in row.nonzero()[:, 0].tolist())
        lines.append(line)
    if len(sizes) > _SHOWN:
        lines.append(f"… and {len(sizes) - _SHOWN} more")
    return "\n".join(lines)


def plot(held: Holdings, title: str, path: Path) -> None:
    """A PNG: the samples of each class at each client (the first hundred), and the sizes of all in order.

    Raises:
      ConfigError: ``path`` cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    rows = 1 if held.count_CK is None else 2
    picture = figure(9, 3 * rows)
    picture.suptitle(title)
    if held.count_CK is not None:
        count_CK = held.count_CK[:_COLUMNS]
        axes = picture.add_subplot(rows, 1, 1)
        image = axes.imshow(
            count_CK.T.numpy(), aspect="auto", interpolation="nearest", cmap="Blues", origin="lower", vmin=0
        )
        picture.colorbar(image, label="samples")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(
                MaxNLocator(integer=True, min_n_ticks=1)
            )  # clients and classes are numbers
        more = len(held.sizes) - len(count_CK)
        axes.set(xlabel="client" + (f" (the first {_COLUMNS}; {more} more)" if more else ""), ylabel="class")
    axes = picture.add_subplot(rows, 1, rows)
    ordered = held.sizes.sort(descending=True).values.numpy()
    axes.fill_between(range(1, len(ordered) + 1), ordered, step="mid", alpha=0.3)
    axes.plot(range(1, len(ordered) + 1), ordered, drawstyle="steps-mid")
    axes.set(xlabel="clients, the largest first", ylabel="samples", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if float(ordered[0]) > 50 * max(1, int(ordered[-1])):
        axes.set(xscale="log", yscale="log", ylim=(0.8, None))
    with writing(path.parent, "--plot"):
        write_aside(path, png(picture))
