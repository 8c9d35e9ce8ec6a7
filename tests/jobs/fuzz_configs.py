"""Texts of configurations, each refused in a few sentences or read as what it says; a kind of
:mod:`tests.jobs.fuzz`."""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from fedmpi import config, strict_yaml
from fedmpi.errors import FedMPIError

from .outcomes import Attempt

TEXT = (Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text()
ODD = (
    *(
        "on",
        "no",
        "Yes",
        "true",
        "0100",
        "0o17",
        "0x1f",
        "-0",
        "1_000",
        "1e1",
        "1e-3",
        "1.5",
        "-1",
        "0",
        "1:30",
        "~",
    ),
    *(
        "2026-01-02",
        ".inf",
        "-.nan",
        "1e999",
        "18446744073709551616",
        "9223372036854775807",
        "9" * 5000,
        "''",
        '"\\0"',
    ),
    *(
        "[]",
        "{}",
        "[1, 2]",
        "{name: dense}",
        "{name: 3}",
        "{name: {name: dense}}",
        "{a: 1, a: 2}",
        "[[[[[]]]]]",
    ),
    *(
        "*x",
        "&x 1",
        "!!python/name:os.system x",
        "!!float on",
        "!!binary aGk=",
        "!!set {a}",
        "<<",
        "{<<: {name: topk}}",
    ),
    *(
        "x" * 5000,
        "é",
        "\ud7ff",
        "'",
        '"',
        "{",
        "}",
        "[",
        "- 1",
        ": ",
        "#",
        "%",
        "@",
        "`",
        "|",
        ">",
        "? a",
        "\t1",
    ),
    *(
        "[" * 1500,
        "{a: " * 1500,
        "os:system",
        "topk",
        "digits",
        "data_parallel",
        "lookback",
        "\x00",
        "\x85",
        "\ufeff",
    ),
)
KEYS = (
    "rounds",
    "loss",
    "name",
    "base",
    "ratio",
    "lr",
    "method",
    "<<",
    "1",
    "?",
    "on",
    "x" * 3000,
    "a.b",
    "",
    "seed",
)


def prepare(folder: Path) -> Attempt:
    path = folder / "c.yaml"

    def attempt(draw: random.Random) -> FedMPIError | None:
        text = TEXT
        for _ in range(draw.randint(1, 3)):
            text = _mutated(text, draw)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            return _read(path, text)
        except BaseException as error:
            shown = text if len(text) < 300 else f"{text[:150]} … {text[-150:]}"
            raise AssertionError(f"{type(error).__name__}: {error}\n{shown}") from error

    return attempt


def _read(path: Path, text: str) -> FedMPIError | None:
    try:
        read = config.load(path)
    except FedMPIError as error:
        return error
    plain = read.plain()
    assert config.parse(strict_yaml.parse(strict_yaml.dump(plain))).plain() == plain, "it does not round-trip"
    _no_twins(yaml.compose(text, yaml.SafeLoader))
    unknown = set(strict_yaml.parse(text)) - set(config.Config.model_fields) - {"base", "<<"}
    assert not unknown, f"unknown keys {unknown} were accepted"
    return None


def _no_twins(node: yaml.Node) -> None:
    """No mapping has two equal keys, as PyYAML's own nodes, which keep both, show."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"equal keys were accepted: {keys}"
        for _, part in node.value:
            _no_twins(part)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _no_twins(part)


def _mutated(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    at = draw.randrange(len(lines)) if lines else 0
    if not lines:
        return draw.choice(ODD)
    key, colon, value = lines[at].partition(":")
    kind = draw.randrange(9)
    if kind == 0 and colon:
        lines[at] = f"{key}: {draw.choice(ODD)}"
    elif kind == 1:  # a value inside {…}
        parts = value.split(": ")
        spot = draw.randrange(len(parts))
        parts[spot] = draw.choice(ODD) + draw.choice(["", "}", ", steps", ", name"])
        lines[at] = f"{key}:{': '.join(parts)}"
    elif kind == 2 and colon:
        lines[at] = f"{draw.choice(KEYS)}:{value}"
    elif kind == 3:
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif kind == 4:
        lines.insert(at, f"{draw.choice(KEYS)}: {draw.choice(ODD)}")
    elif kind == 5:
        del lines[at]
    elif kind == 6:
        lines[at] = draw.choice(["  ", "\t", "- ", "? ", "&x ", "--- "]) + lines[at]
    elif kind == 7 and lines[at]:
        spot = draw.randrange(len(lines[at]))
        lines[at] = (
            lines[at][:spot]
            + draw.choice(["", "'", "{", "]", ":", ",", "\x00", "\n", "7"])
            + lines[at][spot + 1 :]
        )
    else:
        depth = draw.choice([2, 50, 200])
        lines[at] = f"{key}: {'{k: ' * depth}1{'}' * depth}"
    return "\n".join(lines) + "\n"
