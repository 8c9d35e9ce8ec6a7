"""The command line of the analyses: ``fedmpi analyze``, ``fedmpi sweep`` and ``fedmpi claims``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmpi.config import Config

_Commands = Any  # argparse's own type for add_subparsers() is private


def add(commands: _Commands) -> None:
    """Add the commands to the parser's."""
    analyze = commands.add_parser("analyze", help="figures and numbers on a model, data and a method")
    actions = analyze.add_subparsers(dest="action", required=True, metavar="ANALYSIS")
    _subspace_arguments(actions)
    _sweep_arguments(commands)


def positive(text: str) -> int:
    """An argument's value; argparse says what is wrong with it."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides; values are YAML")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder (runs/<analysis>-<config>)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the few numbers of a claim here")
    parser.add_argument("--quiet", action="store_true", help="no progress, only errors")


def _load(arguments: argparse.Namespace) -> Config:
    from fedmpi import config

    return config.load(arguments.config, arguments.overrides)


def _finish(arguments: argparse.Namespace, out: Path, summary: dict[str, Any]) -> int:
    """Say what was found and where it is."""
    from fedmpi.analysis.page import dump, write

    if arguments.results is not None:
        write(arguments.results, dump(summary), "--results")
    for name, value in summary.items():
        if not isinstance(value, (dict, list)):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"Written: {out / f'{arguments.action}.html'} and what it holds")
    return 0


def _out(arguments: argparse.Namespace) -> Path:
    return arguments.out or Path("runs") / f"{arguments.action}-{Path(arguments.config).stem}"


def _subspace_arguments(actions: _Commands) -> None:
    subspace = actions.add_parser(
        "subspace", help="N-PCA of the gradients, principal gradients, consecutive gradients"
    )
    _common(subspace)
    subspace.add_argument("--measure", choices=("variance", "singular"), default="variance")
    subspace.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="principal gradients of the centred gradients (the numbers are reported both ways)",
    )
    subspace.add_argument("--schedule", choices=("constant", "cosine", "steps"), default="constant")
    subspace.add_argument("--memmap", action="store_true", help="keep the gradients in a file, not in memory")
    subspace.set_defaults(run=_subspace)


def _subspace(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.subspace import analyze

    out = _out(arguments)
    options = {
        name: getattr(arguments, name) for name in ("measure", "center", "schedule", "memmap", "quiet")
    }
    return _finish(arguments, out, analyze(_load(arguments), out, **options))


def _sweep_arguments(commands: _Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of values and seeds, and report",
        description="Run a grid of values and seeds and report. Finished runs are not run again. Under mpirun all "
        "ranks work on one run at a time, or on N with --side-by-side N; in a Slurm job array each task "
        "takes its share.",
    )
    sweep.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    sweep.add_argument("over", type=Path, metavar="OVER", help="a YAML file: seeds, cases, over")
    sweep.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of CONFIG")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="the folder (runs/sweep-<over>)")
    sweep.add_argument("--results", type=Path, metavar="FILE", help="write the points' figures here, too")
    sweep.add_argument(
        "--side-by-side", type=positive, default=1, metavar="N", help="runs at a time, under mpirun"
    )
    sweep.add_argument("--quiet", action="store_true", help="no progress, only errors")
    sweep.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.page import dump, write
    from fedmpi.analysis.sweep import sweep
    from fedmpi.comm import connect
    from fedmpi.errors import FedMPIError

    comm = connect()
    out = arguments.out or Path("runs") / f"sweep-{arguments.over.stem}"
    options = (arguments.side_by_side, arguments.quiet)
    try:
        text, results = sweep(arguments.config, arguments.over, arguments.overrides, out, comm, *options)
    except FedMPIError:
        if comm.rank == 0:  # all ranks share it: it is said once
            raise
        return 2
    if comm.rank == 0:
        print(text)
        if results is not None and arguments.results is not None:
            write(arguments.results, dump(results), "--results")
    return 1 if results is not None and results["failed"] else 0
