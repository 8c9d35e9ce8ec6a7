"""Runs from Python on the ranks that a launcher started: from_python.py OUT. Each rank prints a JSON line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedmpi
from tests.conftest import SMALL


class Fails(fedmpi.Callback):
    def round_end(self, t: int, row: Mapping[str, Any]) -> None:
        raise ValueError("enough")


def error(**arguments: Any) -> str:
    try:
        fedmpi.train(SMALL, quiet=True, **arguments)
    except fedmpi.FedMPIError as found:
        return str(found)
    return ""


def main() -> None:
    found: dict[str, Any] = {"digests": [], "errors": []}
    for topology in ("allreduce", "aggregator"):
        result = fedmpi.train(SMALL, topology=topology, reproducible=True, quiet=True)
        tensors = b"".join(
            name.encode() + value.numpy().tobytes() for name, value in result.state_dict.items()
        )
        found["digests"].append(hashlib.sha256(tensors).hexdigest())
        found["wire"] = result.summary["wire_bytes_by_rank"]
        found["losses"] = result.history.column("loss")
    for arguments in ({"callbacks": [Fails()]}, {"nothing": 1}, {"ranks": 2}):
        found["errors"].append(error(**arguments))
    grid = fedmpi.sweep(SMALL, {"seeds": 2}, out=Path(sys.argv[1]), quiet=True, rounds=1)
    found["seeds"] = [point["seeds"] for point in grid.points]
    sys.stdout.write(json.dumps(found) + "\n")


main()
