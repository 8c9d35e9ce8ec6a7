"""Dependencies point one way: a part imports only from the parts listed for it (and from itself).

``python -m tests.test_layers`` draws that into docs/architecture.md.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedmpi"
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
_MARK = "<!-- drawn by python -m tests.test_layers -->"
BASE = {"errors", "random"}
LAYERS = {
    "errors": set(),
    "random": set(),
    "spec": {"errors"},
    "message": {"errors"},
    "schema": set(),
    "phases": set(),
    "version": set(),
    "callbacks": {"errors"},
    "start": set(),  # nothing: it comes before everything
    "optimizers": set(),
    "own": {"errors"},
    "project": {"errors"},
    "strict_yaml": set(),
    "plain_file": {"errors"},
    "machine": set(),
    "overrides": {"errors", "validation"},
    "validation": {"errors", "plain_file", "strict_yaml"},
    "ops": BASE,
    "comm": {"errors", "phases", "version"},  # and nothing of what it carries
    "tasks": BASE | {"machine", "own", "validation"},
    "method": BASE | {"message", "spec"},
    "methods": BASE
    | {"method", "message", "spec", "ops", "optimizers", "own", "validation"},  # never comm or engine
    "meet": {"comm", "errors", "message", "method", "methods", "ops", "phases"},
    "local": {"methods", "own", "validation"},
    "plan": BASE | {"method", "methods", "spec", "validation"},
    "choice": {"own", "tasks", "validation"},
    "config": {"choice", "errors", "local", "methods", "optimizers", "overrides", "plan", "validation"},
    "engine": BASE
    | {
        "callbacks",
        "choice",
        "comm",
        "config",
        "local",
        "meet",
        "method",
        "methods",
        "message",
        "ops",
        "own",
        "plan",
        "spec",
        "start",
        "tasks",
    }
    | {"machine", "phases", "plain_file", "strict_yaml", "version"},
    "analysis": BASE
    | {"comm", "config", "engine", "local", "method", "methods", "message", "ops", "plan", "spec", "tasks"}
    | {"strict_yaml", "validation"},
    "integrations": BASE
    | {
        "comm",
        "engine",
        "meet",
        "message",
        "method",
        "methods",
        "ops",
        "optimizers",
        "plan",
        "plain_file",
        "schema",
        "spec",
        "validation",
    },  # never what runs a job
    "bench": BASE
    | {"analysis", "comm", "config", "engine", "integrations"}
    | {"message", "method", "methods", "ops", "spec", "tasks", "validation"},
    "accelerate": {"integrations"},  # short names
    "ddp": {"integrations"},
    "horovod": {"integrations"},
    "lightning": {"integrations"},
    "optim": {"integrations"},
    "transformers": {"integrations"},
    "api": {"analysis", "callbacks", "comm", "config", "engine", "errors", "overrides"},
    "doctor": {"comm", "errors", "ops", "version"},
    "tools": {
        "analysis",
        "comm",
        "config",
        "doctor",
        "errors",
        "integrations",
        "spec",
        "tasks",
        "validation",
    },
    "demo": {"analysis", "comm", "config", "engine", "errors", "project"},
    "cli": {
        "demo",
        "analysis",
        "bench",
        "comm",
        "config",
        "engine",
        "errors",
        "project",
        "start",
        "tools",
        "version",
    },
    "__main__": {"cli", "start"},
    "__init__": {"accelerate", "ddp", "horovod", "lightning", "optim", "transformers"}  # on demand
    | {"api", "callbacks", "config", "engine", "errors", "integrations", "methods", "version"},
}


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """The parts of fedmpi that a file imports anywhere in it, functions included."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fedmpi.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "fedmpi":
                parts |= {alias.name for alias in node.names}
            elif node.module.startswith("fedmpi."):
                parts.add(node.module.split(".")[1])
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = part(path)
    assert own in LAYERS, f"{own}: a new part needs its line in LAYERS"
    assert imported(path) - {own} <= LAYERS[own]


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def drawing() -> str:
    """The parts in rows: each imports from rows below its own only, and from the one below it at least."""
    row_of: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(LAYERS).static_order():  # CycleError names the circle
        row_of[name] = max((row_of[needed] + 1 for needed in LAYERS[name]), default=0)
    rows = [sorted(name for name, row in row_of.items() if row == i) for i in range(max(row_of.values()) + 1)]
    return "\n".join("   ".join(names) for names in reversed(rows))


def drawn(text: str) -> str:
    """docs/architecture.md with the drawing of today's table."""
    before, _, rest = text.partition(f"{_MARK}\n```\n")
    return f"{before}{_MARK}\n```\n{drawing()}\n```{rest.partition('```')[2]}"


def test_the_drawing_is_the_tables() -> None:
    text = ARCHITECTURE.read_text()
    assert _MARK in text
    assert drawn(text) == text, "python -m tests.test_layers draws it anew"


def test_no_module_needs_itself() -> None:
    """Imports in functions and those for types only count too."""
    paths, needs = modules(), {}
    for module, path in paths.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in paths else node.module for name in names}
        needs[module] = found & paths.keys() - {module}
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle


if __name__ == "__main__":
    ARCHITECTURE.write_text(drawn(ARCHITECTURE.read_text()))
