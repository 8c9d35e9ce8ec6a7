"""Compressed gradients in a ``transformers.Trainer`` job.

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[fedmpi.transformers.CompressionCallback("bf16")])

The Trainer wraps its model in DistributedDataParallel when torchrun (or an environment like torchrun's) started
several processes; the callback attaches the hook of :mod:`fedmpi.integrations.ddp` to that wrapper. Jobs on
accelerate alone call :func:`fedmpi.ddp.attach` on what ``accelerator.prepare`` returns.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedmpi.errors import ConfigError
from fedmpi.integrations.ddp import AnyMethod, State, attach

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise ImportError(
        "fedmpi.transformers needs transformers and accelerate: pip install 'fedmpi[hf]'"
    ) from None


class CompressionCallback(TrainerCallback):  # type: ignore[misc]
    """Compresses the gradients of a Trainer that runs on several processes; on one it does nothing.

    What the method keeps is saved beside each of the Trainer's checkpoints (``fedmpi-rank<r>.pt``, tensors and plain
    values) and loaded with them, so that a resumed job goes on exactly.

    Attributes:
      state: the hook's (:class:`fedmpi.integrations.ddp.State`), once training has begun; None on one process.
    """

    def __init__(self, method: AnyMethod, **settings: Any) -> None:
        """Args: ``method`` and ``settings`` of :func:`fedmpi.ddp.attach`."""
        self._method, self._settings = method, settings
        self.state: State | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Attach the hook.

        Raises:
          ConfigError: the Trainer runs on several processes, but not through DistributedDataParallel.
          ConfigError, CommError: as :func:`fedmpi.ddp.attach`.
        """
        if args.world_size == 1 or self.state is not None:
            return
        # The Trainer hands its callbacks the model without the wrapper that it has put around it.
        wrappers = [
            o for o in gc.get_objects() if isinstance(o, DistributedDataParallel) and o.module is model
        ]
        if not wrappers:
            raise ConfigError(
                f"Trainer: expected DistributedDataParallel around the model of {args.world_size} processes, got "
                f"{args.parallel_mode}; FSDP and DeepSpeed average gradients themselves"
            )
        self.state = attach(wrappers[-1], self._method, **self._settings)
        if state.global_step:  # resumed
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            path = self._path(folder, args.process_index)
            if path.exists():
                self.state.load_state_dict(torch.load(path, weights_only=True))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Every rank saves its own."""
        if self.state is None:
            return
        path = self._path(Path(args.output_dir) / f"checkpoint-{state.global_step}", args.process_index)
        aside = path.with_suffix(".tmp")
        torch.save(self.state.state_dict(), aside)
        aside.rename(path)

    @staticmethod
    def _path(folder: Path, rank: int) -> Path:
        return folder / f"fedmpi-rank{rank}.pt"
