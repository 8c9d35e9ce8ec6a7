"""Compressed gradients for DistributedDataParallel: :mod:`fedmpi.integrations.ddp` under its short name."""

from __future__ import annotations

from fedmpi.integrations.ddp import Scaler, State, attach, attach_anew, init_process_group

__all__ = ["Scaler", "State", "attach", "attach_anew", "init_process_group"]
