"""Shared by all tests: real launches, small runs and their folders, options."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from . import pretend

if not torch.cuda.is_available():  # before anything imports Triton's kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("tests.codecs", "tests.softmax")

JOBS = Path(__file__).parent / "jobs"
_CPU = pytest.StashKey[float]()  # CPU seconds before the test

# A run of a second: 6 clients of digits, of which 4 train in a round.
SMALL: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "linear"},
    "clients": 6,
    "partition": {"name": "dirichlet", "alpha": 1.0},
    "cohort": 4,
    "rounds": 5,
    "local": {"lr": 0.1, "steps": 2, "batch": 20},
    "method": {"name": "dense"},
    "evaluate_every": 5,
    "seed": 3,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--cpu", action="store_true", help="show each test file's CPU seconds, its processes included"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full"):
        os.environ["FEDMPI_FULL"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_CPU] = _cpu_seconds()  # before fixtures, which may train
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    item.user_properties.append(("cpu", _cpu_seconds() - item.stash[_CPU]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have recorded as ("row", text), whatever process they ran in, as a table; with --cpu each file's
    seconds and those of single tests, most first."""
    if terminalreporter.config.getoption("--cpu"):
        seconds, tests = Counter[str](), Counter[str]()
        for report in terminalreporter.getreports(""):
            for name, value in getattr(report, "user_properties", ()):
                seconds[report.nodeid.partition("::")[0]] += value if name == "cpu" else 0
                tests[report.nodeid] += value if name == "cpu" else 0
        terminalreporter.section(
            f"CPU seconds, {sum(seconds.values()):.0f} in all; files, and the costliest tests"
        )
        for file, value in [*seconds.most_common(), *tests.most_common(60)]:
            terminalreporter.write_line(f"{value:8.1f}  {file}")
    reports = [report for group in ("passed", "failed") for report in terminalreporter.getreports(group)]
    rows = sorted(text for report in reports for name, text in report.user_properties if name == "row")
    if rows:
        terminalreporter.section("a rank fails: what must happen, and what did")
        terminalreporter.write_line("\n".join(rows))


def write_config(folder: Path, values: dict[str, Any]) -> str:
    """The path of a file with this configuration."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's lines, one a round."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def model_hash(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The make-believe accelerator (tests/pretend)."""
    if why := pretend.missing():
        absent(why)
    return pretend.load()


def absent(why: str) -> None:
    """What a test needs is not here: CI has to have it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


class Mpi:
    """Starts real MPI processes with Open MPI or MPICH."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.prefix = Path(os.environ["FEDMPI_MPICH"] if name == "mpich" else sys.prefix)
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if name == "mpich":
            self.env["MPI4PY_LIBMPI"] = str(self.prefix / "lib")
        else:
            self.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            self.env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
            self.env["PRTE_MCA_hwloc_default_binding_policy"] = "none"

    def __call__(self, ranks: int, *arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """``mpiexec -n ranks python arguments``; kills all of it after ``timeout`` seconds."""
        command = [str(self.prefix / "bin" / "mpiexec"), "-n", str(ranks), sys.executable, *arguments]
        return subprocess.run(
            command,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture(scope="session", params=["openmpi", "mpich"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return find_mpi(request.param)


# What is the same under any MPI is tried under one in the fast suite, and under both with --full.
one_mpi = pytest.mark.parametrize(
    "mpi", ["openmpi", pytest.param("mpich", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="session")
def openmpi() -> Mpi:
    return find_mpi("openmpi")


def find_mpi(name: str) -> Mpi:
    if name == "mpich" and "FEDMPI_MPICH" not in os.environ:
        pytest.skip("FEDMPI_MPICH names no MPICH; ./launch/test.sh installs one and sets it")
    mpi = Mpi(name)
    if not (mpi.prefix / "bin" / "mpiexec").exists():
        pytest.skip(f"no mpiexec in {mpi.prefix}; ./launch/test.sh installs one")
    return mpi


def torchrun(
    ranks: int, *arguments: str, env: dict[str, str] | None = None, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """``torchrun arguments`` with so many ranks on this machine; ``within``: the words of a command that starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return _captured([*within, *command, *arguments], env)


def _captured(command: list[str], env: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
    """What it prints; with one thread a process, unless ``env`` is another environment."""
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"} if env is None else env,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def gloo_ranks(
    ranks: int,
    *arguments: str,
    modules: str = "torch",
    env: dict[str, str] | None = None,
    within: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """What :func:`torchrun` gives a script, with one import of ``modules`` for all ranks (tests/jobs/ranks.py)."""
    return _captured([*within, sys.executable, str(JOBS / "ranks.py"), str(ranks), modules, *arguments], env)


def run_jobs(
    mpi: Mpi, ranks: int, jobs: list[dict[str, Any]], folder: Path, *collectives: str
) -> tuple[list[dict[str, Any]], str]:
    """Run configurations one after the other in one launch; returns what tests/jobs/runs.py reports of each, and what
    is printed. Before them ``collectives``: cases of tests/jobs/collectives.py."""
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps(jobs))
    done = mpi(ranks, str(JOBS / "runs.py"), str(request), str(answer), *collectives)
    assert done.returncode == 0, done.stdout + done.stderr
    answers: list[dict[str, Any]] = json.loads(answer.read_text())
    return answers, done.stdout
