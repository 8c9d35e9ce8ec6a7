"""Every rank's hook state in the checkpoints of a job on accelerate.

    model, optimizer = accelerator.prepare(model, optimizer)
    state = fedmpi.ddp.attach(model, "signsgd")
    fedmpi.accelerate.register(accelerator, state)

``accelerator.save_state`` then saves ``fedmpi-rank<r>.pt`` of every rank, and ``accelerator.load_state`` loads them.
(``register_for_checkpointing`` would keep rank 0's alone and hand it to all, which they refuse.)
"""

from __future__ import annotations

import warnings
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.integrations import folder
from fedmpi.integrations.folder import Kept

_HOOKS = ("register_save_state_pre_hook", "register_load_state_pre_hook")


class Registered:
    """What :func:`register` returns."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        """The state is no longer saved and loaded."""
        for handle in self._handles:
            handle.remove()


def register(accelerator: Any, state: Kept) -> Registered:
    """Save and load ``state`` with the accelerator's own. Called by all ranks.

    Args:
      accelerator: an ``accelerate.Accelerator``.
      state: what :func:`fedmpi.ddp.attach` returned, or a :class:`fedmpi.sync`.

    Raises:
      ConfigError: another kind of argument. ``save_state`` and ``load_state`` raise what
        :func:`fedmpi.integrations.folder.save` and ``load`` do; a folder without such files starts afresh, with a
        warning on rank 0.
    """
    if not all(callable(getattr(accelerator, name, None)) for name in _HOOKS):
        raise ConfigError(
            f"accelerator: expected an accelerate.Accelerator, got {type(accelerator).__name__}"
        )
    if not callable(getattr(state, "run", None)):
        raise ConfigError(f"state: expected what fedmpi.ddp.attach returned, got {type(state).__name__}")

    def save(models: Any, weights: Any, output_dir: str) -> None:
        folder.save(state, output_dir)

    def load(models: Any, input_dir: str) -> None:
        resume(state, input_dir)

    return Registered(*(getattr(accelerator, n)(hook) for n, hook in zip(_HOOKS, (save, load), strict=True)))


def resume(state: Kept, checkpoint: str) -> None:
    """Load a checkpoint's hook states, or start afresh, with a warning on rank 0, where it has none.

    Raises:
      CheckpointError: as :func:`fedmpi.integrations.folder.load`.
    """
    if folder.load(state, checkpoint):
        return
    state.run(lambda job: job.reset())
    if state.run(lambda job: job.reducer.comm.rank) == 0:
        warnings.warn(
            f"fedmpi: {checkpoint} has no fedmpi-rank<r>.pt: what the method keeps (residuals, steps) starts afresh",
            stacklevel=2,
        )
