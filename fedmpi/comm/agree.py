"""Ranks that were started differently find out before the first round, not in a hang."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from fedmpi.comm.base import Gathers
from fedmpi.errors import CommError
from fedmpi.version import __version__


def versions() -> dict[str, str]:
    """What must be the same everywhere for ranks to compute alike."""
    return {"fedmpi": __version__, "torch": torch.__version__}


def agree(comm: Gathers, mine: Mapping[str, Any]) -> None:
    """Compare what each rank has, a tree of plain values.

    Raises:
      CommError: on every rank, naming the first difference and both values.
    """
    offers = [leaves(json.loads(offer)) for offer in comm.allgather(json.dumps(mine).encode())]
    for rank, offer in enumerate(offers):
        # What is chosen by name comes before what follows from the choice.
        for path in sorted(
            offers[0].keys() | offer.keys(), key=lambda path: (not path.endswith("name"), path)
        ):
            first, other = offers[0].get(path, "nothing"), offer.get(path, "nothing")
            # As text: 1 is not 1.0, nor true.
            if json.dumps(first, sort_keys=True) != json.dumps(other, sort_keys=True):
                raise CommError(
                    f"ranks disagree on {path}: rank 0 has {first!r}, rank {rank} has {other!r}; "
                    "start all ranks with the same configuration and versions"
                )


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """What a tree of dictionaries holds, by dotted paths."""
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{path}.{name}" if path else name)
    return found
