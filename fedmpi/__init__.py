"""fedmpi: communication-compressed federated and data-parallel training over MPI.

The drop-ins are loaded when they are first used: ``fedmpi.ddp`` (a hook for DistributedDataParallel), ``fedmpi.sync``,
``fedmpi.local_sgd``, ``fedmpi.optim``, ``fedmpi.horovod``, ``fedmpi.transformers``, ``fedmpi.lightning`` and
``fedmpi.accelerate``. The rest is the command line's: ``fedmpi --help``.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_ON_DEMAND = ("accelerate", "ddp", "horovod", "lightning", "optim", "transformers")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ON_DEMAND:
        return import_module(f"fedmpi.integrations.{name}")
    if name == "sync":
        return import_module("fedmpi.integrations.sync").Sync
    if name == "local_sgd":
        return import_module("fedmpi.integrations.local_sgd").LocalSGD
    raise AttributeError(f"module 'fedmpi' has no attribute {name!r}")
