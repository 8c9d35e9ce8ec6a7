"""Models as users have them: batch norm, dropout, buffers of their own, tied weights. Named by import path."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
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


class Recurrent(nn.Module):
    """Rows of a picture one after the other, with dropout between the layers."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.last = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.lstm(x.flatten(1, 2))[0][:, -1])
        return output


class Attention(nn.Module):
    """The same by a transformer's layer, dropout within attention included."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.layer(x.flatten(1, 2)).mean(1))
        return output


def recurrent(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Recurrent(shape[-1], classes)


def attention(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Attention(shape[-1], classes)


class Means(nn.Module):
    """Running means that it assigns anew."""

    level: Tensor

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8), nn.Linear(8, classes)
        self.register_buffer("level", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        if self.training:
            self.level = 0.9 * self.level + 0.1 * h.detach().mean(0)
        output: Tensor = self.last(torch.relu(h - self.level))
        return output


def means(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Means(torch.Size(shape).numel(), classes)


class Skipping(nn.Module):
    """Stochastic depth by generators of its own: NumPy's, Python's and torch's."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8), nn.Linear(8, classes)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.numpy, self.python, self.torch = np.random.default_rng(), random.Random(), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        draws = self.numpy.random(), self.python.random(), float(torch.rand((), generator=self.torch))
        for branch, draw in zip(self.branches, draws, strict=True):
            if not self.training or draw < 0.5:
                h = h + torch.relu(branch(h))
        output: Tensor = self.last(h)
        return output


def skipping(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Skipping(torch.Size(shape).numel(), classes)


class Colours(nn.Module):
    """A network of transformers' for pictures of three colours, fed with grey ones."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x.expand(-1, 3, -1, -1)).logits
        return output


def resnet18(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-18 with batch norm, 11 million parameters, as transformers has it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=classes)
    return Colours(ResNetForImageClassification(config))
