"""What a configuration names, loaded and checked."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from fedmpi import plan, random
from fedmpi.config import Config
from fedmpi.engine import probe
from fedmpi.engine.probe import Traits
from fedmpi.errors import ConfigError
from fedmpi.methods.base import Setup
from fedmpi.plan import Plan
from fedmpi.tasks import data, metrics, models, objectives, partitions
from fedmpi.tasks.data import Data
from fedmpi.tasks.held import by_group, hold_out
from fedmpi.tasks.metrics import Measures
from fedmpi.tasks.partitions import Partition


class Parts(NamedTuple):
    data: Data
    measured: Measures
    partition: Partition
    held: (
        Partition | None
    )  # what clients keep for their own tests: of the training set, or (groups) of the test set
    model: nn.Module
    traits: Traits
    plan: Plan
    start_X: Tensor  # before training


def load(config: Config) -> Parts:
    """The parts of a run.

    Raises:
      DataError, ConfigError: one cannot be had, or does not fit another.
    """
    found = data.load(config.data.name, **config.data.options)
    samples, workers = len(found.train.y), config.mode == "data_parallel"
    objective = objectives.make(config.loss.name, config.loss.options, found)
    objectives.check_data(objective, found)
    measured = metrics.measures(objective, found, [(m.name, m.options) for m in config.metrics])
    partition = partitions.divide(
        config.partition.name, found.train, config.clients, config.seed, **config.partition.options
    )
    held = None
    share = config.client_test.of
    if share == "groups":
        held = by_group(partition, found)
    elif share:
        partition, held = hold_out(partition, share)
        if not len(held.index_N):
            raise ConfigError(
                f"client_test: expected a share that leaves some client a sample, got {share}: the "
                f"largest has {int(partition.sizes.max())}"
            )
    if workers and int(partition.sizes.min()) == 0:
        raise ConfigError("partition.minimum: expected at least 1 with mode: data_parallel, got 0")
    key = random.key(config.seed, stream="model")
    model = models.build(config.model.name, found.shape, found.classes, key, **config.model.options)
    models.check_supported(model)
    traits = probe.look(config.model.name, model, measured, found)
    tensors = plan.Tensors.of(model, traits.changes)
    named = [r for r in config.rules if not any(tensors.fits(r, name) for name in tensors.parameters)]
    listed = [n for n, _ in model.named_buffers() if any(fnmatchcase(n, r.match) for r in named)]
    tensors = plan.Tensors.of(model, {*traits.changes, *listed})  # the probe sees a few steps only
    setup = Setup(config.seed, config.clients, config.rule)
    made = plan.make(tensors, config.method, config.rules, setup, config.local.scaffold)
    for name, parameter in model.named_parameters():
        if name in made.frozen:
            parameter.requires_grad_(False)
    if made.local.names and held is None:
        raise ConfigError(
            f"parts.travels: local: {made.local.names[0]} is each client's own, so that no model is everybody's; "
            "expected client_test, the share of each client's samples that its own model is tested on (0.2, say)"
        )
    if config.client_test.save and not made.local.names:
        raise ConfigError(
            "client_test.save: expected parts that clients keep (parts: travels: local), got none: model.safetensors "
            "is everybody's"
        )
    if made.method.server.samples > samples:
        raise ConfigError(
            f"method.samples: expected at most {samples} (the training set), got {made.method.server.samples}"
        )
    return Parts(found, measured, partition, held, model, traits, made, made.start(model))
