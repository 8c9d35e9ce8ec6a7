"""The scale study: what grows with ranks, clients, cohort, D and d, and a page of arithmetic from it.

Bytes are counts, so that ranks may be many more than cores: real MPI processes as far as asked for, threads beyond.
Everything is measured in processes of its own (:mod:`configs.studies.scale_jobs`), one after the other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs.studies import arithmetic
from configs.studies.scale_jobs import entry
from fedmpi import random
from fedmpi.bench import synthetic
from fedmpi.bench.methods import third_round
from fedmpi.comm import solo
from fedmpi.comm.launcher import launcher
from fedmpi.engine.record import write_aside
from fedmpi.errors import CommError, ConfigError
from fedmpi.meet import ways
from fedmpi.message import to_bytes
from fedmpi.spec import Spec
from fedmpi.tasks.models import build

MODES = ("allreduce", "aggregator", "data_parallel")
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "bf16": {"name": "bf16"},
    "signsgd": {"name": "signsgd", "zeros": "coin"},  # the formulas are of messages of one size
    "topk 1 %": {"name": "topk", "ratio": 0.01, "feedback": True},
    "powersgd rank 4": {"name": "powersgd", "rank": 4, "feedback": True},
    "intrinsic 1 %": {"name": "intrinsic", "dim": 0.01},
    "lookback": {"name": "lookback", "threshold": 1.0},
}
"""A ``dim`` below 1 is a share of the parameters."""
POOLED = "cohort, one step"
_COHORT, _ROUNDS, _HIDDEN = 64, 1, 1000
_TIMEOUT = 900.0  # seconds a process


class Scale(NamedTuple):
    """Everything that was measured; :mod:`configs.studies.arithmetic` makes the page of it."""

    measured: dict[str, Any]

    def missed(self) -> list[str]:
        return []

    def text(self) -> str:
        return arithmetic.page(self.measured)

    def json(self) -> str:
        return json.dumps({"bench": "scale", **self.measured}, indent=1)


def run(
    ranks: int = 64,
    processes: int = 16,
    clients: int = 1_000_000,
    say: Callable[[str], None] = lambda line: None,
    out: Path | None = None,
) -> Scale:
    """Measure; with ``out``, write the page and its inputs there as ``scale.md`` and ``scale.json``.

    Args:
      ranks: bytes are counted for 2, 4, 8, … so many.
      processes: up to so many ranks are MPI processes (where there is an ``mpiexec``), more are threads.
      clients: start-up and rounds are measured for a hundredth of so many, and for all.
      say: is told what is measured.

    Raises:
      ConfigError: this process is a rank itself, or ``out`` cannot be written to.
      CommError: a process failed; with what it said.
    """
    if launcher() is not None:
        raise ConfigError("scale study: starts ranks itself, expected to be started alone")
    mpiexec = _mpiexec()
    measured = {
        "threads": torch.get_num_threads(),
        "processes": processes if mpiexec else 1,
        "wire": _wire(ranks, processes if mpiexec else 1, mpiexec, say),
        "start": [_start(n, say) for n in sorted({max(1000, clients // 100), clients})],
        "cost": {axis: _cost(axis, points, say) for axis, points in _grid(clients).items()},
        "messages": _messages(say),
    }
    scale = Scale(measured)
    if out is not None:
        _write(out, scale)
    return scale


def _mpiexec() -> str | None:
    """That of this Python's environment, else the path's."""
    return shutil.which("mpiexec", path=str(Path(sys.prefix, "bin"))) or shutil.which("mpiexec")


def _environment() -> dict[str, str]:
    """For more ranks than cores, as launch/common.sh has it; what is set already stays."""
    own = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    return {**own, **os.environ, "OMP_NUM_THREADS": "1"}


def _child(job: str, arguments: dict[str, Any], launch: Sequence[str] = ()) -> Any:
    """What a row of :data:`configs.studies.scale_jobs.JOBS` returns."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"job": job, **arguments}))
        command = [
            *launch,
            sys.executable,
            str(Path(__file__).with_name("scale_jobs.py")),
            str(request),
            str(answer),
        ]
        try:
            done = subprocess.run(
                command,
                env=_environment(),
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise CommError(f"scale study: {job} took more than {_TIMEOUT:.0f} s") from None
        if done.returncode or not answer.exists():
            raise CommError(f"scale study: {job} failed ({done.returncode}): {done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def _options(label: str, parameters: int) -> dict[str, Any]:
    options = METHODS[label]
    share = options.get("dim", 1)
    return {**options, "dim": int(share * parameters)} if share < 1 else options


def _cases() -> list[dict[str, Any]]:
    parameters = (synthetic.FEATURES + 1) * _HIDDEN + (_HIDDEN + 1) * synthetic.CLASSES
    own: dict[str, dict[str, Any]] = {
        mode: {"mode": mode} if mode == "data_parallel" else {"topology": mode, "clients": _COHORT}
        for mode in MODES
    }
    # In parts, so that nothing is traced and mapped over clients: that takes longer than these few rounds.
    local = {"lr": 0.01, "batch": 2, "steps": 1, "accumulate": 2}
    model = {"name": "fcn", "hidden": _HIDDEN}
    return [
        {"model": model, "local": local, "method": _options(label, parameters), **own[mode]}
        for mode in MODES
        for label in METHODS
    ]


def _wire(
    ranks: int, processes: int, mpiexec: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each number of ranks, mode and method, with bytes by rank."""
    names = [(mode, method) for mode in MODES for method in METHODS]
    rows = []
    for size in (2**i for i in range(1, ranks.bit_length())):
        real = size <= processes and mpiexec is not None
        say(f"bytes of {size} ranks, {'MPI processes' if real else 'threads of one process'}")
        arguments = {"cases": _cases(), "rounds": _ROUNDS, "threads": 0 if real else size}
        launch = (mpiexec, "-n", str(size)) if real and mpiexec else ()
        for (mode, method), found in zip(names, _child("wire", arguments, launch), strict=True):
            rows.append({"ranks": size, "real": real, "mode": mode, "method": method, **found})
    return rows


def _start(clients: int, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"start of {clients:,} clients")
    found: dict[str, Any] = _child("start", {"clients": clients, "cohort": 100, "rounds": 10})
    return found


def _grid(clients: int) -> dict[str, list[dict[str, Any]]]:
    """Points by what varies; the rest stays as it is."""
    linear, dense = {"name": "linear"}, {"name": "dense"}
    # Two local steps: with one, the clients of an additive method are a single batch (the last axis).
    local = {"lr": 0.01, "batch": 1, "steps": 2}
    point = {
        "clients": max(1000, clients // 100),
        "cohort": 10,
        "model": linear,
        "method": dense,
        "local": local,
    }
    cohorts = [{**point, "cohort": n} for n in (10, 32, 100, 320, 1000)]
    return {
        "clients": [{**point, "clients": max(1000, clients // n)} for n in (100, 10, 1)],
        "cohort": cohorts,
        "D": [{**point, "model": {"name": "fcn", "hidden": n}} for n in (400, 4_000, 40_000)],
        "d": [
            {**point, "model": {"name": "fcn", "hidden": 4_000}, "method": {"name": "intrinsic", "dim": n}}
            for n in (1 << 8, 1 << 11, 1 << 14)
        ],
        POOLED: [{**one, "local": {**local, "steps": 1}} for one in cohorts],
    }


def _cost(axis: str, points: list[dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a round along an axis, and the slope of their logarithm over the axis's."""
    say(f"cost of a round against {axis}")
    found = _child("cost", {"points": points})

    def at(point: dict[str, Any]) -> int:
        name = {"D": "parameters", POOLED: "cohort"}.get(axis, axis)
        return int(point["method"]["dim"] if axis == "d" else point[name])

    rows = [
        {"at": at(p), **{n: p[n] for n in ("clients", "cohort", "parameters", "seconds", "rounds")}}
        for p in found
    ]
    return {"rows": rows, "slope": slope([row["at"] for row in rows], [row["seconds"] for row in rows])}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y over log x, by least squares."""
    logs = [[math.log(value) for value in values] for values in (x, y)]
    mean_x, mean_y = (sum(values) / len(values) for values in logs)
    over = sum((a - mean_x) ** 2 for a in logs[0])
    return float(sum((a - mean_x) * (b - mean_y) for a, b in zip(*logs, strict=True)) / over)


def _messages(say: Callable[[str], None]) -> dict[str, Any]:
    """What a rank of 1,000 has to say of ResNet-9's gradient in data-parallel training, by method: the protocol's
    bytes and the frame's, the way that the engine takes among so many ranks, and what is summed."""
    say("messages of ResNet-9")
    spec = Spec.of(build("resnet9", (3, 32, 32), 10, 0))
    g_1D = random.normal(random.key(0, stream="scale"), spec.size)[None]
    crowd = solo()
    crowd.size = arithmetic.RANKS
    rows = {}
    for label in METHODS:
        third = third_round(_options(label, spec.size), spec, g_1D)
        before = third.passes[0].state
        rows[label] = {
            "message": third.nbytes,
            "download": int(third.method.server.download(before, int(before["version"]) - 1).nbytes()[0]),
            "state": sum(value.nbytes for value in third.method.up.init().values()),
            "passes": [
                {
                    "message": int(one.message.nbytes()[0]),
                    "frame": len(to_bytes(one.message)),
                    "summed": one.mean_S.nbytes,
                    "way": ways.build(crowd, one.codec).name,
                    "entry": entry(one.codec),
                }
                for one in third.passes
            ],
        }
    return {"parameters": spec.size, "methods": rows}


def _write(out: Path, scale: Scale) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_aside(out / "scale.json", (scale.json() + "\n").encode())
        write_aside(out / "scale.md", scale.text().encode())
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out}: {error.strerror or error}") from None
