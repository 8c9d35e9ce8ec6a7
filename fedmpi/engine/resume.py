"""Reading a checkpoint: from files that may be damaged, foreign or of more or fewer ranks, to a run at its round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedmpi import config as configuration
from fedmpi.comm.base import Comm
from fedmpi.config import Config
from fedmpi.engine import manifest as files
from fedmpi.engine import schema
from fedmpi.engine.manifest import MANIFEST, File, Manifest
from fedmpi.engine.store import Kept
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.message import CPU
from fedmpi.method import State, unnest

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation

# What may differ between the run that wrote a checkpoint and the one that continues it: nothing that a result shows.
FREE = (
    "rounds",
    "threads",
    "timeout",
    "checkpoint",
    "store",
    "store_folder",
    "data.folder",
    "comm",
    "device",
)


def restore(simulation: Simulation, folder: Path) -> tuple[Manifest, bytes]:
    """Bring a simulation at its start to the checkpoint in ``folder``; all ranks call this together.

    Returns:
      What the checkpoint is of, and on rank 0 the lines of metrics so far.

    Raises:
      CheckpointError: it cannot be used, the same on every rank; the simulation may be restored to another one.
      ConfigError: it is of another run; names the difference and both values.
    """
    comm = simulation.comm
    head = metrics = state = best = b""
    with _agreed(comm):
        if comm.rank == 0:
            head, described = _head(folder)
            metrics = _file(folder, described, "metrics.jsonl")
            state = _file(folder, described, "state.safetensors")
            best = _file(folder, described, files.BEST) if files.BEST in described.files else b""
    described = files.parse_manifest(folder / MANIFEST, comm.broadcast(head))
    _check_run(folder, described, simulation)
    state, best = comm.broadcast(state), comm.broadcast(best)
    with _agreed(comm):
        schema.check_manifest(folder, described, simulation)
        server, ledger = _parts(folder / "state.safetensors", state)
        best_X = None
        if best:
            found = files.tensors(folder / files.BEST, best)
            schema.check_best(folder / files.BEST, found, simulation.replica.parameters().to(CPU))
            best_X = found["x"]
        if comm.rank == 0:  # the others have the same
            theta_D = simulation.replica.parameters().to(CPU)  # θ₀: nothing has changed it yet
            schema.check_metrics(folder / "metrics.jsonl", metrics, described, simulation)
            schema.check_state(folder / "state.safetensors", server, ledger, described, simulation, theta_D)
    with _agreed(comm):
        stores = simulation.kept()
        for kept in stores.values():
            kept.store.clear()
        for name, file in described.files.items():
            if file.store:
                _load_part(folder / name, file, stores)
    _take_over(simulation, described, server, ledger)
    simulation.best_X = None if best_X is None else best_X.to(simulation.place.device)
    return described, metrics


class Found(NamedTuple):
    """What a checkpoint has of some clients.

    Attributes:
      round: the rounds behind it; None where there is no checkpoint.
      clients: those of them whose states it has.
      seen: what each of all clients had last seen of the model.
    """

    round: int | None
    clients: Tensor
    seen: Tensor


def restore_clients(simulation: Simulation, folder: Path, clients: Tensor, homes: Tensor) -> Found:
    """Take over the states of some clients, at both ends, from the checkpoint in ``folder`` of the same run; all ranks
    call this together.

    Args:
      clients: their ids; no store holds anything of them.
      homes: the rank of each of all clients.

    Raises:
      CheckpointError: it cannot be used, the same on every rank; some states may have been taken over.
    """
    comm = simulation.comm
    head = seen = b""
    with _agreed(comm):
        if comm.rank == 0:
            head, described = _head(folder)
            path = folder / "state.safetensors"
            _, ledger = _parts(path, _file(folder, described, "state.safetensors"))
            schema.check_ledger(path, ledger, simulation)
            seen = ledger["seen"].numpy().tobytes()
    described = files.parse_manifest(folder / MANIFEST, comm.broadcast(head))
    _check_run(folder, described, simulation)
    with _agreed(comm):
        schema.check_manifest(folder, described, simulation)
    seen_K = torch.frombuffer(bytearray(comm.broadcast(seen)), dtype=torch.int64)

    def wanted(kept: Kept, here: bool) -> Kept:
        def needs(clients_C: Tensor) -> Tensor:
            rows = torch.isin(clients_C, clients).nonzero()[:, 0]
            if here:
                return rows[homes[clients_C[rows]] == comm.rank]
            return rows[torch.isin(rows, kept.needs(clients_C))]

        return kept._replace(needs=needs)

    with _agreed(comm):
        stores = {name: wanted(kept, name == "clients") for name, kept in simulation.kept().items()}
        for name, file in described.files.items():
            if file.store:
                _load_part(folder / name, file, stores)
    came = [torch.tensor(file.clients) for file in described.files.values() if file.store == "clients"]
    came_C = torch.cat([clients[:0], *came])
    return Found(described.round, clients[torch.isin(clients, came_C)], seen_K)


def _head(folder: Path) -> tuple[bytes, Manifest]:
    """A checkpoint's manifest, as it is written and as it is meant."""
    files.plain_folder(folder)
    head = files.read(folder / MANIFEST)
    described = files.parse_manifest(folder / MANIFEST, head)
    if folder.name != files.folder_name(described.round):
        raise CheckpointError(f"{folder}: expected {files.folder_name(described.round)}, by its manifest")
    return head, described


def _parts(path: Path, data: bytes) -> tuple[State, State]:
    """The server's state and the ledger."""
    tensors = files.tensors(path, data)
    foreign = [name for name in tensors if not name.startswith(("server.", "ledger."))]
    if foreign:
        raise CheckpointError(f"{path}: expected server. and ledger. entries, got {foreign[0]!r:.100}")
    return unnest(tensors, "server."), unnest(tensors, "ledger.")


