"""Hook states in accelerate"s checkpoints: :mod:`fedmpi.integrations.accelerate` under its short name."""

from __future__ import annotations

from fedmpi.integrations.accelerate import Registered, register, resume

__all__ = ["Registered", "register", "resume"]
