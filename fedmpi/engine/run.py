"""A run from its configuration to its summary: prepare, train, record; again among the survivors when a rank ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmpi.callbacks import Callback, Calls
from fedmpi.comm.agree import agree, versions
from fedmpi.comm.base import Comm, LostError, together
from fedmpi.config import Config
from fedmpi.engine.by_client import personal_parts, table
from fedmpi.engine.checkpoint import Checkpoints, unless_stopped
from fedmpi.engine.device import Place, explained
from fedmpi.engine.evaluate import state_dict
from fedmpi.engine.faults import Faults
from fedmpi.engine.folder import Claim
from fedmpi.engine.profile import profiling
from fedmpi.engine.progress import Display
from fedmpi.engine.record import Record
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.summary import summary
from fedmpi.engine.tensorboard import TensorBoard
from fedmpi.errors import FedMPIError
from fedmpi.spec import Spec


def run(
    config: Config,
    comm: Comm,
    out: Path | None = None,
    quiet: bool = False,
    resume: bool = False,
    profile: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train, and return the summary (the same on every rank).

    Args:
      config: the run.
      comm: this rank's end; every rank calls ``run`` with the same configuration.
      out: the run's folder (rank 0's counts); without one nothing is written, and signals are not listened to.
      quiet: show nothing.
      resume: continue from the last checkpoint in ``out``, where there is one.
      profile: say where the time of rounds goes, and write a trace (:mod:`fedmpi.engine.profile`).
      overwrite: begin anew in ``out``, whatever run it holds; without, one that is finished or interrupted is kept.
      callbacks: what is called while it goes on (rank 0's count).

    Raises:
      Stopped: a signal asked for it; a checkpoint is written, or (Unstarted) no round is done yet.
      FedMPIError: what a user can mend; the same error on every rank.
    """
    with Claim() as claim:
        return _run(Faults(comm), config, out, quiet, resume, profile, overwrite, claim, callbacks)


