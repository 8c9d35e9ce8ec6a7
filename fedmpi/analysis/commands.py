"""The command line of the analyses: ``fedmpi analyze`` and ``fedmpi sweep``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.config import Config

_Commands = Any  # argparse's own type for add_subparsers() is private


def add(commands: _Commands) -> None:
    """Add the commands to the parser's."""
    analyze = commands.add_parser(
        "analyze",
        help="figures and numbers on a model, data and a method",
        description="Figures and numbers on a model, its data and a method: what the papers draw. Each trains as "
        "CONFIG says and writes a page, pictures and JSON.",
    )
    actions = analyze.add_subparsers(dest="action", required=True, metavar="ANALYSIS")
    _subspace_arguments(actions)
    _positions_arguments(actions)
    _inversion_arguments(actions)
    _dimension_arguments(actions)
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
        "subspace",
        help="N-PCA of the gradients, principal gradients, consecutive gradients",
        description="How many principal components the gradients of training have (N-PCA), what they are, and how "
        "near one gradient is to the next.",
        epilog="example: fedmpi analyze subspace configs/quickstart.yaml rounds=20",
    )
    _common(subspace)
    subspace.add_argument(
        "--measure",
        choices=("variance", "singular"),
        default="variance",
        help="what the components shown explain (variance)",
    )
    subspace.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="principal gradients of the centred gradients (the numbers are reported both ways)",
    )
    subspace.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="of the learning rate (constant)",
    )
    subspace.add_argument("--memmap", action="store_true", help="keep the gradients in a file, not in memory")
    subspace.set_defaults(run=_subspace)


