"""Damaged data sets, for the reader of each; a kind of :mod:`tests.jobs.fuzz`.

One thing or some of a small valid set are changed: bytes, what kind of file it is, entries of JSON, fields of lines,
pictures, a header's numbers, or the tensors of an own data set. What is accepted is consistent (shapes, labels in
range, finite numbers) and says what a second, simple and strict reading of the same files says.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedmpi.errors import FedMPIError
from fedmpi.tasks import data as sets
from fedmpi.tasks import objectives
from fedmpi.tasks.data import Data, Split
from fedmpi.tasks.dataset import IGNORE, PAD
from tests import formats

from .outcomes import Attempt

ROOM = 8 << 30  # what the libraries map is most of it
Reading = Callable[[Path, Data], None]  # AssertionError when the data are not what the folder says
FLOATS = ("nan", "inf", "-inf", "1e999", "1.7", "1e300", "-0.5")
NUMBERS = (-1, 0, 1, 2, 7, 61, 62, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, 10**400)
WORDS = (
    "",
    " ",
    "0",
    "-1",
    "1_0",
    "٣",
    "1.0",
    "abc",
    "../a",
    "/dev/zero",
    "\0",
    "\ud800",
    "x" * 5000,
    "\t",
    "é",
)


class Format(NamedTuple):
    name: str  # of the reader
    build: Callable[[Path], Any]
    loss: str
    meant: Reading
    shape: tuple[int, ...] | None = None  # of a sample
    options: Mapping[str, Any] = MappingProxyType({})
    optional: tuple[str, ...] = ()  # what may be away: parts of paths
    weight: int = 10


def _agrees(got: Tensor, expected: list[Any], what: str) -> None:
    assert got.tolist() == expected, f"{what}: {got.tolist()!r:.200} instead of {expected!r:.200}"


def _plain(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def mnist(folder: Path) -> None:
    for i, (stem, content) in enumerate(formats.images_and_labels().items()):
        packed = gzip.compress(content, 1) if i % 2 else content
        (folder / (f"{stem}.gz" if i % 2 else stem)).write_bytes(packed)


def idx_meant(folder: Path, data: Data) -> None:
    for part, split in (("train", data.train), ("t10k", data.test)):
        labels = _plain(next(folder.glob(f"{part}-labels*")))
        pixels = _plain(next(folder.glob(f"{part}-images*")))
        _agrees(split.y, list(labels[8:]), "labels")
        assert len(pixels) == 16 + 784 * len(split.x), "other pictures"


def cifar_meant(names: tuple[tuple[str, ...], tuple[str, ...]], at: int, record: int) -> Reading:
    def meant(folder: Path, data: Data) -> None:
        for split, files in zip((data.train, data.test), names, strict=True):
            _agrees(split.y, [b for f in files for b in (folder / f).read_bytes()[at::record]], "labels")

    return meant


def _real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def leaf_meant(folder: Path, data: Data) -> None:
    for split, part in ((data.train, "train"), (data.test, "test")):
        labels, people = [], 0
        for path in sorted((folder / part).glob("*.json")):
            content = json.loads(path.read_bytes())
            people += len(content["user_data"])
            for user, samples in content["user_data"].items():
                assert user in content.get("users", [user]), f"{user} is none of the users"
                for row in samples["x"]:
                    assert len(row) == 784, "a picture of other pixels"
                    assert all(_real(v) and 0 <= v <= 1 for v in row), "a pixel that is none"
                assert all(_real(v) for v in samples["y"]), "a label that is none"
                labels += samples["y"]
            assert len(content.get("users", content["user_data"])) == len(content["user_data"]), (
                "users are missing"
            )
        _agrees(split.y, labels, "labels")
        if split.groups is not None:
            assert int(split.groups.max()) + 1 == people, "other writers"


def celeba_meant(folder: Path, data: Data) -> None:
    lines = (folder / "list_landmarks_align_celeba.txt").read_text().split("\n")
    points = {w[0]: w[1:] for line in lines[2:] if (w := line.split())}
    parts = dict(
        line.split() for line in (folder / "list_eval_partition.txt").read_text().split("\n") if line.strip()
    )
    for split, part in ((data.train, "0"), (data.test, "2")):
        names = [name for name in points if parts.get(name) == part]
        assert set(parts) == set(points), "a list without some of the pictures"
        values = np.array([[int(v) for v in points[name]] for name in names]) / ([178, 218] * 5)
        assert np.allclose(split.y.numpy(), values, atol=1e-4), "other landmarks"
        assert np.abs(values).max() <= 2, "landmarks far outside the picture"
        for name in names:
            assert Image.open(folder / "img_align_celeba" / name).size == (178, 218), (
                "landmarks of another picture"
            )


def voc_meant(folder: Path, data: Data) -> None:
    root = folder / "VOCdevkit" / "VOC2012"
    for split, part in ((data.train, "train"), (data.test, "val")):
        names = (root / "ImageSets" / "Segmentation" / f"{part}.txt").read_text().split()
        assert len(set(names)) == len(names) == len(split.y), "other pictures"
        for name in names:
            mask = Image.open(root / "SegmentationClass" / f"{name}.png")
            assert mask.size == Image.open(root / "JPEGImages" / f"{name}.jpg").size, "a mask of another size"


def coco_meant(folder: Path, data: Data) -> None:
    for split, part in ((data.train, "train2017"), (data.test, "val2017")):
        content = json.loads((folder / "annotations" / f"instances_{part}.json").read_bytes())
        images = {image["id"]: image for image in content["images"]}
        assert len(images) == len(split.y) == len(content["images"]), "other pictures"
        assert len({c["id"] for c in content["categories"]}) == data.classes - 1, "other classes"
        for image in images.values():
            size = Image.open(folder / part / image["file_name"]).size
            assert size == (image["width"], image["height"]), "an annotation of another picture"
            assert ".." not in image["file_name"], "a picture outside"
        for a in content["annotations"]:
            assert a.get("iscrowd", 0) in (0, 1), "neither a crowd nor none"
            assert type(a.get("iscrowd", 0)) is int, "neither a crowd nor none"
            assert a["category_id"] in {c["id"] for c in content["categories"]}, "an unknown category"
            image, shape = images[a["image_id"]], a["segmentation"]
            if isinstance(shape, dict):
                size = [image["height"], image["width"]]
                assert shape.get("size", size) == size, "runs over another picture"
                assert sum(shape["counts"]) == image["width"] * image["height"], "runs over another picture"
            else:
                assert shape, "no polygon"
                assert all(_real(v) for polygon in shape for v in polygon), "a corner that is none"


def folder_meant(folder: Path, data: Data) -> None:
    classes = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    assert data.classes == len(classes), "other classes"
    for split, part in ((data.train, "train"), (data.test, "test")):
        counts = [len(list((folder / part / name).glob("*.png"))) for name in classes]
        _agrees(split.y.bincount(minlength=len(classes)), counts, "pictures a class")


def sst2(folder: Path) -> None:
    (folder / "train.tsv").write_text("sentence\tlabel\na good film .\t1\nbad\t0\ni like tea\t1\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\ni like a good good bad film\t1\nbad film\t0\n")


def sst2_meant(folder: Path, data: Data) -> None:
    for split, part in ((data.train, "train"), (data.test, "dev")):
        rows = (folder / f"{part}.tsv").read_bytes().decode().rstrip().split("\n")[1:]
        assert all(row.count("\t") == 1 and row.split("\t")[0].strip() for row in rows), "other columns"
        _agrees(split.y, [int(row.split("\t")[1]) for row in rows], "labels")


def movies(folder: Path) -> None:
    rated = [1.5, -2.25, 0.0, 3, -1] * 3
    lines = [f"{i}\t{rating}\ta {'good' if rating > 0 else 'bad'} film\r\n" for i, rating in enumerate(rated)]
    (folder / "movieReviewSnippets_GroundTruth.txt").write_bytes("".join(lines).encode())


def movies_meant(folder: Path, data: Data) -> None:
    lines = (folder / "movieReviewSnippets_GroundTruth.txt").read_bytes().decode().rstrip().split("\n")
    ratings = [float(line.split("\t")[1]) for line in lines]
    assert all(c in "0123456789.-+e \r" for line in lines for c in line.split("\t")[1]), (
        "a rating that is none"
    )
    got = [*data.train.y.tolist(), *data.test.y.tolist()]
    assert sorted(got) == sorted(int(r > 0) for r in ratings if r), "other labels"


def persona_meant(folder: Path, data: Data) -> None:
    content = json.loads((folder / "personachat_self_original.json").read_bytes())
    for split, part in ((data.train, "train"), (data.test, "valid")):
        turns = [turn for dialogue in content[part] for turn in dialogue["utterances"]]
        assert len(turns) == len(split.x), "other turns"
        assert all(
            isinstance(d["personality"], list) and isinstance(d["utterances"], list) for d in content[part]
        )
        assert all(isinstance(t["history"], list) and isinstance(t["candidates"], list) for t in turns), (
            "no lists"
        )
        counted = (split.y != IGNORE).sum(1)
        assert bool((counted > 0).all()), "a sample without a target"


def tables(folder: Path) -> None:
    (folder / "train.csv").write_text("text,label,who\na good film,up,ann\nbad,down,bob\ngood,up,ann\n")
    (folder / "test.csv").write_text("text,label,who\nbad film,down,cy\n")


def tables_meant(folder: Path, data: Data) -> None:
    for split, part in ((data.train, "train"), (data.test, "test")):
        rows = list(csv.DictReader(io.StringIO((folder / f"{part}.csv").read_text().strip())))
        assert len([row for row in rows if row["label"]]) == len(split.y), "other rows"


def lists(folder: Path) -> None:
    for part, n in (("train", 4), ("test", 2)):
        rows = [{"text": [i + 0.5, 2.0, -1], "label": i % 2} for i in range(n)]
        (folder / f"{part}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


def lists_meant(folder: Path, data: Data) -> None:
    for split, part in ((data.train, "train"), (data.test, "test")):
        rows = [
            json.loads(line) for line in (folder / f"{part}.json").read_text().split("\n") if line.strip()
        ]
        # The library's tables have one type a column: it reads numbers in quotes as numbers among numbers.
        expected = [[float(v) for v in row["text"]] for row in rows]
        assert all(_real(v) for row in expected for v in row), "a number that is none"
        assert torch.equal(split.x, torch.tensor(expected, dtype=torch.float64).float()), "other numbers"
        assert all(not isinstance(row["label"], float) or row["label"] % 1 == 0 for row in rows), (
            "half a class"
        )


GIVEN: list[Any] = []  # what the own data set returns


def given(folder: Path) -> Any:
    return GIVEN[0]


def own(rng: random.Random) -> tuple[Any, bool]:
    """A Data with one thing changed, and whether it must be refused."""
    data = Data(
        "own",
        Split(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])),
        Split(torch.randn(4, 3), torch.tensor([2, 1, 0, 1])),
        3,
    )
    part = rng.choice(("train", "test"))
    split = getattr(data, part)
    field = rng.choice(("x", "y", "groups", "classes", "part", "data"))
    if field == "classes":
        value: Any = rng.choice(
            (0, -1, 1, 2, 3.0, True, None, "3", float("nan"), torch.tensor(3), 3, 4, 2**62)
        )
        return data._replace(classes=value), not (type(value) is int and value >= 3)
    if field == "part":
        other: Any = rng.choice((None, (split.x, split.y), split.x, [], Split(split.x[:0], split.y[:0])))
        return data._replace(**{part: other}), not isinstance(other, tuple) or isinstance(other, Split)
    if field == "data":
        whole = rng.choice((None, tuple(data), {"train": data.train}, [data], data._replace(train=data.test)))
        return whole, not isinstance(whole, Data)
    value = getattr(data.train, field)
    split = data.train
    bad = value.clone().view(-1)
    changes: list[tuple[Any, bool]] = [
        # Arrays and other types may be converted: to what is consistent, then.
        *((value.numpy(), False), (value.tolist(), False), (None, field != "groups"), (value[:-1], True)),
        *((value[:0], True), (torch.tensor(1), True), (value.double(), False), (value.half(), False)),
        *((value.bool(), False), (value.int(), False)),
        *((value.to(torch.complex64), True), (value.to_sparse(), True)),
        *((value.to("meta"), True), (value.clone(), False), (value.flip(0), False)),
    ]
    if field == "x":
        at = rng.randrange(len(bad))
        bad[at] = rng.choice((float("nan"), float("inf"), -float("inf")))
        noise = [
            (bad.view_as(value), True),
            (value[..., :2], True),
            (value[:, None], True),
            (value * 3e30, False),
        ]
        changes += [*noise, *noise, (value.clone().requires_grad_(), True)]
    else:
        bad[0] = rng.choice((-1, 3, 2**40, -(2**62), IGNORE if field == "groups" else 3))
        changes += [(bad.view_as(value), field == "y"), (value[:, None], True), (value.float() + 0.7, True)]
        changes += [(value[:, None].expand(-1, 2), True), (value[:, None].float(), True)]
    new, must = rng.choice(changes)
    return data._replace(train=split._replace(**{field: new})), must


CIFAR_FILES = tuple(formats.CIFAR_10)
FORMATS = (
    Format("mnist", mnist, "cross_entropy", idx_meant, (1, 28, 28)),
    Format(
        "cifar-10",
        lambda folder: formats.cifar(folder, dict.fromkeys(CIFAR_FILES, 3), (10,)),
        "cross_entropy",
        cifar_meant((CIFAR_FILES[:5], CIFAR_FILES[5:]), 0, 3073),
        (3, 32, 32),
    ),
    Format(
        "cifar-100",
        lambda folder: formats.cifar(folder, {"train.bin": 4, "test.bin": 3}, (20, 100)),
        "cross_entropy",
        cifar_meant((("train.bin",), ("test.bin",)), 1, 3074),
        (3, 32, 32),
    ),
    Format("femnist", formats.leaf, "cross_entropy", leaf_meant, (1, 28, 28)),
    Format(
        *(
            "celeba",
            formats.celeba,
            "squared_error",
            celeba_meant,
            (3, 8, 8),
            {"size": 8},
            ("identity", "000004.jpg"),
        ),
    ),
    Format("voc", formats.voc, "pixels", voc_meant, (3, 8, 8), {"size": 8}),
    Format("coco", formats.coco, "pixels", coco_meant, (3, 8, 8), {"size": 8}, weight=20),
    Format(
        *("image-folder", formats.image_folder, "cross_entropy", folder_meant, (3, 8, 8), {"size": 8}),
        optional=(".png",),
    ),
)
TEXTS = (  # need the extra hf
    Format("sst-2", sst2, "cross_entropy", sst2_meant, options={"length": 8}),
    Format("movie-reviews", movies, "cross_entropy", movies_meant),
    Format("personachat", formats.personachat, "next_token", persona_meant, weight=20),
    Format("hub", tables, "cross_entropy", tables_meant, options={"group": "who"}, weight=1),
    Format("hub", lists, "cross_entropy", lists_meant, (3,), weight=1),
)


def consistent(data: Data, one: Format, words: int) -> None:
    """AssertionError for what a model could not be trained on."""
    objectives.check_data(objectives.OBJECTIVES[one.loss], data)
    assert data.train.x.shape[1:] == data.test.x.shape[1:], "train and test of different shapes"
    for split in (data.train, data.test):
        n = len(split.x)
        assert n > 0, "no samples"
        assert len(split.y) == n, f"{n} samples and {len(split.y)} targets"
        assert one.shape is None or tuple(split.x.shape[1:]) == one.shape, (
            f"samples of {tuple(split.x.shape)}"
        )
        if split.x.is_floating_point():
            assert split.x.dtype == torch.float32, "another dtype"
            assert bool(split.x.isfinite().all()), "samples that are not finite"
        else:
            assert int(split.x.min()) >= PAD, "a token below the padding"
            assert int(split.x.max()) < words, "a token that is none"
        if split.y.is_floating_point():
            assert bool(split.y.isfinite().all()), "targets that are not finite"
            assert split.y.shape == (n, data.classes), f"targets of {tuple(split.y.shape)}"
        else:
            sound = (split.y >= 0) & (split.y < data.classes) | ((split.y == IGNORE) & (split.y.ndim > 1))
            assert bool(sound.all()), "a label that is none"
        if split.groups is not None:
            assert split.groups.shape == (n,), f"groups of {tuple(split.groups.shape)}"


# What a file becomes. Each returns whether the result must be refused, if the file is needed.


def _flip(path: Path, rng: random.Random) -> bool:
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8, 64))):
        raw[rng.randrange(min(len(raw), rng.choice((20, len(raw)))))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return False


def _cut(path: Path, rng: random.Random) -> bool:
    raw = path.read_bytes()
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    path.write_bytes(rng.choice((raw[:a], raw[:a] + raw[b:], raw[: len(raw) - rng.randrange(1, 9)])))
    return False


def _insert(path: Path, rng: random.Random) -> bool:
    raw, at = path.read_bytes(), rng.choice((0, -1, None))
    more = rng.choice(
        (b"\0", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b" ", b"[" * 20_000, rng.randbytes(40), raw)
    )
    path.write_bytes(raw[:at] + more + raw[at:] if at is not None else raw + more)
    return False


def _fill(path: Path, rng: random.Random) -> bool:
    size = path.stat().st_size
    path.write_bytes(
        rng.choice((b"", b"\0" * size, b"\xff" * size, rng.randbytes(size), b"\x1f\x8b", b"\n" * 9))
    )
    return False


def _huge(path: Path, rng: random.Random) -> bool:
    """A file of zeros that takes no room on the disk."""
    os.truncate(path, 1 << rng.choice((31, 40) if path.suffix == ".gz" else (36, 40, 42)))
    return True


def _other_kind(path: Path, rng: random.Random) -> bool:
    path.unlink()
    how = rng.choice(("away", "fifo", "folder", "dangling", "device", "circle"))
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "away":
        path.symlink_to({"dangling": "/none/such", "device": "/dev/zero", "circle": path.name}[how])
    return how in ("fifo", "folder", "device")


GENERAL = (_flip, _flip, _flip, _cut, _cut, _insert, _fill, _huge, _other_kind, _other_kind)


def _odd(rng: random.Random) -> Any:
    deep: Any = 1
    for _ in range(rng.choice((2, 300))):
        deep = [deep]
    kinds: tuple[tuple[Any, ...], ...] = (
        *((None, True, False, [], {}, "", deep, [[]], {"x": 1}), NUMBERS, WORDS),
        tuple(map(float, FLOATS)),
    )
    return rng.choice(rng.choice(kinds))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *_places(value))]


def _tree(tree: Any, rng: random.Random) -> Any:
    """JSON's content with one thing changed; each level is as likely as the others."""
    level = tree
    while True:
        keys = list(level) if isinstance(level, dict) else list(range(len(level)))
        if not keys:
            return _odd(rng)
        key = rng.choice(keys)
        if isinstance(level[key], (dict, list)) and level[key] and rng.random() < 0.75:
            level = level[key]
            continue
        break
    how = rng.randrange(8)
    if how == 0:
        del level[key]
    elif how == 1 and isinstance(level, list):
        level.insert(key, level[key])
    elif how == 2 and isinstance(level, dict):
        level[rng.choice(("more", "", "x"))] = level[key]
    elif how == 3:
        level[key] = str(level[key])
    elif how == 4:
        level[key] = [level[key]]
    elif how == 5 and type(level[key]) in (int, float):
        level[key] += rng.choice((1, -1, 0.7, 2**40))
    else:
        level[key] = _odd(rng)
    return tree


