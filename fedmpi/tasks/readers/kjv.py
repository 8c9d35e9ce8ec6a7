"""The King James text: bytes to be predicted one after the other, by chapter or by book.

``kjv.txt`` has a line a verse: the book's short name, chapter, colon, verse, a space and the text (``Ge1:1 In the …``).

Shape suffixes: N samples, L bytes.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import IGNORE, PAD, Data, DataOptions, Places, Split, locate, numbered
from fedmpi.tasks.readers.lines import text_lines

TEXT = "kjv.txt"
BYTES = 128  # of ASCII
_VERSE = re.compile(r"([1-3]?[A-Za-z]+)([0-9]+):[0-9]+ (\S.*)")
_TEST = 20  # one in so many samples of a chapter


class KjvOptions(DataOptions):
    length: int = Field(
        65,
        ge=2,
        description="bytes of a sample; all but the first, which the one before it ends with, are predicted",
    )
    groups: Literal["chapter", "book"] = Field(
        "chapter", description="whose a sample is: 1,189 chapters or 66 books (partition: natural)"
    )


def kjv(options: KjvOptions, places: Places) -> Data:
    """Tokens are bytes of ASCII. Each chapter, verses without their numbers a line each, is cut into samples; all
    of its bytes but the first are targets once. The last twentieth of a chapter's samples, if it has twenty, are for
    the test: a contiguous piece, of which training has seen what comes before."""
    folder = locate("kjv", places, (TEXT,), (), "Run: fedmpi data fetch kjv")
    train, test, whose, tested = list[Tensor](), list[Tensor](), list[str](), list[str]()
    for (book, chapter), text in _chapters(folder / TEXT):
        x_NL = _samples(text, options.length)
        name = book if options.groups == "book" else f"{book} {chapter}"
        kept = len(x_NL) - len(x_NL) // _TEST
        train.append(x_NL[:kept])
        test.append(x_NL[kept:])
        whose += [name] * kept
        tested += [name] * (len(x_NL) - kept)
    if not tested:
        raise DataError(
            f"{folder / TEXT}: expected a chapter of {_TEST} samples or more for the test set, got none; make "
            f"data.length smaller than {options.length}"
        )
    number = numbered(whose + tested)
    return Data("kjv", _split(train, number[: len(whose)]), _split(test, number[len(whose) :]), BYTES)


def _chapters(path: Path) -> list[tuple[tuple[str, str], bytes]]:
    """Book, chapter and text of each, in the order of the file."""
    verses = []
    for number, line in enumerate(text_lines(path), 1):
        match = _VERSE.fullmatch(line)
        if match is None or not line.isascii():
            raise DataError(
                f"{path}, line {number}: expected a verse in ASCII such as 'Ge1:1 In the …', got {line[:80]!r}"
            )
        verses.append(match.groups())
    return [
        (key, "\n".join(text for _, _, text in chapter).encode() + b"\n")
        for key, chapter in groupby(verses, key=lambda verse: (verse[0], verse[1]))
    ]


def _samples(text: bytes, length: int) -> Tensor:
    """The samples of one chapter, int64 ``(N, L)``, each begun with the last byte of the one before; PAD at the end."""
    all_T = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    count = -(-(len(all_T) - 1) // (length - 1))
    filled = torch.full((count * (length - 1) + 1,), PAD)
    filled[: len(all_T)] = all_T
    return filled.unfold(0, length, length - 1)


def _split(rows: list[Tensor], groups_N: Tensor) -> Split:
    x_NL = torch.cat(rows)
    return Split(x_NL, x_NL.where(x_NL != PAD, IGNORE), groups_N)
