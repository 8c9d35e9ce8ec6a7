"""Each rank's hook state in a folder, beside whatever else a job's checkpoint holds: ``fedmpi-rank<r>.pt``, or, of a
sharded model, ``fedmpi-rank<replica>-shard<s>.pt``.

All ranks save, load or give up together.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fedmpi.comm.base import together
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.integrations.job import Job
from fedmpi.plain_file import NotPlainError, read_plain

T = TypeVar("T")
_NAME = re.compile(r"fedmpi-rank(\d+)(|-shard[\d-]+)\.pt")


class Kept(Protocol):
    """What :func:`fedmpi.ddp.attach`, :func:`fedmpi.sync` and Horovod's wrapper have: a job between two steps."""

    def run(self, task: Callable[[Job], T]) -> T: ...


def path_of(folder: Path, rank: int, place: Sequence[Sequence[int]] = ()) -> Path:
    """The file of one rank, or of one that holds these shards (:attr:`Shards.place`)."""
    return folder / f"fedmpi-rank{rank}{_suffix(place)}.pt"


def _suffix(place: Sequence[Sequence[int]]) -> str:
    return "-shard" + "-".join(str(number) for number, _ in place) if place else ""


def save(kept: Kept, folder: Path | str) -> None:
    """Save every rank's state, each file whole or not at all. Called by all ranks between two steps.

    Raises:
      CheckpointError, CommError: on all ranks: one could not write its file.
    """
    kept.run(lambda job: _save(job, Path(folder)))


def load(kept: Kept, folder: Path | str) -> bool:
    """Go on where :func:`save` stood. Called by all ranks between two steps. Other numbers of ranks: as
    :func:`fedmpi.integrations.state.load`; a rank without a file of its own then takes over another one's.

    Returns:
      False where no rank has a file: nothing was loaded.

    Raises:
      CheckpointError: on all ranks, and nothing has changed: a file cannot be read or is missing, or is not of this
        job or of the same step.
    """
    return kept.run(lambda job: _load(job, Path(folder)))


def _save(job: Job, folder: Path) -> None:
    comm, place = job.reducer.comm, job.place
    path = path_of(folder, comm.rank, place)
    aside = path.with_name(f".{path.name}-new")
    with together(job.reducer.everyone, f"saving {path.name}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(job.state_dict(), file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError
            with suppress(OSError):
                aside.unlink()
            raise CheckpointError(f"{path}: cannot be written: {error}") from None
    if comm.rank == 0:  # what more ranks left here before
        for other in folder.iterdir():
            match = _NAME.fullmatch(other.name)
            if match and match[2] == _suffix(place) and int(match[1]) >= comm.size:
                other.unlink(missing_ok=True)


def _load(job: Job, folder: Path) -> bool:
    comm, place = job.reducer.comm, job.place
    path = path_of(folder, comm.rank, place)
    data, state, wrong = b"", None, ""
    try:
        data = read_plain(path)
        state = _parsed(data)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except NotPlainError as error:
        wrong = f"{path}: expected a plain file, got {error.what}"
    except OSError as error:
        wrong = f"{path}: cannot be read: {error.strerror or error}"
    except ConfigError as error:
        wrong = f"{path}: {error}"
    ranks = state.get("ranks") if isinstance(state, Mapping) else None
    mine = {"wrong": wrong, "there": bool(data), "ranks": ranks if type(ranks) is int else None}
    mine |= {"rank": comm.rank, "place": place}
    offers = [json.loads(offer) for offer in job.reducer.everyone.allgather(json.dumps(mine).encode())]
    for offer in offers:
        if offer["wrong"]:
            raise CheckpointError(offer["wrong"])
    there = [offer for offer in offers if offer["there"]]
    if not there:
        return False
    for offer in offers:  # those of a place can stand in for each other, where their number has changed
        alike = [other for other in there if other["place"] == offer["place"]]
        if not offer["there"] and (not alike or alike[0]["ranks"] == comm.size):
            lacking, found = (path_of(folder, told["rank"], told["place"]) for told in (offer, there[0]))
            raise CheckpointError(
                f"{lacking} is missing on rank {offers.index(offer)}, and {found.name} is there; expected "
                f"those of all {len(offers)} ranks, or none to start afresh"
            )
    mates = sorted(offer["rank"] for offer in there if offer["place"] == place)
    if len(mates) < comm.size:
        data = comm.broadcast(data, root=mates[0])
        state = state if comm.rank in mates else _parsed(data)
    try:
        job.load_state_dict(state)  # type: ignore[arg-type]  # looks at it itself
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return True


def _parsed(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged archive makes torch and pickle say
        first = str(error).partition("\n")[0][:200]
        raise ConfigError(
            f"expected a file that fedmpi saved, got {len(data)} bytes that cannot be read ({type(error).__name__}: "
            f"{first})"
        ) from None
