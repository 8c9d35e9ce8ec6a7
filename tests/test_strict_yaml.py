"""YAML is read as version 1.2 says, or refused in one sentence with file and line; it never grows without bound."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi import config, strict_yaml
from fedmpi.errors import ConfigError

from .conftest import SMALL


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[on, off, yes, no, y, True, false]", ["on", "off", "yes", "no", "y", True, False]),
        ("[10, -3, 0, +5, 0o17, 0x1f]", [10, -3, 0, 5, 15, 31]),
        ("[1e-3, 1e1, 1., .5, -2E+3, 0.0]", [1e-3, 10.0, 1.0, 0.5, -2000.0, 0.0]),
        ("[1:30, 2026-01-02, '0100', =, 1e, '']", ["1:30", "2026-01-02", "0100", "=", "1e", ""]),
        ("[~, null, ]", [None, None]),
        ("{a: &x {k: 1, m: 2}, b: {<<: *x, k: 3}}", {"a": {"k": 1, "m": 2}, "b": {"k": 3, "m": 2}}),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = strict_yaml.parse(text)
    assert found == value
    assert [type(one) is bool for one in found or []] == [type(one) is bool for one in value or []]
    assert strict_yaml.parse(strict_yaml.dump(found)) == value


@pytest.mark.parametrize(
    "text", ["on", "1e5", "0o17", "010", "1_000", "1:30", "08", "null", "2026-01-02", "0b1"]
)
def test_text_that_looks_like_a_number_stays_text_in_either_version(text: str) -> None:
    written = strict_yaml.dump({"a": text})
    assert strict_yaml.parse(written) == yaml.safe_load(written) == {"a": text}


def test_what_an_alias_names_can_be_changed_alone() -> None:
    found = strict_yaml.parse("a: &x {k: [1]}\nb: *x\n")
    found["a"]["k"].append(2)
    assert found["b"] == {"k": [1]}


BOMB = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10))
REFUSED = {
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' stands twice, first in line 1",
    "x: {k: 1, 'k': 2}": "line 1: the key 'k' stands twice",
    "x: 1\ny: {<<: {a: 1}, <<: {b: 2}}": "line 2: the key '<<' stands twice",
    "clients: 0100": "line 1: 0100 is one number in YAML 1.1 and another",
    "a:\n- 1_000": "line 2: 1_000 is",
    "a: 0b11": "line 1: 0b11 is",
    "a: .inf": "expected a finite number, got .inf",
    "a: 1e999": "expected a finite number, got 1e999",
    "a: !!float on": "expected a finite number, got on",
    "a: !!bool 2": "expected true or false, got '2'",
    f"a: 1{'0' * 5000}": "expected an integer of 64 bits",
    "a: 18446744073709551616": "expected an integer of 64 bits",
    "\n1: 2": "line 2: expected text as a key, got '1'",
    "? [a, b]\n: 1": "expected text as a key, got a sequence",
    "a: !!python/object/apply:os.system [ls]": "line 1: could not determine a constructor",
    "a: &x [*x]": "the alias *x stands inside its own anchor",
    "a: *x": "line 1: not YAML: found undefined alias 'x'",
    "a: 1\n\tb: 2": "line 2: not YAML: found a tab where an indent or a value begins; expected spaces",
    "a: {b: 1": "not YAML: ",
    "a: 1\n---\nb: 2": "not YAML: ",
    "a: \x00": "not YAML: ",
    "a: " + "[" * 1500 + "]" * 1500: "more than 100 levels of nesting",
    "a: " + "{b: " * 1500 + "1" + "}" * 1500: "more than 100 levels of nesting",
    "l0: &l0 [x, x]\n" + BOMB: "aliases stand for more than 10,000 values",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_a_file_is_refused_in_one_short_sentence_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    said = str(caught.value)
    assert REFUSED[text] in said, said
    assert str(path) in said
    assert len(said) < 300 + len(str(path))
    assert "\n" not in said


def test_only_a_regular_file_of_a_sane_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("# \n" * 400_000)
    for base, sentence in {
        "/dev/zero": "a device or pipe",
        "pipe": "a device or pipe",
        "large": "at most 1 MiB",
        "'a\\0b'": "cannot read",
        "[x]": "base: expected a file's path",
        "x" * 5000: "cannot read",
        "c.yaml": "does one name itself",
    }.items():
        text = base.replace("'", '"') if "\\0" in base else base
        (tmp_path / "c.yaml").write_text(f"base: {text}\n")
        with pytest.raises(ConfigError, match=sentence) as caught:
            config.load(tmp_path / "c.yaml")
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rounds=on", "rounds: expected a valid integer, got 'on'"),
        ("rounds=true", "rounds: expected a valid integer, got True"),
        ("rounds='10'", "rounds: expected a valid integer, got '10'"),
        ("rounds=1.5", "rounds: expected a valid integer"),
        ("local.lr=yes", "local.lr: expected a valid number, got 'yes'"),
        ("local.lr=true", "local.lr: expected a valid number, got True"),
        ("local.lr='0.1'", "local.lr: expected a valid number, got '0.1'"),
        ("cohort=true", "cohort"),
        ("clients=0100", "override clients=: 0100 is one number"),
        ("server.schedule.milestones=[true, 2]", "server.schedule.milestones: expected a valid integer"),
        ("method={name: topk, ratio: true}", "method.ratio: expected a valid number, got True"),
        ("method={name: lookback, threshold: [true]}", "threshold"),
        ("model={name: fcn, hidden: true}", "model.hidden: expected a valid integer, got True"),
        ("model={name: 'mine:build', bias: no}", "model.bias: no is text, no boolean; write true or false"),
        ("model={name: 'mine:build', p: [1_000]}", "1_000 is one number"),
    ],
)
def test_a_boolean_or_text_is_no_number(tmp_path: Path, override: str, sentence: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(ConfigError) as caught:
        config.load(path, [override])
    assert sentence in str(caught.value)


def test_numbers_and_switches_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    own = "model={name: 'mine:build', p: 1e-1, text: 'no'}"
    loaded = config.load(path, ["rounds=1e1", "local.lr=1e-3", "local.lr=1", "reproducible=true", own])
    assert (loaded.rounds, loaded.local.lr, loaded.reproducible) == (10, 1.0, True)
    assert loaded.model.options == {"p": 0.1, "text": "no"}
    assert config.parse(strict_yaml.parse(strict_yaml.dump(loaded.plain()))) == loaded
