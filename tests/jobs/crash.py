"""Rank 1 fails with an error that is a bug, not a user's; the others wait for it in a collective: ``crash.py OUT``."""

import sys
from typing import Any

from fedmpi import cli
from fedmpi.comm.base import Comm
from fedmpi.engine.trainer import Trainer

original = Trainer.evaluate


def evaluate(self: Trainer, theta_D: Any, test: Any, batch: int, comm: Comm) -> tuple[float, float]:
    if comm.rank == 1:
        raise ZeroDivisionError("a bug")
    return original(self, theta_D, test, batch, comm)


Trainer.evaluate = evaluate  # type: ignore[method-assign]
sys.exit(cli.main(["train", "configs/quickstart.yaml", "--quiet", "rounds=30", "--out", sys.argv[1]]))
