"""Runs from Python: fedmpi.train, sweep and report, their results, and callbacks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

import fedmpi
from fedmpi import demo
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.config import load
from fedmpi.engine.run import run
from fedmpi.errors import ConfigError, FedMPIError
from fedmpi.tasks.data import load as data
from fedmpi.tasks.models import build

from .conftest import SMALL, Mpi

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")


def alike(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What does not depend on time and ranks."""
    left_out = ("seconds", "ranks", "comm", "wire_bytes", "wire_bytes_by_rank", "clients_by_rank")
    return {name: value for name, value in summary.items() if name not in left_out}


def test_a_result_is_that_of_the_command_line(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    expected = run(load(SMALL, ["method=signsgd", "server.lr=0.01", "reproducible=true"]), solo(), quiet=True)
    for ranks in (1, 3):
        result = fedmpi.train(
            SMALL, ranks=ranks, quiet=True, method="signsgd", server={"lr": 0.01}, reproducible=True
        )
        assert alike(result.summary) == alike(expected)
        assert result.history.column("upload_bytes")[-1] * 5 == expected["upload_bytes"]
    assert torch.get_num_threads() == threads
    assert SMALL["method"] == {"name": "dense"}, "the caller's mapping is as it was"
    module = result.model(build("linear", (1, 8, 8), 10, 7))
    test = data("digits").test
    correct = module(torch.as_tensor(test.x)).argmax(1) == torch.as_tensor(test.y)
    assert float(correct.double().mean()) == pytest.approx(result.score)
    assert repr(result).startswith("signsgd: accuracy ")


def test_a_run_with_a_folder_is_continued_with_its_history(tmp_path: Path) -> None:
    class Ends(fedmpi.Callback):
        def round_end(self, t: int, row: Mapping[str, Any]) -> None:
            if t == 2:
                raise RuntimeError("enough")

    settings = SMALL | {"checkpoint": {"rounds": 2}, "reproducible": True}
    with pytest.raises(
        ConfigError, match=r"^callbacks: Ends.round_end raised RuntimeError: enough$"
    ) as raised:
        fedmpi.train(settings, out=tmp_path / "run", callbacks=[Ends()], ranks=2, quiet=True)
    assert isinstance(raised.value.__cause__, RuntimeError)
    result = fedmpi.train(settings, out=tmp_path / "run", resume=True, quiet=True)
    whole = fedmpi.train(settings, quiet=True)
    assert alike(result.summary) == alike(whole.summary)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in whole.history]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [dict(row) for row in result.history] == [json.loads(line) for line in lines]
    assert list(result.history.to_pandas()["round"]) == [0, 1, 2, 3, 4]
    text = fedmpi.report([result], out=tmp_path / "report", format="svg")
    assert "report.svg" in text
    assert (tmp_path / "report" / "report.svg").read_text().startswith("<?xml")


