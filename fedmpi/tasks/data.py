"""Data sets, read whole into memory as normalised float32 tensors.

IDX format (LeCun, Cortes, Burges, "The MNIST database of handwritten digits"): two zero bytes, a byte
for the element type (8: unsigned byte), a byte for the number of dimensions, each dimension as a
big-endian 32-bit integer, then the elements.

Shape suffixes: N samples.
"""

from __future__ import annotations

import gzip
import math
import os
import threading
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedmpi import random
from fedmpi.errors import DataError
from fedmpi.tasks import choose

Places = tuple[Path, ...]

INSTALLED = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its folder
STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_CHUNK = 1 << 20
_LARGEST = 1 << 30  # bytes of an IDX file's elements; the largest in use, EMNIST's, has 547 million


class Split(NamedTuple):
    x: Tensor  # (N, *shape) float32: scaled to [0, 1], less the training set's mean, over its deviation
    y: Tensor  # (N,) int64 in [0, classes)


class Data(NamedTuple):
    """A data set. Its tensors are shared by all threads of a process: read them, never write."""

    name: str
    train: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape, e.g. ``(1, 28, 28)``."""
        return tuple(self.train.x.shape[1:])


def default_folder() -> Path:
    """``$FEDMPI_DATA``, else ``~/.cache/fedmpi``; a data set lives in the sub-folder of its name."""
    return Path(os.environ.get("FEDMPI_DATA") or Path.home() / ".cache" / "fedmpi")


def load(name: str, folder: str | Path | None = None) -> Data:
    """The data set ``name``, read once a process.

    Args:
      name: a row of :data:`DATA`.
      folder: holds the files, itself or in a sub-folder called ``name``; default:
        :func:`default_folder`, then where Debian's package installs them.

    Raises:
      ConfigError: an unknown name (lists the valid ones).
      DataError: files that are missing (says where it looked and what to do) or damaged.
    """
    places = (Path(folder),) if folder is not None else (default_folder(), INSTALLED)
    with _LOCK:  # lru_cache alone would let rank-threads that start together each read their own copy
        return _load(name, tuple(place.expanduser().absolute() for place in places))


_LOCK = threading.Lock()


@lru_cache(maxsize=4)
def _load(name: str, places: Places) -> Data:
    return choose("data set", name, DATA)(places)


def find_idx(name: str, places: Places) -> dict[str, Path] | None:
    """The four files of an IDX data set by their stem, all from the first folder that has all four.

    Each may be gzipped and may be spelled ``train-images.idx3-ubyte``.
    """
    for folder in (folder for place in places for folder in (place / name, place)):
        found = {stem: path for stem in STEMS if (path := _spelled(folder, stem))}
        if len(found) == len(STEMS):
            return found
    return None


def _spelled(folder: Path, stem: str) -> Path | None:
    names = (f"{s}{end}" for s in (stem, stem.replace("-idx", ".idx")) for end in (".gz", ""))
    return next((path for name in names if (path := folder / name).is_file()), None)


def read_idx(path: str | Path) -> Tensor:
    """The array in an IDX file of unsigned bytes, gzipped or not: uint8, of the file's dimensions.

    Never reads (or unpacks) more than the header announces and one byte, nor more than 1 GiB.

    Raises:
      DataError: the file cannot be read, is no IDX file of bytes, is shorter or longer than its
        header says or is damaged inside; names the file, what was expected and what was got.
    """
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed:
                with gzip.open(file) as unpacked:
                    return _parse_idx(cast(BinaryIO, unpacked), path)
            return _parse_idx(file, path)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(
            f"{path}: expected a readable IDX file, got {type(error).__name__}: {error}"
        ) from error


def _parse_idx(file: BinaryIO, path: str | Path) -> Tensor:
    magic = file.read(4)
    if len(magic) != 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{path}: expected an IDX file of bytes (it starts with 000008 and 01 to 04), got {magic.hex()}"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) != 4 * magic[3]:
        raise DataError(f"{path}: expected {4 * magic[3]} bytes of dimensions, got {len(sizes)}")
    shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
    length = math.prod(shape)
    if not 1 <= length <= _LARGEST:
        raise DataError(f"{path}: expected dimensions of 1 to {_LARGEST} elements, got {shape}")
    body = bytearray()  # grows with what is really there, so a false header costs no memory
    while len(body) < length and (chunk := file.read(min(_CHUNK, length - len(body)))):
        body += chunk
    if len(body) != length:
        raise DataError(f"{path}: expected {length} bytes for dimensions {shape}, got {len(body)}")
    if file.read(1):  # at a gzip file's end this also checks its CRC
        raise DataError(f"{path}: expected its end after {length} bytes for dimensions {shape}, got more")
    return torch.frombuffer(body, dtype=torch.uint8).view(shape)


def _normalised(pixels_N: Tensor, white: int, mean: float, deviation: float) -> Tensor:
    """uint8 ``(N, H, W)`` → float32 ``(N, 1, H, W)``, ``(pixel / white − mean) / deviation``."""
    return pixels_N.float().div_(white).sub_(mean).div_(deviation).unsqueeze_(1)


def _idx_split(images: Path, labels: Path, mean: float, deviation: float) -> Split:
    pixels_N, y_N = read_idx(images), read_idx(labels)
    if pixels_N.dim() != 3 or pixels_N.shape[1:] != (28, 28):
        raise DataError(f"{images}: expected images (N, 28, 28), got {tuple(pixels_N.shape)}")
    if y_N.shape != pixels_N.shape[:1]:
        raise DataError(f"{labels}: expected {len(pixels_N)} labels, one an image, got {tuple(y_N.shape)}")
    if (largest := int(y_N.max())) > 9:
        raise DataError(f"{labels}: expected labels 0 to 9, got {largest}")
    return Split(_normalised(pixels_N, 255, mean, deviation), y_N.long())


def _idx_data(name: str, mean: float, deviation: float, remedy: str, places: Places) -> Data:
    files = find_idx(name, places)
    if files is None:
        looked = ", ".join(str(folder) for place in places for folder in (place / name, place))
        raise DataError(
            f"{name}: no complete data in {looked}; expected in one folder, each with or without .gz: "
            f"{', '.join(STEMS)}. {remedy.format(folder=places[0])}"
        )
    paths = [files[stem] for stem in STEMS]
    train, test = (
        _idx_split(*pair, mean, deviation) for pair in ((paths[0], paths[1]), (paths[2], paths[3]))
    )
    return Data(name, train, test, 10)


def _digits(places: Places) -> Data:
    """scikit-learn's ``load_digits`` (UCI, "Optical recognition of handwritten digits"), 0 to 16 in 8×8.

    The file is read without importing scikit-learn, which would cost every rank over a second.
    """
    spec = find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(f"digits: expected scikit-learn's copy at {path}; run: pip install scikit-learn")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    table = table[random.permutation(random.key(0, stream="digits split"), len(table))]
    x, y = _normalised(table[:, :-1].reshape(-1, 8, 8), 16, 0.305, 0.376), table[:, -1].long()
    return Data("digits", Split(x[:1437], y[:1437]), Split(x[1437:], y[1437:]), 10)


DATA: dict[str, Callable[[Places], Data]] = {
    "digits": _digits,
    "fashion-mnist": partial(
        _idx_data, "fashion-mnist", 0.286, 0.353, "Run: fedmpi data fetch fashion-mnist --to {folder}"
    ),
    "mnist": partial(_idx_data, "mnist", 0.1307, 0.3081, "Put the four files into {folder}/mnist"),
}
