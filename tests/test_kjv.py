"""The King James text: its reader on a few verses, and how it is fetched, with stand-ins for apt-get and dpkg-deb."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedmpi.errors import DataError
from fedmpi.tasks import debian
from fedmpi.tasks.data import default_folder, load
from fedmpi.tasks.dataset import IGNORE, PAD
from fedmpi.tasks.debian import PRINTED
from fedmpi.tasks.fetch import fetch
from fedmpi.tasks.partitions import divide
from fedmpi.tasks.readers.kjv import TEXT
from fedmpi.tasks.verify import Unpacked

VERSES = "Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\n1Jn1:1 That which was.\n"
CHAPTERS = [b"In the beginning.\nAnd the earth.\n", b"Thus.\n", b"That which was.\n"]


def written(folder: Path, verses: str = VERSES) -> Path:
    (folder / TEXT).write_text(verses)
    return folder


@pytest.mark.parametrize("length", [2, 3, 7])
def test_every_byte_but_a_chapters_first_is_predicted_once(tmp_path: Path, length: int) -> None:
    data = load("kjv", written(tmp_path, VERSES + "Rev1:1 " + "x" * 200 + "\n"), length=length)
    chapters = {0: CHAPTERS[0], 1: CHAPTERS[1], 2: CHAPTERS[2], 3: b"x" * 200 + b"\n"}
    for group, text in chapters.items():
        rows, targets = [], []
        for split in (data.train, data.test):
            assert split.groups is not None
            mine = split.groups == group
            rows += split.x[mine].tolist()
            targets += split.y[mine].tolist()
        assert bytes(y for row in targets for y in row[1:] if y != IGNORE) == text[1:]
        assert bytes(x[0] for x in rows) == bytes(text[i] for i in range(0, len(text) - 1, length - 1))
        assert [[IGNORE if x == PAD else x for x in row] for row in rows] == targets
    assert data.test.groups is not None
    assert len(data.test.y) == sum(-(-(len(t) - 1) // (length - 1)) // 20 for t in chapters.values())
    assert data.shape == (length,)
    assert data.classes == 128


def test_groups_are_chapters_or_books(tmp_path: Path) -> None:
    folder = written(tmp_path)
    for groups, count in (("chapter", 3), ("book", 2)):
        data = load("kjv", folder, length=2, groups=groups)
        assert data.train.groups is not None
        assert len(data.train.groups.unique()) == count
        assert len(divide("natural", data.train, count, 1).sizes) == count


@pytest.mark.parametrize(
    ("verses", "message"),
    [
        ("", "expected a chapter of 20 samples"),
        (VERSES, "expected a chapter of 20 samples or more.*make data.length smaller than 65"),
        (VERSES + "Ge2 And.\n", r"kjv.txt, line 5: expected a verse in ASCII.*got 'Ge2 And\.'"),
        (VERSES + "Ge2:2 \n", "line 5: expected a verse"),
        (VERSES + "Ge2:2 Élan\n", "line 5: expected a verse in ASCII"),
    ],
)
def test_damaged(tmp_path: Path, verses: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("kjv", written(tmp_path, verses))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Run: fedmpi data fetch kjv"):
        load("kjv", tmp_path)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in front of the path, of which apt-get's package holds a program that prints :data:`VERSES`; yields that
    program."""
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / "bible"
    program.write_text(f"#!/bin/sh\nprintf '{VERSES}'".replace("\n", "\\n").replace("sh\\n", "sh\n"))
    for name, script in {
        "apt-get": 'shift; for p in "$@"; do : > "${p}_1_all.deb"; done',
        "dpkg-deb": f'mkdir -p "$3/usr/bin"; [ ! -f "{program}" ] || cp "{program}" "$3/usr/bin/bible"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    known = Unpacked(len(VERSES), hashlib.sha256(VERSES.encode()).hexdigest())
    monkeypatch.setitem(PRINTED, "kjv", PRINTED["kjv"]._replace(unpacked=known))
    return program


def test_fetches_verifies_and_is_idempotent(tmp_path: Path, packages: Path) -> None:
    lines: list[str] = []
    folder = fetch("kjv", tmp_path / "to", lines.append)
    assert [path.name for path in folder.iterdir()] == [TEXT]
    assert (folder / TEXT).read_text() == VERSES
    packages.unlink()
    assert fetch("kjv", tmp_path / "to", lines.append) == folder
    assert "already" in lines[-1]
    (folder / TEXT).write_text(VERSES[1:])
    with pytest.raises(DataError, match="expected usr/bin/bible in it"):
        fetch("kjv", tmp_path / "to")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("printf other", "printed something else: kjv.txt: expected"),
        ("echo 'libreadline.so.8: cannot open' >&2; exit 127", "does not run here: libreadline"),
    ],
)
def test_nothing_unverified_arrives(tmp_path: Path, packages: Path, script: str, message: str) -> None:
    packages.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(
        DataError, match=f"{message}.*run: bible -f gen1:1-rev22:21 > kjv.txt, and put that into"
    ):
        fetch("kjv", tmp_path / "to")
    assert not list((tmp_path / "to" / "kjv").iterdir())


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"kjv: there is no apt-get on this machine\. On a machine of Debian"):
        fetch("kjv", tmp_path)


def test_the_real_text() -> None:
    """Runs where ``fedmpi data fetch kjv`` was run."""
    if not (default_folder() / "kjv" / TEXT).exists():
        pytest.skip(f"no kjv in {default_folder()}: fedmpi data fetch kjv")
    data = load("kjv")
    assert data.train.groups is not None
    assert (len(data.train.y), len(data.test.y), len(data.train.groups.unique())) == (62_535, 2_701, 1_189)
    assert bytes(data.train.x[0].tolist()).startswith(b"In the beginning God created the heaven")
