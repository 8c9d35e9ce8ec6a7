"""Checkpoints: all that a run needs to continue to the same bits, at any number of ranks.

Between rounds a run is the server's state, what clients keep, the ledger and some counters; everything else is a
function of the configuration, the seed and the round (torch's generators are not used). Each rank writes the client
states that live on it, rank 0 the rest, into a folder aside that is renamed when all of it is on the disk: a
checkpoint is there completely or not at all. The files are described in :mod:`fedmpi.engine.manifest`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmpi import start
from fedmpi.comm.base import Comm, together
from fedmpi.config import CheckpointConfig
from fedmpi.engine import manifest as files
from fedmpi.engine.manifest import File, Manifest, Rank, Totals
from fedmpi.engine.resume import restore
from fedmpi.engine.store import Kept
from fedmpi.errors import CheckpointError, ConfigError, FedMPIError, Stopped, Unstarted
from fedmpi.message import CPU
from fedmpi.method import State, nest, placed
from fedmpi.version import __version__

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation

_PART_BYTES = 1 << 27  # client states of so many bytes go into one file, and are in memory, at a time
_SHARE = 10  # checkpoints by time cost at most this part of it
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NAME = re.compile(r"round-(\d{8,})")


class Checkpoints:
    """One rank's end of a run's checkpoints.

    Args:
      run: the run's folder, the same on every rank; ranks on several machines share it.
      plan: when to save.
      comm: this rank's end.

    Attributes:
      saved: called on rank 0 with the rounds and the folder of each checkpoint that was written.
    """

    def __init__(self, run: Path, plan: CheckpointConfig, comm: Comm) -> None:
        self.run, self.folder, self.plan, self.comm = run, run / "checkpoints", plan, comm
        self.saved: Callable[[int, Path], None] = lambda done, folder: None
        self._stop = False
        self._last, self._cost = time.monotonic(), 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 (Slurm's --signal) and Ctrl-C on any rank end the run after the round, with a checkpoint;
        a second Ctrl-C at once. Elsewhere than in the main thread nothing is listened to."""

        def handle(number: int, frame: object) -> None:
            if number == signal.SIGINT and self._stop:
                raise KeyboardInterrupt
            if number == signal.SIGINT:
                os.write(2, b"fedmpi: saving after this round; once more ends at once\n")
            self._stop = True

        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, handle) for number in _SIGNALS if main}
        self._stop = self._stop or start.asked()  # since unless_stopped
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def asks(self) -> tuple[bool, bool]:
        """What this rank asks for after the round: to stop, to save. Any rank's wish is all ranks'."""
        due = False
        if self.comm.rank == 0 and self.plan.minutes is not None:
            due = time.monotonic() - self._last >= max(60 * self.plan.minutes, _SHARE * self._cost)
        return self._stop, due

    def after(self, simulation: Simulation, done: int) -> None:
        """``done`` rounds are finished: save where it is time to.

        Raises:
          CheckpointError: it cannot be written; those before it are as they were.
          Stopped: a signal asked for it, and a checkpoint is written.
        """
        stop, due = simulation.asked
        unfinished = done < simulation.config.rounds and not simulation.ended
        if (self.plan.rounds and done % self.plan.rounds == 0) or (unfinished and (stop or due)):
            self.save(simulation, done)
        if unfinished and stop:
            raise Stopped(
                f"stopped after round {done} of {simulation.config.rounds}, which is saved in {self.folder}"
            )

    def save(self, simulation: Simulation, done: int) -> None:
        """Write the checkpoint after ``done`` rounds; all ranks call this together.

        Raises:
          CheckpointError: it cannot be written; those before it are as they were.
        """
        started, comm = time.monotonic(), self.comm
        # Their sums are the run's; which rank counted a client's bytes does not matter.
        ledger = {name: getattr(simulation.ledger, name).clone() for name in ("upload", "download")}
        did = json.dumps({"trained": simulation.trained, "sent": comm.sent}).encode()
        ranks = [Rank.model_validate_json(part) for part in comm.allgather(did)]
        comm.sum(list(ledger.values()))
        aside = self.folder / f".{files.folder_name(done)}"
        try:
            with together(comm, "saving a checkpoint"):
                if simulation.error is not None:
                    raise simulation.error
                if comm.rank == 0:
                    self._clean(aside)
            written: dict[str, File] = {}
            with together(comm, "saving a checkpoint"), files.writing(aside):
                for name, kept in simulation.kept().items():
                    written |= self._write_store(aside, name, kept)
            offer = {name: file.model_dump() for name, file in written.items()}
            offers = [json.loads(part) for part in comm.gather(json.dumps(offer).encode())]
            with together(comm, "saving a checkpoint"), files.writing(aside):
                if comm.rank == 0:
                    shards = {
                        name: File.model_validate(file) for part in offers for name, file in part.items()
                    }
                    self._commit(aside, simulation, done, ledger, ranks, shards)
        except FedMPIError:
            if comm.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        self._last = time.monotonic()
        self._cost = self._last - started
        if comm.rank == 0:
            self.saved(done, self.at(done))

    def _clean(self, aside: Path) -> None:
        """Make the folder to write in, and remove what killed writers left."""
        with files.writing(aside):
            self.folder.mkdir(exist_ok=True)
            files.plain_folder(self.folder)
            for old in self.folder.glob(".round-*"):
                shutil.rmtree(old)
            aside.mkdir()

    def _write_store(self, aside: Path, name: str, kept: Kept) -> dict[str, File]:
        """This rank's part of a store, a bounded number of clients at a time."""
        store, known, written = kept.store, kept.store.known, {}
        known = known[kept.saves(known)]
        for i, clients_C in enumerate(known.split(max(1, _PART_BYTES // max(1, store.row)))):
            if store.empty or not len(clients_C):
                continue
            if not aside.is_dir():
                raise CheckpointError(
                    f"checkpoint: rank {self.comm.rank} does not see {aside}, which rank 0 made; expected a run's "
                    "folder (--out) that all machines share"
                )
            path = aside / f"{name}-{self.comm.rank:05}-{i:05}.safetensors"
            file = files.write_tensors(path, placed(store.get(clients_C), CPU))
            written[path.name] = file.model_copy(update={"store": name, "clients": clients_C.tolist()})
        return written

    def _commit(
        self,
        aside: Path,
        simulation: Simulation,
        done: int,
        ledger: State,
        ranks: list[Rank],
        written: dict[str, File],
    ) -> None:
        """Rank 0's part, then the rename that makes it a checkpoint."""
        ledger = ledger | {"seen": simulation.ledger.seen}
        states = nest(simulation.replica.state, "server.") | nest(ledger, "ledger.")
        states = {
            name: value.to(CPU, copy=True).contiguous() for name, value in states.items()
        }  # some share memory
        written["state.safetensors"] = files.write_tensors(aside / "state.safetensors", states)
        if simulation.best_X is not None:
            written[files.BEST] = files.write_tensors(aside / files.BEST, {"x": simulation.best_X.to(CPU)})
        written["metrics.jsonl"] = files.write(
            aside / "metrics.jsonl", files.read(self.run / "metrics.jsonl")
        )
        totals = {name: getattr(simulation, name) for name in Totals.model_fields}
        described = Manifest(
            fedmpi=__version__,
            torch=torch.__version__,
            device=simulation.place.kind,
            round=done,
            config=simulation.config.plain(),
            parameters=simulation.spec.plain(),
            fingerprint=simulation.fingerprint,
            totals=Totals.model_validate(totals),
            seconds=time.monotonic() - simulation.started,
            ranks=ranks,
            lost_ranks=simulation.lost,
            files=written,
        )
        files.write_manifest(aside, described)
        with files.writing(aside):
            self._rename(aside, self.folder / files.folder_name(done))
        kept = [path for n, path in self.found() if n <= done][: self.plan.keep]
        for _, path in self.found():
            if path not in kept:  # later ones were passed over when this run resumed before them
                with files.writing(path):
                    shutil.rmtree(path)

    def _rename(self, aside: Path, to: Path) -> None:
        _sync(aside)
        if to.exists():  # damaged: this run resumed before it
            to.rename(self.folder / f".{to.name}-old")
        aside.rename(to)
        _sync(self.folder)
        _sync(self.run)
        shutil.rmtree(self.folder / f".{to.name}-old", ignore_errors=True)

    def found(self) -> list[tuple[int, Path]]:
        """The checkpoints that are there, by their names, the last first: rounds finished, and the folder.

        Raises:
          CheckpointError: the folder is a link.
        """
        if not os.path.lexists(self.folder):
            return []
        files.plain_folder(self.folder)
        try:
            names = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error.strerror or error}") from None
        return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)

    def agreed(self) -> list[int]:
        """The rounds of :meth:`found`, as rank 0 sees them; all ranks call this.

        Raises:
          CheckpointError: the folder is a link.
        """
        with together(self.comm, "looking for checkpoints"):
            there = [n for n, _ in self.found()] if self.comm.rank == 0 else []
        rounds: list[int] = json.loads(self.comm.broadcast(json.dumps(there).encode()))
        return rounds

    def at(self, done: int) -> Path:
        """The folder of the checkpoint after so many rounds."""
        return self.folder / files.folder_name(done)

    def metrics(self, done: int) -> bytes:
        """The lines of metrics of the first ``done`` rounds, as far as this rank sees them."""
        try:
            lines = files.read(self.run / "metrics.jsonl").splitlines(keepends=True)
        except CheckpointError:
            return b""
        return b"".join(lines[:done])

    def forget(self, resume: bool, overwrite: bool = False) -> None:
        """A run begins in this folder: remove what an earlier one left. On rank 0.

        Raises:
          ConfigError: an earlier run would be lost and shall not be ``overwrite``-n, or a finished one is to be
            continued.
        """
        finished = (self.run / "summary.json").exists()
        if resume and finished:
            raise ConfigError(
                f"--resume: the run in {self.run} is finished, and left no checkpoint to go on from; name another "
                f"folder, or begin anew in this one with --overwrite in place of --resume"
            )
        if finished and not overwrite:
            raise ConfigError(
                f"--out: {self.run} holds a finished run; name another folder, or replace that run with --overwrite"
            )
        if self.found() and not overwrite:
            raise ConfigError(
                f"--out: {self.run} holds an interrupted run; continue it with --resume, or replace it with --overwrite"
            )
        for _, path in self.found():
            with files.writing(path):
                shutil.rmtree(path)

    def load(self, simulation: Simulation, say: Callable[[str], None]) -> tuple[int, bytes | None]:
        """Bring ``simulation``, which is at its start, to the last checkpoint that can be used; all ranks call this.

        Returns:
          The rounds that are finished, and the lines of metrics so far (on rank 0; None where there is no checkpoint).

        Raises:
          CheckpointError: there are checkpoints, but none can be read: says of each what is wrong with it.
          ConfigError: the last one that can be read is of another run; names the difference and both values.
        """
        wrong = []
        for n in self.agreed():
            try:
                described, lines = restore(simulation, self.at(n))
            except CheckpointError as error:
                wrong.append(str(error))
                say(f"checkpoint: {error}; taking the one before it")
                continue
            say(f"continuing after round {n} of {simulation.config.rounds}, from {self.at(n)}")
            if described.torch != torch.__version__:
                say(
                    f"written with torch {described.torch}, this is {torch.__version__}: the last bits may differ"
                )
            if described.device != simulation.place.kind:
                say(
                    f"written on {described.device}, this is {simulation.place.kind}: products of matrices have "
                    "other last bits there, and a model that draws random numbers (dropout) draws others"
                )
            if not described.fingerprint:
                say(
                    "written by a version that took no fingerprint of the data: they are taken to be the same"
                )
            self._last = time.monotonic()
            return n, lines
        if wrong:
            raise CheckpointError("\n".join([f"checkpoint: none in {self.folder} can be used", *wrong]))
        say(f"no checkpoint in {self.run} yet: starting from the beginning")
        return 0, None


def unless_stopped(comm: Comm) -> None:
    """Go on to the first round; all ranks call this.

    Raises:
      Unstarted: a signal has reached one of them already.
    """
    if any(comm.allgather(b"stop" if start.asked() else b"")):
        raise Unstarted(
            "stopped by a signal before its first round: nothing is lost, start it again as before"
        )


def _sync(folder: Path) -> None:
    """Names in a folder, down to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
