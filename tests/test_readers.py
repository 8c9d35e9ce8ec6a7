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

from .formats import CIFAR_10, RNG, celeba, cifar, coco, idx, image_folder, leaf, picture, voc


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
        image_folder(tmp_path)
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
    "leaf": "train, test",
    "cifar-10": "data_batch_1.bin",
    "csv": "houses.csv",
    "kjv": "kjv.txt",
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
    if name == "csv":
        options |= {"file": "houses.csv", "target": "price"}
    with pytest.raises(DataError, match="expected") as error:
        load(name, tmp_path, **options)
    assert WANTED[name] in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "link.jpg", "a\0b.jpg", "[" * 20_000])
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


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """The file's JSON after ``change``, which works in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_size(folder: Path, name: str) -> tuple[Path, str]:
    """A set one of whose pictures has another size than what lies beside it is for."""
    if name == "coco":
        return folder / "train2017" / "a.jpg", "8 × 8"
    if name == "celeba":
        return folder / "img_align_celeba" / "000003.jpg", "178 × 218"
    return folder / "VOCdevkit" / "VOC2012" / "JPEGImages" / "b.jpg", "16 × 8"


@pytest.mark.parametrize("name", ["coco", "celeba", "voc"])
def test_masks_and_landmarks_are_of_pictures_of_their_size(name: str, tmp_path: Path) -> None:
    {"coco": coco, "celeba": celeba, "voc": voc}[name](tmp_path)
    path, size = other_size(tmp_path, name)
    picture(path, 16, 16)
    with pytest.raises(DataError, match=f"{path}: expected a picture of {size} pixels.* got 16 × 16"):
        load(name, tmp_path, size=8)


@pytest.mark.parametrize(
    ("name", "build", "file"),
    [
        ("femnist", leaf, "train/all_data_0.json"),
        ("celeba", celeba, "list_eval_partition.txt"),
        ("coco", coco, "annotations/instances_val2017.json"),
        ("voc", voc, "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"),
    ],
)
def test_a_file_that_no_memory_holds(
    name: str, build: Callable[[Path], Any], file: str, tmp_path: Path
) -> None:
    build(tmp_path)
    os.truncate(tmp_path / file, 1 << 42)  # of zeros, which take no room on the disk
    with pytest.raises(DataError, match=rf"{tmp_path / file}: expected at most 4294967296 bytes, got 4398"):
        load(name, tmp_path)


def test_memory_that_runs_out_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read(options: Any, places: Any) -> Any:
        raise MemoryError

    monkeypatch.setitem(DATA, "mnist", DATA["mnist"]._replace(read=read))
    with pytest.raises(DataError, match=r"mnist: the files in .* MemoryError"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["users"].pop(),
            r"expected users to be those of user_data, got \['f1'\] and \['f1', 'f2'\]",
        ),
        (lambda c: c["user_data"].pop("f2"), r"expected users to be .* got \['f1', 'f2'\] and \['f1'\]"),
        (lambda c: c["num_samples"].append(3), r"expected num_samples \[3, 3\], got \[3, 3, 3\]"),
        (lambda c: c["user_data"]["f2"]["x"][1].__setitem__(5, "0.5"), "user f2: .* pixels of float, str"),
        (lambda c: c["user_data"]["f2"]["x"][1].__setitem__(5, True), "user f2: .* pixels of bool, float"),
        (
            lambda c: c["user_data"]["f2"]["x"].__setitem__(slice(0, 2), []),
            "user f2: .* one each, got 1 images and 3 labels",
        ),
        (
            lambda c: c["user_data"]["f2"].__setitem__(
                "x", [[v for row in c["user_data"]["f2"]["x"] for v in row]]
            ),
            r"user f2: .* got ValueError: the picture \[",
        ),
    ],
)
def test_leaf_says_the_same_twice(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = leaf(tmp_path)
    changed(path, change)
    with pytest.raises(DataError, match=f"{path}: {message}"):
        load("femnist", tmp_path)


@pytest.mark.parametrize(
    ("index", "key", "value", "message"),
    [
        (1, "iscrowd", "no", "'no' instead of a whole number"),
        (1, "iscrowd", 2, "iscrowd 2, expected 0 or 1"),
        (1, "segmentation", {"counts": [8, 8, 48], "size": [4, 16]}, r"runs of size \[4, 16\]"),
        (1, "segmentation", [], r"the segmentation \[\], expected at least one polygon"),
        (1, "segmentation", {}, "KeyError: 'counts'"),
    ],
)
def test_coco_annotations_mean_one_thing(
    index: int, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = coco(tmp_path)
    changed(path, lambda content: content["annotations"][index].__setitem__(key, value))
    with pytest.raises(DataError, match=f"{path}: annotation 2: .*{message}"):
        load("coco", tmp_path, size=8)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "list_landmarks_align_celeba.txt",
            (" 19\n", " 1_9\n"),
            "line 4: expected a name and 10 whole numbers",
        ),
        (
            "list_landmarks_align_celeba.txt",
            (" 19\n", " 437\n"),
            "line 4: expected landmarks of a picture of 178",
        ),
        ("list_landmarks_align_celeba.txt", ("  10 ", "  -179 "), "line 4: expected landmarks of a picture"),
        (
            "list_eval_partition.txt",
            ("000004.jpg", "000014.jpg"),
            "expected the pictures .*, got '000004.jpg' in",
        ),
    ],
)
def test_celebas_lists_fit_its_pictures(
    file: str, change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    celeba(tmp_path)
    path = tmp_path / file
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        load("celeba", tmp_path, size=8)


def test_a_picture_counts_once(tmp_path: Path) -> None:
    voc(tmp_path / "voc")
    path = tmp_path / "voc" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("a\nb\na\n")
    with pytest.raises(DataError, match=f"{path}: expected each picture once, got 'a' again"):
        load("voc", tmp_path / "voc", size=8)
    path = coco(tmp_path / "coco")
    changed(path, lambda content: content["images"].append({**content["images"][0], "id": 5}))
    with pytest.raises(DataError, match=f"{path}: expected images, .*a picture's file twice"):
        load("coco", tmp_path / "coco", size=8)
