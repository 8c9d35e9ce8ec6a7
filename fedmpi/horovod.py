"""Compressed gradients for Horovod: :mod:`fedmpi.integrations.horovod` under its short name."""

from __future__ import annotations

from fedmpi.integrations.horovod import Compression, DistributedOptimizer

__all__ = ["Compression", "DistributedOptimizer"]
