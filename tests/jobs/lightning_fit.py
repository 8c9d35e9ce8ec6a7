"""A Lightning job: lightning_fit.py OUT. Prints "ok" for each rank.

Two ``fit``s of one Trainer, and a ``fit`` that resumes from the first one's checkpoint, end where one goes without a
stop; and what cannot be resumed from.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fedmpi
from fedmpi.errors import CheckpointError

TOPK = {"name": "topk", "ratio": 0.05, "feedback": True}


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 20))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(64, 40, generator=generator), torch.ones(64, 20)), batch_size=8
    )


def trainer(out: Path, epochs: int) -> tuple[pl.Trainer, Any]:
    callback = fedmpi.lightning.CompressionCallback(TOPK, exact_below=100)
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=False,
        callbacks=[callback, ModelCheckpoint(out, save_top_k=-1, filename="{epoch}")],
        enable_progress_bar=False,
        enable_model_summary=False,
    ), callback


def apart(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    whole, _ = trainer(out / "whole", 4)
    whole.fit(model := Regression(), data())

    twice, callback = trainer(out / "twice", 2)
    twice.fit(again := Regression(), data())
    assert apart(again, model) > 1e-4
    first = callback.state
    twice.fit_loop.max_epochs = 4
    twice.fit(again, data())
    assert callback.state is not first, "Lightning wraps anew"
    assert callback.state.stats()["steps"] == 8
    assert apart(again, model) == 0

    half = out / "twice" / "epoch=1.ckpt"
    saved = torch.load(half, weights_only=True)["fedmpi"]
    assert len(saved) == 2, "of every rank"
    resumed, callback = trainer(out / "resumed", 4)
    resumed.fit(other := Regression(), data(), ckpt_path=half)
    assert apart(other, model) == 0
    stats, logged = callback.state.stats(), resumed.logged_metrics
    assert logged["fedmpi/ratio"] == pytest.approx(stats["ratio"], rel=1e-6)
    assert stats["ratio"] > 5
    assert logged["fedmpi/payload_bytes"] == stats["payload_bytes"] > 0
    assert logged["fedmpi/seconds"] > 0
    cannot_resume(out, half)
    print("ok", flush=True)


def cannot_resume(out: Path, half: Path) -> None:
    checkpoint = torch.load(half, weights_only=True)
    rank = int(torch.distributed.get_rank())

    def fit(name: str, states: Any) -> None:
        changed = out / f"{name}{rank}.ckpt"
        torch.save({**checkpoint, "fedmpi": states}, changed)
        trainer(out / name, 3)[0].fit(Regression(), data(), ckpt_path=changed)

    with pytest.raises(CheckpointError, match="rank 0 cannot read its state"):
        fit("damaged", [torch.zeros(5, dtype=torch.uint8), checkpoint["fedmpi"][1]])
    with pytest.raises(CheckpointError, match=r"expected rank 0's own state, got rank 1's.*on any rank"):
        fit("swapped", checkpoint["fedmpi"][::-1])
    with pytest.raises(CheckpointError, match=r"states of 2 ranks on rank 0, of 0 on rank 1"):
        fit("missing", None if rank else checkpoint["fedmpi"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("without", None)
    said = [str(warning.message) for warning in caught if "starts afresh" in str(warning.message)]
    assert len(said) == (rank == 0), said


if __name__ == "__main__":
    main()
