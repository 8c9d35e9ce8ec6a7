"""Data sets by name, read whole into memory, once a process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmpi import own
from fedmpi.errors import DataError
from fedmpi.tasks import choose, convert
from fedmpi.tasks.convert import USAGE
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, default_folder
from fedmpi.tasks.readers import (
    celeba,
    cifar,
    hub,
    idx,
    images,
    kjv,
    leaf,
    leaf_any,
    personachat,
    segmentation,
    table,
    text,
)
from fedmpi.validation import checked

__all__ = ["DATA", "INSTALLED", "Data", "Split", "default_folder", "load"]

INSTALLED = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its folder


class Reader(NamedTuple):
    options: type[DataOptions]
    read: Callable[[Any, Places], Data]  # (options, folders for data sets)
    summary: str


DATA: dict[str, Reader] = {
    "digits": Reader(DataOptions, idx.digits, "1,797 handwritten digits, 8×8, of scikit-learn"),
    "fashion-mnist": Reader(DataOptions, idx.fashion_mnist, "70,000 pieces of clothing, 28×28"),
    "mnist": Reader(DataOptions, idx.mnist, "70,000 handwritten digits, 28×28"),
    "emnist": Reader(idx.EmnistOptions, idx.emnist, "handwritten letters and digits, 28×28"),
    "femnist": Reader(DataOptions, leaf.femnist, "EMNIST by writer, from LEAF's JSON files"),
    "leaf": Reader(leaf_any.LeafOptions, leaf_any.leaf, "any other data set of LEAF's, your own too"),
    "cifar-10": Reader(DataOptions, cifar.cifar10, "60,000 pictures of 10 classes, 32×32"),
    "cifar-100": Reader(cifar.Cifar100Options, cifar.cifar100, "60,000 pictures of 100 classes, 32×32"),
    "celeba": Reader(images.ImageOptions, celeba.celeba, "faces and the places of five landmarks"),
    "voc": Reader(images.ImageOptions, segmentation.voc, "Pascal VOC 2012, a class a pixel"),
    "coco": Reader(images.ImageOptions, segmentation.coco, "COCO 2017, a class a pixel"),
    "sst-2": Reader(text.TextOptions, text.sst2, "sentences of film reviews, good or bad"),
    "movie-reviews": Reader(text.ReviewOptions, text.movie_reviews, "10,605 rated sentences of film reviews"),
    "personachat": Reader(personachat.ChatOptions, personachat.personachat, "dialogues by personality"),
    "kjv": Reader(kjv.KjvOptions, kjv.kjv, "the King James text, 4.0 million bytes in 1,189 chapters"),
    "image-folder": Reader(images.FolderOptions, images.image_folder, "your pictures, a folder a class"),
    "csv": Reader(table.TableOptions, table.table, "your own table: columns of numbers and categories"),
    "hub": Reader(hub.HubOptions, hub.hub, "a data set of the Hugging Face hub or a folder of tables"),
}


def load(name: str, folder: str | Path | None = None, **options: object) -> Data:
    """The data set ``name``, read once a process.

    Args:
      name: a row of :data:`DATA`, or the import path of your own ``load(folder, **options) -> Data``.
      folder: holds the files, itself or in a sub-folder called ``name``; default:
        :func:`default_folder`, then where Debian's package installs them.
      options: fields of the row's options.

    Raises:
      ConfigError: an unknown name or option (lists the valid ones).
      DataError: files that are missing (says where it looked and what to do) or damaged.
    """
    places = (Path(folder),) if folder is not None else (default_folder(), INSTALLED)
    wanted = json.dumps(options, sort_keys=True)
    with _LOCK:  # lru_cache alone would let rank-threads that start together each read their own copy
        return _load(name, tuple(place.expanduser().absolute() for place in places), wanted)


_LOCK = threading.Lock()


@lru_cache(maxsize=4)
def _load(name: str, places: Places, wanted: str) -> Data:
    options = json.loads(wanted)
    if own.is_path(name):
        return _own(name, places[0], options)
    reader = choose("data set", name, DATA)
    parsed = checked(reader.options, options, f"data {name}")
    try:
        return _first(reader.read(parsed, places), parsed.limit)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(  # not foreseen where the file is read, so that no more of it is known
            f"{name}: the files in {places[0]} are not as its format says: {type(error).__name__}: {error}"[
                :500
            ]
        ) from error


def _own(name: str, place: Path, options: dict[str, Any]) -> Data:
    """Your own data set. A ``limit`` that it does not take itself is kept for it."""
    limit = None
    if "limit" in options and not own.takes("data.name", name, "limit", USAGE):
        given = {"folder": None, "limit": options["limit"]}
        limit = checked(DataOptions, given, "data").limit
        options = {key: value for key, value in options.items() if key != "limit"}
    found = own.call("data.name", name, place, options=options, usage=USAGE)
    return _first(_checked(name, convert.data_of(name, found)), limit)


def _first(data: Data, limit: int | None) -> Data:
    """The first so many samples of each set, in memory of their own."""
    if limit is None:
        return data

    def cut(split: Split) -> Split:
        groups = None if split.groups is None else split.groups[:limit].clone()
        return Split(split.x[:limit].clone(), split.y[:limit].clone(), groups)

    return data._replace(train=cut(data.train), test=cut(data.test))


def _checked(name: str, data: Data) -> Data:
    """A user's own data set; DataError that says what of it cannot be used."""
    if isinstance(data.classes, bool) or not isinstance(data.classes, int) or data.classes < 1:
        raise DataError(f"{name}: classes: expected an integer of at least 1, got {data.classes!r}")
    for part in ("train", "test"):
        split = getattr(data, part)
        if not isinstance(split, Split):
            raise DataError(f"{name}: {part}: expected a Split(x, y), got a {type(split).__name__}")
        for field, value in split._asdict().items():
            if value is not None or field != "groups":
                _check_tensor(f"{name}: {part}.{field}", field, value, split.x)
        if split.y.dtype == torch.int64 and split.y.shape[1:] == (1,) and split.x.shape != split.y.shape:
            raise DataError(
                f"{name}: {part}.y: expected labels ({len(split.y)},), got {tuple(split.y.shape)}; use y.squeeze(1)"
            )
    for field in ("x", "y"):
        train, test = (tuple(getattr(split, field).shape[1:]) for split in (data.train, data.test))
        if train != test:
            raise DataError(f"{name}: expected samples of one shape, got {field} of {train} and {test}")
    return data


