"""FEMNIST as LEAF makes it (Caldas et al., "LEAF: a benchmark for federated settings", 2018): JSON files of
``{"users": […], "user_data": {user: {"x": [784 numbers in 0 … 1], "y": [labels]}}}``, a user a writer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, locate, normalised, numbered
from fedmpi.tasks.readers.lines import kind, read_json


def femnist(options: DataOptions, places: Places) -> Data:
    """All JSON files of ``train`` and ``test``; 62 classes; the natural groups are the writers."""
    remedy = f"Put LEAF's data/train and data/test into {places[0]}/femnist"
    folder = locate("femnist", places, ("train", "test"), ("data",), remedy)
    (train_x, train_y, writers), (test_x, test_y, others) = (
        _part(folder / part) for part in ("train", "test")
    )
    x, groups = normalised(train_x, test_x), numbered([*writers, *others])
    test = Split(x[1], test_y, groups[len(writers) :])
    return Data("femnist", Split(x[0], train_y, groups[: len(writers)]), test, 62)


def _part(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: expected LEAF's JSON files, got none")
    images, labels, writers = [], [], []
    for path in files:
        for user, pixels, y in users_of(path, _samples):
            images.append(pixels)
            labels.append(y)
            writers += [user] * len(y)
    return torch.cat(images), torch.cat(labels), writers


def users_of(path: Path, read: Callable[[Path, str, Any], tuple[Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Each user of a file with what ``read`` makes of the samples.

    Raises:
      DataError: the file is not as LEAF writes it.
    """
    content = read_json(path)
    users = content.get("user_data") if isinstance(content, dict) else None
    if not isinstance(users, dict) or not users:
        raise DataError(
            f"{path}: expected an object with user_data of at least one user, got {kind(content)}"
        )
    found = [(user, *read(path, user, samples)) for user, samples in users.items()]
    # LEAF writes the names and counts beside the samples: what was cut off does not go unseen.
    counts = {user: len(labels) for user, _, labels in found}
    names = content.get("users", [*counts])
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(counts):  # in any order
        raise DataError(
            f"{path}: expected users to be those of user_data, got {names!r:.80} and {[*counts]!r:.80}"
        )
    expected = [counts[str(name)] for name in names]
    if (told := content.get("num_samples", expected)) != expected:
        raise DataError(f"{path}: expected num_samples {expected!r:.80}, got {told!r:.80}")
    return found


def _samples(path: Path, user: str, samples: Any) -> tuple[Tensor, Tensor]:
    expected = f"{path}: user {user}: expected x of 784 numbers in 0 to 1 and y of labels 0 to 61"
    try:
        if wrong := [row for row in samples["x"] if not isinstance(row, list) or len(row) != 784]:
            raise ValueError(f"the picture {wrong[0]!r:.40}")
        kinds = {type(value) for row in samples["x"] for value in row}
        if not kinds <= {int, float}:
            raise TypeError(f"pixels of {', '.join(sorted(kind.__name__ for kind in kinds))}")
        x = np.asarray(samples["x"], dtype=np.float64).reshape(-1, 1, 28, 28)
        if wrong := [label for label in samples["y"] if type(label) not in (int, float) or label % 1]:
            raise ValueError(f"the label {wrong[0]!r:.40}")
        y = np.asarray(samples["y"], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{expected}, got {type(error).__name__}: {error}") from error
    if len(x) != len(y) or not len(y):
        raise DataError(f"{expected}, one each, got {len(x)} images and {len(y)} labels")
    if not (x.min() >= 0 and x.max() <= 1 and y.min() >= 0 and y.max() <= 61):
        raise DataError(f"{expected}, got x in {x.min():g} to {x.max():g}, y in {y.min()} to {y.max()}")
    return torch.from_numpy((x * 255).round().astype(np.uint8)), torch.from_numpy(y)
