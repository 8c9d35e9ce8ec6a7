"""What a data set is, whatever file it comes from.

Sequences of tokens are int64 ``(N, L)`` filled up with :data:`PAD`, so that one tensor carries the tokens and
the attention mask, and is cut into batches as images are. Targets that do not count are :data:`IGNORE`.

Shape suffixes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks import Options

Places = tuple[Path, ...]

PAD = -1  # in place of a token: no vocabulary has it, so it needs no mask beside it
IGNORE = -100  # in place of a target: torch's cross entropy leaves it out


class Split(NamedTuple):
    x: Tensor  # (N, *shape): float32, or int64 tokens
    y: Tensor  # (N,) int64 in [0, classes); (N, H, W) or (N, L) int64 with IGNORE; (N,) or (N, values) float32
    groups: Tensor | None = (
        None  # (N,) int64: whose sample it is, where the data say so (writer, personality)
    )


class Data(NamedTuple):
    """A data set. Its tensors are shared by all threads of a process: read them, never write."""

    name: str
    train: Split
    test: Split
    classes: int  # outputs that a model needs: classes, values to predict or words of the vocabulary
    notes: tuple[str, ...] = ()  # what a user should know of how it was read

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape, e.g. ``(1, 28, 28)``."""
        return tuple(self.train.x.shape[1:])


class DataOptions(Options):
    folder: str | None = Field(None, description="where it lies (default: $FEDMPI_DATA, ~/.cache/fedmpi)")
    limit: PositiveInt | None = Field(None, description="take only the first so many samples of each set")


def default_folder() -> Path:
    """``$FEDMPI_DATA``, else ``~/.cache/fedmpi``; a data set lives in the sub-folder of its name."""
    return Path(os.environ.get("FEDMPI_DATA") or Path.home() / ".cache" / "fedmpi")


def locate(name: str, places: Places, wanted: tuple[str, ...], subs: tuple[str, ...], remedy: str) -> Path:
    """The first folder that has all of ``wanted`` (paths inside it).

    Args:
      name: of the data set, also a sub-folder to look in.
      places: folders for data sets.
      wanted: files or folders.
      subs: further sub-folders to look in, as archives unpack them.
      remedy: what a user can do, for the error.

    Raises:
      DataError: there is none; says where it looked, for what, and what to do.
    """
    folders = [place / sub for place in places for sub in (name, *(f"{name}/{s}" for s in subs), *subs, "")]
    for folder in folders:
        if all((folder / path).exists() for path in wanted):
            return folder
    raise DataError(
        f"{name}: no complete data in {', '.join(str(place / name) for place in places)} (or beside it); "
        f"expected in one folder: {', '.join(wanted)}. {remedy}"
    )


def normalised(train_NCHW: Tensor, test_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 pixels → float32, less the training set's mean over its deviation, each channel by itself.

    The sums are of integers, so mean and deviation are the same on every machine.
    """
    channels = train_NCHW.shape[1]
    out = tuple(pixels.float().div_(255) for pixels in (train_NCHW, test_NCHW))
    for c in range(channels):
        count = torch.bincount(train_NCHW[:, c].flatten(), minlength=256)
        value = torch.arange(256)
        n, first, second = (int((count * value**power).sum()) for power in (0, 1, 2))
        mean = first / n / 255
        deviation = max((second / n - (first / n) ** 2) ** 0.5 / 255, 1 / 255)
        for x in out:
            x[:, c].sub_(mean).div_(deviation)
    return out[0], out[1]


def numbered(names: list[str]) -> Tensor:
    """A number for each different name, int64 ``(N,)``, in the order of the names' first appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
