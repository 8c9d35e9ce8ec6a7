"""Rank 1 fails with an error that is a bug, not a user's; the others wait for it in a collective: ``crash.py OUT``."""

import sys

from fedmpi import cli
from fedmpi.engine.rounds import Simulation

original = Simulation.evaluate


def evaluate(self: Simulation) -> tuple[float, float]:
    if self.comm.rank == 1:
        raise ZeroDivisionError("a bug")
    return original(self)


Simulation.evaluate = evaluate  # type: ignore[method-assign]
sys.exit(cli.main(["train", "configs/quickstart.yaml", "--quiet", "rounds=30", "--out", sys.argv[1]]))
