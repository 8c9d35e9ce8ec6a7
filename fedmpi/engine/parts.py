"""What a configuration names, loaded and checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fedmpi import methods, random
from fedmpi.config import Config
from fedmpi.engine import probe
from fedmpi.errors import ConfigError
from fedmpi.method import Method
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec
from fedmpi.tasks import data, models, objectives, partitions
from fedmpi.tasks.data import Data
from fedmpi.tasks.objectives import Objective
from fedmpi.tasks.partitions import Partition


class Parts(NamedTuple):
    data: Data
    objective: Objective
    partition: Partition
    model: nn.Module
    spec: Spec
    theta_D: Tensor  # θ₀
    method: Method


def load(config: Config) -> Parts:
    """The parts of a run.

    Raises:
      DataError, ConfigError: one cannot be had, or does not fit another.
    """
    found = data.load(config.data.name, **config.data.options)
    samples, workers = len(found.train.y), config.mode == "data_parallel"
    objectives.check_data(config.loss, found)
    partition = partitions.divide(
        config.partition.name, found.train, config.clients, config.seed, **config.partition.options
    )
    if workers and int(partition.sizes.min()) == 0:
        raise ConfigError("partition.minimum: expected at least 1 with mode: data_parallel, got 0")
    key = random.key(config.seed, stream="model")
    model = models.build(config.model.name, found.shape, found.classes, key, **config.model.options)
    models.check_supported(model)
    spec = Spec.of(model)
    probe.check(config.model.name, model, config.loss, found)
    method = methods.build(config.method, spec, Setup(config.seed, config.clients, config.rule))
    if method.server.samples > samples:
        raise ConfigError(
            f"method.samples: expected at most {samples} (the training set), got {method.server.samples}"
        )
    theta_D = spec.flatten(dict(model.named_parameters()))
    return Parts(found, objectives.OBJECTIVES[config.loss], partition, model, spec, theta_D, method)
