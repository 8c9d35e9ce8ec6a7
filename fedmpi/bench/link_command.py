"""``fedmpi bench link`` on the command line."""

from __future__ import annotations

import argparse
import sys

from fedmpi.analysis.commands import positive


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    link = kinds.add_parser(
        "link",
        help="data-parallel steps and trainings across slow links, against DDP's bf16 hook (Linux, root)",
        description="Two ranks in network namespaces, a link of 10 Mb/s to 1 Gb/s between them. About six minutes.",
    )
    link.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns a bandwidth (5)")
    link.add_argument("--steps", type=positive, default=8, metavar="N", help="steps a turn (8)")
    link.add_argument(
        "--speed",
        action="append",
        metavar="SPEED",
        help="only this: unshaped, '1 Gb/s', '100 Mb/s', '10 Mb/s'",
    )
    link.add_argument(
        "--accuracy", type=_share, default=0.80, metavar="A", help="on test images, to be reached (0.8)"
    )
    link.add_argument("--data", default="fashion-mnist", help="a data set of images (fashion-mnist)")
    link.add_argument("--json", action="store_true", help="print JSON instead of a table")
    link.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    link.set_defaults(run=_run)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text!r}")
    return share


def _run(arguments: argparse.Namespace) -> int:
    from fedmpi.bench.link import SPEEDS, run
    from fedmpi.errors import ConfigError

    speeds = arguments.speed or list(SPEEDS)
    for speed in speeds:
        if speed not in SPEEDS:
            raise ConfigError(f"--speed: expected one of {', '.join(SPEEDS)}, got {speed!r}")
    table = run(arguments.repeats, arguments.steps, speeds, arguments.accuracy, arguments.data)
    print(table.json() if arguments.json else table.text())
    missed = table.missed() if arguments.check else []
    if missed:
        print(f"fedmpi: missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0
