"""Data sets: the IDX reader against damaged files, where data is looked for, fetching with checksums."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks import data as data_module
from fedmpi.tasks import debian
from fedmpi.tasks.data import INSTALLED, default_folder, load
from fedmpi.tasks.fetch import PUBLISHED, Published, Unpacked, fetch
from fedmpi.tasks.readers.idx import STEMS, find_idx, read_idx
from fedmpi.tasks.verify import fault

from .formats import idx, images_and_labels

arrays = st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
    lambda shape: st.binary(min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
        lambda raw: np.frombuffer(raw, np.uint8).reshape(shape)
    )
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all of hypothesis' examples."""
    return tmp_path_factory.mktemp("idx") / "file"


class TestReadIdx:
    @settings(deadline=None)
    @given(array=arrays, packed=st.booleans())
    def test_reads_what_was_written(self, scratch: Path, array: np.ndarray, packed: bool) -> None:
        scratch.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        got = read_idx(scratch)
        assert got.dtype == torch.uint8
        assert np.array_equal(got.numpy(), array)

    @pytest.mark.parametrize("packed", [False, True])
    def test_every_truncation_is_named(self, scratch: Path, packed: bool) -> None:
        raw = idx(np.arange(24).reshape(2, 3, 4))
        whole = gzip.compress(raw) if packed else raw
        for length in range(len(whole)):
            scratch.write_bytes(whole[:length])
            with pytest.raises(DataError, match=f"{scratch}: expected .* got "):
                read_idx(scratch)

    @settings(deadline=None)
    @given(
        raw=st.binary(max_size=64),
        head=st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"\0\0\x08\x01"]),
    )
    def test_foreign_bytes_are_a_data_error_or_really_an_array(
        self, scratch: Path, raw: bytes, head: bytes
    ) -> None:
        scratch.write_bytes(head + raw)
        try:
            got = read_idx(scratch)
        except DataError:
            return
        assert idx(got.numpy()) == head + raw

    @pytest.mark.parametrize("packed", [False, True])
    def test_trailing_bytes(self, scratch: Path, packed: bool) -> None:
        raw = idx(np.zeros(5)) + b"\0"
        scratch.write_bytes(gzip.compress(raw) if packed else raw)
        with pytest.raises(DataError, match=r"expected its end after 5 bytes for dimensions \[5\], got more"):
            read_idx(scratch)

    def test_wrong_checksum_inside_gzip(self, scratch: Path) -> None:
        whole = bytearray(gzip.compress(idx(np.zeros(5))))
        whole[-8] ^= 1  # the CRC
        scratch.write_bytes(whole)
        with pytest.raises(DataError, match="CRC"):
            read_idx(scratch)

    @pytest.mark.parametrize("shape", [(1 << 31,), (65535, 65535, 65535), (0, 28, 28)])
    def test_dimensions_out_of_bounds(self, scratch: Path, shape: tuple[int, ...]) -> None:
        scratch.write_bytes(struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape))
        with pytest.raises(DataError, match="expected dimensions of 1 to"):
            read_idx(scratch)

    def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_says(
        self, scratch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scratch.write_bytes(gzip.compress(idx(np.zeros(5)) + bytes(1 << 24)))
        unpacked = 0
        read = gzip.GzipFile.read

        def counting(self: gzip.GzipFile, size: int | None = -1) -> bytes:
            nonlocal unpacked
            chunk = read(self, size)
            unpacked += len(chunk)
            return chunk

        monkeypatch.setattr(gzip.GzipFile, "read", counting)
        with pytest.raises(DataError, match="got more"):
            read_idx(scratch)
        assert unpacked == 8 + 5 + 1

    def test_what_follows_a_gzip_file_is_not_gone_through(self, scratch: Path) -> None:
        """gzip skips zeros behind a member a byte a step: hours, for a file that takes no room on the disk."""
        scratch.write_bytes(gzip.compress(idx(np.zeros(5))))
        os.truncate(scratch, 1 << 31)
        with pytest.raises(
            DataError, match=r"expected at most 65541 bytes for dimensions \[5\], got 2147483648"
        ):
            read_idx(scratch)
        assert "expected at most 65546 bytes, got 2147483648" in str(fault(scratch, Unpacked(10, "")))

    def test_missing_and_unreadable(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(DataError, match=f"{path}: expected a readable IDX file"):
                read_idx(path)


class TestDigits:
    def test_is_scikit_learns_shuffled_and_normalised(self) -> None:
        from sklearn.datasets import load_digits

        digits = load("digits")
        assert (digits.shape, digits.classes) == ((1, 8, 8), 10)
        assert (len(digits.train.y), len(digits.test.y)) == (1437, 360)
        x = torch.cat((digits.train.x, digits.test.x)).flatten(1) * 0.376 + 0.305
        y = torch.cat((digits.train.y, digits.test.y))
        assert y.dtype == torch.int64
        got = torch.cat(((x * 16).round().int(), y.int()[:, None]), 1)
        want = load_digits()
        rows = np.column_stack((want.data, want.target)).astype(int).tolist()
        assert sorted(got.tolist()) == sorted(rows)
        assert abs(digits.train.x.mean()) < 1e-3
        assert abs(digits.train.x.std() - 1) < 1e-3

    def test_the_split_is_fixed_and_has_all_classes(self) -> None:
        digits = load("digits")
        assert digits.train.y[:12].tolist() == GOLDEN_DIGITS
        assert digits.train.y.bincount().min() >= 130
        assert digits.test.y.bincount().min() >= 25


GOLDEN_DIGITS = [6, 1, 8, 6, 6, 8, 5, 6, 1, 4, 4, 6]


class TestLoad:
    def test_unknown_name(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"'fashion-mnits'; did you mean 'fashion-mnist'\? valid: digits, fashion-mnist, mnist",
        ):
            load("fashion-mnits")

    @pytest.mark.parametrize("sub", ["", "mnist"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dotted", [False, True])
    def test_takes_data_as_it_lies(self, tmp_path: Path, sub: str, packed: bool, dotted: bool) -> None:
        write(tmp_path / sub, images_and_labels(), packed, dotted)
        got = load("mnist", tmp_path)
        pixels = np.frombuffer(images_and_labels()[STEMS[0]][16:], np.uint8).reshape(30, 1, 28, 28)
        assert np.allclose(got.train.x.numpy(), (pixels / 255 - 0.1307) / 0.3081, atol=1e-6)
        assert got.train.x.dtype == torch.float32
        assert got.test.y.tolist() == [i % 10 for i in range(12)]
        assert got.shape == (1, 28, 28)

    def test_threads_share_one_copy(self, tmp_path: Path) -> None:
        write(tmp_path, images_and_labels())
        got: list[data_module.Data] = []
        threads = [threading.Thread(target=lambda: got.append(load("mnist", tmp_path))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({d.train.x.data_ptr() for d in got}) == 1

    def test_missing_data_says_where_what_and_how(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEDMPI_DATA", str(tmp_path))
        monkeypatch.setattr(data_module, "INSTALLED", tmp_path / "none")
        assert default_folder() == tmp_path
        for folder in (None, tmp_path):
            with pytest.raises(DataError) as error:
                load("fashion-mnist", folder)
            for part in (
                *STEMS,
                str(tmp_path / "fashion-mnist"),
                f"fedmpi data fetch fashion-mnist --to {tmp_path}",
            ):
                assert part in str(error.value)

    def test_an_incomplete_folder_is_passed_over(self, tmp_path: Path) -> None:
        write(tmp_path / "a" / "mnist", dict(list(images_and_labels().items())[:3]))
        write(tmp_path / "b", images_and_labels())
        files = find_idx("mnist", (tmp_path / "a", tmp_path / "b"))
        assert files is not None
        assert {path.parent for path in files.values()} == {tmp_path / "b"}

    def test_installed_data_is_used_when_the_default_folder_has_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEDMPI_DATA", str(tmp_path / "none"))
        monkeypatch.setattr(data_module, "INSTALLED", tmp_path / "usr")
        write(tmp_path / "usr" / "fashion-mnist", images_and_labels())
        assert len(load("fashion-mnist").train.y) == 30

    @pytest.mark.parametrize(
        ("stem", "array", "message"),
        [
            (0, np.zeros((30, 8, 8)), r"expected images \(N, 28, 28\), got \(30, 8, 8\)"),
            (1, np.zeros(29), r"expected 30 labels, one an image, got \(29,\)"),
            (3, np.full(12, 10), "expected labels 0 to 9, got 10"),
        ],
    )
    def test_files_that_do_not_fit(self, tmp_path: Path, stem: int, array: np.ndarray, message: str) -> None:
        write(tmp_path, {**images_and_labels(), STEMS[stem]: idx(array)})
        with pytest.raises(DataError, match=f"{STEMS[stem]}.gz: {message}"):
            load("mnist", tmp_path)


def write(folder: Path, files: dict[str, bytes], packed: bool = True, dotted: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, raw in files.items():
        name = stem.replace("-idx", ".idx") if dotted else stem
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A web server that is the only source of a small "fashion-mnist"; yields the folder it serves."""
    files, served = images_and_labels(), tmp_path / "served"
    write(served, files)
    handler = partial(QuietHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        published = Published(
            home="https://example.org/fashion",
            addresses=(f"http://127.0.0.1:{server.server_port}",),
            package="dataset-that-is-nowhere",
            files={stem: Unpacked(len(raw), hashlib.sha256(raw).hexdigest()) for stem, raw in files.items()},
        )
        monkeypatch.setitem(PUBLISHED, "fashion-mnist", published)
        monkeypatch.setattr(debian.shutil, "which", lambda name: None)  # no apt-get
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield served
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class TestFetch:
    def test_fetches_verifies_and_is_idempotent(self, tmp_path: Path, origin: Path) -> None:
        lines: list[str] = []
        folder = fetch("fashion-mnist", tmp_path / "to", lines.append)
        assert folder == tmp_path / "to" / "fashion-mnist"
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"{stem}.gz" for stem in STEMS)
        assert len(load("fashion-mnist", tmp_path / "to").train.y) == 30
        for path in origin.iterdir():
            path.unlink()
        assert fetch("fashion-mnist", tmp_path / "to", lines.append) == folder
        assert "already" in lines[-1]

    def test_own_files_in_another_form_are_left_alone(self, tmp_path: Path, origin: Path) -> None:
        write(tmp_path / "to", images_and_labels(), packed=False, dotted=True)
        assert fetch("fashion-mnist", tmp_path / "to") == tmp_path / "to"

    def test_damaged_files_are_replaced(self, tmp_path: Path, origin: Path) -> None:
        folder = fetch("fashion-mnist", tmp_path)
        damaged = folder / f"{STEMS[2]}.gz"
        damaged.write_bytes(damaged.read_bytes()[:-20])
        fetch("fashion-mnist", tmp_path)
        assert damaged.read_bytes() == (origin / damaged.name).read_bytes()

    @pytest.mark.parametrize("damage", ["other", "short", "bomb", "page", "none"])
    def test_nothing_unverified_arrives(self, tmp_path: Path, origin: Path, damage: str) -> None:
        victim = origin / f"{STEMS[1]}.gz"
        raw = images_and_labels()[STEMS[1]]
        if damage == "none":
            victim.unlink()
        else:
            victim.write_bytes(
                {
                    "other": gzip.compress(raw[:-1] + b"\x07"),
                    "short": victim.read_bytes()[:-1],
                    "bomb": gzip.compress(raw + bytes(1 << 22)),
                    "page": b"<html>Please log in</html>",
                }[damage]
            )
        with pytest.raises(DataError) as error:
            fetch("fashion-mnist", tmp_path / "to")
        message = str(error.value)
        for part in (
            "no source could be used",
            "https://example.org/fashion",
            "http://127.0.0.1:",
            "dataset-that-is-nowhere",
            "no apt-get",
        ):
            assert part in message
        assert str(tmp_path / "to" / "fashion-mnist") in message
        assert ("404" if damage == "none" else STEMS[1]) in message
        assert not list((tmp_path / "to" / "fashion-mnist").iterdir())

    def test_an_unwritable_folder_and_an_unknown_name(self, tmp_path: Path, origin: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="cannot be written"):
            fetch("fashion-mnist", tmp_path / "file")
        with pytest.raises(ConfigError, match="'digits'; valid: fashion-mnist"):
            fetch("digits", tmp_path)


def test_real_fashion_mnist() -> None:
    """Runs where ``fedmpi data fetch fashion-mnist`` was run or Debian's package is installed."""
    if find_idx("fashion-mnist", (default_folder(), INSTALLED)) is None:
        pytest.skip(f"no Fashion-MNIST in {default_folder()} or {INSTALLED}: fedmpi data fetch fashion-mnist")
    real = load("fashion-mnist")
    assert real.train.y.bincount().tolist() == [6000] * 10
    assert real.test.y.bincount().tolist() == [1000] * 10
    assert real.train.y[:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]
    assert abs(real.train.x.mean()) < 1e-3
    assert abs(real.train.x.std() - 1) < 1e-3
    assert real.train.x.is_contiguous()
