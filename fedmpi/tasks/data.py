"""Data sets by name, read whole into memory, once a process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.data

from fedmpi import own
from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks import choose
from fedmpi.tasks.dataset import Data, DataOptions, Places, Split, default_folder
from fedmpi.tasks.readers import celeba, cifar, hub, idx, images, kjv, leaf, personachat, segmentation, text
from fedmpi.validation import checked

__all__ = ["DATA", "INSTALLED", "Data", "Split", "default_folder", "load"]

INSTALLED = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its folder
USAGE = "load(folder: pathlib.Path, **options) -> fedmpi.tasks.data.Data"


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
        return _checked(name, own.call("data.name", name, places[0], options=options, usage=USAGE))
    reader = choose("data set", name, DATA)
    parsed = checked(reader.options, options, f"data {name}")
    try:
        return reader.read(parsed, places)
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


def _checked(name: str, data: Any) -> Data:
    """A user's own data set; ConfigError or DataError that says what of it cannot be used."""
    if not isinstance(data, Data):
        how = ""
        if isinstance(data, torch.utils.data.Dataset | torch.utils.data.DataLoader):
            how = "; stack its samples: Split(torch.stack([x for x, _ in it]), torch.tensor([y for _, y in it]))"
        raise ConfigError(f"data.name: {name} returned a {type(data).__name__}, expected {USAGE}{how}")
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
        how = "; torch.from_numpy makes one" if type(value).__module__ == "numpy" else ""
        raise DataError(f"{title}: expected a tensor, a row a sample, got a {type(value).__name__}{how}")
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
        how = (
            ".float()" if value.dtype.is_floating_point else ".long() (classes, tokens) or .float() (values)"
        )
        raise DataError(f"{title}: expected {wanted}, got {value.dtype}; convert it with {how}")
    if field == "groups" and value.dim() != 1:
        raise DataError(f"{title}: expected one dimension, got the shape {tuple(value.shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise DataError(f"{title}: expected finite numbers, got a NaN or an infinity")
