"""Compressed gradients in a Lightning job.

    trainer = Trainer(strategy="ddp", devices=8, callbacks=[fedmpi.lightning.CompressionCallback("signsgd")])

Lightning wraps its module in DistributedDataParallel anew in each ``fit``; the callback attaches the hook of
:mod:`fedmpi.integrations.ddp` to that wrapper.
"""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.integrations.ddp import State, attach, attach_anew
from fedmpi.integrations.job import AnyMethod, Job

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:  # the same under its older name, where it is alone
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError:
        raise ImportError("fedmpi.lightning needs lightning: pip install 'fedmpi[lightning]'") from None

_KEY = "fedmpi"  # of Lightning's checkpoints


class CompressionCallback(Callback):  # type: ignore[misc]
    """Compresses the gradients of a Trainer that runs on several processes; on one it does nothing.

    What the method keeps is saved in Lightning's own checkpoints, that of every rank under ``"fedmpi"`` (gathered on
    rank 0, as bytes; not in weights-only ones), and loaded from the one that a ``fit`` resumes from, so that a resumed
    job goes on exactly. A further ``fit`` of the same module goes on with what the last one's hook kept.

    Logs ``fedmpi/payload_bytes``, ``fedmpi/ratio`` and ``fedmpi/seconds`` (spent on coding and waiting), of all steps
    so far, as often as the Trainer logs.

    Attributes:
      state: the hook's (:class:`fedmpi.integrations.ddp.State`), once training has begun; None on one process.
    """

    def __init__(self, method: AnyMethod, **settings: Any) -> None:
        """Args: ``method`` and ``settings`` of :func:`fedmpi.ddp.attach`."""
        self._method, self._settings = method, settings
        self._loaded: list[torch.Tensor] | None = None
        self._resumes = False
        self.state: State | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before there is a wrapper: what it holds is kept until then."""
        self._loaded, self._resumes = checkpoint.get(_KEY), True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the hook, and load what a checkpoint holds.

        Raises:
          ConfigError: the Trainer runs on several processes, but not through DistributedDataParallel.
          CheckpointError: on all ranks: the checkpoint's hook states are damaged, or not of this job.
          ConfigError, CommError: as :func:`fedmpi.ddp.attach`.
        """
        loaded, resumes, self._loaded, self._resumes = self._loaded, self._resumes, None, False
        if trainer.world_size == 1:
            return
        ddp = trainer.strategy.model
        if not isinstance(ddp, DistributedDataParallel):
            raise ConfigError(
                f"Trainer: expected strategy='ddp' for {trainer.world_size} processes, got "
                f"{type(trainer.strategy).__name__}, which averages gradients by itself or not at all; take "
                "Trainer(strategy='ddp'), or leave the callback out"
            )
        settings = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **self._settings}
        if resumes:
            self.state = attach(ddp, self._method, **settings)
            self.state.run(lambda job: _load(job, loaded))
        else:
            self.state = attach_anew(self.state, ddp, self._method, "Lightning", **settings)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called on all ranks, as ``Trainer.save_checkpoint`` is; rank 0 gets, and saves, what all have."""
        if self.state is not None:
            checkpoint[_KEY] = self.state.run(_saved)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what the hook has done so far."""
        if self.state is None or trainer.global_step % trainer.log_every_n_steps:
            return
        stats = self.state.stats()
        seconds = sum(value for name, value in stats.items() if name.endswith("_seconds"))
        told = {"payload_bytes": stats["payload_bytes"], "ratio": stats["ratio"], "seconds": seconds}
        self.log_dict({f"fedmpi/{name}": float(value) for name, value in told.items()})


def _saved(job: Job) -> list[torch.Tensor]:
    """Every rank's state on rank 0, as bytes."""
    file = io.BytesIO()
    torch.save(job.state_dict(), file)
    parts = job.reducer.comm.gather(file.getvalue())
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]


def _load(job: Job, saved: list[torch.Tensor] | None) -> None:
    """Go on where all ranks stood; from a checkpoint without this, afresh.

    Raises:
      CheckpointError: on all ranks: it is damaged, not of this job, or not the same checkpoint everywhere.
    """
    comm, state, mine = job.reducer.comm, None, {"ranks": 0, "wrong": ""}
    try:
        if saved is not None:
            mine["ranks"] = len(saved)
            state = torch.load(io.BytesIO(saved[comm.rank % len(saved)].numpy().tobytes()), weights_only=True)
    except Exception as error:  # whatever a damaged checkpoint makes torch and pickle say
        mine["wrong"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    offers = [json.loads(offer) for offer in comm.allgather(json.dumps(mine).encode())]
    for rank, offer in enumerate(offers):
        if offer["wrong"]:
            raise CheckpointError(f"checkpoint: {_KEY}: rank {rank} cannot read its state: {offer['wrong']}")
        if offer != offers[0]:
            raise CheckpointError(
                f"checkpoint: {_KEY}: states of {offers[0]['ranks']} ranks on rank 0, of {offer['ranks']} on rank "
                f"{rank}; expected the same checkpoint on all"
            )
    if state is not None:
        try:
            job.load_state_dict(state)
        except ConfigError as error:
            raise CheckpointError(f"checkpoint: {_KEY}: {error}") from None
    elif comm.rank == 0:
        warnings.warn(
            "fedmpi: the checkpoint was saved without fedmpi's callback: what the method keeps (residuals, steps) "
            "starts afresh",
            stacklevel=2,
        )
