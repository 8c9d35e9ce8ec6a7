"""What each method computes and sends, to be compared between two checkouts on one machine:

    python tests/jobs/golden.py record OUT.json [WORD ...]     of the fedmpi that is imported; cases that hold a WORD
    python tests/jobs/golden.py compare [BASE] [WORD ...]      this checkout against a commit (golden.yaml's base)

A case is one run: every row and variant of METHODS, exact sums or not, both topologies, 1 and 3 ranks; data-parallel
at 2 and 3; a Reducer at 2 and 3 ranks with each way to meet, a step that is not finite and its state. What is kept
of each: SHA-256 of the parameters and of what server and clients keep, bytes up, down and on the wire of each rank
(in rounds and steps: not those of the handshake), the loss. ``golden.yaml`` beside this file names what may differ from
the base, and why.

Runs are looked at from outside (``engine.run.run``, its folder, ``Reducer``'s public methods), so that the file
outlives what it compares.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Of its own, not tests/conftest.py's: what is recorded must not change when the tests' runs do.
SMALL: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "linear"},
    "clients": 6,
    "partition": {"name": "dirichlet", "alpha": 1.0},
    "cohort": 4,
    "rounds": 5,
    "local": {"lr": 0.1, "steps": 2, "batch": 20},
    "evaluate_every": 5,
    "seed": 3,
    "checkpoint": {"rounds": 5},
}
WORKERS = {
    "mode": "data_parallel",
    "clients": 0,
    "local": {"lr": 0.1, "batch": 20},
    "partition": {"name": "iid"},
}
SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "fc.weight": (11, 20), "fc.bias": (11,)}
Case = dict[str, Any]


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes, types and bytes."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def methods() -> Iterator[tuple[str, dict[str, Any]]]:
    """A label and the options of every row and variant."""
    from fedmpi.methods import METHODS

    for name, entry in METHODS.items():
        for variant, options in {"": {}, **entry.variants}.items():
            yield f"{name} {variant}".strip(), {"name": name, **entry.example, **options}


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """All of them by name, each a call that gives what is kept of it."""
    for label, method in methods():
        for exact in (True, False):
            sums = "exact" if exact else "float"
            for topology in ("allreduce", "aggregator"):
                for ranks in (1, 3):
                    one = {**SMALL, "method": method, "reproducible": exact, "topology": topology}
                    yield (
                        f"federated {label}, {sums}, {topology}, {ranks}",
                        lambda one=one, ranks=ranks: trained(one, ranks),  # type: ignore[misc]
                    )
            one = {k: v for k, v in SMALL.items() if k != "cohort"} | WORKERS
            one |= {"method": method, "reproducible": exact}
            for ranks in (2, 3):
                yield (
                    f"data_parallel {label}, {sums}, {ranks}",
                    lambda one=one, ranks=ranks: trained(one, ranks),  # type: ignore[misc]
                )
        for way in ("auto", "gather", "sum"):
            for ranks in (2, 3):
                yield (
                    f"reducer {label}, {way}, {ranks}",
                    lambda m=method, r=ranks, way=way: reduced(m, r, way),  # type: ignore[misc]
                )


def trained(values: dict[str, Any], ranks: int) -> Case:
    """A run of so many ranks, threads of this process."""
    from fedmpi import config
    from fedmpi.comm import run_ranks
    from fedmpi.engine.rounds import Simulation
    from fedmpi.engine.run import run

    wire, round_of = [0] * ranks, Simulation.round

    def counted(simulation: Simulation, t: int) -> dict[str, Any]:
        before = simulation.comm.sent
        line = round_of(simulation, t)
        wire[simulation.comm.rank] += simulation.comm.sent - before
        return line

    with mock.patch.object(Simulation, "round", counted), tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        summary = run_ranks(ranks, lambda comm: run(config.parse(values), comm, out, quiet=True), timeout=60)[
            0
        ]
        saved = next((out / "checkpoints").glob("round-*"))
        return {
            "parameters": digest(load_file(out / "model.safetensors")),
            "upload": summary["upload_bytes"],
            "download": summary["download_bytes"],
            "wire": wire,
            "loss": summary["loss"],
            "server": digest(load_file(saved / "state.safetensors")),
            "kept": digest(_clients(saved)),
        }


def _clients(saved: Path) -> dict[str, Tensor]:
    """What each client keeps, whichever rank wrote it into whichever file of a checkpoint."""
    kept: dict[str, Tensor] = {}
    files = json.loads((saved / "manifest.json").read_text())["manifest"]["files"]
    for name, file in files.items():
        if file.get("store"):
            for entry, rows in load_file(saved / name).items():
                for client, row in zip(file["clients"], rows, strict=True):
                    kept[f"{file['store']} {client} {entry}"] = row
    return kept


def reduced(method: dict[str, Any], ranks: int, way: str) -> Case:
    """Four steps of a drop-in, of which the third has a NaN on one rank."""
    from fedmpi.comm import Comm, run_ranks
    from fedmpi.integrations.reducer import Reducer

    def one(comm: Comm) -> Case:
        reducer = Reducer(SHAPES, method, comm, exact_below=30, group_mb=1e-4, exchange=way)
        means: dict[str, Tensor] = {}
        shaken = comm.sent
        for step in range(4):
            generator = torch.Generator().manual_seed(100 * comm.rank + step)
            parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 2 and comm.rank == 0:
                fc = parameters["fc.weight"].grad
                assert fc is not None
                fc[0, 0] = float("nan")
            reducer.average(parameters)
            if step != 2:
                means |= {f"{step} {n}": p.grad for n, p in parameters.items() if p.grad is not None}
        kept = {
            f"{i} {part} {name}": value
            for i, group in enumerate(reducer.state_dict()["groups"])
            for part in ("state", "memory")
            for name, value in group[part].items()
        }
        stats = reducer.stats()
        return {
            "parameters": digest(means),
            "payload": stats["payload_bytes"],
            "wire": comm.sent - shaken,
            "steps": [stats["steps"], stats["skipped"]],
            "kept": digest(kept),
        }

    try:
        found = run_ranks(ranks, one, timeout=60)
    except Exception as error:
        return {"refused": type(error).__name__}
    return {what: [rank[what] for rank in found] for what in found[0]}


def record(out: Path, words: list[str]) -> None:
    """Do the cases and write what is kept of them."""
    torch.set_num_threads(1)
    found = {}
    for name, case in cases():
        if all(word in name for word in words):
            try:
                found[name] = case()
            except Exception as error:  # one that did not run is a difference, not the end
                found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    out.write_text(json.dumps(found, indent=1))


def compare(base: str, words: list[str], allowed: list[dict[str, Any]]) -> list[str]:
    """What differs between this checkout and the commit ``base`` and is not allowed to, a line each.

    Raises:
      CalledProcessError: git does not know the commit, or a checkout cannot be imported.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = subprocess.run(
            ["git", "archive", base, "fedmpi"], cwd=ROOT, check=True, capture_output=True
        )
        (folder / "base").mkdir()
        subprocess.run(["tar", "-x"], input=archive.stdout, cwd=folder / "base", check=True)
        recorders = []
        for label, tree in (("base", folder / "base"), ("here", ROOT)):
            command = [sys.executable, HERE / "golden.py", "record", folder / f"{label}.json", *words]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            recorders.append(subprocess.Popen(command, env=environment, cwd=folder))
        codes = [one.wait() for one in recorders]
        if any(codes):
            raise SystemExit("a checkout could not be recorded; its message is above")
        before, now = (json.loads((folder / f"{label}.json").read_text()) for label in ("base", "here"))
    return [*_differences(before, now, allowed), *_unused(before, now, allowed, words)]


