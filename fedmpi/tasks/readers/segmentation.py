"""Pictures with a class a pixel: Pascal VOC 2012 and COCO, from their folders.

Targets are int64 ``(N, size, size)``, 0 for the background and IGNORE where the data set does not say.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import IGNORE, Data, Places, Split, locate, normalised
from fedmpi.tasks.readers.images import ImageOptions, opened, read_image
from fedmpi.tasks.readers.lines import inside, kind, read_json, text_lines

_VOC_CLASSES, _VOID = 21, 255
_LISTS = "ImageSets/Segmentation"
_COCO_PARTS = {"train": "train2017", "test": "val2017"}

Samples = list[tuple[Tensor, Tensor]]


def voc(options: ImageOptions, places: Places) -> Data:
    """Pascal VOC 2012's segmentation task: 20 classes and the background; ``train.txt`` against ``val.txt``.

    Masks are palette PNGs whose indices are the classes, 255 where none is given.
    """
    wanted = ("JPEGImages", "SegmentationClass", f"{_LISTS}/train.txt", f"{_LISTS}/val.txt")
    remedy = f"Unpack VOCtrainval_11-May-2012.tar into {places[0]}"
    folder = locate("voc", places, wanted, ("VOCdevkit/VOC2012",), remedy)
    parts = [_voc_part(folder, part, options) for part in ("train", "val")]
    return _data("voc", parts, _VOC_CLASSES)


def _voc_part(folder: Path, part: str, options: ImageOptions) -> Samples:
    listed = folder / _LISTS / f"{part}.txt"
    names = [name.strip() for name in text_lines(listed)][: options.limit]
    if not names:
        raise DataError(f"{listed}: expected the names of pictures, one a line, got none")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{listed}: expected each picture once, got {twice[:80]!r} again")
    samples = []
    for name in names:
        path = inside(folder / "SegmentationClass", f"{name}.png", listed)
        with opened(path) as mask:
            if mask.mode not in ("P", "L"):
                raise DataError(f"{path}: expected a palette picture of classes, got mode {mask.mode}")
            y, size = _scaled(mask, options.size), mask.size
        file = inside(folder / "JPEGImages", f"{name}.jpg", listed)
        picture = read_image(file, options.size, expected=(size, path))
        wrong = y[(y >= _VOC_CLASSES) & (y != _VOID)]
        if len(wrong):
            raise DataError(f"{path}: expected classes 0 to 20 and 255, got {int(wrong[0])}")
        samples.append((picture, y.masked_fill(y == _VOID, IGNORE)))
    return samples


def coco(options: ImageOptions, places: Places) -> Data:
    """COCO 2017's instances as a class a pixel: 80 classes in the order of their ids, and the background.

    Polygons and uncompressed runs are drawn in the order of the file; what is marked as a crowd is left out
    of the loss.
    """
    annotations = {part: f"annotations/instances_{name}.json" for part, name in _COCO_PARTS.items()}
    remedy = f"Unpack train2017.zip, val2017.zip and annotations_trainval2017.zip into {places[0]}/coco"
    folder = locate("coco", places, (*_COCO_PARTS.values(), *annotations.values()), (), remedy)
    parts, classes = [], []
    for part, name in _COCO_PARTS.items():
        samples, ids = _coco_part(folder / annotations[part], folder / name, options)
        parts.append(samples)
        classes.append(ids)
    if classes[0] != classes[1]:
        raise DataError(f"{folder / annotations['test']}: expected the categories of train, got others")
    return _data("coco", parts, len(classes[0]) + 1)


def _coco_part(path: Path, pictures: Path, options: ImageOptions) -> tuple[Samples, list[int]]:
    content = read_json(path)
    try:
        ids = sorted(_whole(category["id"]) for category in content["categories"])
        known = [_whole(image["id"]) for image in content["images"]]
        images = content["images"][: options.limit]
        by_image = defaultdict(list)
        for annotation in content["annotations"]:
            by_image[_whole(annotation["image_id"])].append(annotation)
        if len(set(known)) < len(known) or by_image.keys() - set(known):
            raise ValueError("an image's id twice, or an annotation of no image")
        named = [(image["id"], inside(pictures, image["file_name"], path), _size(image)) for image in images]
        if not named:
            raise ValueError("no images")
        if len({image["file_name"] for image in content["images"]}) < len(known):
            raise ValueError("a picture's file twice")
        if len(set(ids)) < len(ids) or not ids or ids[0] < 0:
            raise ValueError("a category's id twice, below 0 or none")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected images, annotations and categories as COCO has them, got {kind(content)} "
            f"({type(error).__name__}: {error})"
        ) from error
    number = {identity: i for i, identity in enumerate(ids, 1)}
    samples = []
    for identity, picture, size in named:
        pixels = read_image(picture, options.size, expected=(size, path))
        mask = Image.new("I", size)  # not before the picture is known to be as large
        for annotation in by_image[identity]:
            _draw(mask, annotation, number, path)
        samples.append((pixels, _scaled(mask, options.size)))
    return samples, ids


def _size(image: dict[str, Any]) -> tuple[int, int]:
    width, height = _whole(image["width"]), _whole(image["height"])
    if not (0 < width <= 1 << 14 and 0 < height <= 1 << 14):
        raise ValueError(f"a picture of {width} × {height}")
    return width, height


def _draw(mask: Image.Image, annotation: dict[str, Any], number: dict[int, int], path: Path) -> None:
    try:
        value = number[_whole(annotation["category_id"])]
        if (crowd := _whole(annotation.get("iscrowd", 0))) not in (0, 1):
            raise ValueError(f"iscrowd {crowd:.0f}, expected 0 or 1")
        value, shape = IGNORE if crowd else value, annotation["segmentation"]
        if isinstance(shape, dict):
            if shape.get("size", [*reversed(mask.size)]) != [*reversed(mask.size)]:
                raise ValueError(
                    f"runs of size {shape['size']!r:.40}, expected height and width of the picture"
                )
            mask.paste(value, (0, 0), _runs(shape["counts"], mask.size))
        else:
            if not isinstance(shape, list) or not shape:
                raise ValueError(f"the segmentation {shape!r:.40}, expected at least one polygon")
            for polygon in shape:
                ImageDraw.Draw(mask).polygon(_corners(polygon), fill=value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: annotation {annotation.get('id')}: expected polygons or uncompressed runs of a known "
            f"category, got {type(error).__name__}: {error}"
        ) from error


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} instead of a whole number")
    return value


def _corners(polygon: Any) -> list[float]:
    """x and y of a polygon's corners in turn."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon of {polygon!r:.40}, expected pairs of numbers of 3 corners or more")
    for value in polygon:
        if type(value) not in (int, float) or not abs(value) <= 1 << 20:  # NaN is in no range
            raise ValueError(f"a corner at {value!r:.40}, expected numbers within the picture")
    return [float(value) for value in polygon]


def _runs(counts: Any, size: tuple[int, int]) -> Image.Image:
    """COCO's runs: down the columns, off and on in turn."""
    if not isinstance(counts, list):
        raise ValueError(f"runs of {type(counts).__name__}, expected a list")
    total = sum(map(_whole, counts))  # without a bound, as int64's would wrap
    if min(counts, default=0) < 0 or total != size[0] * size[1]:
        raise ValueError(f"runs over {total} pixels, expected {size[0] * size[1]}")
    lengths = np.asarray(counts, dtype=np.int64)
    on = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(np.uint8) * 255
    return Image.fromarray(np.ascontiguousarray(on.reshape(size).T))


def _scaled(mask: Image.Image, size: int) -> Tensor:
    """int64 ``(size, size)``; the nearest pixel, because classes have no mean."""
    return torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST))).long()


def _data(name: str, parts: list[Samples], classes: int) -> Data:
    x = normalised(*(torch.stack([picture for picture, _ in samples]) for samples in parts))
    y = [torch.stack([mask for _, mask in samples]) for samples in parts]
    return Data(name, Split(x[0], y[0]), Split(x[1], y[1]), classes)
