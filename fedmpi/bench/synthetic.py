"""Noise as a data set, of any number of samples: for measurements of what does not depend on the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fedmpi import random
from fedmpi.tasks.data import Data, Split

PATH = f"{__name__}:load"
"""A configuration's ``data.name``."""

NORM_CNN, NORM_MLP = f"{__name__}:norm_cnn", f"{__name__}:norm_mlp"
"""A configuration's ``model.name``."""

FEATURES, CLASSES = 16, 10
_DIFFERENT = 4096  # samples, which repeat


def load(folder: Path, samples: int, shape: Sequence[int] = (FEATURES,)) -> Data:
    """``samples`` training and 256 test samples of this shape; nothing is read from ``folder``."""
    key = random.key(0, stream="noise")
    rows = random.normal(key, _DIFFERENT * math.prod(shape)).view(_DIFFERENT, *shape)
    train = Split(rows[torch.arange(samples) % _DIFFERENT], torch.arange(samples) % CLASSES)
    return Data("noise", train, Split(rows[:256], torch.arange(256) % CLASSES), CLASSES)


def norm_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions and a hidden layer, each with batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (shape[1] // 4) * (shape[2] // 4), 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, classes),
    )


def norm_mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A hidden layer with batch norm."""
    return nn.Sequential(
        *(
            nn.Flatten(),
            nn.Linear(math.prod(shape), 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )
    )
