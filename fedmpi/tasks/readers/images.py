"""Pictures through Pillow, and folders of them: ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field, PositiveInt
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, locate, normalised
from fedmpi.tasks.readers.lines import regular

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class ImageOptions(DataOptions):
    size: PositiveInt = Field(64, description="pixels of a side that pictures are scaled to")


class FolderOptions(ImageOptions):
    gray: bool = Field(False, description="one channel instead of red, green and blue")


def read_image(
    path: Path, size: int, mode: str = "RGB", expected: tuple[tuple[int, int], Path] | None = None
) -> Tensor:
    """A picture scaled to ``size`` × ``size``: uint8 ``(3, size, size)``, or ``(1, …)`` for mode L.

    Args:
      path: the picture's.
      size: pixels of a side.
      mode: Pillow's name of the channels, RGB or L.
      expected: width and height that the file beside it was made for.

    Raises:
      DataError: it cannot be read, is truncated, is larger than Pillow's limit against bombs, or has another width and
        height than ``expected``, so that landmarks or masks would be of other places.
    """
    with opened(path) as picture:
        if expected is not None and picture.size != expected[0]:
            (width, height), other = expected
            raise DataError(
                f"{path}: expected a picture of {width} × {height} pixels, which {other} is for, "
                f"got {picture.size[0]} × {picture.size[1]}"
            )
        try:
            scaled = picture.convert(mode).resize((size, size), Image.Resampling.BILINEAR)
        except (OSError, ValueError) as error:  # a palette that is none
            raise DataError(
                f"{path}: expected a whole picture, got {type(error).__name__}: {error}"
            ) from error
    pixels = torch.from_numpy(np.array(scaled, dtype=np.uint8))
    return pixels.permute(2, 0, 1) if mode == "RGB" else pixels[None]


def opened(path: Path) -> Image.Image:
    """The picture, wholly read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(regular(path))
            picture.load()
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        struct.error,
        TypeError,
        zlib.error,
        SyntaxError,  # Pillow's word for a broken PNG
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(f"{path}: expected a whole picture, got {type(error).__name__}: {error}") from error
    return picture


def image_folder(options: FolderOptions, places: Places) -> Data:
    """A folder a class, named by it, in ``train`` and ``test``; classes are numbered by their names' order."""
    remedy = "Give the folder that holds them as data.folder"
    root = locate("image-folder", places, ("train", "test"), (), remedy)
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root / 'train'}: expected a folder for each of two classes or more, got {classes}")
    (train_x, train_y), (test_x, test_y) = (
        _labelled(root / part, classes, options) for part in ("train", "test")
    )
    x = normalised(train_x, test_x)
    return Data("image-folder", Split(x[0], train_y), Split(x[1], test_y), len(classes))


def _labelled(root: Path, classes: list[str], options: FolderOptions) -> tuple[Tensor, Tensor]:
    strange = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in classes)
    if strange:
        raise DataError(f"{root}: expected the folders of train ({', '.join(classes)}), got {strange[0]}")
    lists = [
        sorted(path for path in (root / name).glob("*") if path.suffix.lower() in ENDINGS) for name in classes
    ]
    empty = next((root / name for name, paths in zip(classes, lists, strict=True) if not paths), None)
    if empty is not None:
        raise DataError(f"{empty}: expected pictures ({', '.join(ENDINGS)}), got none")
    # The classes in turn, so that a limit takes some of each.
    turns = sorted((i, label, path) for label, paths in enumerate(lists) for i, path in enumerate(paths))
    samples = [(path, label) for _, label, path in turns[: options.limit]]
    mode = "L" if options.gray else "RGB"
    pixels = torch.stack([read_image(path, options.size, mode) for path, _ in samples])
    return pixels, torch.tensor([label for _, label in samples])
