"""Readers of pictures: small files in each one's exact format, and the same truncated, corrupt or missing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedmpi.errors import DataError
from fedmpi.tasks.data import DATA, load
from fedmpi.tasks.dataset import IGNORE

RNG = np.random.default_rng(5)


def cifar(folder: Path, names: dict[str, int], classes: tuple[int, ...]) -> np.ndarray:
    """Files of so many records; returns the records of the first file."""
    folder.mkdir(parents=True, exist_ok=True)
    first = None
    for name, count in names.items():
        labels = np.stack([np.arange(count) % n for n in classes], 1)
        records = np.concatenate((labels, RNG.integers(0, 256, (count, 3072))), 1).astype(np.uint8)
        (folder / name).write_bytes(records.tobytes())
        first = records if first is None else first
    assert first is not None
    return first


CIFAR_10 = {f"data_batch_{i}.bin": 20 for i in range(1, 6)} | {"test_batch.bin": 10}


class TestCifar:
    @pytest.mark.parametrize("sub", ["", "cifar-10", "cifar-10-batches-bin", "cifar-10/cifar-10-batches-bin"])
    def test_ten(self, tmp_path: Path, sub: str) -> None:
        records = cifar(tmp_path / sub, CIFAR_10, (10,))
        got = load("cifar-10", tmp_path)
        assert (got.shape, got.classes) == ((3, 32, 32), 10)
        assert got.train.y.tolist() == [i % 10 for i in range(20)] * 5
        assert len(got.test.y) == 10
        # Normalised, it is an affine map of each channel's pixels: the deviation is 1 over the training set.
        assert torch.allclose(got.train.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
        assert torch.allclose(got.train.x.std((0, 2, 3)), torch.ones(3), atol=1e-3)
        pixels = torch.from_numpy(records[:, 1:].reshape(20, 3, 32, 32)).float()
        for c in range(3):
            corr = torch.corrcoef(torch.stack((pixels[:, c].flatten(), got.train.x[:20, c].flatten())))
            assert corr[0, 1] > 0.9999

    def test_hundred(self, tmp_path: Path) -> None:
        cifar(tmp_path / "cifar-100-binary", {"train.bin": 120, "test.bin": 7}, (20, 100))
        fine, coarse = load("cifar-100", tmp_path), load("cifar-100", tmp_path, labels="coarse")
        assert fine.train.y.tolist() == [i % 100 for i in range(120)]
        assert coarse.train.y.tolist() == [i % 20 for i in range(120)]
        assert (fine.classes, coarse.classes) == (100, 20)

    @pytest.mark.parametrize("cut", [1, 3072, 20 * 3073])
    def test_truncated(self, tmp_path: Path, cut: int) -> None:
        cifar(tmp_path, CIFAR_10, (10,))
        path = tmp_path / "data_batch_3.bin"
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(
            DataError, match=rf"{path}: expected a whole number of records of 3073 bytes .* got"
        ):
            load("cifar-10", tmp_path)

    def test_a_wrong_label_and_a_missing_file(self, tmp_path: Path) -> None:
        cifar(tmp_path, CIFAR_10, (10,))
        path = tmp_path / "test_batch.bin"
        raw = bytearray(path.read_bytes())
        raw[4 * 3073] = 10
        path.write_bytes(raw)
        with pytest.raises(DataError, match=rf"{path}: expected labels 0 to 9, got 10 in record 4"):
            load("cifar-10", tmp_path)
        path.unlink()
        with pytest.raises(
            DataError, match=r"cifar-10: no complete data .* test_batch.bin. Unpack the binary"
        ):
            load("cifar-10", tmp_path)


def leaf(folder: Path, **changes: Any) -> Path:
    for part, users in (("train", ("f1", "f2")), ("test", ("f1",))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        data = {
            user: {"x": (RNG.integers(0, 256, (3, 784)) / 255).tolist(), "y": [0, 61, 5], **changes}
            for user in users
        }
        content = {"users": list(data), "num_samples": [3] * len(data), "user_data": data}
        (folder / part / "all_data_0.json").write_text(json.dumps(content))
    return folder / "train" / "all_data_0.json"


class TestFemnist:
    def test_writers_are_groups(self, tmp_path: Path) -> None:
        leaf(tmp_path)
        got = load("femnist", tmp_path)
        assert got.train.y.tolist() == [0, 61, 5] * 2
        assert got.train.groups is not None
        assert got.train.groups.tolist() == [0, 0, 0, 1, 1, 1]
        assert (got.shape, got.classes) == ((1, 28, 28), 62)

    @pytest.mark.parametrize(
        "changes",
        [{"y": [0, 62, 5]}, {"y": [0, 1]}, {"x": [[0.5] * 783] * 3}, {"x": [[2.0] * 784] * 3}, {"x": "a"}],
    )
    def test_wrong_samples(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        path = leaf(tmp_path, **changes)
        with pytest.raises(DataError, match=rf"{path}: user f1: expected x of 784 numbers .* got "):
            load("femnist", tmp_path)

    def test_truncated(self, tmp_path: Path) -> None:
        path = leaf(tmp_path)
        path.write_text(path.read_text()[:-3])
        with pytest.raises(DataError, match=f"{path}: expected JSON, got JSONDecodeError"):
            load("femnist", tmp_path)


def picture(path: Path, width: int = 20, height: int = 16, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = (3,) if mode == "RGB" else ()
    Image.fromarray(RNG.integers(0, 256, (height, width, *depth)).astype(np.uint8), mode).save(path)


def celeba(folder: Path) -> None:
    names = [f"{i:06}.jpg" for i in range(1, 7)]
    for name in names:
        picture(folder / "img_align_celeba" / name, 178, 218)
    head = " ".join(
        f"{where}_{axis}"
        for where in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
        for axis in "xy"
    )
    rows = [f"{name}  {' '.join(str(10 * i + j) for j in range(10))}" for i, name in enumerate(names)]
    (folder / "list_landmarks_align_celeba.txt").write_text("\n".join(["6", head, *rows]) + "\n")
    parts = zip(names, "000122", strict=True)
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {part}\n" for name, part in parts))
    people = zip(names, (7, 9, 7, 1, 2, 3), strict=True)
    (folder / "identity_CelebA.txt").write_text("".join(f"{name} {who}\n" for name, who in people))


class TestCelebA:
    def test_landmarks_are_shares_and_persons_are_groups(self, tmp_path: Path) -> None:
        celeba(tmp_path / "celeba")
        got = load("celeba", tmp_path, size=8)
        assert got.shape == (3, 8, 8)
        assert (len(got.train.y), len(got.test.y), got.classes) == (3, 2, 10)
        assert torch.allclose(got.train.y[1], torch.arange(10, 20) / torch.tensor([178.0, 218] * 5))
        assert got.train.groups is not None
        assert got.train.groups.tolist() == [0, 1, 0]

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            (
                "list_landmarks_align_celeba.txt",
                lambda t: t[:-4],
                r"line 8: expected a name and 10 whole numbers",
            ),
            ("list_landmarks_align_celeba.txt", lambda t: t.replace("6", "7", 1), "expected 7 pictures"),
            ("list_landmarks_align_celeba.txt", lambda t: "x", "expected a count, a line of names"),
            (
                "list_eval_partition.txt",
                lambda t: t.replace(" 1", " 3"),
                r"line 4: expected a name and one of 0, 1, 2",
            ),
            ("identity_CelebA.txt", lambda t: t.split("\n", 1)[1], "expected a line for 000001.jpg"),
        ],
    )
    def test_damaged_lists(
        self, tmp_path: Path, file: str, change: Callable[[str], str], message: str
    ) -> None:
        celeba(tmp_path)
        (tmp_path / file).write_text(change((tmp_path / file).read_text()))
        with pytest.raises(DataError, match=f"{tmp_path / file}.*{message}"):
            load("celeba", tmp_path, size=8)

    def test_a_truncated_picture(self, tmp_path: Path) -> None:
        celeba(tmp_path)
        path = tmp_path / "img_align_celeba" / "000002.jpg"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DataError, match=f"{path}: expected a whole picture, got"):
            load("celeba", tmp_path, size=8)


def voc(folder: Path) -> None:
    root = folder / "VOCdevkit" / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "SegmentationClass").mkdir()
    for part, names in (("train", ("a", "b")), ("val", ("c",))):
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture(root / "JPEGImages" / f"{name}.jpg", 16, 8)
            mask = Image.new("P", (16, 8))
            mask.putpalette(list(range(256)) * 3)
            mask.paste(20, (0, 0, 8, 8))
            mask.paste(255, (8, 0, 12, 8))
            mask.save(root / "SegmentationClass" / f"{name}.png")


class TestVoc:
    def test_classes_a_pixel(self, tmp_path: Path) -> None:
        voc(tmp_path)
        got = load("voc", tmp_path, size=8)
        assert (got.shape, got.classes, len(got.train.y), len(got.test.y)) == ((3, 8, 8), 21, 2, 1)
        assert got.train.y[0, 0].tolist() == [20] * 4 + [IGNORE] * 2 + [0] * 2

    def test_wrong_masks(self, tmp_path: Path) -> None:
        voc(tmp_path)
        path = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "b.png"
        Image.new("L", (16, 8), 21).save(path)
        with pytest.raises(DataError, match=rf"{path}: expected classes 0 to 20 and 255, got 21"):
            load("voc", tmp_path, size=8)
        Image.new("RGB", (16, 8)).save(path)
        with pytest.raises(DataError, match=rf"{path}: expected a palette picture of classes, got mode RGB"):
            load("voc", tmp_path, size=8)
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(DataError, match=rf"{path}: expected a whole picture"):
            load("voc", tmp_path, size=8)

    def test_damaged_pictures_and_lists(self, tmp_path: Path) -> None:
        voc(tmp_path)
        root = tmp_path / "VOCdevkit" / "VOC2012"
        path = root / "JPEGImages" / "b.jpg"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match=rf"{path}: expected a whole picture, got"):
            load("voc", tmp_path, size=8)
        path.unlink()
        with pytest.raises(DataError, match=rf"{path}: expected a whole picture, got FileNotFoundError"):
            load("voc", tmp_path, size=8)
        path = root / "ImageSets" / "Segmentation" / "train.txt"
        path.write_text("")
        with pytest.raises(DataError, match=rf"{path}: expected the names of pictures"):
            load("voc", tmp_path, size=8)


def coco(folder: Path, **changes: Any) -> Path:
    for part, name in (("train2017", "a.jpg"), ("val2017", "b.jpg")):
        picture(folder / part / name, 8, 8)
        runs = {"counts": [8, 8, 48], "size": [8, 8]}  # the second column
        annotations = [
            {
                "id": 1,
                "image_id": 4,
                "category_id": 18,
                "iscrowd": 0,
                "segmentation": [[4, 0, 7, 0, 7, 7, 4, 7]],
            },
            {"id": 2, "image_id": 4, "category_id": 3, "iscrowd": 0, "segmentation": runs} | changes,
            {"id": 3, "image_id": 4, "category_id": 3, "iscrowd": 1, "segmentation": {"counts": [0, 8, 56]}},
        ]
        content = {
            "images": [{"id": 4, "file_name": name, "width": 8, "height": 8}],
            "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
            "annotations": annotations,
        }
        path = folder / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder / "annotations" / "instances_train2017.json"


class TestCoco:
    def test_polygons_runs_and_crowds(self, tmp_path: Path) -> None:
        coco(tmp_path)
        got = load("coco", tmp_path, size=8)
        assert got.classes == 3
        assert got.train.y[0].tolist() == [[IGNORE, 1, 0, 0, 2, 2, 2, 2]] * 8

    @pytest.mark.parametrize(
        "changes",
        [
            {"category_id": 5},
            {"segmentation": {"counts": "abc"}},
            {"segmentation": {"counts": [8, 8]}},
            {"segmentation": {"counts": [-8, 72]}},
            {"segmentation": [["a", "b"]]},
            {"segmentation": None},
        ],
    )
    def test_wrong_annotations(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        path = coco(tmp_path, **changes)
        with pytest.raises(DataError, match=rf"{path}: annotation 2: expected polygons or uncompressed runs"):
            load("coco", tmp_path, size=8)

    def test_other_json(self, tmp_path: Path) -> None:
        path = coco(tmp_path)
        path.write_text('{"images": []}')
        with pytest.raises(DataError, match=rf"{path}: expected images, annotations and categories"):
            load("coco", tmp_path, size=8)
        path.write_text('{"images": [], "annotations": [], "categories": []}')
        with pytest.raises(DataError, match=rf"{path}: expected images, .*no images"):
            load("coco", tmp_path, size=8)

    def test_damaged_files(self, tmp_path: Path) -> None:
        annotations = coco(tmp_path)
        path = tmp_path / "val2017" / "b.jpg"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match=rf"{path}: expected a whole picture, got"):
            load("coco", tmp_path, size=8)
        annotations.write_bytes(annotations.read_bytes()[:-9])
        with pytest.raises(DataError, match=rf"{annotations}: expected JSON, got JSONDecodeError"):
            load("coco", tmp_path, size=8)


class TestImageFolder:
    def test_a_folder_a_class(self, tmp_path: Path) -> None:
        for part, count in (("train", 3), ("test", 1)):
            for name in ("cat", "ant"):
                for i in range(count):
                    picture(tmp_path / part / name / f"{i}.png")
        got = load("image-folder", tmp_path, size=8)
        assert got.train.y.tolist() == [0, 1, 0, 1, 0, 1]
        assert (got.shape, got.classes, len(got.test.y)) == ((3, 8, 8), 2, 2)
        assert load("image-folder", tmp_path, size=8, gray=True, limit=2).train.x.shape == (2, 1, 8, 8)
        picture(tmp_path / "test" / "dog" / "0.png")
        with pytest.raises(DataError, match=r"test: expected the folders of train \(ant, cat\), got dog"):
            load("image-folder", tmp_path, size=9)
        path = tmp_path / "train" / "cat" / "0.png"
        for content in (path.read_bytes()[:300], b"no picture"):
            path.write_bytes(content)
            with pytest.raises(DataError, match=rf"{path}: expected a whole picture, got"):
                load("image-folder", tmp_path, size=8 + len(content))
        for path in (tmp_path / "train" / "cat").iterdir():
            path.unlink()
        with pytest.raises(DataError, match=rf"{tmp_path / 'train' / 'cat'}: expected pictures .* got none"):
            load("image-folder", tmp_path, size=10)
        (tmp_path / "x" / "train" / "one").mkdir(parents=True)
        (tmp_path / "x" / "test").mkdir()
        with pytest.raises(DataError, match="expected a folder for each of two classes"):
            load("image-folder", tmp_path / "x")


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    from .test_data import idx

    images = RNG.integers(0, 256, (26, 28, 28))
    for part in ("train", "test"):
        (tmp_path / f"emnist-letters-{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"emnist-letters-{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(1, 27)))
    got = load("emnist", tmp_path, split="letters")
    assert got.train.y.tolist() == list(range(26))
    upright = torch.from_numpy(images).transpose(1, 2).float()
    corr = torch.corrcoef(torch.stack((upright.flatten(), got.train.x.flatten())))
    assert corr[0, 1] > 0.9999
    (tmp_path / "emnist-letters-test-labels-idx1-ubyte").write_bytes(idx(np.arange(26)))
    (tmp_path / "again").mkdir()
    for path in tmp_path.glob("emnist-*"):
        path.rename(tmp_path / "again" / path.name)
    with pytest.raises(DataError, match="expected labels 1 to 26, got 0"):
        load("emnist", tmp_path / "again", split="letters")


WANTED = {  # of each reader, a file that a folder without it is told of
    "fashion-mnist": "train-images-idx3-ubyte",
    "mnist": "t10k-labels-idx1-ubyte",
    "emnist": "emnist-balanced-train-images-idx3-ubyte",
    "femnist": "train, test",
    "cifar-10": "data_batch_1.bin",
    "cifar-100": "train.bin",
    "celeba": "list_landmarks_align_celeba.txt",
    "voc": "ImageSets/Segmentation/train.txt",
    "coco": "annotations/instances_train2017.json",
    "sst-2": "train.tsv",
    "movie-reviews": "movieReviewSnippets_GroundTruth.txt",
    "personachat": "personachat_self_original.json",
    "image-folder": "train, test",
    "hub": "a split 'train'",
}


@pytest.mark.parametrize("name", sorted(set(DATA) - {"digits"}))
def test_a_wrong_folder_says_what_was_expected(name: str, tmp_path: Path) -> None:
    options = {"tokenizer": "x"} if {"tokenizer"} & set(DATA[name].options.model_fields) else {}
    if name == "hub":
        options["dataset"] = str(tmp_path / "none")
    with pytest.raises(DataError, match="expected") as error:
        load(name, tmp_path, **options)
    assert WANTED[name] in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "link.jpg", "a\0b.jpg"])
def test_a_list_names_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "secret.jpg", 178, 218)
    annotations = coco(tmp_path / "coco")
    content = json.loads(annotations.read_text())
    (annotations.parent.parent / "train2017" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    content["images"][0]["file_name"] = name
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances_train2017.json: expected the name of a file inside"):
        load("coco", tmp_path / "coco", size=8)


@pytest.mark.parametrize(
    "shape",
    [
        {"counts": [2**62] * 4 + [320]},
        {"counts": [1.7, 318.3]},
        [[math.nan, 1, 2, 3, 4, 5]],
        [[1, 1, 1e300, 3, 4, 5]],
        [[1, 1, 2, 3, 4, 5, 6]],
        [["1", 1, 2, 3, 4, 5]],
        7,
    ],
)
def test_no_shape_of_coco_crashes(shape: Any, tmp_path: Path) -> None:
    annotations = coco(tmp_path)
    content = json.loads(annotations.read_text())
    content["annotations"][0]["segmentation"] = shape
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances_train2017.json: annotation"):
        load("coco", tmp_path, size=8)


def test_a_pipe_among_pictures_is_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            picture(tmp_path / part / name / "1.png")
    os.mkfifo(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"0.png: expected a plain file"):
        load("image-folder", tmp_path, size=8)


def test_a_label_is_a_whole_number(tmp_path: Path) -> None:
    path = leaf(tmp_path)
    content = json.loads(path.read_text())
    next(iter(content["user_data"].values()))["y"][0] = 1.7
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"the label 1\.7"):
        load("femnist", tmp_path)
