"""The command line of ``fedmpi bench``: a table of benchmarks, one row each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
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
        """Cases whose target is not met."""


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
        description="Measure speeds, as ratios to a reference in the same run. Without a BENCH: all of them, about ten "
        "minutes of a machine that does nothing else.",
    )
    bench.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    bench.set_defaults(run=_run_all)
    add_benches(bench.add_subparsers(dest="bench", metavar="BENCH"), BENCHES)


def add_benches(kinds: Any, benches: dict[str, Bench]) -> None:
    """A command for each row of a table of benchmarks, with --threads, --json and --check."""
    for name, row in benches.items():
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
        one.set_defaults(run=partial(_run, row))


def _run(row: Bench, arguments: argparse.Namespace) -> int:
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    outcome = row.run(arguments)
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


def repeats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns a case (5)")


def _kernels_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_log2, default=27, metavar="LOG2", help="of 2^LOG2 numbers (27)")
    repeats(parser)
    _device(parser, "auto")


def _device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--device", default=default, metavar="DEVICE", help=f"auto, cpu, cuda or cuda:N ({default})"
    )


def _kernels(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import kernels

    return kernels.run(arguments.size, arguments.repeats, arguments.device)


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
    repeats(parser)
    _device(parser, "cpu")


def _methods(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import methods

    return methods.run(
        arguments.size, arguments.clients, arguments.repeats, arguments.methods, arguments.device
    )


def _rounds_arguments(parser: argparse.ArgumentParser) -> None:
    repeats(parser)
    _device(parser, "cpu")


def _rounds(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import rounds

    return rounds.run(arguments.repeats, arguments.device)


def _size_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_log2, default=27, metavar="LOG2", help="of 2^LOG2 parameters (27)")
    parser.add_argument(
        "--part",
        action="append",
        choices=["codings", "downloads", "rounds", "hooks", "start"],
        help="only this one; may be given more than once",
    )
    repeats(parser)


def _size(arguments: argparse.Namespace) -> Outcome:
    from fedmpi.bench import size

    return size.run(arguments.size, arguments.repeats, tuple(arguments.part or size.PARTS))


BENCHES: dict[str, Bench] = {
    "kernels": Bench("the kernels, against copying the vector they work on", _kernels_arguments, _kernels),
    "methods": Bench("each method's coding, against copying the gradients", _methods_arguments, _methods),
    "size": Bench(
        "methods, rounds, hooks and start-up at users' sizes, by hand or by torch", _size_arguments, _size
    ),
    "rounds": Bench(
        "rounds of small models, against a bare loop and single clients", _rounds_arguments, _rounds
    ),
}
