"""What can be told of a run while it goes on: a base class for loggers of your own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmpi.errors import ConfigError, FedMPIError

Row = Mapping[str, Any]
"""A round's metrics, as a line of metrics.jsonl: numbers, or None where a round was not evaluated or had no message."""


class Callback:
    """Base class: override the methods that you need.

    A run calls them on rank 0 only (with ``ranks=4`` in that thread alone), in the order of the list. They must not
    communicate with other ranks. An exception ends the run on all ranks, with the callback's name and the exception's
    message; one of a round's methods does so at the end of the next round.
    """

    def run_start(self, config: Mapping[str, Any], done: int) -> None:
        """Before the first round, and again before the first one without a rank that was lost.

        Args:
          config: the resolved configuration, as in config.yaml.
          done: rounds that an earlier process did; 0 in a new run.
        """

    def round_start(self, t: int) -> None:
        """Before round ``t``, counted from 0."""

    def round_end(self, t: int, row: Row) -> None:
        """After round ``t``, with its metrics."""

    def evaluation(self, t: int, metrics: Row) -> None:
        """After ``round_end`` of a round after which the model was evaluated, with what that found."""

    def checkpoint(self, done: int, folder: Path) -> None:
        """A checkpoint of the first ``done`` rounds was written to ``folder``."""

    def run_end(self, summary: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
        """The run is complete; not called for one that failed or was interrupted.

        Args:
          summary: as in summary.json.
          model: the model's state dict, on the CPU.
        """

    def close(self) -> None:
        """The last call, whether the run completed or not. Here an exception is a warning."""


class Calls:
    """Calls several callbacks, and says whose exception it was."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        given: Sequence[object] = callbacks
        for callback in given:
            if not isinstance(callback, Callback):
                got = type(callback).__name__
                raise ConfigError(f"callbacks: expected objects derived from fedmpi.Callback, got {got}")
        self._callbacks = tuple(callbacks)

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def __call__(self, event: str, *arguments: Any) -> None:
        """
        Raises:
          ConfigError: a callback raised an exception, which is its cause; the others are not called.
        """
        for callback in self._callbacks:
            try:
                getattr(callback, event)(*arguments)
            except FedMPIError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"callbacks: {type(callback).__name__}.{event} raised {type(error).__name__}: {error}"
                ) from error

    def close(self) -> None:
        """An exception is a warning: other ranks may not wait for this one any more."""
        for callback in self._callbacks:
            try:
                callback.close()
            except Exception as error:
                said = f"callbacks: {type(callback).__name__}.close raised {type(error).__name__}: {error}"
                warnings.warn(said, RuntimeWarning, stacklevel=2)
