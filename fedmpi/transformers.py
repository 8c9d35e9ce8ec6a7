"""Compressed gradients for transformers.Trainer: :mod:`fedmpi.integrations.transformers` under its short name."""

from __future__ import annotations

from fedmpi.integrations.transformers import CompressionCallback

__all__ = ["CompressionCallback"]
