"""The methods: one file each, one row each."""

from __future__ import annotations

from fedmpi.methods import (
    atomo,
    blockwise,
    dense,
    fetchsgd,
    halves,
    intrinsic,
    lookback,
    powersgd,
    prune,
    qsgd,
    randomk,
    rtopk,
    signsgd,
    sparseloco,
    topk,
)
from fedmpi.methods.table import METHODS, build, entry, parse, parse_inner

METHODS.update(
    {
        "dense": dense.ENTRY,
        "signsgd": signsgd.ENTRY,
        "fp16": halves.FP16,
        "bf16": halves.BF16,
        "topk": topk.ENTRY,
        "randomk": randomk.ENTRY,
        "rtopk": rtopk.ENTRY,
        "prune": prune.ENTRY,
        "qsgd": qsgd.ENTRY,
        "blockwise": blockwise.ENTRY,
        "sparseloco": sparseloco.ENTRY,
        "intrinsic": intrinsic.ENTRY,
        "fetchsgd": fetchsgd.ENTRY,
        "atomo": atomo.ENTRY,
        "powersgd": powersgd.ENTRY,
        "lookback": lookback.ENTRY,
    }
)

__all__ = ["METHODS", "build", "entry", "parse", "parse_inner"]
