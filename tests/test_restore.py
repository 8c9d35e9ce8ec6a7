"""What a checkpoint must be to be gone on from: each thing that can be wrong with one has a sentence of its own.

Damage at random and resumes to the same bits are in tests/test_checkpoint.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedmpi import config
from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.engine import fingerprint as fingerprints
from fedmpi.engine import manifest, parts
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.resume import restore
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.errors import CheckpointError, ConfigError, FedMPIError
from fedmpi.tasks import data

from .conftest import SMALL

VALUES: dict[str, Any] = {
    **SMALL,
    "rounds": 2,
    "checkpoint": {"rounds": 2},
    "method": {"name": "topk", "ratio": 0.1, "feedback": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run(config.parse(VALUES), solo(), out, quiet=True)
    return out / "checkpoints" / "round-00000002"


Body = dict[str, Any]


def rewrite(folder: Path, change: Callable[[Body], None]) -> None:
    """A manifest with its checksum, as a foreign program would write it."""
    path = folder / manifest.MANIFEST
    body = json.loads(path.read_bytes())["manifest"]
    change(body)
    path.write_text(json.dumps({"sha256": manifest._digest(body), "manifest": body}))


def rewrite_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load((folder / "state.safetensors").read_bytes())
    change(tensors)
    (folder / "state.safetensors").unlink()
    file = manifest.write(folder / "state.safetensors", save(tensors))
    rewrite(folder, lambda body: body["files"].update({"state.safetensors": file.model_dump()}))


def of_stores(body: Body) -> list[Body]:
    return [file for file in body["files"].values() if file["store"]]


CHANGES: dict[str, tuple[Callable[[Body], Any], type[FedMPIError], str]] = {
    "no state": (
        lambda body: body["files"].pop("state.safetensors"),
        CheckpointError,
        "expected a file state.safetensors, got clients-00000-00000.safetensors, metrics.jsonl",
    ),
    "another round": (
        lambda body: body.update(round=1),
        CheckpointError,
        "expected round-00000001, by its manifest",
    ),
    "a store that there is not": (
        lambda body: [file.update(store="servants") for file in of_stores(body)],
        CheckpointError,
        "expected a store of clients, got 'servants'",
    ),
    "other clients": (
        lambda body: [file["clients"].pop() for file in of_stores(body)],
        CheckpointError,
        r"expected the state of client \d, which sent messages, got none",
    ),
    "a number that is none": (
        lambda body: body["totals"].update(called="six"),
        CheckpointError,
        "totals.called: .*, got 'six'",
    ),
    "a configuration of another version": (
        lambda body: body["config"].update(quantum=True),
        ConfigError,
        "has a configuration of another version: quantum",
    ),
    "another model": (
        lambda body: body["parameters"].update(more=[3]),
        ConfigError,
        "got one of other parameters",
    ),
    "another configuration": (
        lambda body: body["config"].update(seed=4),
        ConfigError,
        "--resume: seed is 3, but .* was written with 4",
    ),
}


def refused(folder: Path, error: type[FedMPIError], match: str) -> None:
    simulation = Simulation(config.parse(VALUES), solo())
    before = simulation.replica.parameters().clone()
    with pytest.raises(error, match=match):
        restore(simulation, folder)
    assert torch.equal(simulation.replica.parameters(), before)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_does_not_fit_is_named(name: str, folder: Path) -> None:
    change, error, match = CHANGES[name]
    rewrite(folder, change)
    refused(folder, error, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("server.changed"), "expected server state changed int32, .*, got theta"),
        (lambda tensors: tensors.pop("ledger.seen"), "expected ledger state .*seen int64, .*, got "),
        (
            lambda tensors: tensors.update({"server.theta": torch.zeros(650, dtype=torch.float64)}),
            "expected server state .*theta float32, .*, got .*theta float64",
        ),
        (
            lambda tensors: tensors.update({"server.theta": torch.zeros(649)}),
            re.escape("server.theta: expected (650,), got (649,)"),
        ),
        (
            lambda tensors: tensors.update({"ledger.seen": torch.zeros(7, dtype=torch.int64)}),
            re.escape("ledger.seen: expected (6,), got (7,)"),
        ),
    ],
)
def test_a_state_of_another_method_or_model_is_named(change: Any, match: str, folder: Path) -> None:
    rewrite_state(folder, change)
    refused(folder, CheckpointError, match)


def test_a_manifest_is_what_its_checksum_says(folder: Path) -> None:
    path = folder / manifest.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"called": 8', b'"called": 9'))
    refused(folder, CheckpointError, r"manifest.json: expected SHA-256 \w+, got \w+ \(damaged\)")


def test_a_manifest_of_more_than_a_gigabyte_is_not_read(folder: Path) -> None:
    with (folder / manifest.MANIFEST).open("r+b") as file:
        file.truncate((1 << 30) + 1)  # a hole: no gigabyte on the disk
    refused(
        folder,
        CheckpointError,
        f"expected a plain file of at most {1 << 30} bytes, got {(1 << 30) + 1:,} bytes",
    )


def test_another_torch_is_said(folder: Path) -> None:
    rewrite(folder, lambda body: body.update(torch="1.0"))
    (folder.parent / "checkpoints").mkdir()
    folder.rename(folder.parent / "checkpoints" / folder.name)
    simulation, said = Simulation(config.parse(VALUES), solo()), list[str]()
    checkpoints = Checkpoints(folder.parent, simulation.config.checkpoint, simulation.comm)
    assert checkpoints.load(simulation, said.append)[0] == 2
    assert said[1:] == [f"written with torch 1.0, this is {torch.__version__}: the last bits may differ"]


def test_ranks_that_share_no_folder_are_named_and_leave_nothing(tmp_path: Path) -> None:
    """Two machines, each with a folder of its own in the place of ``--out``."""

    def main(comm: Comm) -> str:
        simulation = Simulation(config.parse(VALUES), comm)
        simulation.round(0)
        own = tmp_path / str(comm.rank)
        own.mkdir()
        (own / "metrics.jsonl").touch()
        with pytest.raises(FedMPIError) as caught:
            Checkpoints(own, simulation.config.checkpoint, comm).save(simulation, 1)
        return str(caught.value)

    said = run_ranks(2, main, timeout=30)
    assert all(f"rank 1 does not see {tmp_path}/1/checkpoints/.round-00000001" in one for one in said), said
    assert not list((tmp_path / "0" / "checkpoints").iterdir())


def test_what_could_not_be_recorded_ends_the_save_before_anything_is_written(tmp_path: Path) -> None:
    simulation = Simulation(config.parse(VALUES), solo())
    simulation.round(0)
    simulation.error = ConfigError("--out: no space")
    with pytest.raises(ConfigError, match="--out: no space"):
        Checkpoints(tmp_path, simulation.config.checkpoint, simulation.comm).save(simulation, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(method={"name": "evil:ENTRY"}),
        lambda config: config.update(method="evil:ENTRY"),
        lambda config: config.update({"method.name": "topk", "method": {"name": "evil:ENTRY"}}),
        lambda config: config["method"].update(inner={"name": "evil:ENTRY"}),
        lambda config: config["model"].update(name="evil:build"),
        lambda config: config["data"].update(name="evil:load"),
        lambda config: config["data"].update(folder={"name": "evil:load"}),
    ],
)
def test_a_checkpoint_names_nothing_that_is_imported(
    change: Callable[[Body], Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('PWNED').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rewrite(folder, lambda body: change(body["config"]))
    with contextlib.suppress(ConfigError):  # a folder of data may differ, and is this run's
        restore(Simulation(config.parse(VALUES), solo()), folder)
    assert not (tmp_path / "PWNED").exists()


def test_a_number_is_not_a_share(folder: Path) -> None:
    rewrite(folder, lambda body: body["config"].update(cohort=float(body["config"]["cohort"])))
    refused(folder, ConfigError, r"cohort is 4, but .* was written with 4.0")


def rewrite_metrics(folder: Path, change: Callable[[list[str]], Any]) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    change(lines)
    path.unlink()
    file = manifest.write(path, "".join(f"{line}\n" for line in lines).encode())
    rewrite(folder, lambda body: body["files"].update({"metrics.jsonl": file.model_dump()}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: lines.pop(), "expected 2 lines, one a round, got 1"),
        (lambda lines: lines.append(lines[1]), "expected 2 lines, one a round, got 3"),
        (lambda lines: lines.__setitem__(1, lines[0]), "line 2: expected round 1, got 0"),
        (lambda lines: lines.__setitem__(0, "no JSON"), "line 1: expected JSON, got b'no JSON'"),
        (lambda lines: lines.__setitem__(0, "[" * 50_000), "line 1: expected JSON"),
        (lambda lines: lines.__setitem__(0, "{}"), "line 1: expected accuracy, .*, got $"),
        (
            lambda lines: lines.__setitem__(0, json.dumps({**json.loads(lines[0]), "clients": -1})),
            "line 1: clients: expected a whole number of at least 0, got -1",
        ),
        (
            lambda lines: lines.__setitem__(0, json.dumps({**json.loads(lines[0]), "upload_bytes": 5})),
            r"upload_bytes: expected \d+ in all, by the manifest, got \d+",
        ),
    ],
)
def test_metrics_are_those_of_the_rounds_behind(change: Any, match: str, folder: Path) -> None:
    rewrite_metrics(folder, change)
    refused(folder, CheckpointError, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda body: [
                file.update(clients=[c + 2**40 for c in file["clients"]]) for file in of_stores(body)
            ],
            "expected clients below 6, got 1099511627776",
        ),
        (
            lambda body: [file["clients"].__setitem__(0, file["clients"][1]) for file in of_stores(body)],
            "expected each client once, got one twice",
        ),
        (
            lambda body: body["totals"]["bytes"].update(upload=-1),
            "totals.bytes.upload: expected 0 or more, got -1",
        ),
        (lambda body: body["totals"]["bytes"].pop("upload"), "totals.bytes: expected upload, .*, got "),
        (lambda body: body["totals"]["bytes"].update(upload=10**9), "upload_bytes: expected 1000000000 "),
        (
            lambda body: body["totals"]["bytes"].update(upload_values=1),
            r"totals.bytes.upload_values: expected \d+ of \d+ bytes in all, got 1$",
        ),
        (lambda body: body["totals"].update(called=9), "totals.called: expected at most 8, got 9"),
        (lambda body: body["ranks"][0].update(trained=10**6), "ranks.trained: expected at most 8"),
        (lambda body: body["ranks"].clear(), "ranks: expected at least one"),
        (lambda body: body.update(seconds=float("inf")), "seconds: expected a finite number"),
        (lambda body: body["totals"]["counts"].update(more=1), "totals.counts: expected "),
    ],
)
def test_totals_and_clients_are_this_runs(change: Any, match: str, folder: Path) -> None:
    rewrite(folder, change)
    refused(folder, CheckpointError, match)


def put(name: str, index: int, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("method", "change", "match"),
    [
        (None, put("server.theta", 3, float("nan")), "server.theta: expected finite numbers"),
        (None, put("ledger.upload", 0, -5), "ledger.upload: expected whole numbers from 0"),
        (None, put("ledger.seen", 0, 3), "ledger.seen: expected at most the version 2, got 3"),
        (None, put("ledger.download", 0, 10**9), r"ledger.download: expected \d+ bytes in all"),
        (None, lambda state: state["server.version"].fill_(99), "server.version: expected at most 3"),
        (
            None,
            lambda state: state.update({"ledger.upload": torch.zeros(7).long()}),
            re.escape("ledger.upload: expected (6,), got (7,)"),
        ),
        (
            None,
            lambda state: state.update({"server.optimizer.variance": torch.zeros(1)}),
            re.escape("server.optimizer.variance: expected (650,), got (1,)"),
        ),
        (None, put("server.optimizer.variance", 0, float("inf")), "variance: expected finite numbers"),
        (None, put("server.optimizer.variance", 0, -1.0), "variance: expected squares"),
        (
            None,
            lambda state: state.update(more=torch.zeros(1)),
            "expected server. and ledger. entries, got 'more'",
        ),
        (
            {"name": "signsgd"},
            lambda state: state.update({"server.signs": ~state["server.signs"]}),
            "server.theta: expected the parameters that the other entries of the state lead to",
        ),
        (
            {"name": "powersgd", "rank": 1},
            lambda state: state.update({"server.rights": state["server.rights"][:1]}),
            re.escape("server.rights: expected (2, 74), got (1, 74)"),
        ),
    ],
)
def test_a_state_is_one_that_the_run_can_have_come_to(
    method: Any, change: Any, match: str, optimized: dict[str, Path], tmp_path: Path
) -> None:
    name = method["name"] if method else "topk"
    copy = Path(shutil.copytree(optimized[name], tmp_path / optimized[name].name))
    rewrite_state(copy, change)
    simulation = Simulation(config.parse(OPTIMIZED[name]), solo())
    before = simulation.replica.parameters().clone()
    with pytest.raises(CheckpointError, match=match):
        restore(simulation, copy)
    assert torch.equal(simulation.replica.parameters(), before)


OPTIMIZED: dict[str, dict[str, Any]] = {
    "topk": {**VALUES, "server": {"optimizer": "adam", "lr": 0.01}},
    "signsgd": {**VALUES, "method": {"name": "signsgd"}},
    "powersgd": {**VALUES, "method": {"name": "powersgd", "rank": 1}},
}


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, values in OPTIMIZED.items():
        out = tmp_path_factory.mktemp("run")
        run(config.parse(values), solo(), out, quiet=True)
        found[name] = out / "checkpoints" / "round-00000002"
    return found


def test_residuals_are_numbers(folder: Path) -> None:
    (name,) = [path.name for path in folder.glob("clients-*")]
    tensors = load((folder / name).read_bytes())
    tensors["residual"][0, 0] = float("nan")
    (folder / name).unlink()
    file = manifest.write(folder / name, save(tensors)).model_dump(include={"bytes", "sha256"})
    rewrite(folder, lambda body: body["files"][name].update(file))
    refused(folder, CheckpointError, "residual: expected finite numbers")


def test_other_data_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels flipped, one of many; and a checkpoint of before there were fingerprints goes on, with a sentence."""
    found = data.load("digits")
    y = found.train.y.clone()
    y[7] = (y[7] + 1) % 10
    with monkeypatch.context() as patched:
        other = found._replace(train=found.train._replace(y=y))
        patched.setattr(parts.data, "load", lambda name, **options: other)
        values = {**VALUES, "partition": {"name": "iid"}}
        with pytest.raises(ConfigError, match=r"--resume: partition.name"):
            restore(Simulation(config.parse(values), solo()), folder)
        refused(folder, ConfigError, r"--resume: data.train.y is not what .* was written with; go on with")
    rewrite(folder, lambda body: body.pop("fingerprint"))
    said: list[str] = []
    (folder.parent / "checkpoints").mkdir()
    folder.rename(folder.parent / "checkpoints" / folder.name)
    simulation = Simulation(config.parse(VALUES), solo())
    Checkpoints(folder.parent, simulation.config.checkpoint, solo()).load(simulation, said.append)
    assert "no fingerprint of the data" in said[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bfloat16])
def test_one_entry_of_large_data_changes_the_fingerprint(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE", 64)
    x = torch.arange(600).remainder(100).reshape(100, 6).to(dtype)
    other = x.clone()
    other[33, 2] += 1
    assert fingerprints._of(x) == fingerprints._of(x.clone())
    assert len({fingerprints._of(value) for value in (x, other, x.reshape(50, 12), x[:99])}) == 4
