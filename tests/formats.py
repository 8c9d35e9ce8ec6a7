"""Writers of small data sets in each reader's exact format, independent of the readers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedmpi.tasks.readers.idx import STEMS

RNG = np.random.default_rng(5)


def idx(array: np.ndarray) -> bytes:
    """An independent writer of the format."""
    return (
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


def images_and_labels(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    arrays = [
        rng.integers(0, 256, (30, 28, 28)),
        np.arange(30) % 10,
        rng.integers(0, 256, (12, 28, 28)),
        np.arange(12) % 10,
    ]
    return {stem: idx(array) for stem, array in zip(STEMS, arrays, strict=True)}


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


def image_folder(folder: Path) -> None:
    for part, count in (("train", 3), ("test", 1)):
        for name in ("cat", "ant"):
            for i in range(count):
                picture(folder / part / name / f"{i}.png")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "i", "like", "tea", "."]


def words(folder: Path) -> Path:
    """A BERT tokenizer of a dozen words, as transformers saves it."""
    from transformers import BertTokenizerFast

    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def personachat(folder: Path, **changes: Any) -> Path:
    def dialogue(persona: str) -> dict[str, Any]:
        turn = {"history": ["bad film", "i like"], "candidates": ["tea tea", "a good film"]}
        return {"personality": [persona], "utterances": [turn | changes]}

    people = ["i like tea .", "i like film .", "i like tea ."]
    content = {"train": [dialogue(p) for p in people], "valid": [dialogue("film")]}
    path = folder / "personachat_self_original.json"
    path.write_text(json.dumps(content))
    return path
