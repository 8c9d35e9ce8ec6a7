"""Sentences: SST-2 from GLUE's TSV files and the rated movie-review sentences of vaderSentiment.

Shape suffixes: N samples, L tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from fedmpi import random
from fedmpi.errors import DataError
from fedmpi.tasks.dataset import PAD, Data, DataOptions, Places, Split, locate
from fedmpi.tasks.hf import tokenizer
from fedmpi.tasks.readers.lines import text_lines

RATINGS = "movieReviewSnippets_GroundTruth.txt"
_RATING = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")
_TEST = 2000  # sentences of the movie reviews that are kept for the test


class TextOptions(DataOptions):
    tokenizer: str = Field(
        description="a folder, a folder in the data folder (minilm) or a hub name, as transformers reads it"
    )
    length: PositiveInt = Field(64, description="tokens that are kept of a sentence")


class ReviewOptions(TextOptions):
    neutral: float = Field(
        0.0, ge=0, lt=4, description="sentences rated from -neutral to neutral are left out"
    )


def tokens(encode: Callable[[list[str]], list[list[int]]], sentences: Sequence[str], length: int) -> Tensor:
    """Tokens of each sentence, int64 ``(N, L)`` with L the longest one's or ``length``; PAD after the end."""
    return stacked([ids[:length] for ids in encode(list(sentences))])


def stacked(rows: Sequence[Sequence[int]], fill: int = PAD) -> Tensor:
    """Rows of different lengths, filled up: int64 ``(N, L)``."""
    out_NL = torch.full((len(rows), max(map(len, rows))), fill)
    for row, ids in zip(out_NL, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return out_NL


def encoder(name: str, places: Places, length: int) -> Callable[[list[str]], list[list[int]]]:
    """Sentences → tokens with the tokenizer's own marks at both ends, cut to ``length`` with the marks kept."""
    tokenize: Any = tokenizer(name, places)

    def encode(sentences: list[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenize(sentences, truncation=True, max_length=length)["input_ids"]
        return rows

    return encode


def sst2(options: TextOptions, places: Places) -> Data:
    """SST-2 (Socher et al. 2013) as GLUE gives it: ``train.tsv`` and ``dev.tsv`` of sentence and label, under a
    line of names. GLUE's test set has no labels, so ``dev.tsv`` is the test set."""
    remedy = f"Unpack GLUE's SST-2.zip into {places[0]}"
    folder = locate("sst-2", places, ("train.tsv", "dev.tsv"), ("SST-2",), remedy)
    encode = encoder(options.tokenizer, places, options.length)
    splits = []
    for path in (folder / "train.tsv", folder / "dev.tsv"):
        lines = text_lines(path)
        if len(lines) < 2 or lines[0].split("\t") != ["sentence", "label"]:
            raise DataError(
                f"{path}: expected a line 'sentence<tab>label' and sentences after it, "
                f"got {lines[0][:80] if lines else 'nothing'!r}"
            )
        rows = [line.split("\t") for line in lines[1:]]
        for number, row in enumerate(rows, 2):
            if len(row) != 2 or not row[0].strip() or row[1].strip() not in ("0", "1"):
                raise DataError(
                    f"{path}, line {number}: expected a sentence, a tab and 0 or 1, got {lines[number - 1][:80]!r}"
                )
        y_N = torch.tensor([int(label) for _, label in rows])
        splits.append(Split(tokens(encode, [sentence for sentence, _ in rows], options.length), y_N))
    train, test = _even(splits)
    return Data("sst-2", train, test, 2)


def movie_reviews(options: ReviewOptions, places: Places) -> Data:
    """Sentences of film reviews and the mean of some people's ratings of them, −4 to 4 (Hutto and Gilbert, "VADER: a
    parsimonious rule-based model for sentiment analysis of social media text", ICWSM 2014).

    Label 1 for a rating above ``neutral``, 0 below its negative. 2,000 sentences are the test set, always the
    same.
    """
    folder = locate("movie-reviews", places, (RATINGS,), (), "Run: fedmpi data fetch movie-reviews")
    rated = [_rated(folder / RATINGS, *numbered) for numbered in enumerate(text_lines(folder / RATINGS), 1)]
    order = random.permutation(random.key(0, stream="movie-reviews split"), len(rated)).tolist()
    kept = [rated[i] for i in order if abs(rated[i][0]) > options.neutral]
    test = min(_TEST, len(kept) // 5)
    if not test:
        raise DataError(f"{folder / RATINGS}: expected 5 rated sentences or more, got {len(kept)}")
    encode = encoder(options.tokenizer, places, options.length)
    x_NL = tokens(encode, [sentence for _, sentence in kept], options.length)
    y_N = torch.tensor([int(rating > 0) for rating, _ in kept])
    return Data("movie-reviews", Split(x_NL[test:], y_N[test:]), Split(x_NL[:test], y_N[:test]), 2)


def _rated(path: Any, number: int, line: str) -> tuple[float, str]:
    """The rating and the sentence of a line ``number<tab>rating<tab>sentence``."""
    words = line.split("\t")
    try:
        rating = float(words[1]) if _RATING.fullmatch(words[1].strip()) else math.nan
    except IndexError:
        rating = math.nan
    if len(words) != 3 or not -4 <= rating <= 4 or not words[2].strip():
        raise DataError(
            f"{path}, line {number}: expected a number, a rating in -4 to 4 and a sentence between tabs, "
            f"got {line[:80]!r}"
        )
    return rating, words[2].strip()


def _even(splits: list[Split]) -> list[Split]:
    """Both sets as long as the longer one."""
    longest = max(split.x.shape[1] for split in splits)
    return [
        split._replace(x=torch.nn.functional.pad(split.x, (0, longest - split.x.shape[1]), value=PAD))
        for split in splits
    ]
