"""The studies behind this repository's documents, from its top folder:

python -m configs.studies link      data-parallel training across slow links
python -m configs.studies local     local updates: loss and bytes against data-parallel steps
python -m configs.studies scale     what grows with ranks, clients, cohort, D and d
python -m configs.studies claims    the papers' claims beside our figures
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmpi.analysis.commands import positive
from fedmpi.bench.commands import Bench, Outcome, add_benches, repeats
from fedmpi.cli import code_of
from fedmpi.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a missed target with --check, 2 for what cannot be measured here."""
    parser = argparse.ArgumentParser(
        prog="python -m configs.studies", description="The studies behind this repository's documents."
    )
    parser.set_defaults(check=False)
    commands = parser.add_subparsers(required=True, metavar="STUDY")
    add_benches(commands, STUDIES)
    _claims_arguments(commands)
    arguments = parser.parse_args(argv)
    return code_of(lambda: arguments.run(arguments))


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
    from configs.studies import scale

    def say(line: str) -> None:
        print(f"fedmpi: {line}", file=sys.stderr, flush=True)

    return scale.run(arguments.ranks, arguments.processes, arguments.clients, say, arguments.out)


def _link_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Two ranks in network namespaces, a link of 10 Mb/s to 1 Gb/s between them. About six minutes."
    )
    repeats(parser)
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
    from configs.studies.link import SPEEDS, run

    speeds = arguments.speed or list(SPEEDS)
    for speed in speeds:
        if speed not in SPEEDS:
            raise ConfigError(f"--speed: expected one of {', '.join(SPEEDS)}, got {speed!r}")
    return run(
        arguments.repeats, arguments.steps, speeds, arguments.accuracy, arguments.data, arguments.model
    )


def _local_arguments(parser: argparse.ArgumentParser) -> None:
    from configs.studies.local import CASES

    parser.add_argument(
        "--config", default="configs/kjv/gpt-100k.yaml", help="data, model, batch (%(default)s)"
    )
    parser.add_argument("--ranks", type=positive, default=4, metavar="W", help="threads of this process (4)")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of every rank (300)")
    parser.add_argument(
        "--every", type=positive, default=20, metavar="H", help="steps a synchronisation (20)"
    )
    parser.add_argument(
        "--seed", type=_seed, action="append", metavar="S", help="compare on these (1, 2, 3; rates: on 0)"
    )
    parser.add_argument(
        "--rate",
        type=_rate,
        action="append",
        metavar="R",
        help="AdamW's, tried on seed 0 (0.0015 to 0.012); one: taken",
    )
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write local.json there after every run, and go on from it"
    )


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"expected a rate above 0, got {text!r}")
    return rate


def _local(arguments: argparse.Namespace) -> Outcome:
    from configs.studies.local import CASES, RATES, TUNED, Study, Task

    def say(line: str) -> None:
        print(f"fedmpi: {line}", file=sys.stderr, flush=True)

    task = Task.of(arguments.config, arguments.ranks, arguments.steps, arguments.every)
    path = None if arguments.out is None else arguments.out / "local.json"
    study = Study(task, arguments.seed or (1, 2, 3), arguments.rate or RATES, path)
    if len(study.rates) > 1 and TUNED in study.seeds:
        raise ConfigError(f"--seed: expected others than {TUNED}, on which rates are chosen, got {TUNED}")
    study.run(say, arguments.case or list(CASES))
    return study


def _claims_arguments(commands: Any) -> None:
    claims = commands.add_parser(
        "claims",
        help="the papers' claims beside the figures of result files",
        description="Set the papers' claims beside our figures, from result files that sweeps and analyses wrote with "
        "--results; what is not run names its command.",
        epilog="example: python -m configs.studies claims configs/claims/claims.yaml",
    )
    claims.add_argument("claims", type=Path, metavar="CLAIMS", help="e.g. configs/claims/claims.yaml")
    claims.add_argument(
        "--results",
        type=Path,
        default=Path("configs/results"),
        metavar="DIR",
        help="where the result files are (%(default)s)",
    )
    claims.add_argument(
        "--out", type=Path, metavar="FILE", help="write the Markdown here, not to the terminal"
    )
    claims.set_defaults(run=_claims)


def _claims(arguments: argparse.Namespace) -> int:
    from configs.studies.claims import table
    from fedmpi.analysis.page import write

    text = table(arguments.claims, arguments.results)
    if arguments.out is None:
        print(text, end="")
    else:
        write(arguments.out, text.encode(), "--out")
        print(f"Written: {arguments.out}")
    return 0


STUDIES: dict[str, Bench] = {
    "scale": Bench(
        "what grows with ranks, clients, cohort, D and d; a page of arithmetic", _scale_arguments, _scale
    ),
    "local": Bench(
        "local updates: loss and bytes against data-parallel steps, on a byte-level GPT",
        _local_arguments,
        _local,
    ),
    "link": Bench(
        "data-parallel steps and trainings across slow links, against DDP's bf16 hook (Linux, root)",
        _link_arguments,
        _link,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
