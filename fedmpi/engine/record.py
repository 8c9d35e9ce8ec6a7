"""A run's folder: config.yaml, metrics.jsonl, summary.json, TensorBoard events, model(-best).safetensors, and with
``client_test`` clients.csv (each client's metric) and, where that is asked for, clients.safetensors."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.strict_yaml import dump


def write_aside(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: aside, flushed to the disk, then renamed. What lies there, a link
    above all, is replaced and not followed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)  # of a process that was killed
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path, argument: str) -> Iterator[None]:
    """What is done inside writes to ``folder``.

    Raises:
      ConfigError: that failed; names the command line's ``argument``.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{argument}: cannot write to {folder}: {error.strerror or error}") from None


class Record:
    """Writes a run's folder; on rank 0 only.

    Args:
      folder: the run's folder.
      config: the resolved configuration.
      start: rounds that an earlier process did.
      lines: their lines of metrics; None for a new run.

    Raises (also later, from every method):
      ConfigError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], start: int = 0, lines: bytes | None = None
    ) -> None:
        self.folder = folder
        with writing(self.folder, "--out"):
            folder.mkdir(parents=True, exist_ok=True)
            stale = [
                folder / name
                for name in (
                    "summary.json",
                    "model.safetensors",
                    "model-best.safetensors",
                    "clients.csv",
                    "clients.safetensors",
                )
            ]
            for old in stale if lines is not None else [*stale, *folder.glob("events.*")]:
                old.unlink(missing_ok=True)  # of an earlier run: never shown as this one's
            write_aside(folder / "config.yaml", dump(config, sort_keys=False).encode())
            # In place of what lies there, be it longer or a link to elsewhere.
            write_aside(folder / "metrics.jsonl", lines or b"")
            self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            # Not SummaryWriter: its thread would wait for ever on a full disk.
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            if start:  # what an earlier process showed of these rounds is void
                self._events.write_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def round(self, line: dict[str, Any]) -> None:
        with writing(self.folder, "--out"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            for name, value in line.items():
                if name != "round" and value is not None:
                    shown = scalar(name, value)
                    self._events.write_event(Event(wall_time=time.time(), step=line["round"], summary=shown))
            self._events.flush()

    def best(self, model: dict[str, Tensor]) -> None:
        """The best model so far, as in :meth:`finish`."""
        with writing(self.folder, "--out"):
            write_aside(self.folder / "model-best.safetensors", save(model))

    def finish(
        self, summary: dict[str, Any], model: dict[str, Tensor], clients: str, own: dict[str, Tensor]
    ) -> None:
        """Args:
        model: its state dict; no two tensors share memory.
        clients: the lines of clients.csv; "" for none.
        own: what clients keep of the model; {} for nothing.
        """
        with writing(self.folder, "--out"):
            if clients:
                write_aside(self.folder / "clients.csv", clients.encode())
            if own:
                write_aside(self.folder / "clients.safetensors", save(own))
            write_aside(self.folder / "model.safetensors", save(model))
            write_aside(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def close(self) -> None:
        """What could not be written has been said."""
        for file in (self._metrics, self._events):
            with suppress(OSError):
                file.close()
