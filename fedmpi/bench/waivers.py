"""Targets that are not met, and why: ``fedmpi bench --check`` lets these pass, and no others."""

from __future__ import annotations

from typing import NamedTuple


class Waiver(NamedTuple):
    figure: str  # what is reached, on what machine
    reason: str
    bound: str  # the least that it could take: bytes moved times the memory's speed


WAIVERS: dict[str, Waiver] = {}  # by "bench/case"
