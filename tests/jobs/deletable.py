"""A method can be taken out: ``python tests/jobs/deletable.py NAME``.

In a copy of the tree its file, its row, its own tests and the configurations that name it are removed; the tests that
remain, but for the cases that have it in their name, then pass without an edit. Exit code: pytest's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def methods(tree: Path) -> list[str]:
    """The modules of methods, by their rows."""
    text = (tree / "fedmpi" / "methods" / "__init__.py").read_text()
    return sorted(set(re.findall(r'^ +"\w+": (\w+)\.', text, re.MULTILINE)))


def take_out(tree: Path, name: str) -> list[str]:
    """Remove the method whose module is ``name``; returns its rows' names."""
    package = tree / "fedmpi" / "methods"
    text = (package / "__init__.py").read_text()
    rows = re.findall(rf'^ +"(\w+)": {name}\.', text, re.MULTILINE)
    assert rows, f"{name}: expected one of {', '.join(methods(tree))}"
    text = re.sub(rf'^ +("\w+": )?{name}\b.*,\n', "", text, flags=re.MULTILINE)
    (package / "__init__.py").write_text(text)
    (package / f"{name}.py").unlink()
    for path in (tree / "tests").glob(f"test_{name}*.py"):
        path.unlink()
    named = re.compile(rf"\bname: *({'|'.join(rows)})\b|^method: *({'|'.join(rows)})\b", re.MULTILINE)
    for path in (tree / "configs").rglob("*.yaml"):
        if named.search(path.read_text()):
            path.unlink()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="tests without one method")
    parser.add_argument("name", metavar="NAME", help="a module of fedmpi/methods")
    parser.add_argument("tests", metavar="FILE", nargs="*", help="of tests/; all by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skip = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info", "build", "dist")
        shutil.copytree(ROOT, tree, ignore=skip)
        rows = take_out(tree, args.name)
        tests = args.tests or [
            str(path.relative_to(tree)) for path in sorted((tree / "tests").glob("test_*.py"))
        ]
        others = " and ".join(f"not {row}" for row in rows)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-k",
            others,
            *tests,
        ]
        env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tree, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