def _run(
    faults: Faults,
    config: Config,
    out: Path | None,
    quiet: bool,
    resume: bool,
    profile: bool,
    overwrite: bool,
    claim: Claim,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    comm, lines = faults.comm, None
    while True:
        display = Display(config.method.name, config.rounds, enabled=comm.rank == 0 and not quiet)
        try:
            if faults.simulation is None:
                lines = _prepare(faults, config, out, resume, overwrite, display, claim)
            with _profiling(faults, display) if profile else nullcontext():
                return _train(faults, lines, display, claim, callbacks)
        except LostError as error:
            lost = faults.recover(error)
            if faults.checkpoints:
                lines = faults.checkpoints.metrics(faults.done)
            for one in lost if comm.rank == 0 and not quiet else ():
                print(f"fedmpi: {one}; {comm.size} ranks go on", file=sys.stderr, flush=True)
        finally:
            display.close()


def _profiling(faults: Faults, display: Display) -> AbstractContextManager[None]:
    assert faults.simulation is not None  # prepared
    folder = faults.checkpoints.run if faults.checkpoints else None
    return profiling(faults.simulation, faults.done, folder, display.say)


def _prepare(
    faults: Faults,
    config: Config,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    display: Display,
    claim: Claim,
) -> bytes | None:
    """Bring this rank to the first round that is to be done; returns the lines of metrics before it, if it resumes."""
    comm = faults.comm
    unless_stopped(comm)
    with together(comm, "preparing the run"):
        config = config.for_ranks(comm.size)
        place = Place.of(config.device, comm)
    place = place.counted(comm)
    with together(comm, "preparing the run"), explained(place.device, "preparing the run"):
        simulation = Simulation(config, comm, place)
    handshake(comm, config, simulation.spec, simulation.fingerprint)
    unless_stopped(comm)  # it may have taken minutes to load
    for line in (*simulation.data.notes, simulation.memory):
        display.say(line)
    folder = comm.broadcast(str(out or "").encode()).decode()
    checkpoints, start, lines = None, 0, None
    if folder:
        checkpoints = Checkpoints(Path(folder), config.checkpoint, comm)
        with together(comm, "preparing the run"):
            claim.take(checkpoints.run, comm)
        if comm.survives:
            claim.note(checkpoints.run)
        start, lines = checkpoints.load(simulation, display.say) if resume else (0, None)
        with together(comm, "preparing the run"):
            if comm.rank == 0 and start == 0:
                checkpoints.forget(resume, overwrite)
        simulation.asks = checkpoints.asks
    simulation.set_threads()
    faults.begin(simulation, checkpoints, start)
    return lines


def _train(
    faults: Faults, lines: bytes | None, display: Display, claim: Claim, callbacks: Sequence[Callback]
) -> dict[str, Any]:
    """Do the rounds that are left, and write what comes of them. ``lines`` are those before, None in a new run."""
    simulation, checkpoints, comm = faults.simulation, faults.checkpoints, faults.comm
    assert simulation is not None  # prepared
    display.start(faults.done, simulation.bytes, simulation.measured.metrics)
    with ExitStack() as stack:
        record, calls = None, Calls()
        with together(comm, "preparing the run"):
            if comm.rank == 0:
                plain, first = simulation.config.plain(), []
                if checkpoints:
                    claim.take(checkpoints.run, comm)  # another rank's, whose end made this one rank 0
                    record = Record(checkpoints.run, plain, lines)
                    stack.callback(record.close)
                    _keep_best(simulation, record)
                    first.append(TensorBoard(checkpoints.run))
                calls = Calls([*first, *callbacks])
                stack.callback(calls.close)
                calls("run_start", plain, faults.done)
                if checkpoints:
                    checkpoints.saved = lambda done, folder: _told(
                        simulation, calls, "checkpoint", done, folder
                    )
        with checkpoints.listening() if checkpoints else nullcontext():
            _rounds(faults, simulation, display, record, calls)
        result = summary(simulation, faults.done)
        clients, own = _of_clients(simulation, faults.done)
        with together(comm, "writing the results"):
            if simulation.error is not None:
                raise simulation.error
            if record or calls:
                model = state_dict(simulation.trainer, simulation.replica.parameters())
                if record:
                    record.finish(result, model, clients, own)
                calls("run_end", result, model)
        comm.settle()  # from here on nobody is needed any more
    return result


def _rounds(
    faults: Faults, simulation: Simulation, display: Display, record: Record | None, calls: Calls
) -> None:
    for t in range(faults.done, simulation.config.rounds):
        if simulation.ended:
            display.say(f"the run is over: {simulation.ended}")
            break
        _told(simulation, calls, "round_start", t)
        best_X = simulation.best_X
        line = simulation.round(t)
        faults.reached(t + 1)
        display.round(line)
        if not line["clients"]:
            display.say(f"round {t}: no message that counts, the model stays as it was")
        if record:
            try:
                record.round(line)
                if simulation.best_X is not best_X:
                    _keep_best(simulation, record)
            except FedMPIError as error:  # the others are in the next round already: it ends all in there
                simulation.error = error
        _told(simulation, calls, "round_end", t, line)
        found = {name: line[name] for name in simulation.measures}
        if any(value is not None for value in found.values()):
            _told(simulation, calls, "evaluation", t, found)
        if faults.checkpoints:
            faults.checkpoints.after(simulation, t + 1)


def _of_clients(simulation: Simulation, done: int) -> tuple[str, dict[str, Tensor]]:
    """What clients.csv and clients.safetensors hold, on every rank; "" and {} where they are not asked for."""
    test, comm = simulation.config.client_test, simulation.comm
    if simulation.held is None or not done:
        return "", {}
    tested = simulation.tested or simulation.test_clients(done - 1)  # another process did the last evaluation
    lines = table(tested, simulation.partition.sizes, simulation.measured.first)
    return lines, personal_parts(
        simulation.trainer, simulation.own, simulation.config.clients, comm
    ) if test.save else {}


def _told(simulation: Simulation, calls: Calls, event: str, *arguments: Any) -> None:
    """Call the callbacks; an error ends all ranks in the next round, which they are in already."""
    if simulation.error is None:
        try:
            calls(event, *arguments)
        except FedMPIError as error:
            simulation.error = error


def _keep_best(simulation: Simulation, record: Record) -> None:
    if simulation.best_X is not None:
        record.best(state_dict(simulation.trainer, simulation.best_X))


def handshake(comm: Comm, config: Config, spec: Spec, fingerprint: dict[str, str] | None = None) -> None:
    """Ranks that disagree find out here.

    Raises:
      CommError: on every rank, naming the first difference and both values.
    """
    agree(
        comm, {**versions(), **config.plain(), "parameters": spec.plain(), "fingerprint": fingerprint or {}}
    )
