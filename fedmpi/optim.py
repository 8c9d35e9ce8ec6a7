"""Optimizers that send compressed messages: :mod:`fedmpi.integrations.optim` under its short name."""

from __future__ import annotations

from fedmpi.integrations.optim import Chunks, OneBitAdam

__all__ = ["Chunks", "OneBitAdam"]
