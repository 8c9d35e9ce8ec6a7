"""A user's own data as people have them, arrays, other types or a ``torch`` Dataset, as the tensors of a :class:`Data`.

What is converted keeps its values (but for float64, whose digits beyond float32's go), and is said: pixels of uint8 are
not scaled by a guess, and labels are never rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from fedmpi import own
from fedmpi.errors import ConfigError, DataError
from fedmpi.machine import available_memory
from fedmpi.tasks.dataset import Data, Split

USAGE = "load(folder: pathlib.Path, **options) -> fedmpi.tasks.data.Data"
_LARGE = 1 << 30  # bytes of a data set that is worth a sentence
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.bool)
_REAL = (torch.float64, torch.float16, torch.bfloat16)


def data_of(name: str, found: Any) -> Data:
    """What a user's ``load`` returned: a :class:`Data`, or its training and test set, each a ``Split``, a pair (x, y)
    or a ``torch`` Dataset of pairs.

    Raises:
      ConfigError: it is something else.
      DataError: a set cannot be read or held.
    """
    notes: list[str] = []
    if isinstance(found, Data):
        train, test = (
            _split(f"{name}: {part}", getattr(found, part), notes, part, found) for part in ("train", "test")
        )
        return found._replace(train=train, test=test, notes=(*found.notes, *notes))
    pair = isinstance(found, tuple | list) and len(found) == 2 and not isinstance(found, Split)
    if not pair or not all(isinstance(part, Split | tuple | torch.utils.data.Dataset) for part in found):
        how = ""
        if isinstance(found, torch.utils.data.Dataset | torch.utils.data.DataLoader):
            loader = isinstance(found, torch.utils.data.DataLoader)
            how = f"; return the pair (training set, test set){' of Datasets, not loaders' if loader else ''}"
        raise ConfigError(
            f"data.name: {name} returned a {type(found).__name__}, expected {USAGE}, or a pair of Datasets "
            f"or of (x, y) arrays{how}"
        )
    train, test = (
        _split(f"{name}: {part}", value, notes, part)
        for part, value in zip(("train", "test"), found, strict=True)
    )
    if isinstance(train.y, Tensor) and isinstance(test.y, Tensor) and train.y.numel() and test.y.numel():
        values = train.y.is_floating_point()
        classes = train.y[0].numel() if values else 1 + max(int(train.y.max()), int(test.y.max()))
        notes.append(f"data: {classes} {'values a sample' if values else 'classes'}, counted in the targets")
    else:
        classes = 1  # the check that follows says what is missing
    return Data(name, train, test, classes, tuple(notes))


def _split(title: str, value: Any, notes: list[str], part: str, data: Data | None = None) -> Any:
    """As a Split of tensors where it can be one; what is left as it was, the check that follows names."""
    if isinstance(value, torch.utils.data.Dataset):
        value = _materialised(title, value, notes, part)
    elif isinstance(value, tuple) and not isinstance(value, Split) and len(value) in (2, 3):
        value = Split(*value)
    if not isinstance(value, Split):
        return value
    fields = {field: _tensor(f"{part}.{field}", field, one, notes) for field, one in value._asdict().items()}
    return Split(**fields)


def _tensor(title: str, field: str, value: Any, notes: list[str]) -> Any:
    if not isinstance(value, Tensor | np.ndarray) and (isinstance(value, list) or hasattr(value, "to_numpy")):
        value = _array(value)
    before = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor | np.ndarray) else ""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        if value.dtype.kind == "u" and value.dtype.itemsize > 1:
            value = (
                value.astype(np.int64)
                if value.dtype.itemsize < 8 or not value.size or value.max() < 2**63
                else value
            )
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except (TypeError, ValueError):  # a dtype that torch has not
            return value
    if not isinstance(value, Tensor):
        return value
    flags = field == "y" and value.dtype == torch.bool and value.dim() == 2  # several labels, each so or not
    if flags or (value.dtype in _REAL and field != "groups"):
        value = value.float()
    elif value.dtype in _WHOLE and (field != "x" or value.dtype not in (torch.uint8, torch.bool)):
        value = value.long()
    now = str(value.dtype).removeprefix("torch.")
    if before not in ("", now):
        notes.append(f"data: {title} converted from {before} to {now}")
    return value


def _array(value: Any) -> Any:
    """A list, or a table or column of pandas', as an array; itself where it is none of numbers."""
    try:
        array = value.to_numpy(copy=True) if hasattr(value, "to_numpy") else np.asarray(value)
    except (TypeError, ValueError):  # rows of several lengths
        return value
    return array if array.dtype.kind in "biuf" else value


def _materialised(title: str, data: Any, notes: list[str], part: str) -> Split:
    """Each sample of a Dataset, read once."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    count = len(data) if hasattr(data, "__len__") else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random transforms are the same on every rank
        for i, item in enumerate(_items(title, data, count)):
            if not isinstance(item, tuple | list) or len(item) != 2:
                kind = type(item).__name__
                raise DataError(f"{title}: sample {i}: expected a pair (x, y), got a {kind}")
            for values, value, what in ((xs, item[0], "x"), (ys, item[1], "y")):
                values.append(_row(title, i, what, value, values[0] if values else None))
            if i == 0 and count is not None:
                need, there = count * sum(value[0].nbytes for value in (xs, ys)), available_memory()
                if 2 * need > there:
                    raise DataError(
                        f"{title}: expected a Dataset that fits into memory (it is read whole, and stacked), got "
                        f"{count} samples of {need / 2**30:,.1f} GiB, {there / 2**30:,.1f} GiB are free; return fewer, "
                        "smaller ones, or set limit"
                    )
                if need > _LARGE:
                    notes.append(f"data: {part}, a Dataset, is read whole: {need / 2**30:,.1f} GiB")
    if not xs:
        raise DataError(f"{title}: expected samples, got an empty Dataset")
    if count is not None and not _same(xs[0], _first(title, data)):
        notes.append(
            f"data: {part} gives another sample 0 each time; each is read once, its random transform with it"
        )
    return Split(torch.stack(xs), torch.stack(ys))


def _first(title: str, data: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _row(title, 0, "x", next(_items(title, data, 1))[0], None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def _items(title: str, data: Any, count: int | None) -> Iterator[Any]:
    i = 0
    try:
        if count is None:
            yield from data
            return
        for i in range(count):
            yield data[i]
    except (ConfigError, DataError):
        raise
    except Exception as error:  # whatever a user's Dataset raises
        raise DataError(f"{title}: sample {i} cannot be read: {own.said(error)}") from error


def _row(title: str, i: int, what: str, value: Any, first: Tensor | None) -> Tensor:
    try:
        row = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        how = "; let its transform end with ToTensor" if hasattr(value, "convert") else ""
        raise DataError(
            f"{title}: sample {i}: {what}: expected a tensor, an array or a number, got a {type(value).__name__}{how}"
        ) from None
    if hasattr(value, "convert"):
        raise DataError(
            f"{title}: sample {i}: {what}: expected a tensor, an array or a number, got a picture; let its transform "
            "end with ToTensor"
        )
    if first is not None and (row.shape, row.dtype) != (first.shape, first.dtype):
        raise DataError(
            f"{title}: sample {i}: {what}: expected {tuple(first.shape)} of {first.dtype} as in sample 0, got "
            f"{tuple(row.shape)} of {row.dtype}; a transform can resize, a collate function is not used"
        )
    return row