def _check_tensor(title: str, field: str, value: Any, x: Any) -> None:
    kinds = {"x": (torch.float32, torch.int64), "y": (torch.float32, torch.int64), "groups": (torch.int64,)}[
        field
    ]
    if not isinstance(value, torch.Tensor):
        kind = f" of {value.dtype}" if isinstance(value, np.ndarray) else ""
        raise DataError(
            f"{title}: expected a tensor or an array of numbers, a row a sample, got a {type(value).__name__}{kind}"
        )
    if value.layout != torch.strided or value.device.type != "cpu" or value.requires_grad:
        raise DataError(
            f"{title}: expected a dense tensor on the CPU without requires_grad, got {value.layout} on {value.device}"
            f"{' with it' if value.requires_grad else ''}"
        )
    if not value.dim() or not len(value) or len(value) != len(x):
        got = len(value) if value.dim() else "a single number"
        rows = "at least one" if value is x else f"{len(x)} as x has"
        raise DataError(f"{title}: expected a tensor, a row a sample ({rows}), got {got}")
    if value.dtype not in kinds:
        wanted = " or ".join(str(kind) for kind in kinds)
        how = ".float() / 255 (pixels) or .long() (tokens)" if value.dtype == torch.uint8 else ".float()"
        raise DataError(f"{title}: expected {wanted}, got {value.dtype}; convert it with {how}")
    if field == "groups" and value.dim() != 1:
        raise DataError(f"{title}: expected one dimension, got the shape {tuple(value.shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise DataError(f"{title}: expected finite numbers, got a NaN or an infinity")
