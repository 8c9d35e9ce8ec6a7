"""The command line."""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpi.analysis import commands as analysis
from fedmpi.bench import link_command
from fedmpi.errors import FedMPIError

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.config import Config

_EPILOG = """\
examples:
  fedmpi train configs/quickstart.yaml                          one process
  fedmpi train configs/quickstart.yaml --local-ranks 4          four ranks as threads
  mpirun -n 4 fedmpi train configs/quickstart.yaml method=signsgd server.lr=0.003
  mpirun -n 4 fedmpi train configs/quickstart.yaml 'method={name: topk, ratio: 0.05, feedback: true}'
  torchrun --nproc-per-node 4 -m fedmpi train configs/quickstart.yaml    over Gloo, without MPI
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for a wrong command or configuration, 75 (EX_TEMPFAIL) for a run
    that a signal stopped and ``--resume`` continues, 130 for one that ended without a checkpoint."""
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
    _advise_arguments(commands)
    analysis.add(commands)
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


def _complain(error: FedMPIError | str, again: str = "") -> None:
    said = "".join(f"fedmpi: {line}\n" for line in str(error).splitlines())
    sys.stderr.write(said + (f"fedmpi: continue with:\n{again}" if again else ""))
    sys.stderr.flush()


def _train_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train as a configuration says",
        description="Train as a configuration says. Alone it is one rank; under mpirun, mpiexec, srun or "
        "torchrun it is one rank of many.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides; values are YAML")
    train.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<config>-<time>)")
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue the run in DIR (default: --out, else the last of this CONFIG in runs/) from its last "
        "checkpoint; with --out a run that has none yet starts",
    )
    train.add_argument(
        "--local-ranks", type=analysis.positive, default=1, metavar="N", help="run N ranks as threads"
    )
    train.add_argument("--quiet", action="store_true", help="no progress, only errors")
    train.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from fedmpi.comm import connect, run_ranks
    from fedmpi.errors import ConfigError

    config = _config(arguments)
    comm = connect() if isinstance(config, FedMPIError) else connect(config.comm, timeout=config.timeout)
    if arguments.local_ranks == 1:
        return _train_rank(arguments, config, comm)
    if comm.size > 1:
        raise ConfigError(f"--local-ranks: expected 1 under a launcher that starts {comm.size} ranks")
    return max(run_ranks(arguments.local_ranks, lambda c: _train_rank(arguments, config, c)))


def _config(arguments: argparse.Namespace) -> Config | FedMPIError:
    """Which says what connects the ranks; what is wrong with it, they tell each other once connected."""
    from fedmpi import config

    try:
        return config.load(arguments.config, arguments.overrides)
    except FedMPIError as error:
        return error


def _train_rank(arguments: argparse.Namespace, config: Config | FedMPIError, comm: Comm) -> int:
    from fedmpi.comm import together
    from fedmpi.comm.base import LostError
    from fedmpi.engine.run import run
    from fedmpi.errors import Stopped

    try:
        with together(comm, "reading the configuration"):
            if isinstance(config, FedMPIError):
                raise config
            folder = str(_run_folder(arguments)) if comm.rank == 0 else ""
        out = Path(comm.broadcast(folder.encode()).decode())
        comm.last_words = f"  {shlex.join(_again(arguments, out))}\n"
        if comm.rank == 0 < comm.size - arguments.local_ranks and not arguments.quiet:
            # When a rank dies, a launcher may end the others before they can speak.
            print(f"fedmpi: if it is cut short, continue with:\n{comm.last_words}", end="", file=sys.stderr)
        summary = run(config, comm, out, quiet=arguments.quiet, resume=arguments.resume is not None)
    except Stopped as stopped:
        if comm.rank == 0:
            _complain(stopped, comm.last_words)
        return os.EX_TEMPFAIL
    except FedMPIError as error:
        # Errors that all ranks share are said once; what only this rank knows, it says itself.
        lost = isinstance(error, LostError)
        if comm.rank == 0 or (lost and not comm.survives):
            _complain(error, comm.last_words if lost else "")
        return 2
    except Exception:
        traceback.print_exc()
        _complain(f"rank {comm.rank} failed; ending all ranks", comm.last_words)
        comm.abort()
        raise
    if comm.rank == 0 and not arguments.quiet:
        ratio = summary["upload_ratio"]
        print(
            f"{summary['method']}: accuracy {100 * summary['accuracy']:.2f} %, upload "
            f"{'nothing' if ratio is None else f'{ratio:.1f}x smaller'}, {summary['seconds']:.1f} s; see {out}"
        )
    return 0


def _again(arguments: argparse.Namespace, out: Path) -> list[str]:
    """The command that continues the run in ``out`` (under the same launcher, if there was one)."""
    ranks = ["--local-ranks", str(arguments.local_ranks)] if arguments.local_ranks > 1 else []
    return ["fedmpi", "train", arguments.config, *arguments.overrides, *ranks, "--resume", str(out)]


