"""This tree against the commit that ``jobs/golden.yaml`` names: the same bits and bytes, but for what it names."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml

from .conftest import JOBS
from .jobs import golden


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tree_computes_what_the_base_did() -> None:
    """Needs the repository's history, where the base is a commit."""
    compared = subprocess.run(
        [sys.executable, JOBS / "golden.py", "compare"], capture_output=True, text=True, check=False
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr


def row(cases: str, *what: str) -> dict[str, Any]:
    return {"cases": cases, "what": list(what), "why": "a test"}


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ([], ["a 1: loss: 1 -> 2", "a 2: missing: None -> True", "a 2: loss: 1 -> None"]),
        ([row("a *", "loss", "missing")], []),
        ([row("a 2", "loss", "missing")], ["a 1: loss: 1 -> 2"]),
        ([row("w", "wire") | {"more": 3}, row("a *", "loss", "missing")], []),
        ([row("w", "wire") | {"more": 2}, row("a *", "loss", "missing")], ["w: wire: [1, 2] -> [4, 5]"]),
        ([row("a *", "upload")], ["a 1: loss: 1 -> 2", "a 2: missing: None -> True", "a 2: loss: 1 -> None"]),
    ],
)
def test_only_named_differences_pass(allowed: list[dict[str, Any]], expected: list[str]) -> None:
    before: golden.Case = {"a 1": {"loss": 1, "upload": 8}, "a 2": {"loss": 1}, "b": {"loss": 3}}
    now: golden.Case = {"a 1": {"loss": 2, "upload": 8}, "b": {"loss": 3}, "c": {"loss": 4}}
    if any(row["cases"] == "w" for row in allowed):
        before, now = before | {"w": {"wire": [1, 2]}}, now | {"w": {"wire": [4, 5]}}
    assert sorted(golden._differences(before, now, allowed)) == sorted(expected)


def test_a_row_that_names_no_difference_is_out_of_date() -> None:
    before, now = {"a": {"loss": 1, "upload": 8}}, {"a": {"loss": 2, "upload": 8}}
    rows = [row("a", "loss"), row("a", "upload"), row("z*", "loss")]
    assert [line.split(":")[1] for line in golden._unused(before, now, rows, [])] == [
        " nothing of a differs in upload",
        " nothing of z* differs in loss",
    ]


def test_every_named_difference_says_why() -> None:
    described = yaml.safe_load((JOBS / "golden.yaml").read_text())
    for one in described["differences"]:
        assert one.keys() - {"more"} == {"cases", "what", "why"}
        assert len(one["why"]) > 20
