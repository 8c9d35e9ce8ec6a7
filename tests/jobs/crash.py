"""Rank 1 fails with an error that is a bug, not a user's; the others wait for it in a collective: ``crash.py OUT``."""

import sys
from typing import Any

from fedmpi import cli
from fedmpi.engine.trainer import Trainer

original = Trainer.evaluate


def evaluate(*values: Any) -> Any:
    if values[-1].rank == 1:
        raise ZeroDivisionError("a bug")
    return original(*values)


Trainer.evaluate = evaluate  # type: ignore[method-assign]
sys.exit(cli.main(["train", "configs/quickstart.yaml", "--quiet", "rounds=30", "--out", sys.argv[1]]))
