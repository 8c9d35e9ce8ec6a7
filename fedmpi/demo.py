"""``fedmpi demo``: five methods on the quickstart's data, one after the other, and a report."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi.project import shelf

if TYPE_CHECKING:
    from fedmpi.comm import Comm

# What each run changes in configs/quickstart.yaml.
METHODS = {
    "dense": ["method=dense"],
    "signsgd": ["method=signsgd", "server.lr=0.003"],
    "topk": ["method.name=topk", "method.ratio=0.05", "method.feedback=true"],
    "intrinsic": ["method.name=intrinsic", "method.dim=640"],
    "lookback": ["method.name=lookback", "method.threshold=0.5"],
}


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    demo = commands.add_parser(
        "demo",
        help="train with five methods on embedded data, and compare them",
        description="Train a small model on embedded data with five methods, then write a table and a picture of "
        "accuracy against bytes. Alone it runs four ranks as threads; under mpirun, srun or torchrun, the launcher's.",
        epilog="example: fedmpi demo rounds=20",
    )
    demo.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of every run")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="the folder (%(default)s); an earlier demo in it is replaced",
    )
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.commands import on_all_ranks

    def work(comm: Comm) -> tuple[str, None]:
        return run(comm, arguments.overrides, arguments.out), None

    return on_all_ranks(work, again="")


def run(comm: Comm, overrides: list[str], out: Path, ranks: int = 4) -> str:
    """Do the runs, and return the report's text on rank 0; a process alone runs ``ranks`` threads.

    Raises:
      FedMPIError: an override is wrong, or ``out`` cannot be written.
    """
    from fedmpi import config
    from fedmpi.analysis.report import report
    from fedmpi.comm import run_ranks
    from fedmpi.engine.progress import reached
    from fedmpi.engine.run import run as train

    quickstart = Path("configs/quickstart.yaml")
    wanted = {name: config.load(shelf() / quickstart, [*own, *overrides]) for name, own in METHODS.items()}
    for name, one in wanted.items():
        words = ["fedmpi", "train", str(quickstart), "--out", str(out / name), *METHODS[name], *overrides]
        if comm.rank == 0:
            print(f"\n$ {shlex.join(words)}", flush=True)
        if comm.size > 1:
            comm.sent = comm.received = 0  # wire bytes are this run's alone
            summary = train(one, comm, out / name, overwrite=True)
        else:
            summary = run_ranks(ranks, partial(train, one, out=out / name, overwrite=True))[0]
        if comm.rank == 0:
            print(f"{name}: {reached(summary)}", flush=True)
    return "" if comm.rank else f"\n{report([out / name for name in METHODS], out / 'report')}"
