"""The study of local updates: which rates it takes, what it compares, that it goes on where it was, and real jobs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from configs.studies import local
from configs.studies.__main__ import main
from configs.studies.local import CASES, RATES, Case, Study, Task
from fedmpi.config import parse
from fedmpi.errors import ConfigError
from fedmpi.tasks import data
from fedmpi.tasks.dataset import default_folder
from fedmpi.tasks.readers.kjv import TEXT

ROOT = Path(__file__).parent.parent


@pytest.fixture
def task() -> Task:
    """Digits and a small network in place of text."""
    config = parse(
        {
            "mode": "data_parallel",
            "data": "digits",
            "model": {"name": "fcn", "hidden": 16},
            "rounds": 2,
            "local": {"lr": 0.01, "optimizer": "adamw", "steps": 6, "batch": 32, "clip": 1.0},
            "method": "dense",
        }
    )
    return Task("digits.yaml", config, data.load("digits"), 2, 60, 6)


def test_rates_are_chosen_on_one_seed_and_cases_compared_on_others(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[float, int]] = []

    def train(task: Task, case: Case, rate: float, seed: int) -> dict[str, float]:
        done.append((rate, seed))
        loss = {RATES[0]: math.nan, RATES[-1]: 1.0}.get(rate, 2.0) if seed == 0 else 4.0 + seed
        return {"loss": loss * (1.1 if case.outer else 1.0), "bytes": 10 if case.outer else 100}

    monkeypatch.setattr(local, "train", train)
    study = Study(task, (1, 3), RATES, tmp_path / "local.json")
    study.run(lambda line: None, ["DDP", "DiLoCo"])
    assert done == [*[(rate, 0) for rate in RATES] * 2, *[(RATES[-1], 1)] * 2, *[(RATES[-1], 3)] * 2]
    rows = study.text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| DDP", "| DiLoCo"]
    assert "| 0.012 (edge) | 6.000 (5.000 … 7.000) | – | 0.000 | 1x |" in rows[0]
    assert "| 6.600 (5.500 … 7.700) | +10.0% (+10.0% … +10.0%) | 0.000 | 10x |" in rows[1]

    done.clear()
    again = Study(task, (1, 3, 4), RATES, tmp_path / "local.json")
    again.run(lambda line: None, ["DDP"])
    assert done == [(RATES[-1], 4)], "only what is not done"
    done.clear()
    Study(task, (0, 1), (0.01,), None).run(lambda line: None, ["DDP"])
    assert done == [(0.01, 0), (0.01, 1)], "nothing to choose"
    with pytest.raises(ConfigError, match=r"--out: .*local.json has the runs of another study"):
        Study(task._replace(every=3), (1,), RATES, tmp_path / "local.json")


def test_jobs_train_and_send_what_they_should(task: Task) -> None:
    each, seldom, signs = (
        local.train(task, CASES[n], 0.01, 1) for n in ("DDP", "DiLoCo", "DiLoCo, blockwise 4")
    )
    assert max(found["loss"] for found in (each, seldom, signs)) < 1.2 < math.log(10)
    assert each["bytes"] == 6 * seldom["bytes"]
    assert signs["bytes"] < seldom["bytes"] / 2
    assert local.train(task, CASES["DiLoCo"], 0.01, 1) == seldom, "by seed alone"


def test_steps_that_end_between_synchronisations(capsys: Any) -> None:
    assert main(["local", "--steps", "10", "--every", "3"]) == 2
    assert "--steps: expected a multiple of --every, which is 3, got 10" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["DiLoCo, qsgd 4"])
def test_a_committed_run_can_be_had_again(name: str) -> None:
    """On the first seed: bytes exactly; the loss within 1 %."""
    if not (default_folder() / "kjv" / TEXT).exists():
        pytest.skip(f"no kjv in {default_folder()}: fedmpi data fetch kjv")
    saved = json.loads((ROOT / "configs" / "results" / "local.json").read_text())
    about = saved["about"]
    run = next(run for run in saved["runs"] if run["case"] == name)
    task = Task.of(str(ROOT / about["config"]), about["ranks"], about["steps"], about["every"])
    again = local.train(task, CASES[name], run["rate"], run["seed"])
    assert again["bytes"] == run["bytes"]
    assert again["loss"] == pytest.approx(run["loss"], rel=0.01)
