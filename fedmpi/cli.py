"""The command line."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpi.errors import FedMPIError

if TYPE_CHECKING:
    from fedmpi.comm import Comm

_EPILOG = """\
examples:
  fedmpi train configs/quickstart.yaml                          one process
  fedmpi train configs/quickstart.yaml --local-ranks 4          four ranks as threads
  mpirun -n 4 fedmpi train configs/quickstart.yaml method=signsgd server.lr=0.003
  mpirun -n 4 fedmpi train configs/quickstart.yaml 'method={name: topk, ratio: 0.05, feedback: true}'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for a wrong command or configuration."""
    parser = argparse.ArgumentParser(
        prog="fedmpi",
        description="Communication-compressed training over MPI: federated simulation and data-parallel.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train_arguments(commands)
    _methods_arguments(commands)
    _report_arguments(commands)
    _data_arguments(commands)
    _bench_arguments(commands)
    doctor = commands.add_parser(
        "doctor", help="show what MPI, torch, GPUs and launcher are here, and try them"
    )
    doctor.set_defaults(run=_doctor)
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals of nargs="*" in one run only; overrides may stand anywhere.
    if getattr(arguments, "overrides", None) is None or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}; see fedmpi {arguments.command} --help")
    else:
        arguments.overrides += rest
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except FedMPIError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("fedmpi: interrupted", file=sys.stderr)
        return 130


def _complain(error: FedMPIError) -> None:
    for line in str(error).splitlines():
        print(f"fedmpi: {line}", file=sys.stderr, flush=True)


def _train_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train as a configuration says",
        description="Train as a configuration says. Alone it is one rank; under mpirun, mpiexec or srun it is "
        "one rank of many.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides; values are YAML")
    train.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<config>-<time>)")
    train.add_argument("--local-ranks", type=_positive, default=1, metavar="N", help="run N ranks as threads")
    train.add_argument("--quiet", action="store_true", help="no progress, only errors")
    train.set_defaults(run=_train)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _train(arguments: argparse.Namespace) -> int:
    from fedmpi.comm import connect, run_ranks
    from fedmpi.errors import ConfigError

    comm = connect()
    if arguments.local_ranks == 1:
        return _train_rank(arguments, comm)
    if comm.size > 1:
        raise ConfigError(f"--local-ranks: expected 1 under a launcher that starts {comm.size} ranks")
    return max(run_ranks(arguments.local_ranks, lambda c: _train_rank(arguments, c)))


def _train_rank(arguments: argparse.Namespace, comm: Comm) -> int:
    from fedmpi import config as configuration
    from fedmpi.comm import together
    from fedmpi.engine.rounds import run
    from fedmpi.errors import CommError

    try:
        with together(comm, "reading the configuration"):
            config = configuration.load(arguments.config, arguments.overrides)
        name = f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = arguments.out or Path("runs") / name
        summary = run(config, comm, out, quiet=arguments.quiet)
    except FedMPIError as error:
        # Errors that all ranks share are said once; what only this rank knows, it says itself.
        if comm.rank == 0 or (isinstance(error, CommError) and comm.name == "threads"):
            _complain(error)
        return 2
    except Exception:
        traceback.print_exc()
        print(f"fedmpi: rank {comm.rank} failed; ending all ranks", file=sys.stderr, flush=True)
        comm.abort()
        raise
    if comm.rank == 0 and not arguments.quiet:
        ratio = summary["upload_ratio"]
        print(
            f"{summary['method']}: accuracy {100 * summary['accuracy']:.2f} %, upload "
            f"{'nothing' if ratio is None else f'{ratio:.1f}x smaller'}, {summary['seconds']:.1f} s; see {out}"
        )
    return 0


def _methods_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listing = commands.add_parser("methods", help="list the methods, their options and what they cost")
    listing.add_argument("--params", type=_positive, metavar="D", help="measure bytes for D parameters")
    listing.add_argument("--model", metavar="MODEL", help="measure bytes for a model on 3x32x32 images")
    listing.add_argument(
        "names",
        nargs="*",
        metavar="METHOD",
        help="only these; with --params or --model also {name: topk, ratio: 0.1}",
    )
    listing.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.listing import costs, describe
    from fedmpi.spec import Spec
    from fedmpi.tasks.models import build

    if arguments.model:
        print(costs(Spec.of(build(arguments.model, (3, 32, 32), 10, 0)), arguments.names))
    elif arguments.params:
        print(costs(Spec(("parameters",), ((arguments.params,),)), arguments.names))
    else:
        print(describe(arguments.names))
    return 0


def _report_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="compare runs: a table and plots")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    report.add_argument("--out", type=Path, metavar="DIR", help="where report.md and report.png go")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.report import report

    print(report(arguments.runs, arguments.out))
    return 0


def _data_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser("data", help="get data sets")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download a data set and verify it")
    fetch.add_argument("name", help="e.g. fashion-mnist")
    fetch.add_argument("--to", type=Path, metavar="DIR", help="default: $FEDMPI_DATA or ~/.cache/fedmpi")
    fetch.set_defaults(run=_fetch)


def _fetch(arguments: argparse.Namespace) -> int:
    from fedmpi.tasks.data import default_folder
    from fedmpi.tasks.fetch import fetch

    to = arguments.to or default_folder()
    print(f"{arguments.name} is in {fetch(arguments.name, to, lambda line: print(line, flush=True))}")
    return 0


def _bench_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure speeds, as ratios to a reference in the same run")
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    kernels = kinds.add_parser("kernels", help="the kernels, against copying the vector they work on")
    kernels.add_argument("--size", type=_log2, default=27, metavar="LOG2", help="of 2^LOG2 numbers (27)")
    kernels.add_argument("--threads", type=_positive, metavar="N", help="torch's threads (default: torch's)")
    kernels.add_argument("--repeats", type=_positive, default=5, metavar="N", help="turns a case (5)")
    kernels.add_argument("--json", action="store_true", help="print JSON instead of a table")
    kernels.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    kernels.set_defaults(run=_bench_kernels)


def _log2(text: str) -> int:
    if not text.isdigit() or not 17 <= int(text) <= 32:
        raise argparse.ArgumentTypeError(f"expected the power of two, from 17 to 32, got {text!r}")
    return int(text)


def _bench_kernels(arguments: argparse.Namespace) -> int:
    import torch

    from fedmpi.bench.kernels import run

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    table = run(arguments.size, arguments.repeats)
    print(table.json() if arguments.json else table.text())
    missed = table.missed() if arguments.check else []
    if missed:
        print(f"fedmpi: missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fedmpi.doctor import examine

    return examine()
