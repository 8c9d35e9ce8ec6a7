"""Runs from Python: what ``fedmpi train``, ``fedmpi sweep`` and ``fedmpi report`` do, with results as objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from fedmpi import config as configuration
from fedmpi import overrides as changes
from fedmpi.callbacks import Callback, Row
from fedmpi.comm import Comm, connect, run_ranks, together
from fedmpi.config import Config
from fedmpi.engine.progress import reached
from fedmpi.engine.run import run
from fedmpi.errors import ConfigError, FedMPIError

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

    from fedmpi.analysis.runs import Point

Source = str | Path | Mapping[str, Any] | Config
Module = TypeVar("Module", bound=nn.Module)
T = TypeVar("T")

_connected: dict[tuple[str, float | None], Comm] = {}


class History(Sequence[Row]):
    """A run's metrics, a mapping for each round: ``round``, ``loss``, ``clients``, ``upload_bytes``,
    ``download_bytes``, ``seconds``, and the test set's metrics, which are None in rounds that were not evaluated."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> History: ...

    def __getitem__(self, index: int | slice) -> Row | History:
        return History(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<History of {len(self)} rounds: {', '.join(self._rows[0] if self._rows else ())}>"

    def column(self, name: str) -> list[Any]:
        """One metric of all rounds.

        Raises:
          ConfigError: the run has no metric of this name.
        """
        if self._rows and name not in self._rows[0]:
            raise ConfigError(f"column: expected one of {', '.join(self._rows[0])}, got {name!r}")
        return [row[name] for row in self._rows]

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each round."""
        return _frame(self._rows)


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run, the same on every rank.

    Attributes:
      config: what was asked for.
      summary: what is in summary.json.
      history: a row for each round.
      state_dict: the trained model's, on the CPU.
      folder: the run's files; None for a run without ``out``.
    """

    config: Config
    summary: Mapping[str, Any]
    history: History
    state_dict: Mapping[str, Tensor]
    folder: Path | None

    def __repr__(self) -> str:
        ratio = self.summary["upload_ratio"]
        sent = "nothing" if ratio is None else f"{ratio:.1f}x smaller"
        return f"{self.label}: {reached(self.summary)}, upload {sent}, {self.summary['seconds']:.1f} s"

    @property
    def label(self) -> str:
        """The method and its options: topk(ratio=0.05, feedback=True)."""
        from fedmpi.analysis.legend import method

        return method(self.config.method.model_dump())

    @property
    def score(self) -> float | None:
        """The last value of the first metric, ``summary["metric"]``; None where it is not defined."""
        value: float | None = self.summary[self.summary["metric"]]
        return value

    def model(self, module: Module) -> Module:
        """Load the trained model into ``module``, which is returned.

        Raises:
          ConfigError: ``module`` has other parameters or buffers than the run's model.
        """
        try:
            module.load_state_dict(dict(self.state_dict))
        except RuntimeError as error:
            wrong = (str(error).split("\n\t")[1:2] or [str(error)])[0].strip()
            raise ConfigError(
                f"model: expected a module with the parameters and buffers of the run's model, got "
                f"{type(module).__name__}: {wrong}"
            ) from None
        return module

    def plot(
        self,
        axes: Axes | None = None,
        against: Literal["upload", "download", "total", "rounds", "seconds"] = "upload",
        label: str | None = None,
    ) -> Axes:
        """Draw the first metric against what was sent, or against rounds or simulated seconds.

        Args:
          axes: where to draw, beside what is there already (default: a new figure of pyplot).
          against: upload, download and total: bytes of all clients so far, on a logarithmic axis.
          label: in the legend (default: :attr:`label`).
        """
        from fedmpi.analysis.plots import draw

        return draw(axes, self._points(), against, self.summary["metric"], label or self.label)

    def _points(self) -> list[Point]:
        from fedmpi.analysis.runs import Point

        columns = ("upload_bytes", "download_bytes", "simulated_seconds")
        sums = [accumulate([row.get(name, 0) for row in self.history]) for name in columns]
        scores = (row[self.summary["metric"]] for row in self.history)
        every = zip((row["round"] + 1 for row in self.history), *sums, scores, strict=True)
        return [Point(*point) for point in every if point[-1] is not None]


@dataclass(frozen=True, repr=False)
class Sweep:
    """A finished sweep.

    Attributes:
      points: of each point its label, values, seeds, and for each figure a list over the seeds.
      failed: the messages of runs that failed, by name.
      text: the comparison as a table.
      folder: the report and the runs.
    """

    points: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str]
    text: str
    folder: Path

    def __repr__(self) -> str:
        return self.text

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each run: its point's label and values, its seed and its figures."""
        rows = []
        for point in self.points:
            alike = {"label": point["label"], **point["values"], "rounds": point["rounds"]}
            lists = {name: value for name, value in point.items() if isinstance(value, list)}
            for i, seed in enumerate(lists.pop("seeds")):
                rows.append(alike | {"seed": seed} | {name: value[i] for name, value in lists.items()})
        return _frame(rows)


