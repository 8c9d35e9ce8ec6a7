"""Input that nobody vouches for: messages, files that could run code, links in a run's folder.

Checkpoints have their own tests of the same (tests/test_manifest.py), data sets too (tests/test_data.py).
"""

from __future__ import annotations

import ast
import math
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config, methods
from fedmpi.analysis.report import report
from fedmpi.comm import solo
from fedmpi.engine.downloads import receive
from fedmpi.engine.record import write_aside
from fedmpi.engine.run import run
from fedmpi.errors import DataError, MessageError
from fedmpi.message import Message, from_bytes, to_bytes
from fedmpi.methods.base import Setup
from fedmpi.ops import bits

from .conftest import SMALL
from .jobs import fuzz_messages as fuzz

PACKAGE = Path(__file__).parent.parent / "fedmpi"
SPEC = fuzz.SPECS[0]
TARGETS = fuzz.targets(fuzz.SPECS[:1])


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(TARGETS), st.integers(0, 2**32))
def test_a_damaged_message_is_refused_or_decodes(target: fuzz.Target, seed: int) -> None:
    fuzz.receive(target, fuzz.mutated(target, TARGETS, random.Random(seed)))


def test_frames_as_they_are_are_taken() -> None:
    assert all(fuzz.receive(target, target.frame) is None for target in TARGETS)
    assert len({target.name for target in TARGETS}) > 40
    for target in TARGETS:
        fields, values = fuzz.anatomy(target.frame)
        assert sum(map(len, values)) < len(target.frame) - len(fields)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3.4e38])
def test_a_download_is_finite(number: float) -> None:
    """What is not, and what leads to parameters that are not, is refused before a client takes it."""
    method = methods.build({"name": "signsgd"}, SPEC, Setup(seed=1))
    theta = torch.tensor([-3e38, 3e38] * (SPEC.size // 2 + 1))[: SPEC.size]
    view, signs = method.server.view(theta), torch.zeros(1, 1, bits.nbytes(SPEC.size), dtype=torch.uint8)
    arrays = {"signs": signs, "lr": torch.tensor([[number]])}
    rows = {"rows": torch.zeros(1, 0, method.server.rows, dtype=torch.uint8)} if method.server.skips else {}
    frame = to_bytes(Message(arrays | rows))
    with pytest.raises(
        MessageError, match=r"download: .* has a NaN or an infinity, expected finite numbers"
    ) as error:
        receive(method.server, view, frame, 1)
    assert ("array 'lr'" in str(error.value)) == (number != 3.4e38)
    assert torch.equal(view["theta"], theta)


def test_rows_without_bytes_cannot_be_many() -> None:
    """They would pass the check that their bytes are there, and a list of their owners would fill the memory."""
    arrays = {"tag": torch.zeros(2, dtype=torch.uint8), "empty": torch.zeros(2, 0)}
    frame = bytearray(to_bytes(Message(arrays, {"empty": torch.tensor([1, 1])})))
    assert from_bytes(bytes(frame)).arrays["empty"].shape == (2, 0)
    frame[-8:-4] = struct.pack("<i", 2**31 - 1)
    with pytest.raises(MessageError, match="'empty' has 2147483648 rows in"):
        from_bytes(bytes(frame))


# What would execute what it reads: by the module's name, by the function's.
_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
    "imp",
}
_NAMES = {"eval", "exec", "__import__", "yaml.load", "os.system", "os.popen"}
_CALLS = {"load_module", "unsafe_load", "full_load", "read_pickle", "extractall"}


def test_nothing_executes_what_it_reads() -> None:
    found = {path: suspicious(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 70
    assert not {path: calls for path, calls in found.items() if calls}


def suspicious(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            dangerous = (
                called in _NAMES
                or last in _CALLS
                or (called == "torch.load" and keywords.get("weights_only") != "True")
                or keywords.get("allow_pickle", "False") != "False"
                or keywords.get("trust_remote_code", "False") != "False"
                or keywords.get("shell", "False") != "False"
            )
            found += [called] if dangerous else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "tar.extractall(folder)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_what_would_is_found(source: str) -> None:
    assert suspicious(source)


def test_a_run_replaces_links_in_its_folder(tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    names = ["config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "events.out.tfevents.1.x"]
    for name in names:
        (tmp_path / f"precious-{name}").write_text("mine")
        (out / name).symlink_to(tmp_path / f"precious-{name}")
    precious.write_text("mine")
    for name in names[:4]:
        (out / f".{name}.{os.getpid()}").symlink_to(precious)
    run(config.parse({**SMALL, "rounds": 1}), solo(), out, quiet=True, overwrite=True)
    assert not any(path.is_symlink() for path in out.iterdir() if path.name in names)
    assert precious.read_text() == "mine"
    assert {(tmp_path / f"precious-{name}").read_text() for name in names} == {"mine"}


def test_what_is_written_aside_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".report.md.{os.getpid()}").symlink_to(tmp_path / "precious")
    (tmp_path / "report.md").symlink_to(tmp_path / "precious")
    write_aside(tmp_path / "report.md", b"a report")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "report.md").read_bytes() == b"a report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "report.md"]


def test_a_report_reads_plain_files_only(tmp_path: Path) -> None:
    """A run's folder that somebody else gave us shows no other file of ours, and makes nobody wait."""
    run(config.parse({**SMALL, "rounds": 1}), solo(), tmp_path / "run", quiet=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        for kind in ("link", "pipe"):
            folder = tmp_path / f"{name} {kind}"
            shutil.copytree(tmp_path / "run", folder)
            (folder / name).unlink()
            if kind == "link":
                (folder / name).symlink_to(tmp_path / "run" / name)
            else:
                os.mkfifo(folder / name)
            with pytest.raises(DataError, match=name):
                report([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