def test_callbacks_hear_all_on_rank_0_in_order(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Hears(fedmpi.Callback):
        def run_start(self, config: Mapping[str, Any], done: int) -> None:
            heard.append(("start", config["rounds"], done))

        def round_start(self, t: int) -> None:
            heard.append(("round", t))

        def round_end(self, t: int, row: Mapping[str, Any]) -> None:
            assert row["round"] == t
            heard.append(("end", t))

        def evaluation(self, t: int, metrics: Mapping[str, Any]) -> None:
            heard.append(("evaluation", t, sorted(metrics)))

        def checkpoint(self, done: int, folder: Path) -> None:
            assert (folder / "manifest.json").is_file()
            heard.append(("checkpoint", done))

        def run_end(self, summary: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> None:
            heard.append(("over", summary["rounds"], sum(tensor.numel() for tensor in model.values())))

        def close(self) -> None:
            heard.append("closed")
            raise OSError("no disk")

    board = fedmpi.TensorBoard(tmp_path / "board")
    with pytest.warns(RuntimeWarning, match=r"callbacks: Hears.close raised OSError: no disk"):
        fedmpi.train(
            SMALL,
            rounds=2,
            evaluate_every=2,
            checkpoint={"rounds": 2},
            ranks=2,
            quiet=True,
            out=tmp_path / "run",
            callbacks=[Hears(), board],
        )
    assert heard == [
        ("start", 2, 0),
        ("round", 0),
        ("end", 0),
        ("round", 1),
        ("end", 1),
        ("evaluation", 1, ["accuracy", "test_loss"]),
        ("checkpoint", 2),
        ("over", 2, 650),
        "closed",
    ]
    (mine,), (the_runs,) = (list((tmp_path / name).glob("events.*")) for name in ("board", "run"))
    assert mine.stat().st_size == the_runs.stat().st_size > 300


def test_a_sweep_from_mappings_can_be_run_again_as_a_command(tmp_path: Path) -> None:
    grid = {"seeds": 2, "over": {"method.ratio": [0.1, 0.5]}}
    topk = {"name": "topk", "ratio": 0.1}
    found = fedmpi.sweep(SMALL, grid, out=tmp_path, quiet=True, ranks=2, method=topk, rounds=2)
    assert [point["label"] for point in found.points] == ["ratio=0.1", "ratio=0.5"]
    frame = found.to_pandas()
    assert list(frame["method.ratio"]) == [0.1, 0.1, 0.5, 0.5]
    assert list(frame["seed"]) == [0, 1, 0, 1]
    command = json.loads((tmp_path / "report.json").read_text())["command"].split()
    assert command[:4] == ["fedmpi", "sweep", f"{tmp_path}/base.yaml", f"{tmp_path}/over.yaml"]
    again = fedmpi.sweep(tmp_path / "base.yaml", tmp_path / "over.yaml", out=tmp_path, quiet=True)
    assert again.points == found.points, "nothing is run twice"
    wire = [
        json.loads(path.read_text())["wire_bytes"] for path in sorted(tmp_path.glob("runs/*/summary.json"))
    ]
    assert wire[0] == wire[1], "a run's wire bytes are its own"


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    result = fedmpi.train(SMALL, rounds=1, quiet=True)
    calls: dict[str, Any] = {
        r"^config: expected a YAML file's path, a mapping or a fedmpi.Config, got int$": lambda: fedmpi.train(
            5
        ),
        r"^ranks: expected a whole number from 1, got 0$": lambda: fedmpi.train(SMALL, ranks=0),
        r"^nothing: unknown key; valid: data, ": lambda: fedmpi.train(SMALL, nothing=1, ranks=2),
        r"^out: expected a folder with resume=True, got None$": lambda: fedmpi.train(SMALL, resume=True),
        r"^callbacks: expected objects derived from fedmpi.Callback, got function$": lambda: fedmpi.train(
            SMALL,
            callbacks=[alike],
            quiet=True,
        ),
        r"^model: .* got Linear: Missing key": lambda: result.model(torch.nn.Linear(3, 2)),
        r"^against: expected one of rounds, upload, .* got 'bytes'$": lambda: result.plot(against="bytes"),
        r"^column: expected one of round, loss, .* got 'acc'$": lambda: result.history.column("acc"),
        r"^report: expected runs with a folder, got one without: dense: ": lambda: fedmpi.report([result]),
        r"^OVER.seed: unknown key; did you mean 'seeds'": lambda: fedmpi.sweep(
            SMALL, {"seed": 3}, out=tmp_path
        ),
    }
    for sentence, call in calls.items():
        with pytest.raises(FedMPIError) as raised:
            call()
        assert re.search(sentence, str(raised.value)), (sentence, str(raised.value))


def test_the_readmes_script_draws_three_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(script.splitlines()) <= 15
    (tmp_path / "configs").mkdir()
    base = f"base: {ROOT / 'configs' / 'quickstart.yaml'}\nrounds: 2\nevaluate_every: 1\n"
    (tmp_path / "configs" / "quickstart.yaml").write_text(base)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script, "README.md", "exec"), names)
    lines = names["axes"].lines
    assert [line.get_label() for line in lines] == [
        "dense", "topk(ratio=0.05, feedback=True)", "intrinsic(dim=640)"
    ]  # fmt: skip
    sent = [line.get_xdata()[-1] for line in lines]
    assert sent[0] == 2 * 20 * 4 * 3760
    assert sent[2] == 2 * 20 * 4 * 640
    assert Path("accuracy-by-bytes.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_compares_five_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "rounds=1", "evaluate_every=1", "--out", str(tmp_path / "demo")]
    assert main(command) == 0
    said = capsys.readouterr().out
    for name, changes in demo.METHODS.items():
        assert (
            f"$ fedmpi train configs/quickstart.yaml --out {tmp_path}/demo/{name} {' '.join(changes)}" in said
        )
        summary = json.loads((tmp_path / "demo" / name / "summary.json").read_text())
        assert (summary["method"], summary["rounds"], summary["ranks"]) == (name, 1, 4)
    assert (tmp_path / "demo" / "report" / "report.png").is_file()


@pytest.mark.mpi
@pytest.mark.slow
def test_every_rank_has_the_same_result_and_its_errors(tmp_path: Path, openmpi: Mpi) -> None:
    done = openmpi(2, str(ROOT / "tests" / "jobs" / "from_python.py"), str(tmp_path / "sweep"))
    assert done.returncode == 0, done.stderr
    one, other = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert {**one, "errors": 0} == {**other, "errors": 0}
    assert len(set(one["digests"])) == 1, "both topologies come to the same model"
    assert one["seeds"] == [[0, 1]]
    for callback, key, ranks in (one["errors"], other["errors"]):
        assert callback.endswith("callbacks: Fails.round_end raised ValueError: enough")
        assert key.startswith("nothing: unknown key; valid: data, ")
        assert ranks == "ranks: expected 1 under a launcher that starts 2 ranks, got 2"


def test_names_are_listed_and_loaded_where_the_types_say() -> None:
    tree = ast.parse((ROOT / "fedmpi" / "__init__.py").read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    loaded = {name: (f"fedmpi.{module}", inside) for name, (module, inside) in fedmpi._PLACES.items()}
    assert typed == loaded | {name: ("fedmpi", name) for name in fedmpi._MODULES}
    assert sorted({*typed, "__version__"}) == sorted(fedmpi.__all__)
    assert {*fedmpi.__all__} - {"horovod", "lightning", "transformers"} <= set(dir(fedmpi))
    for name in set(dir(fedmpi)) & set(fedmpi.__all__) - {"horovod", "lightning", "transformers"}:
        getattr(fedmpi, name)
    with pytest.raises(AttributeError, match="module 'fedmpi' has no attribute 'trian'"):
        fedmpi.trian  # noqa: B018
