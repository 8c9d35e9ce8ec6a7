"""The command line."""

from __future__ import annotations

from fedmpi import start  # isort: skip (before all others: signals are heard from here on)

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpi import demo, project, tools
from fedmpi.analysis import commands as analysis
from fedmpi.bench import commands as bench
from fedmpi.errors import FedMPIError
from fedmpi.version import __version__

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.config import Config

_FIRST = """\
first steps:
  fedmpi demo                                       five methods, a table and a picture
  fedmpi init lab && cd lab                         a folder with configurations, Slurm jobs and a README
  fedmpi train configs/quickstart.yaml              a run of seconds, its data inside the package
  launch/mpirun.sh -n 4 fedmpi train configs/quickstart.yaml method=signsgd server.lr=0.003
  fedmpi report runs/*                              a table and plots of the runs
  fedmpi methods                                    what there is, with all options
in a job of your own:
  fedmpi.ddp.attach(ddp, {"name": "signsgd", "feedback": True})    and fedmpi advise says whether it pays
"""
_TRAIN = """\
examples:
  fedmpi train configs/quickstart.yaml                          one process
  fedmpi train configs/quickstart.yaml --local-ranks 4          four ranks as threads
  mpirun -n 4 fedmpi train configs/quickstart.yaml method=signsgd server.lr=0.003
  mpirun -n 4 fedmpi train configs/quickstart.yaml 'method={name: topk, ratio: 0.05, feedback: true}'
  torchrun --nproc-per-node 4 -m fedmpi train configs/quickstart.yaml    over Gloo, without MPI
  srun -n 4 fedmpi train configs/quickstart.yaml --out runs/one --resume starts it, or goes on from its last checkpoint
"""


def arguments_of() -> argparse.ArgumentParser:
    """All commands and what they take; nothing heavy is imported before one of them runs."""
    parser = argparse.ArgumentParser(
        prog="fedmpi",
        description="Communication-compressed training over MPI: federated simulation and data-parallel.",
        epilog=_FIRST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    project.add(commands)
    demo.add(commands)
    _train_arguments(commands)
    tools.add(commands)
    analysis.add(commands)
    bench.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for a wrong command or configuration, 75 (EX_TEMPFAIL) for a run
    that a signal stopped and ``--resume`` continues, 130 for one that ended without a checkpoint."""
    parser = arguments_of()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals of nargs="*" in one run only; overrides may stand anywhere.
    if getattr(arguments, "overrides", None) is None or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}; see fedmpi {arguments.command} --help")
    else:
        arguments.overrides += rest
    with start.remembering(arguments.command):
        return code_of(lambda: arguments.run(arguments))


def code_of(run: Callable[[], int]) -> int:
    """A command's exit code; what ends it is said in a sentence."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except FedMPIError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("fedmpi: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # fedmpi methods | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 1


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
        epilog=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file; fedmpi init writes some")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="overrides of the file's keys; values are YAML, {…} and […] in quotes",
    )
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (runs/<config>-<time>, made anew)"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue the run in DIR (default: --out, else the last of this CONFIG in runs/) from its last "
        "checkpoint; with --out a run that has none yet starts",
    )
    train.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew in --out, whatever run it holds, finished or interrupted; without it such a run is kept",
    )
    train.add_argument(
        "--local-ranks",
        type=analysis.positive,
        default=1,
        metavar="N",
        help="run N ranks as threads of this process (1)",
    )
    train.add_argument(
        "--profile",
        action="store_true",
        help="show where the rounds' time goes (load, compute, encode, wire, decode, server, evaluate), and write "
        "profile.json and trace.json.gz, for ui.perfetto.dev, into the run's folder",
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
    from fedmpi.engine.folder import drop_empty
    from fedmpi.engine.progress import reached
    from fedmpi.engine.run import run
    from fedmpi.errors import Stopped, Unstarted

    out = None
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
        resume = arguments.resume is not None
        quiet, profile, overwrite = arguments.quiet, arguments.profile, arguments.overwrite
        summary = run(config, comm, out, quiet, resume, profile, overwrite)
    except Stopped as stopped:
        if comm.rank == 0:
            _complain(stopped, "" if isinstance(stopped, Unstarted) else comm.last_words)
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
    finally:
        if comm.rank == 0 and out is not None and arguments.out is None is arguments.resume:
            drop_empty(out)
    if comm.rank == 0 and not arguments.quiet:
        ratio = summary["upload_ratio"]
        print(
            f"{summary['method']}: {reached(summary)}, upload "
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
      ConfigError: there is no run to resume, or no folder can be made.
    """
    from fedmpi.engine import folder
    from fedmpi.errors import ConfigError

    runs, stem = Path("runs"), Path(arguments.config).stem
    if arguments.overwrite and (arguments.resume is not None or not arguments.out):
        instead = "--out, whose run begins anew" if arguments.resume is None else "it or --resume, not both"
        raise ConfigError(f"--overwrite: expected {instead}")
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
        return folder.fresh(runs, stem)
    if (earlier := folder.last(runs, stem)) is None:
        raise ConfigError(
            f"--resume: expected a run of {stem} in {runs.absolute()}, found none; name its folder"
        )
    return earlier
