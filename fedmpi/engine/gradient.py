"""The gradient of one client's step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmpi.engine.apart import forward
from fedmpi.engine.device import Samples
from fedmpi.local import Local
from fedmpi.message import CPU
from fedmpi.phases import phase
from fedmpi.tasks.objectives import Objective

LEAST = 1e-9
"""Of a sample; less counts only where nothing does."""


class Gradient:
    """Of the mean loss over samples, added to what the model's parameters have."""

    def __init__(self, model: nn.Module, objective: Objective, local: Local, device: torch.device) -> None:
        self._model, self._objective, self._local, self._device = model, objective, local, device

    def autocast(self) -> torch.autocast:
        mixed = self._local.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=mixed)

    def add(self, data: Samples, chosen: Tensor) -> tuple[float | Tensor, float]:
        """Of what counts of the samples, in so many parts as asked for; returns the loss (of a device, which nobody
        waits for, as float64 there) and how many samples' worth that is."""
        parts = chosen.chunk(self._local.accumulate)
        weights = [float(self._objective.weights(data.host.y[part][None])) for part in parts]
        total: float | Tensor = 0.0
        whole = sum(weights)
        for part, weight in zip(parts, weights, strict=True):
            with phase("load"):
                x, y = data.take(part)
            with self.autocast():
                loss = self._objective.loss(forward(self._model, x), y)
            share = weight / max(whole, LEAST)
            (loss if share == 1 else loss * share).backward()
            total += (loss.item() if self._device == CPU else loss.detach().double()) * share
        return total, whole
