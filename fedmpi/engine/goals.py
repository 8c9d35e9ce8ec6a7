"""What a run is after: the best model by a metric, and a value, or an end of progress, at which it is over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fedmpi.config import Config, StopConfig
from fedmpi.engine.manifest import Peak
from fedmpi.errors import ConfigError
from fedmpi.tasks.metrics import Measures


class Goals(NamedTuple):
    """Attributes:
    best: the metric whose best model is kept, or None.
    stop: when to end before the last round, or None.
    """

    best: str | None
    stop: StopConfig | None
    measured: Measures

    @classmethod
    def of(cls, config: Config, measured: Measures, names: Mapping[str, object]) -> Goals:
        """Of a run that measures ``names``.

        Raises:
          ConfigError: it does not measure what ``best`` or ``stop`` asks for; lists what it does.
        """
        stop = config.stop
        for key, name in (("best", config.best), ("stop.metric", stop and stop.metric)):
            if name is not None and name not in names:
                raise ConfigError(
                    f"{key}: expected one of what this run measures, {', '.join(names)} (metrics adds some), "
                    f"got {name!r}"
                )
        return cls(config.best, stop, measured)

    @property
    def watched(self) -> set[str]:
        """The metrics whose best value counts."""
        watched = {self.best, None if self.stop is None else self.stop.metric}
        return {name for name in watched if name is not None}

    def better(self, name: str, a: float, b: float) -> bool:
        """Whether ``a`` is better than ``b``."""
        return a < b if self.measured.least(name) else a > b

    def after(
        self, t: int, measures: Mapping[str, float | None], peaks: Mapping[str, Peak]
    ) -> tuple[dict[str, Peak], str]:
        """The best values after the evaluation in round ``t``, and why the run is over; "" where it is not.

        Args:
          peaks: the best values before it.
        """
        peaks = dict(peaks)
        for name in self.watched:
            value = measures[name]
            if value is not None and (name not in peaks or self.better(name, value, peaks[name].value)):
                peaks[name] = Peak(value=value, round=t)
        if self.stop is None or (peak := peaks.get(self.stop.metric)) is None:
            return peaks, ""
        name, target, patience = self.stop.metric, self.stop.target, self.stop.patience
        if target is not None and not self.better(name, target, peak.value):
            return peaks, f"{name} {peak.value:.6g} has reached the target {target:g} in round {peak.round}"
        if patience is not None and t - peak.round >= patience:
            return (
                peaks,
                f"{name} has not been better than {peak.value:.6g} in round {peak.round} for {t - peak.round} rounds",
            )
        return peaks, ""

    def bounds(self, name: str) -> tuple[float, float]:
        """Between which a measure lies."""
        metrics = self.measured.metrics
        metric = metrics[self.measured.first] if name.startswith("client_") else metrics.get(name)
        return (0, 1) if metric is not None and metric.share else (-math.inf, math.inf)
