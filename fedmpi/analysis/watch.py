"""Trains as a configuration says, in this process, and shows what clients compute and send to an analysis.

Shape suffixes: C clients, D parameters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmpi.comm import solo
from fedmpi.config import Config
from fedmpi.engine.passes import Sent
from fedmpi.engine.progress import Display
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.local import Schedule
from fedmpi.spec import Spec


def plain(config: Config) -> Simulation:
    """The run in this process, of a model that is one vector of parameters and nothing else.

    Raises:
      ConfigError: training changes buffers, or parts of it travel by methods of their own.
    """
    simulation = Simulation(
        config.model_copy(update={"device": "cpu"}), solo()
    )  # what is sent is looked at there
    if more := [p.name for p in simulation.plan.parts[1:]]:
        raise ConfigError(
            f"analyze: expected a model all of which travels by one method, got parts of its own ({', '.join(more)}); "
            "leave out parts and local.scaffold, and take a model without running statistics (GroupNorm for BatchNorm)"
        )
    return simulation


class Watched:
    """A run in this process: :meth:`train` gives each round's line of metrics, ``see`` what clients send.

    ``schedule`` (a name of :class:`fedmpi.config.Schedule`) is that of the clients' rates *and* the server's, as in
    training without clients.
    """

    def __init__(self, config: Config, see: Callable[[Sent], None], schedule: str = "constant") -> None:
        self.config, self._schedule = config, Schedule.model_validate({"name": schedule})
        self.simulation = plain(config)
        if "accuracy" not in self.simulation.measured.metrics:
            raise ConfigError(
                f"analyze: expected a run that measures accuracy, which is drawn beside the rest, got "
                f"{', '.join(self.simulation.measured.metrics)}; take a loss of classes"
            )
        self.simulation.passes.observe = see
        self.simulation.set_threads()

    @property
    def spec(self) -> Spec:
        return self.simulation.spec

    def train(
        self, title: str, quiet: bool, after: Callable[[int], None] = lambda t: None
    ) -> list[dict[str, Any]]:
        """Every round's metrics; ``after`` is called with each round's number when it is over."""
        display, lines = Display(title, self.config.rounds, enabled=not quiet), []
        try:
            for t in range(self.config.rounds):
                self._set_rate(self._schedule.factor(t, self.config.rounds))
                lines.append(self.simulation.round(t))
                display.round(lines[-1])
                after(t)
        finally:
            display.close()
        return lines

    def _set_rate(self, factor: float) -> None:
        local, server = self.config.local, self.config.server
        local = local.model_copy(update={"lr": local.lr * factor})
        rate = None if server.lr is None else server.lr * factor
        changed = {"local": local, "server": server.model_copy(update={"lr": rate})}
        self.simulation.config = self.config.model_copy(update=changed)
        self.simulation.trainer.local = local


class Mean:
    """The mean gradient of a round's clients, weighted by their samples as federated averaging does."""

    def __init__(self, size: int) -> None:
        self._sum_D, self._weight = torch.zeros(size), 0

    def add(self, g_CD: Tensor, samples_C: Tensor) -> None:
        for g_D, samples in zip(g_CD, samples_C.tolist(), strict=True):
            self._sum_D.add_(g_D, alpha=samples)
            self._weight += samples

    def take(self) -> Tensor:
        """The mean ``(D,)`` since the last call."""
        mean_D = self._sum_D / self._weight
        self._sum_D, self._weight = torch.zeros_like(mean_D), 0
        return mean_D


class Steps:
    """Says on stderr which of ``total`` steps is on, for work that has no rounds."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet, self._done, self._started = total, quiet, 0, time.monotonic()

    def step(self, doing: str) -> None:
        """A step begins."""
        if not self._quiet:
            passed = time.monotonic() - self._started
            left = f", {passed / self._done * (self._total - self._done):.0f} s left" if self._done else ""
            print(f"{self._done + 1}/{self._total} {doing}{left}", file=sys.stderr, flush=True)
        self._done += 1
