"""``fedmpi init``: a folder to start from. It gets the files that lie around the package in the repository, under the
same paths, so that every command of the documentation works in it too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError

_PACKAGE = Path(__file__).parent

# What is written, and what the folder's README says of it.
FILES = {
    "configs/quickstart.yaml": "a run of seconds: data inside the package, 40 clients, every key explained",
    "configs/methods/*.yaml": "the same run with each method, a file each",
    "configs/sweep.over.yaml": "a grid of methods, values and seeds, for fedmpi sweep",
    "configs/csv.yaml": "a run on a table of your own, without code",
    "configs/own.csv": "which is this one: put yours in its place",
    "configs/own.yaml": "the same with a data set, a model and a method of your own",
    "configs/own.py": "which are in this file: change it",
    "configs/kjv/*.yaml": "a language model byte by byte: across slow links (DiLoCo) in three sizes, and 1,189 clients",
    "configs/jobs/ddp.py": "a DistributedDataParallel job with compressed gradients, two lines more than without",
    "configs/jobs/trainer.py": "a transformers.Trainer job with compressed gradients, one callback more than without",
    "launch/mpirun.sh": "mpirun for one machine: more ranks than cores, root, threads",
    "launch/mpi.sh": "what it is made of",
    "slurm/*.sbatch": "Slurm jobs: one node, many, GPUs, MPICH, sweeps, requeueing",
    "slurm/README.md": "which of them to take, and the three lines that your site must change",
    "slurm/test-cluster.sh": "a Slurm of two nodes on this machine, to try them",
}
PAPERS = {
    "configs/intrinsic/**/*.yaml": "intrinsic gradient compression: a file for each row and figure",
    "configs/lbgm/**/*.yaml": "look-back gradients: a file for each row and figure",
    "configs/crucial/**/*.yaml": "crucial gradients, Prune-m: a file for each row and figure",
    "configs/claims/*-*.yaml": "the sweeps that check the papers' claims on data that one can have",
}

_README = """\
# Experiments with fedmpi

```sh
fedmpi train configs/quickstart.yaml                               # one process
launch/mpirun.sh -n 4 fedmpi train configs/quickstart.yaml         # four, if there is an MPI: pip install 'fedmpi[mpi]'
torchrun --nproc-per-node 4 -m fedmpi train configs/quickstart.yaml    # four without MPI
sbatch slurm/cpu.sbatch configs/quickstart.yaml                    # on a cluster, after a look into slurm/README.md
fedmpi train configs/own.yaml                                      # data, model and method of your own
fedmpi train configs/csv.yaml                                      # a table of your own
fedmpi sweep configs/quickstart.yaml configs/sweep.over.yaml       # a grid of values and seeds, with a report
torchrun --nproc-per-node 2 configs/jobs/ddp.py                    # compressed gradients in a job of your own
fedmpi report runs/*                                               # a table and plots of what was run
```

| file | what it is |
|:--|:--|
"""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    init = commands.add_parser(
        "init",
        help="write a folder to start from: configurations, Slurm jobs, a launch script",
        description="Write a folder to start from: configs/quickstart.yaml and one file for each method, an example of "
        "your own data, model and method, a sweep, jobs of DistributedDataParallel and transformers, batch files for "
        "Slurm, an mpirun for one machine, and a README with a line for each. Nothing is overwritten: if one of these "
        "files is there, nothing is written.",
    )
    init.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="(here)")
    init.add_argument("--papers", action="store_true", help="the papers' experiments too, some hundred files")
    init.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    written = write(arguments.folder, papers=arguments.papers)
    here = "" if arguments.folder == Path() else f"cd {arguments.folder} && "
    print(f"{len(written)} files in {arguments.folder.absolute()}; README.md says what they are. Now:")
    print(f"  {here}fedmpi train configs/quickstart.yaml")
    return 0


def shelf() -> Path:
    """The folder that holds configs/, launch/ and slurm/: in an installed wheel, or in the repository."""
    inside = _PACKAGE / "share"
    return inside if inside.is_dir() else _PACKAGE.parent


def write(folder: Path, papers: bool = False) -> list[Path]:
    """Write the files and return their paths inside ``folder``, which is made if it is not there.

    Raises:
      ConfigError: one of them exists (then none is written), or ``folder`` cannot be written to.
    """
    rows = FILES | (PAPERS if papers else {})
    top = shelf()
    files = {path.relative_to(top): path for pattern in rows for path in sorted(top.glob(pattern))}
    texts = {name: path.read_bytes() for name, path in files.items()}
    table = "".join(f"| `{pattern}` | {line} |\n" for pattern, line in rows.items())
    texts[Path("README.md")] = (_README + table).encode()
    there = [str(name) for name in texts if (folder / name).exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ConfigError(
            f"FOLDER: expected one without {there[0]}, but {folder.absolute()} has it{more}; nothing was written, "
            f"name another folder"
        )
    done: list[Path] = []
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            done.append(folder / name)
            (folder / name).write_bytes(text)
            if name.suffix in (".sh", ".sbatch"):
                (folder / name).chmod(0o755)
    except OSError as error:
        for path in done:
            path.unlink(missing_ok=True)
        raise ConfigError(f"FOLDER: cannot write to {folder}: {error.strerror or error}") from None
    return list(texts)