@contextmanager
def _agreed(comm: Comm) -> Iterator[None]:
    """What one rank cannot read, none takes: all raise the first one's error."""
    mine = ""
    try:
        yield
    except CheckpointError as error:
        mine = str(error)
    for report in comm.allgather(mine.encode()):
        if report:
            raise CheckpointError(report.decode())


def _file(folder: Path, described: Manifest, name: str) -> bytes:
    if name not in described.files:
        raise CheckpointError(
            f"{folder / MANIFEST}: expected a file {name}, got {', '.join(described.files)}"
        )
    return files.read(folder / name, described.files[name])


def _check_run(folder: Path, described: Manifest, simulation: Simulation) -> None:
    """Raises ConfigError when the checkpoint is of another run; the same on every rank."""
    config = simulation.config
    before = _same_config(folder, described.config, config)
    if described.parameters != simulation.spec.plain():
        raise ConfigError(
            f"--resume: expected the model that {folder} was written with, got one of other parameters (names or "
            f"shapes); has the code that builds {config.model.name} changed, or its data?"
        )
    for name, of in simulation.fingerprint.items():
        if described.fingerprint and described.fingerprint.get(name) != of:
            raise ConfigError(
                f"--resume: {name} is not what {folder} was written with; go on with the same "
                f"{'file' if name == 'model.init' else 'data (data.folder says where they lie)'}, or begin a new run "
                "with another --out"
            )
    if described.round > config.rounds:
        raise ConfigError(
            f"--resume: expected rounds of at least {described.round}, which {folder} has behind it, "
            f"got {config.rounds}"
        )
    for section in ("server", "local"):
        factor = (schedule := getattr(config, section).schedule).factor
        if any(factor(t, before.rounds) != factor(t, config.rounds) for t in range(described.round)):
            raise ConfigError(
                f"--resume: rounds is {config.rounds}, but {folder} was written with {before.rounds}, on which "
                f"{section}.schedule: {schedule.name} depends"
            )


def _same_config(folder: Path, saved: dict[str, Any], config: Config) -> Config:
    """The configuration that a checkpoint was written with. Nothing of it is parsed before it is known to name no more
    than the user's own: parsing imports what an import path names.

    Raises:
      ConfigError: it is not this run's.
    """
    plain = config.plain()
    wrong = [one for one in _differences(saved, plain) if not _free(one[0])]
    # What is chosen by name comes before what follows from the choice.
    for path, old, new in sorted(wrong, key=lambda one: (not one[0].endswith("name"), one[0])):
        if path not in plain and path in saved:
            raise ConfigError(
                f"--resume: {folder} has a configuration of another version: {path} is no key of this one's"
            )
        raise ConfigError(_differs(folder, path, old, new))
    own = {key: value for key, value in saved.items() if not _free(key)} | {"data": plain["data"]}
    own |= {"rounds": saved.get("rounds")}  # on which schedules depend
    try:  # a key that the checkpoint's version did not have stands at its default
        before = configuration.parse(own)
    except ConfigError as error:
        raise ConfigError(f"--resume: {folder} has a configuration of another version: {error}") from None
    for path, old, new in _differences(before.plain(), plain):
        if not _free(path):
            raise ConfigError(_differs(folder, path, old, new))
    return before


def _differs(folder: Path, path: str, old: object, new: object) -> str:
    return (
        f"--resume: {path} is {new!r:.200}, but {folder} was written with {old!r:.200}; expected the same "
        f"configuration (only these may change: {', '.join(FREE)})"
    )


def _free(path: str) -> bool:
    return any(f"{path}.".startswith(f"{free}.") for free in FREE)


def _differences(saved: Any, now: Any, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Where two trees differ: the dotted path, and both values. Keys that only ``now`` has are left out: they stand at
    their default in ``saved``."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key, value in saved.items():
            yield from _differences(value, now.get(key, "nothing"), f"{path}.{key}" if path else key)
    elif type(saved) is not type(now) or saved != now:  # 1 client is not 1.0 of them
        yield path, saved, now


def _load_part(path: Path, file: File, stores: dict[str, Kept]) -> None:
    """Take over those rows of a file that this rank needs; a file without any is not read."""
    if file.store not in stores:
        raise CheckpointError(f"{path}: expected a store of {', '.join(stores)}, got {file.store!r}")
    store, _, needs = stores[file.store]
    clients_C = torch.tensor(file.clients, dtype=torch.int64)
    rows = needs(clients_C)
    if not len(rows):
        return
    tensors = files.tensors(path, files.read(path, file))
    schema.check_rows(path, len(clients_C), tensors, store.template)
    store.put(clients_C[rows], {name: value[rows] for name, value in tensors.items()})


def _take_over(simulation: Simulation, described: Manifest, server: State, ledger: State) -> None:
    """Nothing fails from here on."""
    simulation.replica.load(server)
    for name, value in described.totals:  # peaks stay what they are
        setattr(simulation, name, value)
    simulation.lost = [*described.lost_ranks, *simulation.lost]
    simulation.started -= described.seconds
    comm = simulation.comm
    for i, rank in enumerate(described.ranks):
        if min(i, comm.size - 1) == comm.rank:  # of more ranks than there are now, the last takes the rest
            simulation.trained += rank.trained
            comm.sent += rank.sent
    simulation.ledger.seen.copy_(ledger["seen"])
    if comm.rank == 0:
        simulation.ledger.upload.copy_(ledger["upload"])
        simulation.ledger.download.copy_(ledger["download"])
