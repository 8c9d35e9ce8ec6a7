"""The command line around a run: ``fedmpi methods``, ``report``, ``data``, ``advise``, ``coordinator``, ``doctor``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from fedmpi.analysis.commands import positive

_Commands = Any  # argparse's own type for add_subparsers() is private


def add(commands: _Commands) -> None:
    """Add the commands to the parser's."""
    _methods_arguments(commands)
    _report_arguments(commands)
    _data_arguments(commands)
    _advise_arguments(commands)
    _coordinator_arguments(commands)
    doctor = commands.add_parser(
        "doctor",
        help="show what MPI, torch, GPUs and launcher are here, and try them",
        description="Show what MPI, torch, GPUs and launcher are here, which of them would connect the ranks and why, "
        "and try a collective. Start it as the job is started: alone, or under mpirun, srun or torchrun.",
    )
    doctor.set_defaults(run=_doctor)


def _methods_arguments(commands: _Commands) -> None:
    listing = commands.add_parser(
        "methods",
        help="list the methods, their options and what they cost",
        description="List the methods with their options; with --params or --model, the bytes of one client, "
        "measured on its messages.",
        epilog="example: fedmpi methods --model resnet9 signsgd '{name: topk, ratio: 0.01}'",
    )
    listing.add_argument("--params", type=positive, metavar="D", help="measure bytes for D parameters")
    listing.add_argument(
        "--model", metavar="MODEL", help="measure bytes for a model on 3x32x32 images, e.g. resnet9"
    )
    listing.add_argument(
        "--parts",
        metavar="RULES",
        help="with --model: bytes by part, for rules as in a configuration's parts and one METHOD (dense); what "
        "batch norm keeps is averaged",
    )
    listing.add_argument(
        "names",
        nargs="*",
        metavar="METHOD",
        help="only these (all); with --params or --model also {name: topk, ratio: 0.1}",
    )
    listing.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.listing import costs, describe, parts
    from fedmpi.errors import ConfigError
    from fedmpi.spec import Spec
    from fedmpi.tasks.models import build

    if arguments.parts and not (arguments.model and len(arguments.names) < 2):
        raise ConfigError("--parts: expected --model and at most one METHOD, by which all else travels")
    if arguments.parts:
        model = build(arguments.model, (3, 32, 32), 10, 0)
        print(parts(model, arguments.parts, (arguments.names or ["dense"])[0]))
    elif arguments.model:
        print(costs(Spec.of(build(arguments.model, (3, 32, 32), 10, 0)), arguments.names))
    elif arguments.params:
        print(costs(Spec(("parameters",), ((arguments.params,),)), arguments.names))
    else:
        print(describe(arguments.names))
    return 0


def _report_arguments(commands: _Commands) -> None:
    report = commands.add_parser(
        "report",
        help="compare runs: a table and plots",
        description="Compare finished runs: a table here, and report.md with plots of accuracy against bytes. "
        "Runs that differ in nothing but their seed are averaged in a second one.",
        epilog="example: fedmpi report runs/*",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="where report.md and its files go (report, beside the runs)"
    )
    report.add_argument(
        "--format", choices=("png", "svg", "pdf"), default="png", help="also write the picture as svg or pdf"
    )
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from fedmpi.analysis.report import report

    print(report(arguments.runs, arguments.out, arguments.format))
    return 0


