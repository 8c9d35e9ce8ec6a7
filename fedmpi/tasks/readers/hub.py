"""Any data set that the library ``datasets`` reads: a hub name or a folder of CSV, JSON or Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import PAD, Data, Places, Split, normalised, numbered
from fedmpi.tasks.hf import library
from fedmpi.tasks.readers.images import ImageOptions
from fedmpi.tasks.readers.lines import regular
from fedmpi.tasks.readers.text import encoder, tokens


class HubOptions(ImageOptions):
    dataset: str = Field(description="a hub name (owner/name) or a local folder")
    config: str | None = Field(None, description="of the data set, where it has several")
    train: str = Field("train", description="the split to train on")
    test: str = Field("test", description="the split to test on")
    input: str | list[str] = Field(
        "text",
        min_length=1,
        description="the column of pictures, sentences or lists of numbers; or several columns of numbers",
    )
    target: str = Field("label", description="the column of classes: whole numbers or names")
    group: str | None = Field(None, description="the column that says whose sample it is")
    tokenizer: str | None = Field(None, description="for sentences: as for movie-reviews")
    length: int = Field(64, ge=1, description="tokens that are kept of a sentence")


class _Columns(NamedTuple):
    x: list[Any]
    y: list[Any]
    group: list[str] | None


def hub(options: HubOptions, places: Places) -> Data:
    """The columns as tensors: pictures scaled to ``size``, sentences as tokens, lists of numbers as float32."""
    parts = [_columns(options, split) for split in (options.train, options.test)]
    x = _inputs(options, places, [part.x for part in parts])
    values = sorted({str(value) for value in parts[0].y}, key=_by_number)
    number = {value: i for i, value in enumerate(values)}
    splits = []
    for part, x_N in zip(parts, x, strict=True):
        strange = next((value for value in part.y if str(value) not in number), None)
        if strange is not None:
            raise DataError(
                f"{options.dataset}: {options.target}: expected the classes of {options.train}, got {strange!r} "
                f"in {options.test}"
            )
        part_name = options.train if part is parts[0] else options.test
        fraction = next((v for v in part.y if not isinstance(v, (str, bool, int))), None)
        if fraction is not None:
            raise DataError(
                f"{options.dataset}: {options.target}: expected classes, whole numbers or names, got {fraction!r:.60} "
                f"in {part_name}"
            )
        y_N = torch.tensor([number[str(value)] for value in part.y])
        splits.append(Split(x_N, y_N))
    if parts[0].group is not None and parts[1].group is not None:  # the same in both sets have one number
        groups = numbered([*parts[0].group, *parts[1].group])
        cut = len(parts[0].group)
        splits = [splits[0]._replace(groups=groups[:cut]), splits[1]._replace(groups=groups[cut:])]
    return Data("hub", splits[0], splits[1], len(values))


def _by_number(value: str) -> tuple[float, str]:
    return (float(value), "") if value.lstrip("-").isdigit() else (float("inf"), value)


def _columns(options: HubOptions, split: str) -> _Columns:
    datasets = library("datasets")
    for path in sorted(Path(options.dataset).rglob("*")) if Path(options.dataset).is_dir() else ():
        regular(path)  # the library would wait at a pipe, and goes through what no memory holds
    take = split if options.limit is None else f"{split}[:{options.limit}]"
    try:
        table = datasets.load_dataset(options.dataset, options.config, split=take)
    except Exception as error:  # the library raises whatever its readers and its network raise
        cause = error.__cause__ or error  # under "An error occurred while generating the dataset"
        first = (str(cause).strip().splitlines() or [""])[0]
        raise DataError(
            f"data.dataset: expected a hub name that can be reached or a folder, with a split {split!r} of whole "
            f"tables, got {options.dataset!r}: {type(cause).__name__}: {first}"
        ) from error
    inputs = (options.input,) if isinstance(options.input, str) else options.input
    for column in filter(None, (*inputs, options.target, options.group)):
        if column not in table.column_names:
            raise DataError(
                f"{options.dataset}: expected a column {column!r}, got {', '.join(table.column_names)}"
            )
    if not len(table):
        raise DataError(f"{options.dataset}: expected samples in {split}, got none")
    found = [_values(options, table, split, column) for column in inputs]
    rows = found[0] if isinstance(options.input, str) else [[*row] for row in zip(*found, strict=True)]
    return _Columns(
        rows,
        [
            int(value) if isinstance(value, float) and value.is_integer() else value
            for value in _values(options, table, split, options.target)
        ],
        None
        if options.group is None
        else [str(value) for value in _values(options, table, split, options.group)],
    )


def _values(options: HubOptions, table: Any, split: str, column: str) -> list[Any]:
    """A column, complete: a line that was cut off lacks its last values."""
    values = list(table[column])
    empty = next((row for row, value in enumerate(values) if value is None), None)
    if empty is not None:
        raise DataError(
            f"{options.dataset}: {split}, row {empty}: expected a value in column {column!r}, got none"
        )
    return values


def _inputs(options: HubOptions, places: Places, columns: list[list[Any]]) -> list[Tensor]:
    first = columns[0][0]
    if isinstance(first, str):
        if options.tokenizer is None:
            raise DataError(f"data.tokenizer: required, because {options.input} holds sentences")
        encode = encoder(options.tokenizer, places, options.length)
        rows = [tokens(encode, column, options.length) for column in columns]
        longest = max(x.shape[1] for x in rows)
        return [torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=PAD) for x in rows]
    if hasattr(first, "convert"):  # Pillow's
        side = (options.size, options.size)
        pixels = [
            np.stack([np.asarray(picture.convert("RGB").resize(side), np.uint8) for picture in column])
            for column in columns
        ]
        return list(normalised(*(torch.from_numpy(p).permute(0, 3, 1, 2) for p in pixels)))
    try:
        arrays = [np.asarray(column) for column in columns]
        if kinds := [a.dtype.name for a in arrays if a.dtype.kind not in "iuf"]:
            raise TypeError(f"values of {kinds[0]}")
        found = [torch.tensor(a.astype(np.float32)) for a in arrays]
        for x in found:
            if x.shape[1:] != found[0].shape[1:] or not bool(x.isfinite().all()):
                raise ValueError("lists of other lengths, or NaN or infinity among them")
        return found
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{options.dataset}: {options.input}: expected pictures, sentences or lists of numbers of one length, "
            f"got {type(first).__name__}: {error}"
        ) from error
