"""The best model is kept, and a run ends early, to the same bits after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import CheckpointError

from .conftest import write_config
from .interrupted import SAVED, lines, only, outcome, train

# At this rate the accuracy goes up and down.
BEST = {
    **SAVED,
    "rounds": 10,
    "evaluate_every": 1,
    "checkpoint": {"rounds": 1, "keep": 9},
    "best": "accuracy",
}
BEST |= {"local": {"lr": 2.0, "steps": 2, "batch": 10}, "metrics": ["macro_f1"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(BEST, out)
    return out


def copy(whole: Path, to: Path, *rounds: int) -> Path:
    shutil.copytree(whole, to)
    only(to, *rounds)
    return to


def test_the_best_model_is_that_of_its_round(whole: Path) -> None:
    summary, scores = (
        json.loads((whole / "summary.json").read_text()),
        [line["accuracy"] for line in lines(whole)],
    )
    best = scores.index(max(scores))
    assert 0 < best < 9, "the last one: a test of nothing"
    assert summary["best"] == {"metric": "accuracy", "value": max(scores), "round": best}
    assert list(lines(whole)[0])[1:5] == ["loss", "accuracy", "macro_f1", "test_loss"]
    made = Simulation(config.parse(BEST), solo())
    made.trainer.model.load_state_dict(load_file(whole / "model-best.safetensors"), strict=True)
    x_X = torch.cat([p.detach().flatten() for p in made.trainer.model.parameters()])
    found = made.trainer.evaluate(made.measured, x_X, made.data.test, 512, solo())
    assert found["accuracy"] == max(scores)


@pytest.mark.parametrize(("done", "ranks"), [(2, 2), (9, 1)])
def test_it_is_the_same_after_an_interruption(whole: Path, tmp_path: Path, done: int, ranks: int) -> None:
    """Before and after the best round; what a killed process wrote after its last checkpoint is void."""
    out = copy(whole, tmp_path / "copy", done)
    (out / "model-best.safetensors").write_bytes(b"of a round that is done anew")
    train(BEST, out, ranks, resume=True)
    assert outcome(out) == outcome(whole)
    best = "model-best.safetensors"
    assert (out / best).read_bytes() == (whole / best).read_bytes()


def test_a_new_run_does_not_keep_an_earlier_ones(whole: Path, tmp_path: Path) -> None:
    out = copy(whole, tmp_path / "copy")
    train({**SAVED, "rounds": 1}, out, overwrite=True)
    assert not (out / "model-best.safetensors").exists()


@pytest.mark.parametrize(
    ("stop", "ended"),
    [
        ({"metric": "accuracy", "target": 0.9}, "accuracy 0.9"),
        ({"metric": "test_loss", "patience": 2}, "test_loss has not been better than"),
        ({"metric": "macro_f1", "target": 2.0, "patience": 3}, "macro_f1 has not been better than"),
    ],
)
def test_a_run_ends_early(stop: dict[str, Any], ended: str, tmp_path: Path) -> None:
    values, out = {**BEST, "rounds": 40, "stop": stop}, tmp_path / "run"
    summary = train(values, out)
    done, scores = lines(out), [line[stop["metric"]] for line in lines(out)]
    assert summary["ended"].startswith(ended)
    assert summary["rounds"] == len(done) < 40
    if "patience" in stop:
        best = scores.index(min(scores) if stop["metric"] == "test_loss" else max(scores))
        assert len(scores) - 1 - best == stop["patience"]
    else:
        assert scores[-1] >= stop["target"] > max(scores[:-1])
    expected = outcome(out)
    for rounds, ranks in ((len(done) - 1, 2), (len(done), 1)):  # the round before, and when it is over
        again = copy(out, tmp_path / str(rounds), rounds)
        train(values, again, ranks, resume=True)
        assert outcome(again) == expected


def test_the_command_line_says_so_and_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, values = str(tmp_path / "run"), BEST | {"stop": {"metric": "accuracy", "target": 0.3}}
    assert not main(["train", write_config(tmp_path, values), "--out", out])
    assert "the run is over: accuracy 0." in capsys.readouterr().err
    assert not main(["report", out]), "as many lines as it did rounds"


def forge(folder: Path, **changes: Any) -> None:
    """The manifest with other totals, and its checksums right."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())["manifest"]
    body["totals"] |= changes
    for name, file in body["files"].items():
        data = (folder / name).read_bytes()
        file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "manifest": body}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peaks": {"r2": {"value": 0.5, "round": 1}}}, "totals.peaks: expected accuracy, got 'r2'"),
        (
            {"peaks": {"accuracy": {"value": 0.5, "round": 6}}},
            "totals.peaks.accuracy.round: expected less than 6",
        ),
        (
            {"peaks": {"accuracy": {"value": 1.5, "round": 1}}},
            "totals.peaks.accuracy: expected 0 to 1, got 1.5",
        ),
        ({"peaks": {}}, "expected a file best.safetensors with the best value of accuracy, and only with it"),
        ({"ended": "now"}, "totals.ended: expected none without a best value, got 'now'"),
        ({"model": {"x": torch.zeros(3)}}, "best.safetensors: x: expected"),
        ({"model": {"x": torch.full((650,), torch.nan)}}, "best.safetensors: x: expected finite numbers"),
        ({"model": {"y": torch.zeros(650)}}, "best.safetensors: expected"),
    ],
)
def test_a_forged_checkpoint_is_refused(
    whole: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = copy(whole, tmp_path / "copy", 6)
    folder = out / "checkpoints" / "round-00000006"
    if "model" in changes:
        save_file(changes["model"], folder / "best.safetensors")
        changes = {}
    forge(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        train(BEST, out, resume=True)
    assert message in str(caught.value)


def test_a_manifest_from_before_measures_had_their_names_is_read(whole: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in BEST.items() if key not in ("best", "metrics")}
    out = tmp_path / "run"
    train(values, out)
    expected = outcome(out)
    only(out, 5)
    folder = out / "checkpoints" / "round-00000005"
    path = folder / "manifest.json"
    body = json.loads(path.read_text())["manifest"]
    totals = body["totals"]
    totals |= totals["measures"] | {"measures": {}}
    for new in ("peaks", "ended"):
        del totals[new]
    for new in ("best", "stop", "metrics"):
        del body["config"][new]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "manifest": body}))
    train(values, out, resume=True)
    assert outcome(out) == expected
