"""The files of one checkpoint: their names, how they are written, and how they are read from an untrusted disk.

    RUN/checkpoints/round-00000050/
      manifest.json                     what the checkpoint is of, and the size and SHA-256 of each file;
                                        itself under a SHA-256
      state.safetensors                 the server's state and the ledger
      metrics.jsonl                     the run's lines of metrics so far
      best.safetensors                  the best model so far, where the run keeps it
      clients-00002-00000.safetensors   the states of some of rank 2's clients, and so on

Nothing here executes what it reads: JSON is checked against :class:`Manifest`, tensors are safetensors, links are not
followed, and a file is read only when it has the size that the manifest gives it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmpi.errors import CheckpointError
from fedmpi.method import State
from fedmpi.plain_file import NotPlainError, read_plain

MANIFEST = "manifest.json"
BEST = "best.safetensors"
_LARGEST_MANIFEST = 1 << 30
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z]+(-\d+)*\.(safetensors|jsonl)$")]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class File(_Strict):
    """One file. Of a store's file also which store, and whose states are its rows."""

    bytes: _Count
    sha256: str
    store: str = ""
    clients: list[_Count] = []


class Peak(_Strict):
    """The best value of a metric so far, and its round."""

    value: float
    round: _Count


class Totals(_Strict):
    """A run's counters, as :class:`fedmpi.engine.rounds.Simulation` names them; None: not a number yet."""

    participations: _Count
    called: _Count
    bytes: dict[str, int]
    counts: dict[str, int]
    simulated_seconds: float = 0.0
    measures: dict[str, float | None] = {}
    peaks: dict[str, Peak] = {}
    ended: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Until 0.1.0 a manifest had the accuracy and the test loss beside the measures."""
        if isinstance(values, dict) and isinstance(values.get("measures", {}), dict):
            old = {name: values[name] for name in ("accuracy", "test_loss") if name in values}
            if old:
                kept = {name: value for name, value in values.items() if name not in old}
                return kept | {"measures": old | values.get("measures", {})}
        return values


class Rank(_Strict):
    """What one rank did: client trainings, and wire bytes sent."""

    trained: _Count
    sent: _Count


class Lost(_Strict):
    """A rank that ended, and what went with it.

    Attributes:
      rank: by the launcher's numbers.
      round: which was begun anew without it.
      dropped: clients of that round whose message did not arrive because of it.
      restored: clients that it kept the state of which now stands as in a checkpoint.
      checkpoint: the rounds behind that.
      reset: the other clients that lived there; they start afresh.
    """

    rank: _Count
    round: _Count
    dropped: _Count = 0
    restored: _Count = 0
    checkpoint: _Count | None = None
    reset: _Count = 0

    def __str__(self) -> str:
        """For people."""
        said = [f"rank {self.rank} was lost in round {self.round}"]
        if self.dropped:
            said.append(f"{self.dropped} clients of this round drop out")
        if self.restored:
            said.append(
                f"{self.restored} clients' states are as of the checkpoint after round {self.checkpoint}"
            )
        if self.reset:
            said.append(f"{self.reset} clients start afresh")
        return ", ".join(said)


class Manifest(_Strict):
    format: Literal[1] = 1
    fedmpi: str
    torch: str
    device: str = "cpu"  # the kind that rank 0 computed on
    round: int = Field(ge=1)  # rounds that are finished
    config: dict[str, Any]
    parameters: dict[str, list[int]]
    fingerprint: dict[str, str] = {}  # of the data, by tensor; {} where the writer took none
    totals: Totals
    seconds: float
    ranks: list[Rank]
    lost_ranks: list[Lost] = []
    files: dict[_Name, File] = {}


def folder_name(done: int) -> str:
    """The name of a checkpoint after so many rounds."""
    return f"round-{done:08}"


def plain_folder(path: Path) -> None:
    """Raises CheckpointError when ``path`` is a link or no folder."""
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: expected a folder, not a link or anything else")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in here is a CheckpointError: ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot write {path}: {error.strerror or error}") from None


def write(path: Path, data: bytes) -> File:
    """Write a new file, down to the disk.

    Raises:
      CheckpointError: it cannot be written.
    """
    with writing(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return File(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_tensors(path: Path, tensors: State) -> File:
    """Write contiguous tensors that share no memory.

    Raises:
      CheckpointError: they cannot be written.
    """
    return write(path, save(tensors))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    body = manifest.model_dump()
    write(folder / MANIFEST, json.dumps({"sha256": _digest(body), "manifest": body}).encode())


def _digest(body: Any) -> str:
    """Of a form that parsing and writing again does not change."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read(path: Path, expected: File | None = None) -> bytes:
    """The bytes of a plain file; those that ``expected`` says.

    Raises:
      CheckpointError: it is not there, is not a plain file, or has another size or checksum.
    """
    try:
        data = read_plain(path, _LARGEST_MANIFEST if expected is None else expected.bytes, links=False)
    except NotPlainError as error:
        size = f"{expected.bytes} bytes" if expected else f"at most {_LARGEST_MANIFEST} bytes"
        raise CheckpointError(f"{path}: expected a plain file of {size}, got {error.what}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a plain file: {error.strerror or error}") from None
    if expected is not None and len(data) != expected.bytes:
        raise CheckpointError(
            f"{path}: expected {expected.bytes} bytes, got {len(data)} (truncated or foreign)"
        )
    digest = hashlib.sha256(data).hexdigest()
    if expected is not None and digest != expected.sha256:
        raise CheckpointError(f"{path}: expected SHA-256 {expected.sha256}, got {digest} (damaged)")
    return data


def tensors(path: Path, data: bytes) -> State:
    """The tensors of ``data``, which was read from ``path``.

    Raises:
      CheckpointError: it is not safetensors.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: expected safetensors: {error}") from None


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """The manifest that ``data``, read from ``path``, is.

    Raises:
      CheckpointError: it is not one, or not the one that was written.
    """
    try:
        outer = json.loads(data)
        body = outer["manifest"]
        if outer["sha256"] != (digest := _digest(body)):
            raise CheckpointError(f"{path}: expected SHA-256 {outer['sha256']}, got {digest} (damaged)")
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}, got {first['input']!r}"[:500]) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a manifest: {type(error).__name__}: {error}") from None
