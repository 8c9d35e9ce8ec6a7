"""The table of claims: every rule says held and not held where it should, and what was not run says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.studies import claims
from configs.studies.__main__ import main as studies
from configs.studies.claims import RULES, Results
from fedmpi import config as configuration
from fedmpi.analysis import grid
from fedmpi.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent


def point(label: str, *accuracy: float, up: int = 1000, seconds: float = 1.0) -> dict[str, Any]:
    n = len(accuracy)
    return {
        "label": label,
        "seeds": list(range(n)),
        "accuracy": list(accuracy),
        "upload_bytes": [up] * n,
        "seconds": [seconds + 0.1 * i for i in range(n)],
    }


SWEEP = Results(
    [
        {
            "points": [
                point("dense", 0.80, 0.82, 0.84),
                point("close", 0.795, 0.815, 0.835, up=300, seconds=1.05),
                point("far", 0.70, 0.72, 0.74, up=100, seconds=2.0),
                point("noisy", 0.86, 0.75, 0.86, up=1100),
            ]
        }
    ]
)
RUNS = Results(
    [
        {"share": 0.1, "full": 20.0, "less": 19.0, "loud": 10.0, "plan": "even"},
        {"share": 0.2, "full": 22.0, "less": 20.0, "loud": 25.0, "plan": "odd"},
    ]
)


@pytest.mark.parametrize(
    ("rule", "held", "figures"),
    [
        (
            {"name": "saves", "of": "close", "than": "dense", "lose": 1, "least": 60},
            True,
            "81.50 ± 1.15 % against 82.00 ± 1.15 % (-0.50 ± 0.00 points), upload saved 70 %",
        ),
        ({"name": "saves", "of": "close", "than": "dense", "lose": 1, "least": 80}, False, "saved 70 %"),
        ({"name": "saves", "of": "far", "than": "dense", "lose": 1, "least": 60}, False, "(-10.00 ± 0.00"),
        (
            {"name": "most_saved", "of": ["close", "far"], "than": "dense", "lose": 1, "least": 60},
            True,
            "close: 70 % saved",
        ),
        (
            {"name": "most_saved", "of": ["close", "far"], "than": "dense", "lose": 11, "least": 90},
            True,
            "far: 90 % saved",
        ),
        (
            {"name": "most_saved", "of": ["far"], "than": "dense", "lose": 1, "least": 0},
            False,
            "none is within 1 points of 82.00 ± 1.15 %",
        ),
        ({"name": "trade", "of": ["dense", "close", "far"], "than": "dense"}, True, "far: 72.00 ± 1.15 %, 90 % saved"),
        ({"name": "trade", "of": ["close", "dense", "far"], "than": "dense"}, False, "0 % saved"),
        ({"name": "trade", "of": ["noisy", "close"], "than": "dense"}, False, "noisy: 82.33 ± 3.67 %, -10 % saved"),
        ({"name": "ahead", "of": ["dense", "close"], "than": ["close", "far"]}, True, "(+9.50 ± 0.00 points)"),
        ({"name": "ahead", "of": ["dense", "close"], "than": ["close", "dense"]}, False, "(-0.50"),
        ({"name": "ahead", "of": ["noisy"], "than": ["close"]}, False, "(+0.83 ± 3.84 points)"),
        ({"name": "tie", "of": ["close"], "than": ["dense"], "within": 0.6}, True, "(-0.50"),
        ({"name": "tie", "of": ["close"], "than": ["dense"], "within": 0.4}, False, "(-0.50"),
        ({"name": "grows", "of": ["far", "close", "dense"]}, True, "far: 72.00"),
        ({"name": "grows", "of": ["far", "dense", "close"]}, False, "close: 81.50"),
        ({"name": "peak", "of": ["close", "dense", "far"]}, True, "dense: 82.00"),
        ({"name": "peak", "of": ["far", "dense", "close"]}, False, "dense: 82.00"),
        ({"name": "peak", "of": ["dense", "close", "far"]}, False, "far: 72.00"),
        ({"name": "slower", "of": ["close"], "than": "dense", "most": 1.1}, True, "1.05 times as long"),
        ({"name": "slower", "of": ["close", "far"], "than": "dense", "most": 1.1}, False, "2.00 times"),
    ],
)  # fmt: skip
def test_rules_on_points(rule: dict[str, Any], held: bool, figures: str) -> None:
    verdict = RULES[rule["name"]](SWEEP, **{k: v for k, v in rule.items() if k != "name"})
    assert verdict is not None
    assert verdict.held == held
    assert figures in verdict.figures


def test_rules_on_numbers() -> None:
    assert RULES["between"](RUNS, "share", 0.1, 0.2) == ("share: 0.15 ± 0.05", True)
    assert RULES["between"](RUNS, "share", 0.0, 0.1) == ("share: 0.15 ± 0.05", False)
    assert RULES["lower"](RUNS, ["less"], "full") == ("full 21 ± 1; less 19.5 ± 0.5", True)
    for of in (["less", "full"], ["loud"]):  # loud: lower by 3.5 ± 6.5
        verdict = RULES["lower"](RUNS, of, "full")
        assert verdict is not None
        assert not verdict.held
    assert RULES["differs"](RUNS, "share", "plan") == ("share: even: 0.1; odd: 0.2", True)
    assert RULES["differs"](Results(RUNS.loaded[:1]), "share", "plan") is None
    spread = Results([*RUNS.loaded, {"share": 0.4, "plan": "even"}])
    assert RULES["differs"](spread, "share", "plan") == ("share: even: 0.25; odd: 0.2", False)  # ± 0.15
    with pytest.raises(DataError, match="no number 'sahre' in the results; did you mean 'share'"):
        RUNS.numbers("sahre")
    with pytest.raises(DataError, match="no point 'dens' in the results; did you mean 'dense'"):
        SWEEP.point("dens")


def write(folder: Path, rule: dict[str, Any], of: list[str]) -> Path:
    experiments = {name: {"command": "fedmpi x", "setting": "small", "minutes": 1} for name in ("a", "b")}
    claim = {"claim": "it helps", "paper": "figure 1", "of": of, "rule": rule}
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump({"experiments": experiments, "claims": [claim]}))
    return path


def test_the_table_says_what_was_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, {"name": "between", "number": "share", "low": 0, "high": 0.1}, ["a", "b"])
    assert "| it helps | figure 1 |  | not run | a, b |" in claims.table(path, tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"share": 0.05}))
    assert "| share: 0.05 | held (1 of 2 seeds) | a, b |" in claims.table(path, tmp_path)
    (tmp_path / "b.json").write_text(json.dumps({"share": 0.35}))
    text = claims.table(path, tmp_path)
    assert "| share: 0.2 ± 0.15 | not held | a, b |" in text
    assert "| a | small | `fedmpi x` | 1 |" in text
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json: expected a result file"):
        claims.table(path, tmp_path)


def test_a_wrong_claim_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    for rule, of, message in (
        ({"name": "ahed"}, ["a"], "unknown rule 'ahed'; did you mean 'ahead'"),
        ({"name": "between", "high": 1}, ["a"], "rule between: .*missing"),
        ({"name": "dimension", "at_most": 1}, ["a"], "rule dimension: no 'share' in the results"),
        ({"name": "between"}, ["c"], "unknown experiment 'c'"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            claims.table(write(tmp_path, rule, of), tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        claims.table(tmp_path / "none.yaml", tmp_path)


def test_the_committed_table_is_that_of_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    made = tmp_path / "claims.md"
    assert studies(["claims", "configs/claims/claims.yaml", "--out", str(made)]) == 0
    assert made.read_text() == Path("configs/claims/README.md").read_text()


def test_every_experiment_can_be_run_and_has_the_points_that_rules_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without running: the commands' files and overrides make configurations, whose labels the rules name."""
    monkeypatch.chdir(ROOT)
    table = claims.Claims.model_validate(yaml.safe_load(Path("configs/claims/claims.yaml").read_text()))
    labels: dict[str, set[str]] = {}
    for name, experiment in table.experiments.items():
        import shlex

        words = shlex.split(experiment.command)
        assert f"configs/results/{name}.json" in words
        files = [word for word in words if word.endswith(".yaml")]
        overrides = [word for word in words if "=" in word]
        if words[1] == "sweep":
            jobs = grid.jobs(files[0], grid.read(Path(files[1])), overrides, tmp_path)
            labels[name] = {job.label for job in jobs}
        else:
            configuration.load(files[0], overrides)
    for claim in table.claims:
        assert claim.rule["name"] in RULES
        if claim.of[0] in labels:
            for key in ("of", "than"):
                named = claim.rule.get(key, [])
                assert set([named] if isinstance(named, str) else named) <= labels[claim.of[0]]