def _data_arguments(commands: _Commands) -> None:
    data = commands.add_parser(
        "data",
        help="get data sets, and show who holds what",
        description="Get data sets, and show which client holds what. Files of your own go into $FEDMPI_DATA/NAME, "
        "~/.cache/fedmpi/NAME or the folder that data.folder names; digits needs none.",
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser(
        "fetch",
        help="download a data set and verify it",
        description="Download a data set, or a pretrained model, and verify its checksums.",
    )
    fetch.add_argument(
        "name", metavar="NAME", help="fashion-mnist, movie-reviews, kjv or minilm (a text encoder)"
    )
    fetch.add_argument("--to", type=Path, metavar="DIR", help="($FEDMPI_DATA, else ~/.cache/fedmpi)")
    fetch.set_defaults(run=_fetch)
    show = actions.add_parser(
        "show",
        help="show which client holds what",
        description="Show how a configuration's partition deals out its data: a table of clients and classes, and a "
        "picture.",
        epilog="example: fedmpi data show configs/quickstart.yaml partition.alpha=0.1",
    )
    show.add_argument("config", metavar="CONFIG", help="a YAML file")
    show.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides; values are YAML")
    show.add_argument("--plot", type=Path, metavar="PNG", help="the picture (<config>-clients.png)")
    show.set_defaults(run=_show)


def _fetch(arguments: argparse.Namespace) -> int:
    from fedmpi.tasks.data import default_folder
    from fedmpi.tasks.fetch import fetch

    to = arguments.to or default_folder()
    print(f"{arguments.name} is in {fetch(arguments.name, to, lambda line: print(line, flush=True))}")
    return 0


def _advise_arguments(commands: _Commands) -> None:
    advise = commands.add_parser(
        "advise",
        help="measure whether compression pays on this link",
        description="Measure this launch's link and each method's coding and exchange of gradients, and say which "
        "method is fastest. Start it as the job is started: mpirun, srun or torchrun.",
        epilog="example: mpirun -n 2 fedmpi advise --model resnet9 --method '{name: topk}'; for a link that is not "
        "there: fedmpi advise --link 100Mbps --ranks 2 --step-ms 60 --params 11000000",
    )
    size = advise.add_mutually_exclusive_group()
    size.add_argument("--params", type=positive, metavar="N", help="parameters (11000000)")
    size.add_argument(
        "--model", metavar="MODEL", help="the layers of a model on 3x32x32 images, e.g. resnet9"
    )
    advise.add_argument(
        "--method",
        action="append",
        metavar="METHOD",
        help="only this, as YAML, besides bf16; can be given several times (a choice)",
    )
    advise.add_argument(
        "--comm",
        default="auto",
        metavar="COMM",
        help="what connects the ranks: auto, mpi, gloo or nccl (auto)",
    )
    advise.add_argument(
        "--link",
        metavar="RATE",
        help="compute the exchange for such a link instead, without a launcher: 100Mbps",
    )
    advise.add_argument(
        "--latency", metavar="TIME", help="of a collective over that link, whatever its size (0.5ms)"
    )
    advise.add_argument("--ranks", type=positive, metavar="N", help="ranks that the link connects (2)")
    advise.add_argument(
        "--step-ms", type=float, default=0.0, metavar="MS", help="computing of one step of the job (0)"
    )
    advise.add_argument(
        "--every", type=positive, default=100, metavar="H", help="steps between local updates' rounds (100)"
    )
    advise.set_defaults(run=_advise)


def _advise(arguments: argparse.Namespace) -> int:
    from fedmpi.comm import Comm, connect
    from fedmpi.comm.imagined import ImaginedComm, bandwidth, duration
    from fedmpi.errors import ConfigError
    from fedmpi.integrations import advise
    from fedmpi.spec import Spec
    from fedmpi.tasks.models import build
    from fedmpi.validation import yaml_value

    if arguments.link:
        comm: Comm = ImaginedComm(
            arguments.ranks or 2, bandwidth(arguments.link), duration(arguments.latency or "0.5ms")
        )
    elif arguments.ranks or arguments.latency:
        raise ConfigError(
            "--ranks, --latency: expected with --link alone; a launcher's own ranks and link are measured"
        )
    else:
        comm = connect(arguments.comm)
    if not 0 <= arguments.step_ms < math.inf:
        raise ConfigError(f"--step-ms: expected milliseconds from 0, got {arguments.step_ms:g}")
    shapes = advise.shapes_of(arguments.params or 11_000_000)
    if arguments.model:
        spec = Spec.of(build(arguments.model, (3, 32, 32), 10, 0))
        shapes = dict(zip(spec.names, spec.shapes, strict=True))
    candidates = advise.CANDIDATES
    if arguments.method:
        candidates = tuple(advise.check([yaml_value(method, "--method") for method in arguments.method]))

    def say(line: str) -> None:
        if comm.rank == 0:
            print(line, file=sys.stderr, flush=True)

    text = advise.advise(comm, shapes, candidates, say, arguments.step_ms / 1e3, arguments.every)
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


def _doctor(arguments: argparse.Namespace) -> int:
    from fedmpi.doctor import examine

    return examine()


def _coordinator_arguments(commands: _Commands) -> None:
    coordinator = commands.add_parser(
        "coordinator",
        help="serve jobs whose ranks come and go",
        description='The place where the ranks of fedmpi.local_sgd(…, elastic="HOST:PORT") meet: it keeps who is '
        "there, and trains nothing. One a job; if it ends, another one may be started at the same address, and the "
        "ranks go on. It asks for no password: whoever reaches the port can take part, so listen in a private network.",
        epilog="example: fedmpi coordinator --host 10.0.0.1 --port 29400",
    )
    coordinator.add_argument(
        "--host", default="0.0.0.0", metavar="ADDRESS", help="where it listens (0.0.0.0, on all interfaces)"
    )
    coordinator.add_argument(
        "--port", type=int, default=29400, help="(29400; 0: one that is free, which the first line names)"
    )
    coordinator.set_defaults(run=_coordinator)


def _coordinator(arguments: argparse.Namespace) -> int:
    from fedmpi.comm.coordinated import serve

    where = arguments.host
    serve(arguments.host, arguments.port, lambda port: print(f"coordinator: {where}:{port}", flush=True))
    return 0
