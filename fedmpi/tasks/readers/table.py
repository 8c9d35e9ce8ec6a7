"""A CSV file with a column a quantity: numbers and categories as inputs, one or several columns as targets."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, numbered
from fedmpi.tasks.readers.lines import regular

_MOST = 1000  # categories of a column
_REMEDY = "expected a number in every row (or list the column in data.categories)"


class TableOptions(DataOptions):
    file: str = Field(
        description="the CSV file with the training samples, in data.folder or the current one; row 1 names columns"
    )
    test: str | None = Field(
        None, description="the file with the test samples (default: a part of the training file's)"
    )
    test_share: float = Field(
        0.2, gt=0, lt=1, description="without test: the share of rows, drawn at random, that are for testing"
    )
    target: str | list[str] = Field(description="the column to predict, or several")
    kind: Literal["auto", "classes", "values", "labels"] = Field(
        "auto",
        description="what a target is. auto: values where there are several columns or fractions, else classes (whole "
        "numbers or names); labels: columns of 0 and 1",
    )
    inputs: list[str] | None = Field(None, description="the columns to predict from (default: all others)")
    categories: list[str] = Field(
        [], description="those of inputs that are no numbers: an input a value (one-hot)"
    )
    group: str | None = Field(None, description="the column that says whose sample it is")
    scale: bool = Field(
        True, description="numbers less their mean over their deviation, both of the training samples"
    )
    separator: str = Field(",", min_length=1, max_length=1, description="between the columns")


class _Table(NamedTuple):
    path: Path
    columns: dict[str, list[str]]

    def numbers(self, column: str) -> Tensor:
        """float64 ``(N,)``."""
        found = array("d")
        for row, text in enumerate(self.columns[column], 2):
            try:
                value = float("nan" if "_" in text else text)
            except ValueError:
                value = float("nan")
            if not np.isfinite(value):
                raise DataError(f"{self.path}, row {row}: {column}: {_REMEDY}, got {text!r:.60}")
            found.append(value)
        return torch.from_numpy(np.array(found))


def table(options: TableOptions, places: Places) -> Data:
    """Inputs float32 ``(N, inputs)``; targets as classes, values or labels."""
    targets = [options.target] if isinstance(options.target, str) else options.target
    parts = [_read(options, places, name) for name in (options.file, options.test) if name is not None]
    names = list(parts[0].columns)
    used = options.inputs or [n for n in names if n not in (*targets, options.group)]
    named = [("target", targets), ("inputs", used), ("categories", options.categories)]
    named += [("group", [options.group] if options.group else [])]
    for part in parts:
        for option, columns in named:
            if lacking := [column for column in columns if column not in part.columns]:
                raise DataError(
                    f"{part.path}: data.{option}: expected columns of {', '.join(part.columns)}, got {lacking[0]!r}"
                )
    if not used or not targets:
        raise ConfigError("data.inputs, data.target: expected a column at least, got none")
    if strange := [c for c in options.categories if c not in used]:
        raise ConfigError(
            f"data.categories: expected some of data.inputs, {', '.join(used)}, got {strange[0]!r}"
        )
    rows = _split_rows(options, parts)
    kind = options.kind if options.kind != "auto" else _kind(parts[0], targets)
    x = _inputs(parts, used, options, rows)
    y, classes = _targets(parts, targets, kind, options.target)
    groups = None if options.group is None else numbered([g for p in parts for g in p.columns[options.group]])
    train, test = (Split(x[r], y[r], None if groups is None else groups[r]) for r in rows)
    note = f"data: {', '.join(targets)}: {classes} {kind}"
    return Data("csv", train, test, classes, (note,) if options.kind == "auto" else ())


def _read(options: TableOptions, places: Places, name: str) -> _Table:
    where = [place / name for place in places] + [Path(name).expanduser().absolute()]
    path = next((path for path in where if path.exists()), None)
    if path is None:
        raise DataError(
            f"csv: expected a file {name} in {' or '.join(str(p.parent) for p in where)}, got none; give data.folder"
        )
    columns: dict[str, list[str]] = {}
    with regular(path).open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = _rows(path, csv.reader(file, delimiter=options.separator, strict=True))
            header = [name.strip() for name in next(rows, [])]
            if len(set(header)) < len(header) or not header:
                raise DataError(f"{path}, row 1: expected different names of columns, got {header!r:.200}")
            columns = {name: [] for name in header}
            lists = list(columns.values())
            for number, row in enumerate(rows, 2):
                if len(row) != len(lists):
                    raise DataError(f"{path}, row {number}: expected {len(lists)} columns, got {len(row)}")
                for values, text in zip(lists, row, strict=True):
                    values.append(text.strip())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected text in UTF-8: {error.reason}") from None
    if not columns[header[0]]:
        raise DataError(f"{path}: expected samples below the names of columns, got none")
    return _Table(path, columns)


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """All but empty lines."""
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise DataError(f"{path}: expected CSV: {error}") from None


def _split_rows(options: TableOptions, parts: Sequence[_Table]) -> tuple[Tensor, Tensor]:
    """The rows of all files one after the other: those to train and to test on."""
    counts = [len(next(iter(part.columns.values()))) for part in parts]
    every = torch.arange(sum(counts))
    if options.test is not None:
        return every[: counts[0]], every[counts[0] :]
    held = round(options.test_share * counts[0])
    if not 0 < held < counts[0]:
        raise DataError(
            f"{parts[0].path}: data.test_share: expected a share that leaves rows on both sides, got "
            f"{options.test_share} of {counts[0]}"
        )
    tested = torch.zeros(counts[0], dtype=torch.bool)
    tested[random.sample(random.key(0, stream="csv test"), counts[0], held)] = True
    return every[~tested], every[tested]


def _inputs(
    parts: Sequence[_Table], used: Sequence[str], options: TableOptions, rows: tuple[Tensor, Tensor]
) -> Tensor:
    columns: list[Tensor] = []
    for name in used:
        if name in options.categories:
            every = [text for part in parts for text in part.columns[name]]
            known = sorted({every[i] for i in rows[0].tolist()})
            if len(known) > _MOST:
                raise DataError(
                    f"{parts[0].path}: {name}: expected at most {_MOST} categories, got {len(known)}"
                )
            number = {text: i for i, text in enumerate(known)}
            code_N = torch.tensor(
                [number.get(text, -1) for text in every]
            )  # one that training never saw: all 0
            columns += [(code_N == i).float() for i in range(len(known))]
            continue
        value_N = torch.cat([part.numbers(name) for part in parts])
        if options.scale:
            of_train = value_N[rows[0]]
            deviation = float(of_train.std(correction=0))
            value_N = (value_N - of_train.mean()) / (deviation if deviation > 0 else 1)
        columns.append(value_N.float())
    return torch.stack(columns, 1)


def _kind(part: _Table, targets: Sequence[str]) -> str:
    if len(targets) > 1:
        return "values"
    fraction = any(_number(text) and not _whole(text) for text in part.columns[targets[0]])
    return "values" if fraction else "classes"


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _whole(text: str) -> bool:
    return text.lstrip("+-").isdigit()


def _targets(parts: Sequence[_Table], targets: Sequence[str], kind: str, asked: object) -> tuple[Tensor, int]:
    if kind != "classes":
        y_NP = torch.stack([torch.cat([part.numbers(name) for part in parts]) for name in targets], 1).float()
        return (y_NP[:, 0] if isinstance(asked, str) else y_NP), len(targets)
    if len(targets) > 1:
        raise ConfigError(f"data.target: expected one column with kind: classes, got {len(targets)}")
    texts = [text for part in parts for text in part.columns[targets[0]]]
    if "" in texts:
        raise DataError(f"{parts[0].path}: {targets[0]}: expected a class in every row, got an empty one")
    known = set(parts[0].columns[targets[0]])
    if strange := sorted(set(texts) - known):
        raise DataError(
            f"{parts[-1].path}: {targets[0]}: expected the classes of {parts[0].path.name}, got {strange[0]!r:.60}"
        )
    ordered = sorted(known, key=lambda text: (int(text), "") if _whole(text) else (2**63, text))
    number = {text: i for i, text in enumerate(ordered)}
    return torch.tensor([number[text] for text in texts]), len(ordered)
