"""CIFAR-10 and CIFAR-100 in the binary version (Krizhevsky, "Learning multiple layers of features from tiny
images", 2009): records of one label byte (CIFAR-100: coarse, then fine) and 3 × 32 × 32 pixels.

Shape suffixes: N samples, R bytes of a record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, locate, normalised
from fedmpi.tasks.readers.lines import regular

_PIXELS = 3 * 32 * 32
_LARGEST = 1 << 30
_TRAIN_10 = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


class Cifar100Options(DataOptions):
    labels: Literal["fine", "coarse"] = Field("fine", description="100 classes or their 20 superclasses")


def cifar10(options: DataOptions, places: Places) -> Data:
    """From ``data_batch_1.bin`` … ``data_batch_5.bin`` and ``test_batch.bin``."""
    remedy = f"Unpack the binary version's archive cifar-10-binary.tar.gz into {places[0]}"
    wanted = (*_TRAIN_10, "test_batch.bin")
    folder = locate("cifar-10", places, wanted, ("cifar-10-batches-bin",), remedy)
    train = [read_records(folder / name, (10,)) for name in _TRAIN_10]
    return _data("cifar-10", train, read_records(folder / "test_batch.bin", (10,)), -1, 10)


def cifar100(options: Cifar100Options, places: Places) -> Data:
    """From ``train.bin`` and ``test.bin``."""
    remedy = f"Unpack the binary version's archive cifar-100-binary.tar.gz into {places[0]}"
    folder = locate("cifar-100", places, ("train.bin", "test.bin"), ("cifar-100-binary",), remedy)
    train, test = (read_records(folder / f"{part}.bin", (20, 100)) for part in ("train", "test"))
    column, classes = (-1, 100) if options.labels == "fine" else (0, 20)
    return _data("cifar-100", [train], test, column, classes)


def read_records(path: Path, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Pixels uint8 ``(N, 3, 32, 32)`` and labels int64 ``(N, len(classes))`` of a file of records.

    Raises:
      DataError: the file cannot be read, is no whole number of records, or has a label out of range.
    """
    record = len(classes) + _PIXELS
    try:
        length = regular(path).stat().st_size
        if not 0 < length <= _LARGEST or length % record:
            raise DataError(
                f"{path}: expected a whole number of records of {record} bytes (at most {_LARGEST} bytes), "
                f"got {length} bytes"
            )
        raw = bytearray(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: expected a readable file of records, got {error}") from error
    record_NR = torch.frombuffer(raw, dtype=torch.uint8).view(-1, record)
    labels = record_NR[:, : len(classes)].long()
    for column, count in enumerate(classes):
        if (largest := int(labels[:, column].max())) >= count:
            at = int(labels[:, column].argmax())
            raise DataError(f"{path}: expected labels 0 to {count - 1}, got {largest} in record {at}")
    return record_NR[:, len(classes) :].reshape(-1, 3, 32, 32), labels


def _data(
    name: str, train: list[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor], column: int, classes: int
) -> Data:
    x = normalised(torch.cat([pixels for pixels, _ in train]), test[0])
    y = torch.cat([labels[:, column] for _, labels in train])
    return Data(name, Split(x[0], y), Split(x[1], test[1][:, column]), classes)