def _subspace(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.subspace import analyze

    out = _out(arguments)
    options = {
        name: getattr(arguments, name) for name in ("measure", "center", "schedule", "memmap", "quiet")
    }
    return _finish(arguments, out, analyze(_load(arguments), out, **options))


def _positions_arguments(actions: _Commands) -> None:
    positions = actions.add_parser(
        "positions",
        help="where the largest gradients lie: how often each is chosen, overlap scores",
        description="Whether the positions of the largest gradients stay where they are: how often top-k and rTop-k "
        "choose each, and how much of it the first epoch's m hold. CONFIG's method is topk.",
        epilog="example: fedmpi analyze positions configs/methods/topk.yaml rounds=60",
    )
    _common(positions)
    positions.add_argument("--m", type=positive, metavar="M", help="positions of the first epoch (D / 10)")
    positions.add_argument("--r", type=positive, metavar="R", help="rTop-k's candidates (10 k)")
    positions.add_argument(
        "--epochs",
        type=_numbers,
        default=(1, 10, 20, 30),
        metavar="E,E,…",
        help="the epochs shown (1,10,20,30)",
    )
    positions.add_argument(
        "--rounds-per-epoch", type=positive, metavar="N", help="rounds that make an epoch (clients / cohort)"
    )
    positions.set_defaults(run=_positions)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _positions(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.positions import analyze

    out = _out(arguments)
    names = ("m", "r", "epochs", "rounds_per_epoch", "quiet")
    options = {name: getattr(arguments, name) for name in names}
    return _finish(arguments, out, analyze(_load(arguments), out, **options))


def _inversion_arguments(actions: _Commands) -> None:
    inversion = actions.add_parser(
        "inversion",
        help="reconstruct images from clients' messages",
        description="What an attacker who knows the model reads from one message of each method: images reconstructed "
        "by matching gradients, and how near they come.",
        epilog="example: fedmpi analyze inversion configs/quickstart.yaml --images 1",
    )
    _common(inversion)
    inversion.add_argument(
        "--methods",
        metavar="METHOD;…",
        help="names or YAML options with semicolons between: 'dense; {name: topk, ratio: 0.1}' (all)",
    )
    inversion.add_argument("--images", type=positive, default=2, metavar="N", help="images attacked (2)")
    inversion.add_argument(
        "--iterations", type=positive, default=200, metavar="N", help="of the optimizer (200)"
    )
    inversion.add_argument(
        "--optimizer",
        choices=("lbfgs", "adam"),
        default="lbfgs",
        help="what matches the gradients (lbfgs)",
    )
    inversion.add_argument(
        "--clip", type=float, metavar="C", help="also attack gradients clipped to length C"
    )
    inversion.add_argument(
        "--noise", type=float, default=0.0, metavar="σ", help="with --clip: and noise of deviation σ·C"
    )
    inversion.set_defaults(run=_inversion)


def _inversion(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.inversion import analyze
    from fedmpi.validation import yaml_value

    out, words = _out(arguments), (arguments.methods or "").split(";")
    chosen = [yaml_value(word, "--methods") for word in words if word.strip()]
    names = ("images", "iterations", "optimizer", "clip", "noise", "quiet")
    options = {name: getattr(arguments, name) for name in names}
    return _finish(arguments, out, analyze(_load(arguments), out, chosen, **options))


def _dimension_arguments(actions: _Commands) -> None:
    dimension = actions.add_parser(
        "dimension",
        help="the smallest subspace that reaches 90 %% of the full accuracy",
        description="Search the smallest d that reaches a share of the uncompressed accuracy, with real runs. "
        "Finished runs are not run again; under mpirun all ranks work on one run at a time.",
    )
    _common(dimension)
    dimension.add_argument("--share", type=_share, default=0.9, metavar="S", help="(%(default)s)")
    dimension.add_argument("--low", type=positive, default=25, metavar="D", help="the first d (%(default)s)")
    dimension.add_argument("--high", type=positive, metavar="D", help="the last d (the parameters)")
    dimension.add_argument(
        "--within", type=_share, default=0.1, metavar="S", help="how near the answer (%(default)s: 10 %%)"
    )
    dimension.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="runs of each d (%(default)s)"
    )
    dimension.add_argument("--schedule", choices=("static", "time_varying", "k_varying"), help="(CONFIG's)")
    dimension.set_defaults(run=_dimension)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, got {text!r}")
    return share


def _dimension(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.dimension import Asked, analyze

    out, base = _out(arguments), Path(arguments.config)
    asked = Asked(**{name: getattr(arguments, name) for name in Asked._fields})
    return on_all_ranks(
        lambda comm: analyze(base, arguments.overrides, out, comm, asked, arguments.quiet), arguments.results
    )


def _sweep_arguments(commands: _Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of values and seeds, and report",
        description="Run a grid of values and seeds and report. Finished runs are not run again. Under mpirun all "
        "ranks work on one run at a time, or on N with --side-by-side N; in a Slurm job array each task "
        "takes its share.",
    )
    sweep.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    sweep.add_argument(
        "over", type=Path, metavar="OVER", help="a YAML file: seeds, cases, over (see configs/claims)"
    )
    sweep.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of CONFIG")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="the folder (runs/sweep-<over>)")
    sweep.add_argument("--results", type=Path, metavar="FILE", help="write the points' figures here, too")
    sweep.add_argument(
        "--side-by-side", type=positive, default=1, metavar="N", help="runs at a time, under mpirun"
    )
    sweep.add_argument("--quiet", action="store_true", help="no progress, only errors")
    sweep.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.sweep import sweep

    out = arguments.out or Path("runs") / f"sweep-{arguments.over.stem}"
    options = (arguments.side_by_side, arguments.quiet)
    return on_all_ranks(
        lambda comm: sweep(arguments.config, arguments.over, arguments.overrides, out, comm, *options),
        arguments.results,
    )


def on_all_ranks(
    work: Callable[[Comm], tuple[str, dict[str, Any] | None]],
    results_file: Path | None = None,
    again: str = "; the same command goes on from there",
) -> int:
    """Do what all ranks do, and on rank 0 show its text and write its results; returns the exit code.

    Args:
      again: what is said to somebody who has stopped it.
    """
    from fedmpi.analysis.page import dump, write
    from fedmpi.comm import connect
    from fedmpi.errors import FedMPIError, Stopped

    comm = connect()
    try:
        text, results = work(comm)
    except Stopped as stopped:
        if comm.rank == 0:
            print(f"fedmpi: {stopped}{again}", file=sys.stderr, flush=True)
        return os.EX_TEMPFAIL
    except FedMPIError:
        if comm.rank == 0:  # all ranks share it: it is said once
            raise
        return 2
    if comm.rank == 0:
        print(text)
        if results is not None and results_file is not None:
            write(results_file, dump(results), "--results")
    return 1 if results is not None and results.get("failed") else 0
