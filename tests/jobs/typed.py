"""A user's script, for mypy alone (pyproject.toml names it): every name of fedmpi has its type, and none is Any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import assert_type

import fedmpi
import fedmpi.ddp
import fedmpi.horovod
import fedmpi.lightning
import fedmpi.transformers


class Logger(fedmpi.Callback):
    def evaluation(self, t: int, metrics: Mapping[str, Any]) -> None:
        print(t, metrics)


def runs() -> None:
    config = fedmpi.Config.model_validate({})
    for source in ("configs/quickstart.yaml", Path("run.yaml"), {"rounds": 3}, config):
        result = fedmpi.train(source, ranks=4, callbacks=[Logger(), fedmpi.TensorBoard("logs")], rounds=3)
        assert_type(result, fedmpi.Result)
    assert_type(result.history, fedmpi.History)
    assert_type(result.history[0], Mapping[str, Any])
    assert_type(result.history[1:], fedmpi.History)
    assert_type(result.score, float | None)
    assert_type(result.model(torch.nn.Linear(2, 1)), torch.nn.Linear)
    assert_type(fedmpi.sweep("run.yaml", {"seeds": 3}, out="runs/grid"), fedmpi.Sweep)
    assert_type(fedmpi.report([result, "runs/one"], format="svg"), str)
    assert_type(list(fedmpi.METHODS), list[str])
    fedmpi.train("run.yaml", ranks="4")  # type: ignore[arg-type]
    fedmpi.trian("run.yaml")  # type: ignore[attr-defined]


def jobs(model: torch.nn.Module, ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    assert_type(fedmpi.ddp.attach(ddp, {"name": "signsgd", "feedback": True}), fedmpi.ddp.State)
    assert_type(fedmpi.sync(model, "bf16"), fedmpi.sync)
    assert_type(fedmpi.local_sgd(model, optimizer, "bf16", every=10), fedmpi.local_sgd)
    assert_type(fedmpi.optim.OneBitAdam(model.parameters(), warmup=10), fedmpi.optim.OneBitAdam)
    assert_type(fedmpi.horovod.Compression("dense"), fedmpi.horovod.Compression)
    assert_type(fedmpi.transformers.CompressionCallback("bf16"), fedmpi.transformers.CompressionCallback)
    assert_type(fedmpi.lightning.CompressionCallback("bf16"), fedmpi.lightning.CompressionCallback)
    fedmpi.ddp.detach(ddp)  # type: ignore[attr-defined]
