"""Noise as a data set, of any number of samples: for measurements of what does not depend on the samples."""

from __future__ import annotations

from pathlib import Path

import torch

from fedmpi import random
from fedmpi.tasks.data import Data, Split

PATH = f"{__name__}:load"
"""A configuration's ``data.name``."""

FEATURES, CLASSES = 16, 10
_DIFFERENT = 4096  # samples, which repeat


def load(folder: Path, samples: int, features: int = FEATURES, classes: int = CLASSES) -> Data:
    """``samples`` training and 256 test samples of so many numbers; nothing is read from ``folder``."""
    rows = random.normal(random.key(0, stream="noise"), _DIFFERENT * features).view(_DIFFERENT, features)
    index = torch.arange(samples)
    train = Split(rows.repeat(-(-samples // _DIFFERENT), 1)[:samples].clone(), index % classes)
    return Data("noise", train, Split(rows[:256], torch.arange(256) % classes), classes)
