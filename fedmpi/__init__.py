"""fedmpi: communication-compressed federated and data-parallel training over MPI.

Runs: :func:`train`, :func:`sweep`, :func:`report`, with a :class:`Callback` for a logger of your own; ``METHODS`` are
the methods by name. In a job that is already there: ``fedmpi.ddp`` (a hook for DistributedDataParallel),
:class:`sync`, :class:`local_sgd`, ``fedmpi.optim``, ``fedmpi.horovod``, ``fedmpi.transformers``, ``fedmpi.lightning``
and ``fedmpi.accelerate``.

Every name is loaded when it is first used: ``import fedmpi`` alone imports neither torch nor MPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmpi.version import __version__

if TYPE_CHECKING:
    from fedmpi import accelerate, ddp, horovod, lightning, optim, transformers
    from fedmpi.api import History, Result, Sweep, report, sweep, train
    from fedmpi.callbacks import Callback
    from fedmpi.config import Config
    from fedmpi.engine.tensorboard import TensorBoard
    from fedmpi.errors import FedMPIError
    from fedmpi.integrations.local_sgd import LocalSGD as local_sgd
    from fedmpi.integrations.sync import Sync as sync
    from fedmpi.methods import METHODS

__all__ = [
    "METHODS",
    "Callback",
    "Config",
    "FedMPIError",
    "History",
    "Result",
    "Sweep",
    "TensorBoard",
    "__version__",
    "accelerate",
    "ddp",
    "horovod",
    "lightning",
    "local_sgd",
    "optim",
    "report",
    "sweep",
    "sync",
    "train",
    "transformers",
]

# What the imports above say to editors and mypy, for the interpreter: the module that has a name, and its name there.
_PLACES = {
    "METHODS": ("methods", "METHODS"),
    "Callback": ("callbacks", "Callback"),
    "Config": ("config", "Config"),
    "FedMPIError": ("errors", "FedMPIError"),
    "History": ("api", "History"),
    "Result": ("api", "Result"),
    "Sweep": ("api", "Sweep"),
    "TensorBoard": ("engine.tensorboard", "TensorBoard"),
    "local_sgd": ("integrations.local_sgd", "LocalSGD"),
    "report": ("api", "report"),
    "sweep": ("api", "sweep"),
    "sync": ("integrations.sync", "Sync"),
    "train": ("api", "train"),
}
_MODULES = ("accelerate", "ddp", "horovod", "lightning", "optim", "transformers")
_NEEDED = {
    "horovod": ("horovod",),
    "lightning": ("lightning", "pytorch_lightning"),
    "transformers": ("transformers",),
}

if not TYPE_CHECKING:  # or every misspelt name would have the type Any

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"fedmpi.{name}")
        if name in _PLACES:
            module, inside = _PLACES[name]
            found = getattr(import_module(f"fedmpi.{module}"), inside)
            globals()[name] = found
            return found
        raise AttributeError(f"module 'fedmpi' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names but those of modules whose package is not installed: pydoc and editors load what is listed."""
    from importlib.util import find_spec

    missing = {name for name, any_of in _NEEDED.items() if not any(map(find_spec, any_of))}
    return sorted({*globals(), *__all__} - missing)
