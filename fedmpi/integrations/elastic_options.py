"""What ``fedmpi.local_sgd`` takes as ``elastic``, and what does not go with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field
from torch.nn.parallel import DistributedDataParallel

from fedmpi.errors import ConfigError
from fedmpi.integrations.local_options import LocalOptions
from fedmpi.integrations.modules import uncompiled
from fedmpi.integrations.settings import Settings
from fedmpi.validation import Strict, checked


class ElasticOptions(Strict):
    """How ranks meet; times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    at: str = Field(description="the coordinator's host:port")
    workers: int = Field(1, ge=1, description="ranks that begin together")
    lease: float = Field(10.0, gt=0, description="without a heartbeat, until a rank counts as gone")
    late: float = Field(300.0, gt=0, description="that a synchronisation waits for a rank that is there")
    collective: float = Field(60.0, gt=0, description="that a collective waits for the others")
    join: float = Field(3600.0, gt=0, description="that a newcomer waits for the next synchronisation")
    coordinator: float = Field(60.0, gt=0, description="that a coordinator which has gone is waited for")

    @property
    def address(self) -> tuple[str, int]:
        """
        Raises:
          ConfigError: it is none.
        """
        host, _, port = self.at.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f'elastic: expected the coordinator\'s "host:port", got {self.at!r}; fedmpi coordinator --port PORT'
            )
        return host.strip("[]"), int(port)


def parsed(
    elastic: str | Mapping[str, Any], every: object, group: object, comm: object, model: object
) -> ElasticOptions:
    """What ``fedmpi.local_sgd`` was given as ``elastic``.

    Raises:
      ConfigError: it is none, or other arguments do not go with it.
    """
    value = {"at": elastic} if isinstance(elastic, str) else elastic
    options = checked(ElasticOptions, value, "elastic")
    _ = options.address
    if callable(every):
        raise ConfigError(
            "every: expected a number with elastic, got a function, whose rounds a newcomer has not seen"
        )
    if group is not None or comm != "auto":
        raise ConfigError(
            "elastic: expected neither group nor comm with it: the coordinator says who is there"
        )
    if isinstance(uncompiled(model), DistributedDataParallel):
        raise ConfigError(
            "elastic: expected a model without DistributedDataParallel, whose ranks cannot come and go; give "
            "the module inside (ddp.module), or leave elastic out"
        )
    return options


def check_elastic(options: LocalOptions, settings: Settings) -> None:
    """
    Raises:
      ConfigError: what does not go with elastic.
    """
    if options.overlap:
        raise ConfigError(
            f"overlap: expected 0 with elastic, got {options.overlap}: what is under way would be lost with a rank"
        )
    if settings.exchange == "owner":
        raise ConfigError(
            "exchange: expected gather or sum with elastic, got owner, where groups follow the number of ranks"
        )
