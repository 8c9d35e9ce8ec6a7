"""Compressed gradients for Lightning: :mod:`fedmpi.integrations.lightning` under its short name."""

from __future__ import annotations

from fedmpi.integrations.lightning import CompressionCallback

__all__ = ["CompressionCallback"]
