"""A method is one file, one row and one configuration: without them, what remains passes without an edit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .jobs import deletable


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a large part of the suite
@pytest.mark.parametrize("name", ["qsgd", "atomo", "fetchsgd"])
def test_a_method_can_be_taken_out(name: str) -> None:
    command = [sys.executable, deletable.__file__, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("name", deletable.methods(deletable.ROOT))
def test_what_is_taken_out_is_the_file_the_row_the_tests_and_the_configurations(
    name: str, tmp_path: Path
) -> None:
    for part in ("fedmpi/methods", "configs/methods", "configs/intrinsic"):
        shutil.copytree(deletable.ROOT / part, tmp_path / part)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / f"test_{name}.py").touch()
    table = tmp_path / "fedmpi" / "methods" / "__init__.py"
    before = table.read_text().splitlines()
    deletable.take_out(tmp_path, name)
    after = table.read_text().splitlines()
    gone = [line.strip() for line in before if line not in after]
    assert gone[0] == f"{name},"
    assert {line.split()[-1].partition(".")[0] for line in gone[1:]} == {name}
    assert name not in deletable.methods(tmp_path)
    assert not (tmp_path / "fedmpi" / "methods" / f"{name}.py").exists()
    assert not [*(tmp_path / "tests").iterdir()]
    left = [path for path in (tmp_path / "configs").rglob("*.yaml") if f"name: {name}" in path.read_text()]
    assert not left
