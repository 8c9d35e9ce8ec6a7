"""What a client does in a round, how long it takes and on what it is tested: ``local``, ``time`` and ``client_test`` in
a configuration."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, SerializeAsAny, model_validator

from fedmpi import methods, own
from fedmpi.methods.base import Options
from fedmpi.validation import Strict, no_words

MOST = 10**9
"""Of anything that is counted: more is a slip, and overflows somewhere."""
_Control = Annotated[
    Literal["exact"] | SerializeAsAny[Options],
    BeforeValidator(lambda value: value if value == "exact" else methods.parse(value, "local.scaffold")),
]


class _Section(Strict):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OwnOptimizer(_Section):
    """A class of torch's kind by its import path, and what it takes besides the parameters and ``lr``."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def _optimizer(value: Any) -> Any:
    """A name, or ``{name: "torch.optim:RMSprop", alpha: 0.9}``, or its name alone."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not own.is_path(str(given.get("name"))):
        return given["name"] if isinstance(given, dict) and [*given] == ["name"] else value
    options = {key: option for key, option in given.items() if key != "name"}
    no_words(options, "local.optimizer")
    if "lr" in options:
        raise ValueError("expected no lr beside local.lr, which it is")
    return OwnOptimizer(name=given["name"], options=options)


_ADAPTIVE = ("adam", "adamw")
_Optimizer = Annotated[
    Literal["sgd", "nesterov", "adam", "adamw"] | OwnOptimizer,
    BeforeValidator(_optimizer),
    PlainSerializer(lambda one: one if isinstance(one, str) else {"name": one.name, **one.options}),
]


class Schedule(_Section):
    """How the server's learning rate changes over the run."""

    name: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup: int = Field(0, ge=0, le=MOST, description="rounds in which it rises linearly from 0")
    final: float = Field(0.0, ge=0, le=1, description="linear's and cosine's last value, as a share of lr")
    milestones: tuple[int, ...] = Field((), description="step's rounds")
    gamma: float = Field(0.1, gt=0, le=1, description="what step multiplies it by at each of them")

    def factor(self, t: int, rounds: int, step: int = 0, steps: int = 1) -> float:
        """What the learning rate is multiplied by in round ``t`` of ``rounds``, or, where it changes within rounds, in
        one of a round's ``steps``."""
        if t < self.warmup:
            return (t * steps + step + 1) / (self.warmup * steps)
        if self.name == "step":
            return self.gamma ** sum(t >= m for m in self.milestones)
        done = (t + step / steps - self.warmup) / max(1, rounds - self.warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.name]
        return self.final + (1 - self.final) * left


def _client_test(value: Any) -> Any:
    return value if isinstance(value, dict | ClientTest) else {"of": value}


class ClientTest(_Section):
    """What every client's model is tested on, client by client; false where there is nothing."""

    of: Annotated[float, Field(ge=0, lt=1)] | Literal["groups"] = Field(
        description="share of its samples that a client holds out; groups: the test set's samples of its own groups "
        "(users, with partition: natural)"
    )
    after: bool = Field(
        False,
        description="also after a round of local steps from the model that it has, which costs a round of all clients "
        "an evaluation: client_after_accuracy beside client_accuracy, and so on",
    )
    save: bool = Field(
        False,
        description="write what each client keeps of the model (parts that are local): clients.safetensors",
    )

    def __bool__(self) -> bool:
        return bool(self.of)

    @model_validator(mode="after")
    def _something(self) -> ClientTest:
        if (self.after or self.save) and not self.of:
            raise ValueError("of: expected a share above 0, or groups, with after or save, got 0")
        return self


ClientTesting = Annotated[
    ClientTest,
    BeforeValidator(_client_test),
    PlainSerializer(lambda one: one.model_dump() if one.after or one.save else one.of),
]