def train(
    config: Source,
    *,
    ranks: int = 1,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    profile: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Result:
    """Train as a configuration says. Under mpirun, srun or torchrun every process calls this and is one rank.

    >>> fedmpi.train("configs/quickstart.yaml", method={"name": "topk", "ratio": 0.05}, server={"lr": 0.1})

    Args:
      config: a YAML file's path, a mapping of the same keys, or a :class:`fedmpi.Config`.
      ranks: run so many ranks as threads of this process.
      out: the run's folder (default: nothing is written, and there are no checkpoints).
      callbacks: what is called while the run goes on.
      resume: continue from the last checkpoint in ``out``, where there is one.
      overwrite: begin anew in ``out``, whatever run it holds.
      profile: show where the time of rounds goes.
      quiet: show no progress.
      overrides: keys of the configuration. A mapping changes the keys that it names; one with a ``name`` (a method, a
        model) replaces what was there.

    Raises:
      ConfigError: the configuration or an argument is wrong; names the key, what was expected and what was got.
      Stopped: a signal or Ctrl-C ended a run with a folder, after a checkpoint; ``resume=True`` continues it.
      FedMPIError: whatever else a user can mend; the same error on every rank.
    """
    folder = None if out is None else Path(out)
    if folder is None and (resume or overwrite):
        raise ConfigError(f"out: expected a folder with {'resume' if resume else 'overwrite'}=True, got None")
    asked = _config(config, overrides)

    def one(comm: Comm) -> Result:
        if isinstance(asked, FedMPIError):
            with together(comm, "reading the configuration"):
                raise asked
        keeper = _Keeper()
        comm.sent = comm.received = 0  # wire bytes are this run's alone
        summary = run(asked, comm, folder, quiet, resume, profile, overwrite, [keeper, *callbacks])
        rows: list[Row] = keeper.rows
        if folder is not None and comm.rank == 0:  # with the rounds of earlier processes
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        model = dict(keeper.model)
        if comm.size > 1:
            rows, names = json.loads(comm.broadcast(json.dumps([rows, list(model)]).encode()))
            if ranks == 1:  # threads share rank 0's
                loaded = tensors_of(comm.broadcast(bytes_of(model) if comm.rank == 0 else b""))
                model = {name: loaded[name] for name in names}  # in the module's order
        return Result(asked, summary, History(rows), model, folder)

    connecting = ("auto", None) if isinstance(asked, FedMPIError) else (asked.comm, asked.timeout)
    return _on_ranks(ranks, one, *connecting)


def sweep(
    config: Source,
    over: str | Path | Mapping[str, Any],
    *,
    out: str | Path,
    ranks: int = 1,
    side_by_side: int = 1,
    quiet: bool = False,
    **overrides: Any,
) -> Sweep:
    """Run a grid of values and seeds, and write a report into ``out``. Finished runs are not run again.

    >>> fedmpi.sweep("configs/quickstart.yaml", {"seeds": 3, "over": {"method.ratio": [0.01, 0.1]}}, out="runs/k")

    Args:
      config: what every run starts from, as in :func:`train`.
      over: a YAML file's path or a mapping: ``seeds``, ``cases``, ``over`` (:mod:`fedmpi.analysis.grid`).
      out: the sweep's folder.
      ranks: run so many ranks as threads of this process.
      side_by_side: so many runs at a time, among which the ranks are divided.
      quiet: show no progress.
      overrides: keys of the configuration, as in :func:`train`.

    Raises:
      ConfigError: the grid, the configuration or an argument is wrong. A run that fails does not stop the others.
    """
    from fedmpi.analysis import sweep as sweeps

    folder, grid = Path(out), Path(over) if isinstance(over, str) else over
    base: Path | Mapping[str, Any] = Path(config) if isinstance(config, str | Path) else _laid(config, {})
    base = _laid(config, overrides) if overrides else base

    def one(comm: Comm) -> Sweep:
        text, results = sweeps.sweep(base, grid, [], folder, comm, side_by_side, quiet)
        found = json.loads(comm.broadcast(json.dumps([text, results]).encode()))
        results = found[1] or {"points": [], "failed": {}}
        return Sweep(results["points"], results["failed"], found[0], folder)

    return _on_ranks(ranks, one)


def report(runs: Sequence[str | Path | Result], *, out: str | Path | None = None, format: str = "png") -> str:
    """Compare finished runs: write ``report.md``, ``report.html`` and a picture, and return the table as text.

    Args:
      runs: folders of runs, or results of :func:`train` with ``out``.
      out: where the files go (default: the folder ``report`` beside the runs).
      format: of the picture: png, svg or pdf.

    Raises:
      DataError: a folder is no run, or its run is unfinished or damaged.
      ConfigError: a result has no folder, or the files cannot be written.
    """
    from fedmpi.analysis.report import report as compare

    folders = []
    for one in runs:
        folder = one.folder if isinstance(one, Result) else Path(one)
        if folder is None:
            raise ConfigError(
                f"report: expected runs with a folder, got one without: {one}; train it with out=…"
            )
        folders.append(folder)
    return compare(folders, None if out is None else Path(out), format)


class _Keeper(Callback):
    """Keeps what a result needs."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.model: Mapping[str, Tensor] = {}

    def run_start(self, config: Mapping[str, Any], done: int) -> None:
        del self.rows[done:]  # of rounds that are done anew without a lost rank

    def round_end(self, t: int, row: Row) -> None:
        self.rows.append(dict(row))

    def run_end(self, summary: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
        self.model = model


def _laid(config: Source, overrides: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = configuration.values_of(config)
    changes.lay(values, overrides)
    return values


def _config(config: Source, overrides: Mapping[str, Any]) -> Config | FedMPIError:
    """An error is told once the ranks are connected, or those that could read the file would wait."""
    try:
        return configuration.parse(_laid(config, overrides))
    except FedMPIError as error:
        return error


def _on_ranks(ranks: int, work: Callable[[Comm], T], comm: str = "auto", timeout: float | None = None) -> T:
    """This rank's result."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"ranks: expected a whole number from 1, got {ranks!r}")
    mine = _connected.get((comm, timeout)) or connect(comm, timeout=timeout)
    if mine.size > 1:  # a process is connected once
        _connected[comm, timeout] = mine
    with _threads_kept():
        if ranks == 1:
            return work(mine)
        if mine.size > 1:
            raise ConfigError(
                f"ranks: expected 1 under a launcher that starts {mine.size} ranks, got {ranks}"
            )
        return run_ranks(ranks, work)[0]


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Runs choose torch's threads; afterwards the caller has its own again."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _frame(rows: Sequence[Row]) -> pandas.DataFrame:
    try:
        import pandas
    except ImportError:
        raise ConfigError("to_pandas: expected pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame([dict(row) for row in rows])
