"""CelebA's aligned faces and their five landmarks (Liu, Luo, Wang, Tang, "Deep learning face attributes in the
wild", ICCV 2015), from ``img_align_celeba``, ``list_landmarks_align_celeba.txt``, ``list_eval_partition.txt`` and,
where it is there, ``identity_CelebA.txt``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import Data, Places, Split, locate, normalised, numbered
from fedmpi.tasks.readers.images import ImageOptions, read_image
from fedmpi.tasks.readers.lines import inside, text_lines

_WIDTH, _HEIGHT = 178, 218
_NUMBER = re.compile(r"-?[0-9]{1,6}")
_LANDMARKS = "list_landmarks_align_celeba.txt"
_PARTS = "list_eval_partition.txt"
_WHO = "identity_CelebA.txt"


def celeba(options: ImageOptions, places: Places) -> Data:
    """Targets: x and y of eyes, nose and corners of the mouth as shares of width and height, float32
    ``(N, 10)``; the natural groups are the persons. The test set is part 2 of CelebA's own split."""
    remedy = f"Unpack img_align_celeba.zip and the two lists into {places[0]}/celeba"
    wanted = ("img_align_celeba", _LANDMARKS, _PARTS)
    folder = locate("celeba", places, wanted, ("Anno", "CelebA"), remedy)
    points = _landmarks(folder / _LANDMARKS)
    part = _table(folder / _PARTS, ("0", "1", "2"))
    if different := sorted(points.keys() ^ part.keys()):
        raise DataError(
            f"{folder / _PARTS}: expected the pictures of {_LANDMARKS}, got {different[0]!r:.80} in one of the two"
        )
    persons = _table(folder / _WHO) if (folder / _WHO).exists() else None
    splits = []
    for wanted_part in ("0", "2"):
        names = [name for name in points if part.get(name) == wanted_part][: options.limit]
        if not names:
            raise DataError(f"{folder / _PARTS}: expected pictures of part {wanted_part}, got none")
        pictures, size = folder / "img_align_celeba", ((_WIDTH, _HEIGHT), folder / _LANDMARKS)
        paths = [inside(pictures, name, folder / _LANDMARKS) for name in names]
        x = torch.stack([read_image(path, options.size, expected=size) for path in paths])
        y = torch.tensor([points[name] for name in names])
        splits.append(Split(x, y / torch.tensor([_WIDTH, _HEIGHT] * 5), _groups(folder, names, persons)))
    x, x_test = normalised(splits[0].x, splits[1].x)
    return Data("celeba", splits[0]._replace(x=x), splits[1]._replace(x=x_test), 10)


def _groups(folder: Path, names: list[str], persons: dict[str, str] | None) -> torch.Tensor | None:
    if persons is None:
        return None
    missing = next((name for name in names if name not in persons), None)
    if missing is not None:
        raise DataError(f"{folder / _WHO}: expected a line for {missing}, got none")
    return numbered([persons[name] for name in names])


def _landmarks(path: Path) -> dict[str, list[float]]:
    """Ten numbers for each picture, after a line with their count and a line of names."""
    lines = text_lines(path)
    if len(lines) < 3 or not lines[0].strip().isdecimal() or len(lines[0]) > 20:
        raise DataError(
            f"{path}: expected a count, a line of names and a line a picture, got {len(lines)} lines"
        )
    points = {}
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        if name in points:
            raise DataError(f"{path}, line {number}: expected each picture once, got {name!r} again")
        sizes = (_WIDTH, _HEIGHT) * 5
        if len(values) != 10 or not all(map(_NUMBER.fullmatch, values)):
            raise DataError(f"{path}, line {number}: expected a name and 10 whole numbers, got {line[:80]!r}")
        points[name] = [float(value) for value in values]
        # Some lie a little outside. None lies a whole picture away.
        if not all(-most <= value <= 2 * most for value, most in zip(points[name], sizes, strict=True)):
            raise DataError(
                f"{path}, line {number}: expected landmarks of a picture of {_WIDTH} × {_HEIGHT}, got {line[:80]!r}"
            )
    if len(points) != int(lines[0]):
        raise DataError(f"{path}: expected {int(lines[0])} pictures (its first line), got {len(points)}")
    return points


def _table(path: Path, valid: tuple[str, ...] = ()) -> dict[str, str]:
    """``name value`` a line."""
    table = {}
    for number, line in enumerate(text_lines(path), 1):
        words = line.split()
        if len(words) != 2 or (valid and words[1] not in valid):
            what = f"one of {', '.join(valid)}" if valid else "a value"
            raise DataError(f"{path}, line {number}: expected a name and {what}, got {line[:80]!r}")
        if words[0] in table:
            raise DataError(f"{path}, line {number}: expected each picture once, got {words[0]!r} again")
        table[words[0]] = words[1]
    return table