def _differences(before: Case, now: Case, allowed: list[dict[str, Any]]) -> Iterator[str]:
    for name, old in before.items():
        new = now.get(name, {"missing": True})
        changed = [what for what in sorted(old.keys() | new.keys()) if old.get(what) != new.get(what)]
        for what in changed:
            if not any(_names(row, name, what) and _as_much(row, old, new, what) for row in allowed):
                yield f"{name}: {what}: {old.get(what)} -> {new.get(what)}"


def _names(row: dict[str, Any], case: str, what: str) -> bool:
    return fnmatch.fnmatch(case, row["cases"]) and what in row["what"]


def _as_much(row: dict[str, Any], old: Any, new: Any, what: str) -> bool:
    """A row that says how much ``more`` allows that alone, of each number of a list."""
    if "more" not in row:
        return True
    was, now = old.get(what), new.get(what)
    return isinstance(was, list) and now == [n + row["more"] for n in was]


def _unused(before: Case, now: Case, allowed: list[dict[str, Any]], words: list[str]) -> Iterator[str]:
    """Rows that name no difference are out of date."""
    for row in allowed if not words else ():
        if not any(
            _names(row, name, what) and before[name].get(what) != now.get(name, {}).get(what)
            for name in before
            for what in row["what"]
        ):
            yield f"golden.yaml: nothing of {row['cases']} differs in {', '.join(row['what'])}: remove the row"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["record"] and len(arguments) > 1:
        record(Path(arguments[1]), arguments[2:])
        return 0
    if arguments[:1] != ["compare"]:
        print(__doc__)
        return 2
    described = yaml.safe_load((HERE / "golden.yaml").read_text())
    base, *words = arguments[1:] or [described["base"]]
    lines = compare(base, words, described["differences"] or [])
    print("\n".join(lines) or f"equal to {base}, but for what golden.yaml names")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
