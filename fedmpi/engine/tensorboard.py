"""A run's metrics for TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from fedmpi.callbacks import Callback, Row
from fedmpi.engine.record import writing


class TensorBoard(Callback):
    """Writes every number of a round as a scalar. A run with a folder has one of its own, which writes there.

    Args:
      folder: where ``events.*`` go; a new run removes those that it finds.

    Raises (later, from every method):
      ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._events: Any = None

    def run_start(self, config: Mapping[str, Any], done: int) -> None:
        with writing(self.folder, "TensorBoard"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in () if done else self.folder.glob("events.*"):
                old.unlink(missing_ok=True)  # of an earlier run: never shown as this one's
            # Not SummaryWriter: its thread would wait for ever on a full disk.
            self._events = EventsWriter(str(self.folder / "events"), f".{os.getpid()}")
            if done:  # what an earlier process showed of later rounds is void
                self._events.write_event(Event(step=done, session_log=SessionLog(status=SessionLog.START)))

    def round_end(self, t: int, row: Row) -> None:
        with writing(self.folder, "TensorBoard"):
            for name, value in row.items():
                if name != "round" and value is not None:
                    shown = scalar(name, value)
                    self._events.write_event(Event(wall_time=time.time(), step=t, summary=shown))
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            with suppress(OSError):  # what could not be written has been said
                self._events.close()
            self._events = None
