"""Any data set that LEAF makes (Caldas et al., "LEAF: a benchmark for federated settings", 2018): FEMNIST, Shakespeare,
Sent140, Synthetic, or your own in its format.

``train`` and ``test`` hold JSON files of ``{"users": […], "user_data": {user: {"x": […], "y": […]}}}``. A sample is
numbers, in lists within lists, or text, which becomes tokens: a number for each character or word of the training set.

Shape suffixes: N samples, L tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import PAD, Data, DataOptions, Places, Split, locate, numbered
from fedmpi.tasks.readers.leaf import users_of
from fedmpi.tasks.readers.lines import kind

_FEW = 1000  # whole labels up to here are classes


class LeafOptions(DataOptions):
    text: Literal["characters", "words"] | None = Field(
        None, description="what of a text is a token (Shakespeare: characters); null: samples are numbers"
    )
    field: NonNegativeInt | None = Field(
        None,
        description="which entry of a sample is taken, where it is a list of several (Sent140's text: 4)",
    )
    length: PositiveInt = Field(80, description="tokens a sample at the most")
    words: PositiveInt = Field(
        10_000, description="the vocabulary's most frequent words; others are one more"
    )
    shape: tuple[PositiveInt, ...] | None = Field(
        None, description="of a sample of numbers, e.g. [1, 28, 28] (default: as they lie)", strict=False
    )


def leaf(options: LeafOptions, places: Places) -> Data:
    """The natural groups are the users, in both sets under the same numbers."""
    remedy = (
        f"Put LEAF's data/train and data/test into {places[0]}/leaf, or name their folder with data.folder"
    )
    folder = locate("leaf", places, ("train", "test"), ("data",), remedy)
    (x, y, users), (test_x, test_y, test_users) = (
        _part(folder / part, options) for part in ("train", "test")
    )
    groups = numbered([*users, *test_users])
    notes: tuple[str, ...] = ()
    if options.text is None:
        inputs, tests = (
            _numbers(folder / part, xs, options) for part, xs in (("train", x), ("test", test_x))
        )
    else:
        cut = (lambda text: [*text]) if options.text == "characters" else str.split
        vocabulary = _vocabulary([*x, *(label for label in y if isinstance(label, str))], cut, options)
        inputs, tests = (_tokens(texts, vocabulary, cut, options.length) for texts in (x, test_x))
        notes = (f"data: a vocabulary of {len(vocabulary) + 1} {options.text}, the last for all others",)
        y, test_y = (
            [vocabulary.get(label, len(vocabulary)) if isinstance(label, str) else label for label in labels]
            for labels in (y, test_y)
        )
    targets, test_targets, classes = _targets(folder, y, test_y)
    if options.text and any(isinstance(label, str) for label in y):
        classes = len(vocabulary) + 1
    train = Split(inputs, targets, groups[: len(y)])
    return Data("leaf", train, Split(tests, test_targets, groups[len(y) :]), classes, notes)


def _part(folder: Path, options: LeafOptions) -> tuple[list[Any], list[Any], list[str]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: expected LEAF's JSON files, got none")
    xs, ys, users = [], [], []
    for path in files:
        for user, x, y in users_of(path, lambda path, user, samples: _samples(path, user, samples, options)):
            xs += x
            ys += y
            users += [user] * len(y)
    return xs, ys, users


def _samples(path: Path, user: str, samples: Any, options: LeafOptions) -> tuple[list[Any], list[Any]]:
    title = f"{path}: user {user}"
    x, y = (samples.get(field) if isinstance(samples, dict) else None for field in ("x", "y"))
    if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y) or not y:
        raise DataError(
            f"{title}: expected lists x and y of equally many samples, got {kind(x)} and {kind(y)}"
        )
    if options.field is not None:
        if wrong := [one for one in x if not isinstance(one, list) or len(one) <= options.field]:
            raise DataError(
                f"{title}: expected lists of more than {options.field} entries, as data.field says, got "
                f"{wrong[0]!r:.60}"
            )
        x = [one[options.field] for one in x]
    texts = [isinstance(one, str) for one in x]
    if options.text is None and any(texts):
        raise DataError(
            f"{title}: expected numbers, got the text {x[texts.index(True)]!r:.40}; for texts set data.text: "
            "characters or words (and data.field where a sample is a list)"
        )
    if options.text is not None and not all(texts):
        raise DataError(f"{title}: expected texts, as data.text says, got {x[texts.index(False)]!r:.40}")
    return x, y


def _numbers(part: Path, x: list[Any], options: LeafOptions) -> Tensor:
    try:
        array = np.asarray(x)
    except ValueError:
        raise DataError(f"{part}: x: expected samples of one shape, got several") from None
    if array.dtype.kind not in "iuf":
        raise DataError(f"{part}: x: expected numbers, got {x[0]!r:.60}")
    if options.shape is None:
        return torch.from_numpy(array.astype(np.float32).reshape(len(x), *(array.shape[1:] or (1,))))
    if array[0].size != np.prod(options.shape):
        raise DataError(
            f"{part}: x: data.shape {list(options.shape)} does not hold the {array[0].size} numbers of a sample"
        )
    return torch.from_numpy(array.astype(np.float32).reshape(len(x), *options.shape))


def _vocabulary(texts: list[str], cut: Callable[[str], list[str]], options: LeafOptions) -> dict[str, int]:
    counts = Counter(token for text in texts for token in cut(text))
    if options.text == "words":
        most = sorted(counts, key=lambda word: (-counts[word], word))[: options.words]
        return {word: i for i, word in enumerate(most)}
    return {character: i for i, character in enumerate(sorted(counts))}


def _tokens(
    texts: list[str], vocabulary: dict[str, int], cut: Callable[[str], list[str]], length: int
) -> Tensor:
    x_NL = torch.full((len(texts), length), PAD)
    for row, text in enumerate(texts):
        tokens = [vocabulary.get(token, len(vocabulary)) for token in cut(text)[:length]] or [len(vocabulary)]
        x_NL[row, : len(tokens)] = torch.tensor(tokens)
    return x_NL


def _targets(folder: Path, y: list[Any], test_y: list[Any]) -> tuple[Tensor, Tensor, int]:
    """Whole numbers from 0 are classes, texts are numbered, others are values."""
    both = [*y, *test_y]
    if all(isinstance(label, str) for label in both):
        names = {label: i for i, label in enumerate(sorted(set(both)))}
        return torch.tensor([names[n] for n in y]), torch.tensor([names[n] for n in test_y]), len(names)
    if wrong := [label for label in both if isinstance(label, bool) or not isinstance(label, int | float)]:
        raise DataError(f"{folder}: y: expected numbers or texts, one a sample, got {wrong[0]!r:.60}")
    if all(label % 1 == 0 and 0 <= label < _FEW for label in both):
        return torch.tensor([int(n) for n in y]), torch.tensor([int(n) for n in test_y]), 1 + int(max(both))
    return torch.tensor(y, dtype=torch.float32), torch.tensor(test_y, dtype=torch.float32), 1
