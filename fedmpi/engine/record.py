"""A run's folder: config.yaml, metrics.jsonl, summary.json, model(-best).safetensors, and with ``client_test``
clients.csv (each client's metric) and, where that is asked for, clients.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
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
      lines: the lines of metrics of the rounds that an earlier process did; None for a new run.

    Raises (also later, from every method):
      ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, config: dict[str, Any], lines: bytes | None = None) -> None:
        self.folder = folder
        with writing(self.folder, "--out"):
            folder.mkdir(parents=True, exist_ok=True)
            stale = "summary.json", "model.safetensors", "model-best.safetensors"
            for name in (*stale, "clients.csv", "clients.safetensors"):
                (folder / name).unlink(missing_ok=True)  # of an earlier run: never shown as this one's
            write_aside(folder / "config.yaml", dump(config, sort_keys=False).encode())
            # In place of what lies there, be it longer or a link to elsewhere.
            write_aside(folder / "metrics.jsonl", lines or b"")
            self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def round(self, line: dict[str, Any]) -> None:
        with writing(self.folder, "--out"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()

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
        with suppress(OSError):  # what could not be written has been said
            self._metrics.close()
