"""What a configuration names: rows of tables with their options, or your own by import path."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from fedmpi import own
from fedmpi.tasks.data import DATA
from fedmpi.tasks.metrics import METRICS
from fedmpi.tasks.models import MODELS
from fedmpi.tasks.objectives import OBJECTIVES
from fedmpi.tasks.partitions import PARTITIONS
from fedmpi.validation import checked, choose, no_words


class Choice(BaseModel):
    """One row of a table with that row's options: ``{name: dirichlet, alpha: 0.5}`` or a bare name."""

    model_config = ConfigDict(frozen=True)
    name: str
    options: dict[str, Any] = {}


def _chooser(where: str, table: Any) -> BeforeValidator:
    """A row of ``table``, or an import path, whose options its own function checks."""

    def parse(value: Any) -> Choice:
        if isinstance(value, Choice):
            return value
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and own.is_path(str(value.get("name"))):
            options = {k: v for k, v in value.items() if k != "name"}
            no_words(options, where)
            return Choice(name=value["name"], options=options)
        name = choose(where, value, table)
        options = checked(table[name].options, {k: v for k, v in value.items() if k != "name"}, where)
        return Choice(name=name, options=options.model_dump())

    return BeforeValidator(parse)


def _sampling(value: Any) -> Any:
    """A name, or an import path with options."""
    given = {"name": value} if isinstance(value, str) else value
    if isinstance(given, dict) and own.is_path(str(given.get("name"))):
        options = {k: v for k, v in given.items() if k != "name"}
        no_words(options, "sampling")
        return Choice(name=given["name"], options=options)
    return value


_flat = PlainSerializer(lambda choice: {"name": choice.name, **choice.options})
_short = PlainSerializer(
    lambda choice: {"name": choice.name, **choice.options} if choice.options else choice.name
)
DataChoice = Annotated[Choice, _chooser("data", DATA), _flat]
ModelChoice = Annotated[Choice, _chooser("model", MODELS), _flat]
PartitionChoice = Annotated[Choice, _chooser("partition", PARTITIONS), _flat]
LossChoice = Annotated[Choice, _chooser("loss", OBJECTIVES), _short]
SamplingChoice = Annotated[
    Literal["uniform", "weighted", "poisson", "round_robin", "epoch_shuffle"] | Choice,
    BeforeValidator(_sampling),
    PlainSerializer(lambda one: one if isinstance(one, str) else {"name": one.name, **one.options}),
]
MetricChoice = Annotated[Choice, _chooser("metrics", METRICS), _short]
