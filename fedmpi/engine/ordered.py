"""Trimmed mean and median in the place of the mean: what a few clients send, however large, hardly matters.

Source: Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018, Definitions 1 and 2, coordinate by coordinate, each client counting once: of C values the ⌊trim · C⌋
smallest and as many largest are left out; of an even number of values the median is the mean of the two in the middle.

Rank 0 holds the vectors of all clients of a round: 4 · C · D bytes. Of sparse vectors the median is mostly zero.

Shape suffixes: C clients, S summed numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmpi.config import Config, ServerConfig
from fedmpi.engine.sums import Sum
from fedmpi.engine.topology import TOPOLOGIES, Aggregator, Topology
from fedmpi.errors import ConfigError
from fedmpi.method import Method

_BLOCK_VALUES = 1 << 24  # sorted at a time


class Ordered(Sum):
    """The trimmed mean or median of clients' vectors; their weights do not count, nor does their order."""

    def __init__(self, rule: ServerConfig, size: int, terms: int) -> None:
        super().__init__(0, integer=False, exact=False, terms=terms)
        self.rule, self.size, self._rows = rule, size, list[Tensor]()

    def add(self, v_CS: Tensor, weights_C: Tensor) -> None:
        self._rows.extend(v_CS.unbind())

    def value(self, share: float = 1.0) -> Tensor:
        count = len(self._rows)
        middle = (count - 1) // 2
        cut = middle if self.rule.aggregate == "median" else min(middle, int(self.rule.trim * count + 1e-9))
        blocks = zip(*(v_S.split(max(1, _BLOCK_VALUES // count)) for v_S in self._rows), strict=True)
        kept = (torch.stack(rows).sort(0).values[cut : count - cut] for rows in blocks)
        return torch.cat([rows.double().mean(0).float() for rows in kept])


class OrderedAggregator(Aggregator):
    """Rank 0 takes a trimmed mean or the median of what it decodes."""

    rule: ServerConfig

    def sum(self) -> Sum:
        return Ordered(self.rule, self.up.size, len(self.clients))


def topology(config: Config, method: Method) -> Callable[..., Topology]:
    """The class of the topology that a federated configuration asks for.

    Raises:
      ConfigError: ``server.aggregate`` and a method whose vectors' coordinates are not the parameters.
    """
    if config.server.aggregate == "mean":
        return TOPOLOGIES[config.topology]
    up = method.up
    if up.integer or up.size != up.spec.size or len(method.passes) > 1:
        raise ConfigError(
            f"server.aggregate: {config.server.aggregate} needs a method whose message decodes to a gradient of D "
            f"numbers and that has one pass (dense, bf16, topk, …); {config.method.name}'s does not, expected mean"
        )
    return type("OrderedAggregator", (OrderedAggregator,), {"rule": config.server})
