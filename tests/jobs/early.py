"""``fedmpi train`` on every rank, one of which is struck before the first round: ``early.py 'RANK SIGNAL PLACE' …``.

PLACE is "import" (nothing of fedmpi but its first module is there), "load" (the data) or "shaken" (the ranks agree).
"none" strikes before any of fedmpi is there.
"""

import os
import sys
from typing import Any

rank, number, place = sys.argv.pop(1).split()
mine = rank == (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK"))


def strike(here: str) -> None:
    if mine and here == place:
        os.kill(os.getpid(), int(number))


def struck(module: Any, name: str, here: str) -> None:
    original = getattr(module, name)

    def first(*arguments: Any) -> Any:
        strike(here)
        return original(*arguments)

    setattr(module, name, first)


strike("none")
import fedmpi.start  # noqa: E402, F401

strike("import")
from fedmpi.cli import main  # noqa: E402
from fedmpi.engine import rounds, run  # noqa: E402

struck(rounds, "load", "load")
struck(run, "handshake", "shaken")
sys.exit(main(sys.argv[1:]))