def _run_folder(arguments: argparse.Namespace) -> Path:
    """Where the run's files go, or are. Rank 0's is everybody's.

    Raises:
      ConfigError: there is no run to resume.
    """
    from fedmpi.errors import ConfigError

    runs, stem = Path("runs"), Path(arguments.config).stem
    if arguments.resume:
        if arguments.out not in (None, Path(arguments.resume)):
            raise ConfigError(
                f"--resume: expected the folder of --out, {arguments.out}, got {arguments.resume}"
            )
        if not Path(arguments.resume).is_dir():
            raise ConfigError(
                f"--resume: expected a run's folder (overrides stand before --resume), got {arguments.resume!r}"
            )
        return Path(arguments.resume)
    if arguments.out:
        return Path(arguments.out)
    if arguments.resume is None:
        return runs / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    earlier = sorted(runs.glob(f"{glob.escape(stem)}-{'[0-9]' * 8}-{'[0-9]' * 6}"))
    if not earlier:
        raise ConfigError(
            f"--resume: expected a run of {stem} in {runs.absolute()}, found none; name its folder"
        )
    return earlier[-1]


def _methods_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listing = commands.add_parser("methods", help="list the methods, their options and what they cost")
    listing.add_argument(
        "--params", type=analysis.positive, metavar="D", help="measure bytes for D parameters"
    )
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
    data = commands.add_parser("data", help="get data sets, and show who holds what")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download a data set and verify it")
    fetch.add_argument("name", help="e.g. fashion-mnist")
    fetch.add_argument("--to", type=Path, metavar="DIR", help="default: $FEDMPI_DATA or ~/.cache/fedmpi")
    fetch.set_defaults(run=_fetch)
    show = actions.add_parser("show", help="show which client holds what")
    show.add_argument("config", metavar="CONFIG", help="a YAML file")
    show.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides; values are YAML")
    show.add_argument("--plot", type=Path, metavar="PNG", help="the picture (default: <config>-clients.png)")
    show.set_defaults(run=_show)


def _fetch(arguments: argparse.Namespace) -> int:
    from fedmpi.tasks.data import default_folder
    from fedmpi.tasks.fetch import fetch

    to = arguments.to or default_folder()
    print(f"{arguments.name} is in {fetch(arguments.name, to, lambda line: print(line, flush=True))}")
    return 0


def _advise_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    advise = commands.add_parser(
        "advise",
        help="measure whether compression pays on this link",
        description="Measure this launch's link and each method's coding and exchange of gradients, and say which "
        "method is fastest. Start it as the job is started: mpirun, srun or torchrun.",
    )
    size = advise.add_mutually_exclusive_group()
    size.add_argument("--params", type=analysis.positive, metavar="N", help="parameters (default: 11000000)")
    size.add_argument(
        "--model", metavar="MODEL", help="the layers of a model on 3x32x32 images, e.g. resnet9"
    )
    advise.add_argument(
        "--method",
        action="append",
        metavar="METHOD",
        help="only this, as YAML, besides bf16; can be given several times",
    )
    advise.add_argument("--comm", default="auto", help="auto, mpi, gloo or nccl")
    advise.set_defaults(run=_advise)


def _advise(arguments: argparse.Namespace) -> int:
    import yaml

    from fedmpi.comm import connect
    from fedmpi.integrations import advise
    from fedmpi.spec import Spec
    from fedmpi.tasks.models import build

    comm = connect(arguments.comm)
    shapes = advise.shapes_of(arguments.params or 11_000_000)
    if arguments.model:
        spec = Spec.of(build(arguments.model, (3, 32, 32), 10, 0))
        shapes = dict(zip(spec.names, spec.shapes, strict=True))
    candidates = advise.CANDIDATES
    if arguments.method:
        candidates = tuple(advise.check([yaml.safe_load(method) for method in arguments.method]))

    def say(line: str) -> None:
        if comm.rank == 0:
            print(line, file=sys.stderr, flush=True)

    text = advise.advise(comm, shapes, candidates, say)
    if comm.rank == 0:
        print(text)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from fedmpi import config as configuration
    from fedmpi.analysis.holdings import holdings, plot, table
    from fedmpi.tasks import data, partitions

    config = configuration.load(arguments.config, arguments.overrides)
    train, options = data.load(config.data.name, **config.data.options), config.partition.options
    split = partitions.divide(config.partition.name, train.train, config.clients, config.seed, **options)
    held = holdings(split.index_N, split.offset, train.train.y, train.classes)
    title = f"{config.data.name}, partition {config.partition.name}"
    path = arguments.plot or Path(f"{Path(arguments.config).stem}-clients.png")
    print(f"{title}: {table(held)}")
    plot(held, title, path)
    print(f"picture: {path}")
    return 0


def _bench_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure speeds, as ratios to a reference in the same run")
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    kernels = kinds.add_parser("kernels", help="the kernels, against copying the vector they work on")
    kernels.add_argument("--size", type=_log2, default=27, metavar="LOG2", help="of 2^LOG2 numbers (27)")
    kernels.add_argument(
        "--threads", type=analysis.positive, metavar="N", help="torch's threads (default: torch's)"
    )
    kernels.add_argument("--repeats", type=analysis.positive, default=5, metavar="N", help="turns a case (5)")
    kernels.add_argument("--json", action="store_true", help="print JSON instead of a table")
    kernels.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    kernels.set_defaults(run=_bench_kernels)
    link_command.add(kinds)


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
