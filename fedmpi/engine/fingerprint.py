"""What data a run is of: a few bytes that change when any of the data do."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedmpi.tasks.data import Data
    from fedmpi.tasks.partitions import Partition

_WHOLE = 1 << 24  # bytes of a tensor that are hashed; of a larger one rows at even distances
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(data: Data, partition: Partition, start_X: Tensor | None = None) -> dict[str, str]:
    """By name (``data.train.y``) of each tensor that a run's samples, labels and clients come from; of the initial
    values too, where these are a file's."""
    tensors: dict[str, Tensor | None] = {
        f"data.{part}.{field}": value
        for part, split in (("train", data.train), ("test", data.test))
        for field, value in split._asdict().items()
    }
    tensors |= {"partition.samples": partition.index_N, "partition.sizes": partition.offset}
    if start_X is not None:
        tensors["model.init"] = start_X
    return {name: "none" if value is None else _of(value) for name, value in tensors.items()}


def _of(value: Tensor) -> str:
    """Dtype and shape, the bytes (of large data a sample), and the sum of all as whole numbers: the same on every
    machine, and another one when a single entry is."""
    words = value.contiguous().view(_WORDS[value.element_size()]).reshape(len(value), -1)
    step = -(-value.nbytes // _WHOLE)
    sample = words[:: max(1, step)].contiguous()
    known = f"{value.dtype} {tuple(value.shape)} {int(words.sum(dtype=torch.int64))}"
    digest = hashlib.blake2b(known.encode(), digest_size=12)
    digest.update(sample.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
