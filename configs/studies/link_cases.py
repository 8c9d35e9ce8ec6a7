"""What ``python -m configs.studies link`` and its study compare, and at which learning rates."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One way of averaging gradients.

    Attributes:
      options: a case of :mod:`configs.studies.link_job`.
      rates: the learning rates that are tried, a grid of equal size for all: a factor of 1.5 to 3 apart, around what
        suits gradients of this scale.
      rate: the one that the study found best for the CNN.
      mlp: the same for the MLP, which has fewer cases.
    """

    options: dict[str, Any]
    rates: tuple[float, float, float, float]
    rate: float
    mlp: float | None = None

    def of(self, model: str) -> tuple[dict[str, Any], float] | None:
        """Options and rate for a model of :mod:`configs.studies.link_job`; None: this is no case of it."""
        rate = self.rate if model == "cnn" else self.mlp
        settings = {"settings": _SETTINGS[model]} if "method" in self.options else {}
        return None if rate is None else (self.options | settings, rate)


_SETTINGS: dict[str, dict[str, Any]] = {
    "cnn": {"group_mb": 3.0},
    "mlp": {"group_mb": 3.0, "exact_below": 16384},
}
"""Large layers go alone, the others together, as in DDP's buckets: while gradients of the lower layers are still
computed, those of the upper ones are coded and sent. The MLP's last layer, 10,240 numbers, goes exactly."""


def _ours(name: str, **options: Any) -> dict[str, Any]:
    return {"method": {"name": name, **options}}


def _power_hook(rank: int) -> dict[str, Any]:
    """In one bucket: in two, its collectives start from callbacks, whose order differs from rank to rank."""
    return {"plain": "powersgd", "rank": rank, "one_bucket": True}


_GRADIENT = (0.01, 0.02, 0.05, 0.1)
_PLAIN = 0.02  # the best of these for the MLP
_SIGNS = {"name": "signsgd", "vote": "mean"}

CASES: dict[str, Case] = {
    "bf16 hook": Case({"plain": "bf16"}, _GRADIENT, 0.05, _PLAIN),
    "PowerSGD hook, rank 1": Case(_power_hook(1), _GRADIENT, 0.01),
    "PowerSGD hook, rank 2": Case(_power_hook(2), _GRADIENT, 0.02),
    "PowerSGD hook, rank 4": Case(_power_hook(4), _GRADIENT, 0.05, 0.02),
    "powersgd, rank 1": Case(_ours("powersgd", rank=1, feedback=True), _GRADIENT, 0.02),
    "powersgd, rank 2": Case(_ours("powersgd", rank=2, feedback=True), _GRADIENT, 0.02),
    "powersgd, rank 4": Case(_ours("powersgd", rank=4, feedback=True), _GRADIENT, 0.05, 0.05),
    "signsgd": Case(_ours("signsgd"), (5e-5, 1e-4, 2e-4, 3e-4), 2e-4, 5e-5),
    "signsgd, feedback": Case(_ours("signsgd", feedback=True), _GRADIENT, 0.02),
    "topk 1 %, feedback": Case(_ours("topk", ratio=0.01, feedback=True), _GRADIENT, 0.05, 0.05),
    "intrinsic 1 %, hashed": Case(
        _ours("intrinsic", dim=16384, matrix="hashed"), (0.001, 0.003, 0.01, 0.03), 0.03
    ),
    "intrinsic 1 %, fastfood": Case(_ours("intrinsic", dim=16384), (0.001, 0.003, 0.01, 0.03), 0.01),
    "lookback over signsgd": Case(_ours("lookback", threshold=0.2, inner=_SIGNS), _GRADIENT, 0.05),
    "bf16 hook, one bucket": Case({"plain": "bf16", "one_bucket": True}, _GRADIENT, 0.05),
    "fp32 DDP": Case({"plain": "fp32"}, _GRADIENT, 0.05, _PLAIN),
    "nothing sent": Case({"plain": "nothing"}, _GRADIENT, 0.05),
    "one number sent": Case({"plain": "one number"}, _GRADIENT, 0.05, _PLAIN),
    "auto": Case({"method": {"name": "auto", "steps": 5}}, _GRADIENT, 0.05, _PLAIN),
}
REFERENCE = "bf16 hook"
ALONE = "nothing sent"
"""Each rank trains for itself, as if there were no other."""
BOUND = "one number sent"
"""Ranks wait for each other in each step, and keep their own gradients: no exchange, however fast, takes less."""
SAME_AS_BF16 = ("bf16 hook, one bucket", "fp32 DDP", "auto", ALONE, BOUND)
"""Cases that are not tuned: their gradients are, or at first are, those of the reference, or stand for them."""
POWERSGD, OURS = "PowerSGD hook, rank 4", ("signsgd", "powersgd, rank 4")
"""Those that the study found to reach the accuracy first: of torch's hook, and of ours (on one link or another)."""
