"""IDX files: Fashion-MNIST, MNIST, EMNIST; and scikit-learn's digits.

The format (LeCun, Cortes, Burges, "The MNIST database of handwritten digits"): two zero bytes, a byte
for the element type (8: unsigned byte), a byte for the number of dimensions, each dimension as a
big-endian 32-bit integer, then the elements.

Shape suffixes: N samples.
"""

from __future__ import annotations

import gzip
import math
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmpi import random
from fedmpi.errors import DataError
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, normalised
from fedmpi.tasks.readers.lines import regular
from fedmpi.tasks.verify import PACKING

STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_CHUNK = 1 << 20
_LARGEST = 1 << 30  # bytes of an IDX file's elements; the largest in use, EMNIST's, has 547 million


def find_idx(name: str, places: Places, stems: tuple[str, ...] = STEMS) -> dict[str, Path] | None:
    """The four files of an IDX data set by their stem, all from the first folder that has all four.

    Each may be gzipped and may be spelled ``train-images.idx3-ubyte``.
    """
    for folder in (folder for place in places for folder in (place / name, place)):
        found = {stem: path for stem in stems if (path := _spelled(folder, stem))}
        if len(found) == len(stems):
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
        with regular(Path(path)).open("rb") as file:
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
    if (there := Path(path).stat().st_size) > length + PACKING:
        # Else gzip would look for another member behind the first, a byte a step through whatever follows.
        raise DataError(
            f"{path}: expected at most {length + PACKING} bytes for dimensions {shape}, got {there}"
        )
    body = bytearray()  # grows with what is really there, so a false header costs no memory
    while len(body) < length and (chunk := file.read(min(_CHUNK, length - len(body)))):
        body += chunk
    if len(body) != length:
        raise DataError(f"{path}: expected {length} bytes for dimensions {shape}, got {len(body)}")
    if file.read(1):  # at a gzip file's end this also checks its CRC
        raise DataError(f"{path}: expected its end after {length} bytes for dimensions {shape}, got more")
    return torch.frombuffer(body, dtype=torch.uint8).view(shape)


def _scaled(pixels_N: Tensor, white: int, mean: float, deviation: float) -> Tensor:
    """uint8 ``(N, H, W)`` → float32 ``(N, 1, H, W)``, ``(pixel / white − mean) / deviation``."""
    return pixels_N.float().div_(white).sub_(mean).div_(deviation).unsqueeze_(1)


def _pair(images: Path, labels: Path, classes: range) -> tuple[Tensor, Tensor]:
    """uint8 images ``(N, 28, 28)`` and their labels from 0."""
    pixels_N, y_N = read_idx(images), read_idx(labels).long()
    if pixels_N.dim() != 3 or pixels_N.shape[1:] != (28, 28):
        raise DataError(f"{images}: expected images (N, 28, 28), got {tuple(pixels_N.shape)}")
    if y_N.shape != pixels_N.shape[:1]:
        raise DataError(f"{labels}: expected {len(pixels_N)} labels, one an image, got {tuple(y_N.shape)}")
    for found in (int(y_N.min()), int(y_N.max())):
        if found not in classes:
            raise DataError(f"{labels}: expected labels {classes[0]} to {classes[-1]}, got {found}")
    return pixels_N, y_N - classes[0]


def _pairs(
    name: str, places: Places, stems: tuple[str, ...], classes: range, remedy: str
) -> list[tuple[Tensor, Tensor]]:
    """The training and the test set's images and labels."""
    files = find_idx(name, places, stems)
    if files is None:
        looked = ", ".join(str(folder) for place in places for folder in (place / name, place))
        raise DataError(
            f"{name}: no complete data in {looked}; expected in one folder, each with or without .gz: "
            f"{', '.join(stems)}. {remedy.format(folder=places[0])}"
        )
    paths = [files[stem] for stem in stems]
    return [_pair(paths[0], paths[1], classes), _pair(paths[2], paths[3], classes)]


def _mnist(
    name: str, mean: float, deviation: float, remedy: str, options: DataOptions, places: Places
) -> Data:
    pairs = _pairs(name, places, STEMS, range(10), remedy)
    train, test = (Split(_scaled(pixels, 255, mean, deviation), y) for pixels, y in pairs)
    return Data(name, train, test, 10)


class EmnistOptions(DataOptions):
    split: Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"] = Field(
        "balanced", description="which of the six splits"
    )


_EMNIST = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 26, "mnist": 10}


def emnist(options: EmnistOptions, places: Places) -> Data:
    """A split of EMNIST (Cohen, Afshar, Tapson, van Schaik, "EMNIST: an extension of MNIST to handwritten
    letters", 2017) from the files of its archive ``gzip.zip``, whose images lie on their side."""
    stems = tuple(
        f"emnist-{options.split}-{part}-{kind}-ubyte"
        for part in ("train", "test")
        for kind in ("images-idx3", "labels-idx1")
    )
    classes, first = _EMNIST[options.split], int(options.split == "letters")
    remedy = "Unpack EMNIST's gzip.zip into {folder}/emnist"
    train, test = _pairs("emnist", places, stems, range(first, classes + first), remedy)
    x = normalised(*(pixels.transpose(1, 2).unsqueeze(1) for pixels, _ in (train, test)))
    return Data("emnist", Split(x[0], train[1]), Split(x[1], test[1]), classes)


def digits(options: DataOptions, places: Places) -> Data:
    """scikit-learn's ``load_digits`` (UCI, "Optical recognition of handwritten digits"), 0 to 16 in 8×8.

    The file is read without importing scikit-learn, which would cost every rank over a second.
    """
    spec = find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(f"digits: expected scikit-learn's copy at {path}; run: pip install scikit-learn")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    table = table[random.permutation(random.key(0, stream="digits split"), len(table))]
    x, y = _scaled(table[:, :-1].reshape(-1, 8, 8), 16, 0.305, 0.376), table[:, -1].long()
    return Data("digits", Split(x[:1437], y[:1437]), Split(x[1437:], y[1437:]), 10)


fashion_mnist = partial(
    _mnist, "fashion-mnist", 0.286, 0.353, "Run: fedmpi data fetch fashion-mnist --to {folder}"
)
mnist = partial(_mnist, "mnist", 0.1307, 0.3081, "Put the four files into {folder}/mnist")
