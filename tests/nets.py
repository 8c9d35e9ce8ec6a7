"""Models as users have them: batch norm, dropout, buffers of their own, tied weights. Named by import path."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Batch norm between linear layers, dropout by the function, and a counter of its own."""

    steps: Tensor

    def __init__(self, inputs: int, classes: int, hidden: int, p: float) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden)
        self.middle, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, classes)
        self.p = p
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        h = torch.relu(self.norm(self.first(x.flatten(1))))
        h = nn.functional.dropout(h, self.p, self.training)
        output: Tensor = self.last(torch.relu(self.middle(h)))
        return output


def build(shape: tuple[int, ...], classes: int, hidden: int = 12, p: float = 0.2) -> nn.Module:
    return Net(torch.Size(shape).numel(), classes, hidden, p)