class TimeConfig(_Section):
    """Simulated time of clients, and which of them a round waits for (:mod:`fedmpi.engine.timing`)."""

    compute: float = Field(gt=0, description="seconds a sample, forward and backward (the median client's)")
    compute_spread: float = Field(0.0, ge=0, le=5, description="σ of its logarithm over clients")
    jitter: float = Field(0.0, ge=0, le=5, description="σ of its logarithm from round to round")
    upload: float = Field(gt=0, description="Mb/s, 10^6 bits a second (the median client's)")
    download: float = Field(gt=0, description="Mb/s")
    bandwidth_spread: float = Field(0.0, ge=0, le=5, description="σ of both logarithms over clients")
    first: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="a round ends after this many messages; later ones are dropped",
    )
    deadline: float | None = Field(
        None, gt=0, description="seconds that a round waits; it always waits for the first message"
    )


class Local(_Section):
    """What a client does in a round."""

    lr: float = Field(gt=0, description="η, the clients' learning rate")
    steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="τ local steps; this or epochs (default: 1 step; with mode: data_parallel "
        "from 2 on local updates, of which it is the H)",
    )
    epochs: int | None = Field(None, ge=1, le=MOST, description="passes over the client's own data")
    batch: int | None = Field(
        None, ge=1, le=MOST, description="samples a step (default: all of the client's)"
    )
    optimizer: _Optimizer = Field(
        "sgd",
        description="a step's rule: sgd (with momentum torch.optim.SGD's), nesterov, adam, adamw; or a class of "
        'torch\'s kind by import path, whose options are further keys: {name: "torch.optim:RMSprop", alpha: 0.9}',
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd's and nesterov's")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient; adamw's apart from it")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam's and adamw's β₁")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam's and adamw's β₂")
    epsilon: float = Field(1e-8, gt=0, description="adam's and adamw's ε")
    keep: bool | None = Field(
        None,
        description="each client keeps its optimizer's memory from round to round (default: with mode: data_parallel, "
        "where it is a rank's optimizer)",
    )
    mu: float = Field(
        0.0, ge=0, description="FedProx's μ: clients stay near the model that they started from"
    )
    clip: float | None = Field(None, gt=0, description="a step's gradient is shortened to this L2 norm")
    scaffold: _Control | None = Field(
        None,
        description="SCAFFOLD (Karimireddy et al. 2020, option II): clients correct their drift by control variates, "
        "which travel as a part of their own: exact, or by a method",
    )
    fednova: bool = Field(
        False,
        description="FedNova (Wang et al. 2020): clients' directions are divided by what their steps weigh",
    )
    schedule: Schedule = Field(Schedule.model_validate({}), description="how lr changes from round to round")
    accumulate: int = Field(1, ge=1, le=MOST, description="parts that a batch is computed in, to save memory")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision (torch.autocast); parameters stay float32"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Local:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("expected steps or epochs, not both")
        adaptive, foreign = self.optimizer in _ADAPTIVE, isinstance(self.optimizer, OwnOptimizer)
        name = self.optimizer.name if isinstance(self.optimizer, OwnOptimizer) else self.optimizer
        for key in ("momentum", "weight_decay", "beta1", "beta2", "epsilon") if foreign else ():
            if getattr(self, key) != Local.model_fields[key].default:
                raise ValueError(
                    f"{key}: expected none with optimizer: {name}, which takes its own: optimizer: {{name: {name}, "
                    "<key>: <value>}"
                )
        if adaptive and self.momentum:
            raise ValueError(f"momentum: expected none with optimizer: {name}, whose beta1 it is")
        if self.optimizer == "nesterov" and not self.momentum:
            raise ValueError("momentum: expected one above 0 with optimizer: nesterov, got 0")
        if self.keep and not (adaptive or foreign or self.momentum):
            raise ValueError(
                "keep: expected an optimizer with a memory (momentum, adam, adamw), got sgd without one"
            )
        if self.scaffold and (
            self.optimizer != "sgd" or self.momentum or self.mu or self.fednova or self.clip
        ):
            raise ValueError(
                "scaffold: expected plain sgd (no momentum, mu, clip, fednova), of which the paper's c_i are gradients"
            )
        if self.fednova and (self.optimizer != "sgd" or (self.mu and self.momentum)):
            raise ValueError(
                "fednova: expected optimizer: sgd, with momentum or mu, for which the paper says what steps weigh; got "
                f"{name}{' with both' if self.mu and self.momentum else ''}"
            )
        return self
