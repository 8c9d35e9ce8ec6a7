"""The command line of ``fedmpi bench``: a table of benchmarks, one row each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedmpi.analysis.commands import positive
from fedmpi.errors import FedMPIError


class Outcome(Protocol):
    """What a benchmark comes to; :class:`fedmpi.bench.timing.Table` is one."""

    def text(self) -> str:
        """For people."""

    def json(self) -> str:
        """For programs."""

    def missed(self) -> list[str]:
        """Cases whose target is neither met nor waived."""


class Bench(NamedTuple):
    """One benchmark. Both functions import what they need when they are called."""

    help: str
    arguments: Callable[
        [argparse.ArgumentParser], None
    ]  # adds its own, besides --threads, --json and --check
    run: Callable[[argparse.Namespace], Outcome]


def add(commands: Any) -> None:
    """Add the command to the parser's (argparse's own type for ``add_subparsers()`` is private)."""
    bench = commands.add_parser(
        "bench",
        help="measure speeds, as ratios to a reference in the same run",
        description="Measure speeds, as ratios to a reference in the same run. Without a BENCH: all of them, about 20 "
        "minutes of a machine that does nothing else.",
    )
    bench.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    bench.set_defaults(run=_run_all)
    kinds = bench.add_subparsers(dest="bench", metavar="BENCH")
    for name, row in BENCHES.items():
        one = kinds.add_parser(name, help=row.help, description=f"Measure {row.help}.")
        row.arguments(one)
        one.add_argument("--threads", type=positive, metavar="N", help="torch's threads (default: torch's)")
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
        one.add_argument(
            "--check",
            action="store_true",
            default=argparse.SUPPRESS,
            help="exit with 1 when a target is missed",
        )
        one.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    outcome = BENCHES[arguments.bench].run(arguments)
    print(outcome.json() if arguments.json else outcome.text())
    return _missed(outcome.missed(), arguments.check)


def _run_all(arguments: argparse.Namespace) -> int:
    """Each with its defaults; what cannot be measured here is missed."""
    missed = []
    for name, row in BENCHES.items():
        parser = argparse.ArgumentParser()
        row.arguments(parser)
        print(f"\n## {name}: {row.help}", flush=True)
        try:
            outcome = row.run(parser.parse_args([]))
        except FedMPIError as error:
            print(f"fedmpi: {name} is not measured: {error}", file=sys.stderr)
            missed.append(name)
            continue
        print(outcome.text(), flush=True)
        missed += [f"{name}/{case}" for case in outcome.missed()]
    return _missed(missed, arguments.check)


def _missed(cases: list[str], check: bool) -> int:
    if check and cases:
        print(f"fedmpi: missed: {', '.join(cases)}", file=sys.stderr)
    return 1 if check and cases else 0


def _log2(text: str) -> int:
    if not text.isdigit() or not 17 <= int(text) <= 32:
        raise argparse.ArgumentTypeError(f"expected the power of two, from 17 to 32, got {text!r}")
    return int(text)


def _repeats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns a case (5)")


def _kernels_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_log2, default=27, metavar="LOG2", help="of 2^LOG2 numbers (27)")
    _repeats(parser)


def _kernels(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import kernels

    return kernels.run(arguments.size, arguments.repeats)


def _methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "methods",
        nargs="*",
        metavar="METHOD",
        help="only these, as YAML: topk or '{name: topk, ratio: 0.01}'",
    )
    parser.add_argument("--size", type=_log2, default=20, metavar="LOG2", help="of 2^LOG2 parameters (20)")
    parser.add_argument(
        "--clients", type=positive, default=4, metavar="C", help="that are coded at a time (4)"
    )
    _repeats(parser)


def _methods(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import methods

    return methods.run(arguments.size, arguments.clients, arguments.repeats, arguments.methods)


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=_ranks, default=64, metavar="W", help="count bytes for 2, 4, 8, … W ranks (64)"
    )
    parser.add_argument(
        "--processes", type=positive, default=16, metavar="W", help="up to W ranks are MPI processes (16)"
    )
    parser.add_argument("--clients", type=_clients, default=1_000_000, metavar="N", help="at most (1000000)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scale.md and scale.json there")


def _ranks(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a whole number from 2, got {text!r}")
    return int(text)


def _clients(text: str) -> int:
    if not text.isdigit() or int(text) < 10_000:
        raise argparse.ArgumentTypeError(f"expected a whole number from 10000, got {text!r}")
    return int(text)


def _scale(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import scale

    def say(line: str) -> None:
        print(f"fedmpi: {line}", file=sys.stderr, flush=True)

    return scale.run(arguments.ranks, arguments.processes, arguments.clients, say, arguments.out)


def _rounds(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import rounds

    return rounds.run(arguments.repeats)


def _link_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Two ranks in network namespaces, a link of 10 Mb/s to 1 Gb/s between them. About six minutes."
    )
    _repeats(parser)
    parser.add_argument("--steps", type=positive, default=8, metavar="N", help="steps a turn (8)")
    parser.add_argument(
        "--speed",
        action="append",
        metavar="SPEED",
        help="only this: unshaped, '1 Gb/s', '100 Mb/s', '10 Mb/s'",
    )
    parser.add_argument(
        "--accuracy", type=_share, default=0.80, metavar="A", help="on test images, to be reached (0.8)"
    )
    parser.add_argument("--data", default="fashion-mnist", help="a data set of images (fashion-mnist)")
    parser.add_argument(
        "--model",
        choices=("mlp", "cnn"),
        default="mlp",
        help="cnn: about as many parameters as the MLP, ten times as much to compute (mlp)",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text!r}")
    return share


def _link(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench.link import SPEEDS, run
    from fedmpi.errors import ConfigError

    speeds = arguments.speed or list(SPEEDS)
    for speed in speeds:
        if speed not in SPEEDS:
            raise ConfigError(f"--speed: expected one of {', '.join(SPEEDS)}, got {speed!r}")
    return run(
        arguments.repeats, arguments.steps, speeds, arguments.accuracy, arguments.data, arguments.model
    )


BENCHES: dict[str, Bench] = {
    "kernels": Bench("the kernels, against copying the vector they work on", _kernels_arguments, _kernels),
    "methods": Bench("each method's coding, against copying the gradients", _methods_arguments, _methods),
    "scale": Bench(
        "what grows with ranks, clients, cohort, D and d; a page of arithmetic", _scale_arguments, _scale
    ),
    "rounds": Bench("rounds of small models, against a bare loop and single clients", _repeats, _rounds),
    "link": Bench(
        "data-parallel steps and trainings across slow links, against DDP's bf16 hook (Linux, root)",
        _link_arguments,
        _link,
    ),
}