def _json(path: Path, rng: random.Random) -> bool:
    raw = path.read_text()
    if "\n" in raw.strip():  # a line a sample
        lines = raw.strip().split("\n")
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(_tree(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(json.dumps(_tree(json.loads(raw), rng)))
    return False


def _line(path: Path, rng: random.Random) -> bool:
    text = path.read_bytes().decode()
    comma = next((c for c in "\t, " if c in text), " ")
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    fields = lines[at].split(comma)
    spot, how = rng.randrange(len(fields)), rng.randrange(6)
    if how == 0:
        del lines[at]
    elif how == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif how == 2:
        lines.insert(at, rng.choice(("", " ", comma, "\r", "\x85", "#")))
    else:
        if how == 3:
            del fields[spot]
        elif how == 4:
            fields.insert(spot, fields[spot])
        else:
            fields[spot] = rng.choice((*WORDS, *FLOATS, *map(str, NUMBERS)))
        lines[at] = comma.join(fields)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return False


def _picture(path: Path, rng: random.Random) -> bool:
    """A sound picture of another kind or size under the same name."""
    mode = rng.choice(("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA", "I;16"))
    size = rng.choice(((1, 1), (8, 8), (16, 8), (178, 218), (1, 3000), (9, 7)))
    ending = rng.choice(("PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP", "PPM"))
    made, raw = io.BytesIO(), rng.randbytes(size[0] * size[1])
    try:
        Image.frombytes("L", size, raw).convert(mode).save(made, ending)
    except (OSError, ValueError, KeyError):  # no such pair
        made.write(b"GIF89a\xff\xff\xff\xff\0\0\0,")
    path.write_bytes(made.getvalue())
    return False


def _header(path: Path, rng: random.Random) -> bool:
    """Numbers of a binary file's first bytes, packed as before."""
    raw = bytearray(_plain(path))
    packed, at = path.suffix == ".gz", 4 * rng.randrange(4)
    raw[at : at + 4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "big")
    if rng.random() < 0.3:
        raw = raw[: rng.randrange(len(raw))]
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    return False


SPECIAL: dict[str, Callable[[Path, random.Random], bool]] = {
    ".json": _json,
    ".txt": _line,
    ".tsv": _line,
    ".csv": _line,
    ".jpg": _picture,
    ".png": _picture,
    ".gz": _header,
    "": _header,
}


def damage(folder: Path, one: Format, rng: random.Random) -> tuple[str, bool]:
    """Changes files of a set; what was done, and whether that must be refused."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    done, must = [], False
    for _ in range(rng.choice((1, 1, 1, 2))):
        # As likely a list as a picture, of which there are more.
        ending = rng.choice(sorted({path.suffix for path in files}))
        path = rng.choice([path for path in files if path.suffix == ending])
        special = SPECIAL.get(ending)
        change = special if special and rng.random() < 0.6 else rng.choice(GENERAL)
        if (
            path.is_symlink()
            or not path.is_file()
            or not path.stat().st_size
            or path.stat().st_size > 1 << 30
        ):
            continue  # done before
        try:
            hard = change(path, rng)
        except (
            ValueError,
            LookupError,
            OSError,
            EOFError,
            zlib.error,
        ):  # what was done before left nothing to change in this way
            continue
        done.append(f"{change.__name__} {path.relative_to(folder)}")
        must |= hard and not any(part in str(path) for part in one.optional)
    return ", ".join(done), must


def _read(name: str, folder: Path, options: dict[str, Any]) -> Data | FedMPIError:
    sets._load.cache_clear()
    try:
        return sets.load(name, folder, **options)
    except FedMPIError as error:
        return error


def prepare(folder: Path, texts: bool = True) -> Attempt:
    """Args:
    texts: sentences and tables, too, which need the extra hf.
    """
    root, kinds, words = folder / "set", list(FORMATS), len(formats.WORDS)
    more: dict[str, dict[str, Any]] = {}
    if texts:
        import datasets

        datasets.config.HF_DATASETS_CACHE = root / "cache"
        datasets.disable_progress_bars()
        kinds += TEXTS
        tokenizer = {"tokenizer": str(formats.words(folder / "tokenizer"))}
        more = {one.name: tokenizer for one in TEXTS} | {"hub": {**tokenizer, "dataset": str(root)}}
    contents = []
    for one in kinds:
        root.mkdir()
        one.build(root)
        found = _read(one.name, root, {**one.options, **more.get(one.name, {})})
        assert isinstance(found, Data), (one.name, found)
        consistent(found, one, words)
        one.meant(root, found)
        files = [p for p in root.rglob("*") if p.is_file() and (root / "cache") not in p.parents]
        contents.append({p.relative_to(root): p.read_bytes() for p in files})
        shutil.rmtree(root)

    def restore(content: dict[Path, bytes]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for path, raw in content.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(raw)

    def attempt(rng: random.Random) -> FedMPIError | None:
        number = rng.choices(range(len(kinds) + 1), [*(one.weight for one in kinds), 30])[0]
        if number == len(kinds):
            return _attempt_own(rng)
        one = kinds[number]
        restore(contents[number])
        done, must = damage(root, one, rng)
        found: Any = None
        try:
            found = _read(one.name, root, {**one.options, **more.get(one.name, {})})
            if isinstance(found, FedMPIError):
                return found
            assert not must, "it must be refused"
            try:
                consistent(found, one, words)
            except FedMPIError as error:  # the engine's, before it trains
                return error
            one.meant(root, found)
        except BaseException as error:
            raise AssertionError(f"{one.name}: {done}: {type(error).__name__}: {error}") from error
        return None

    return attempt


def _attempt_own(rng: random.Random) -> FedMPIError | None:
    GIVEN[:], must = [], False
    made, must = own(rng)
    GIVEN.append(made)
    found = _read("tests.jobs.fuzz_data:given", Path("/"), {})
    if isinstance(found, FedMPIError):
        return found
    try:
        objectives.check_data(objectives.OBJECTIVES["cross_entropy"], found)
    except FedMPIError as error:
        return error
    assert not must, f"own: it must be refused: {made!r:.500}"
    return None
