"""Noise as a data set, of any number of samples: for measurements of what does not depend on the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fedmpi import random
from fedmpi.tasks.data import Data, Split

PATH = f"{__name__}:load"
"""A configuration's ``data.name``."""

FEATURES, CLASSES = 16, 10
_DIFFERENT = 4096  # samples, which repeat


def load(folder: Path, samples: int, shape: Sequence[int] = (FEATURES,)) -> Data:
    """``samples`` training and 256 test samples of this shape; nothing is read from ``folder``."""
    key = random.key(0, stream="noise")
    rows = random.normal(key, _DIFFERENT * math.prod(shape)).view(_DIFFERENT, *shape)
    train = Split(rows[torch.arange(samples) % _DIFFERENT], torch.arange(samples) % CLASSES)
    return Data("noise", train, Split(rows[:256], torch.arange(256) % CLASSES), CLASSES)
