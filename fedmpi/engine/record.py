"""A run's folder: config.yaml, metrics.jsonl, summary.json, TensorBoard events, model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from tensorboardX import SummaryWriter
from torch import Tensor

from fedmpi.errors import ConfigError


def write_aside(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: aside, flushed to the disk, then renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class Record:
    """Writes a run's folder; on rank 0 only.

    Raises:
      ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in [folder / "summary.json", folder / "model.safetensors", *folder.glob("events.*")]:
                old.unlink(missing_ok=True)  # of an earlier run: never shown as this one's
            write_aside(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
            self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out: cannot write to {folder}: {error.strerror or error}") from None
        self._events = SummaryWriter(str(folder))

    def round(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in line.items():
            if name != "round" and value is not None:
                self._events.add_scalar(name, value, line["round"])

    def finish(self, summary: dict[str, Any], parameters: dict[str, Tensor]) -> None:
        tensors = {name: value.clone() for name, value in parameters.items()}
        write_aside(self.folder / "model.safetensors", save(tensors))
        write_aside(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
