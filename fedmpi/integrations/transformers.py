"""Compressed gradients in a ``transformers.Trainer`` job.

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[fedmpi.transformers.CompressionCallback("bf16")])

The Trainer wraps its model in DistributedDataParallel when torchrun (or an environment like torchrun's) started
several processes; the callback attaches the hook of :mod:`fedmpi.integrations.ddp` to that wrapper. Jobs on
accelerate alone call :func:`fedmpi.ddp.attach` on what ``accelerator.prepare`` returns, and
:func:`fedmpi.accelerate.register`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedmpi.errors import ConfigError
from fedmpi.integrations import folder
from fedmpi.integrations.accelerate import resume
from fedmpi.integrations.ddp import State, attach_anew
from fedmpi.integrations.job import AnyMethod

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise ImportError(
        "fedmpi.transformers needs transformers and accelerate: pip install 'fedmpi[hf]'"
    ) from None


class CompressionCallback(TrainerCallback):  # type: ignore[misc]
    """Compresses the gradients of a Trainer that runs on several processes; on one it does nothing.

    What the method keeps is saved beside each of the Trainer's checkpoints (``fedmpi-rank<r>.pt``, tensors and plain
    values) and loaded from the one that the Trainer resumes from, so that a resumed job goes on exactly. Where the
    Trainer wraps its model anew (after ``auto_find_batch_size``, in another ``train()``), the new wrapper gets a hook,
    which takes over what the old one's kept if it is for the same parameters.

    Beside each loss the Trainer logs ``fedmpi_payload_bytes``, ``fedmpi_ratio`` and ``fedmpi_seconds`` (spent on coding
    and waiting), of all steps so far.

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
        """Attach the hook, if this wrapper has none yet, and load what a checkpoint holds.

        Raises:
          ConfigError: the Trainer runs on several processes, but not through DistributedDataParallel.
          CheckpointError: on all ranks: the checkpoint's hook states are damaged, or not of this job.
          ConfigError, CommError: as :func:`fedmpi.ddp.attach`.
        """
        if args.world_size == 1:
            return
        caller = _caller(state, "resume_from_checkpoint")
        ddp = _wrapper(model, caller.get("self"), args)
        if self.state is None or getattr(ddp, "_fedmpi", None) is not self.state:
            self.state = attach_anew(self.state, ddp, self._method, "the Trainer", **self._settings)
        assert self.state is not None
        if state.global_step:
            resume(self.state, _resumed_from(args, state, caller))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """What the hook has done by the steps so far, beside each loss that the Trainer logs, wherever it does."""
        if self.state is None or "loss" not in (logs or {}):
            return
        trainer = _caller(state, "logs").get("self")
        if trainer is not None:
            stats = self.state.stats()
            told = {"payload_bytes": stats["payload_bytes"], "ratio": stats["ratio"]}
            told["seconds"] = sum(value for name, value in stats.items() if name.endswith("_seconds"))
            trainer.log({f"fedmpi_{name}": value for name, value in told.items()})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Every rank saves its own.

        Raises:
          CheckpointError, CommError: on all ranks: one cannot write.
        """
        if self.state is None:
            return
        caller = _caller(state, "trial")  # a search gives each trial a folder
        out = caller["self"]._get_output_dir(caller["trial"]) if caller else args.output_dir
        folder.save(self.state, Path(out) / f"checkpoint-{state.global_step}")


def _caller(state: TrainerState, variable: str) -> Mapping[str, Any]:
    """The variables of the Trainer's function that called back and has such a one; none if there is no such function.

    The Trainer tells its callbacks neither the wrapper around its model, nor where it resumes from and saves to.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        owner = variables.get("self")
        if isinstance(owner, Trainer) and owner.state is state and variable in variables:
            return variables
        frame = frame.f_back
    return {}


def _wrapper(model: nn.Module, trainer: Any, args: TrainingArguments) -> DistributedDataParallel:
    """What the Trainer has put around ``model``, and trains."""
    wrapped = getattr(trainer, "model_wrapped", None)
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's
    if isinstance(wrapped, DistributedDataParallel) and wrapped.module is model:
        return wrapped
    gc.collect()  # wrappers of an earlier train()
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    around: list[DistributedDataParallel] = [
        ddp for ddp in wrappers if getattr(ddp.module, "_orig_mod", ddp.module) is model
    ]
    if len(around) != 1:
        raise ConfigError(
            f"Trainer: expected one DistributedDataParallel around the model of {args.world_size} processes, got "
            f"{len(around)} ({args.parallel_mode}); FSDP and DeepSpeed average gradients themselves"
        )
    return around[0]


def _resumed_from(args: TrainingArguments, state: TrainerState, caller: Mapping[str, Any]) -> str:
    """The checkpoint that the Trainer goes on from; the same on every rank, whether it can see it or not."""
    for given in (caller.get("resume_from_checkpoint"), args.resume_from_checkpoint):
        if isinstance(given, str) and given.lower() not in ("true", "false"):
            return given
    return str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
