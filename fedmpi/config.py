"""A run's configuration: strict, typed YAML. An unknown key is an error that lists the valid ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    StrictFloat,
    StrictInt,
    model_validator,
)

from fedmpi import methods
from fedmpi.choice import (
    Choice,
    DataChoice,
    LossChoice,
    MetricChoice,
    ModelChoice,
    PartitionChoice,
    SamplingChoice,
)
from fedmpi.errors import ConfigError
from fedmpi.local import MOST as _MOST
from fedmpi.local import ClientTest, ClientTesting, Local, Schedule, TimeConfig
from fedmpi.methods.base import Options
from fedmpi.optimizers import Name, Optimizer
from fedmpi.overrides import override, read
from fedmpi.plan import Rule
from fedmpi.validation import Strict, checked, mapping

# pydantic before 2.8 would give a second argument something of its own.
_Method = Annotated[SerializeAsAny[Options], BeforeValidator(lambda value: methods.parse(value))]


class _Section(Strict):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerConfig(_Section):
    lr: float | None = Field(
        None, gt=0, description="the server's learning rate η (default: local.lr; required for adam and yogi)"
    )
    optimizer: Name = Field(
        "sgd",
        description="the rule on what the method sums. sgd, momentum, nesterov: on the accumulated "
        "gradients' mean, Δ / local.lr; adam, yogi: on the model difference Δ with η and τ as in Reddi et al. (in a "
        "subspace on AᵀΔ); with mode: data_parallel all on the mean gradient, but with local.steps from 2 as here",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁ of all but sgd")
    beta2: float = Field(0.99, ge=0, lt=1, description="adam's and yogi's β₂")
    epsilon: float = Field(1e-3, gt=0, description="adam's and yogi's τ: v starts at τ²")
    schedule: Schedule = Schedule.model_validate({})
    aggregate: Literal["mean", "trimmed_mean", "median"] = Field(
        "mean",
        description="how clients' vectors are combined. trimmed_mean, median: for each coordinate, every client counts "
        "once; for methods that decode to D numbers, with topology: aggregator",
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="trimmed_mean: the share left out at either end")

    @model_validator(mode="after")
    def _rate(self) -> ServerConfig:
        if self.lr is None and self.optimizer in ("adam", "yogi"):
            raise ValueError(
                f"expected lr, the paper's η, with optimizer: {self.optimizer}, got none: their steps are "
                f"normalised, so local.lr is no default; set server.lr"
            )
        return self


class ClipConfig(_Section):
    """Norm clipping of clients' accumulated gradients, before compression."""

    norm: float = Field(gt=0, description="a longer accumulated gradient is shortened to this L2 norm")


class StopConfig(_Section):
    """When a run ends before its last round."""

    metric: str = Field(description="a metric, test_loss, client_worst, …")
    target: float | None = Field(None, description="end when the metric reaches this value")
    patience: int | None = Field(
        None, ge=1, le=_MOST, description="end after this many rounds without a better value"
    )

    @model_validator(mode="after")
    def _one(self) -> StopConfig:
        if self.target is None and self.patience is None:
            raise ValueError(
                "stop: expected a target (the value that is enough) or patience (rounds without a better one)"
            )
        return self


class CheckpointConfig(_Section):
    """When a run writes a checkpoint. It always does when a signal ends it."""

    rounds: int | None = Field(None, ge=1, le=_MOST, description="write one every this many rounds")
    minutes: float | None = Field(
        10.0,
        gt=0,
        description="write one when the last is this many minutes old (null: never), and writing it took less than a "
        "tenth of that time",
    )
    keep: int = Field(2, ge=1, le=_MOST, description="how many are kept, the last ones")


class Config(_Section):
    """A run. The command line's ``key.path=value`` overrides any of these."""

    data: DataChoice
    model: ModelChoice
    mode: Literal["federated", "data_parallel"] = Field(
        "federated",
        description="data_parallel: every rank trains one client with its share of the data, one step a round, or "
        "local.steps of its own",
    )
    clients: int = Field(
        0,
        ge=0,
        le=_MOST,
        description="how many (data_parallel: the number of ranks, which is the default there)",
    )
    partition: PartitionChoice = Field("iid", validate_default=True)
    cohort: StrictInt | StrictFloat | None = Field(
        None, description="clients a round: a number, or a fraction as a float (default: all)"
    )
    sampling: SamplingChoice = Field(
        "uniform",
        description="uniform: a new draw in each round; weighted: with probability proportional to their samples "
        "(messages then have equal weights); poisson: each client independently with probability cohort / clients, so "
        "rounds differ in size; round_robin: in order; epoch_shuffle: each client exactly once in an epoch; or your "
        "own function by import path",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a called client's message is lost")
    time: TimeConfig | None = Field(
        None,
        description="simulate the time of clients, stragglers and deadlines (default: no client is late)",
    )
    rounds: int = Field(ge=1, le=_MOST)
    local: Local
    on_bad_update: Literal["stop", "reject"] = Field(
        "stop",
        description="when a client's loss, gradient or message is NaN or infinite: stop the run, or continue without "
        "that client in this round, and count it",
    )
    clip: ClipConfig | None = None
    server: ServerConfig = ServerConfig.model_validate({})
    loss: LossChoice = Field("cross_entropy", validate_default=True)
    metrics: tuple[MetricChoice, ...] = Field(
        (),
        description="metrics on the test set besides the loss's own, which comes first (a loss of your own has "
        "none)",
    )
    best: str | None = Field(
        None, description="also keep the model with the best value of this metric (model-best.safetensors)"
    )
    stop: StopConfig | None = Field(None, description="end the run early")
    method: _Method
    parts: tuple[Rule, ...] = Field(
        (),
        description="rules for tensors that method does not compress: [{match: ..., travels: exact | local | frozen | "
        "a method}]; the first rule that matches a tensor counts. Buffers that training changes are averaged exactly "
        "without a rule",
    )
    exact_below: int = Field(
        0,
        ge=0,
        le=_MOST,
        description="tensors of fewer numbers are averaged exactly; this is the last rule of parts",
    )
    comm: Literal["auto", "mpi", "gloo", "nccl"] = Field(
        "auto",
        description="what connects the ranks: MPI, or torch.distributed's Gloo (CPU) or NCCL (GPU); auto: MPI "
        "under mpirun, mpiexec and srun with PMI, else NCCL if each rank has its own GPU, else Gloo",
    )
    device: str = Field(
        "auto",
        pattern=r"^[a-z]+(:\d+)?$",
        description="where each rank computes. auto: its GPU where it sees one (ranks share where there are fewer), "
        "else the CPU; cpu; cuda; cuda:N; other accelerators of torch have not been tried",
    )
    timeout: float = Field(
        300.0,
        gt=0,
        description="seconds that ranks wait for one that does not answer; with Gloo and NCCL also for a busy one",
    )
    topology: Literal["allreduce", "aggregator"] = Field(
        "allreduce", description="allreduce: ranks are peers; aggregator: rank 0 aggregates, the others train"
    )
    store: Literal["memory", "mmap"] = Field("memory", description="where clients' state is kept")
    store_folder: str | None = Field(
        None, description="for store: mmap (default: the system's temporary folder)"
    )
    checkpoint: CheckpointConfig = CheckpointConfig.model_validate({})
    reproducible: bool = Field(
        False, description="the same bits at any number of ranks: one thread a rank, fixed-point sums"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    client_test: ClientTesting = Field(
        ClientTest.model_validate({"of": 0.0}),
        description="what each client's model is tested on: the share of its samples that it holds out, or groups, or "
        "{of: 0.2, after: true, save: true}. Mean, median, worst tenth and spread of accuracies are reported",
    )
    evaluate_every: int = Field(1, ge=1, le=_MOST, description="rounds between evaluations on the test set")
    test_batch: int = Field(512, ge=1, le=_MOST, description="test samples in a batch")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="torch threads a rank (default: 1 or this rank's share of the cores, whichever is faster)",
    )

    @model_validator(mode="after")
    def _mode(self) -> Config:
        if self.mode == "federated":
            if not self.clients:
                raise ValueError("clients: required, not given")
            return self
        local, time = self.local, self.time and self.time.model_dump(exclude_defaults=True)
        wanted: dict[
            str, tuple[Any, Any, str]
        ] = {  # key → value, the only one that goes, why or what instead
            "cohort": (self.cohort, None, " (every rank trains in every round)"),
            "sampling": (
                self.own_sampling and self.own_sampling.name,
                None,
                " of your own (every rank trains in every round)",
            ),
            "dropout": (self.dropout, 0, ""),
            "topology": (self.topology, "allreduce", ""),
            "local.epochs": (local.epochs, None, " (use local.steps: H for local updates)"),
            "time": (time, None, ""),
            "on_bad_update": (self.on_bad_update, "stop", " (every rank's message is needed)"),
        }
        for key, (value, only, why) in wanted.items():
            if value != only:
                expected = "none" if only is None else only
                raise ValueError(f"{key}: expected {expected}{why} with mode: data_parallel, got {value}")
        return self

    @model_validator(mode="after")
    def _clients_rule(self) -> Config:
        local = self.local
        if local.fednova and self.on_bad_update == "reject":
            raise ValueError(
                "local.fednova: expected on_bad_update: stop, got reject: FedNova's weights are computed before a "
                "client can be rejected"
            )
        if self.mode != "data_parallel":
            return self
        alone: list[tuple[str, Any, Any]] = [
            ("scaffold", local.scaffold, None),
            ("fednova", local.fednova, False),
        ]
        why = "whose ranks make equally many steps on shares of the same data"
        if not self.local_updates:
            alone += [
                ("optimizer", local.optimizer, "sgd"),
                ("momentum", local.momentum, 0),
                ("mu", local.mu, 0),
            ]
            why = "where the step is the server's (use server.optimizer, or local.steps from 2)"
        for key, value, only in alone:
            if value != only:
                expected = "none" if only in (None, 0) else only
                raise ValueError(
                    f"local.{key}: expected {expected} with mode: data_parallel, {why}, got {value}"
                )
        return self

    @model_validator(mode="after")
    def _cohort(self) -> Config:
        if isinstance(self.cohort, float) and not 0 < self.cohort <= 1:
            raise ValueError(
                f"cohort: expected a number of clients or a fraction in (0, 1], got {self.cohort}"
            )
        if isinstance(self.cohort, int) and not 1 <= self.cohort <= self.clients:
            raise ValueError(f"cohort: expected 1 to clients = {self.clients}, got {self.cohort}")
        if self.time and (self.time.first or 0) > self.cohort_size:
            raise ValueError(
                f"time.first: expected at most the cohort, {self.cohort_size}, got {self.time.first}"
            )
        return self

    @model_validator(mode="after")
    def _aggregate(self) -> Config:
        if self.server.aggregate != "mean" and self.topology != "aggregator":
            raise ValueError(
                f"server.aggregate: expected mean with topology: {self.topology}, got {self.server.aggregate}, which "
                f"needs topology: aggregator, where one rank receives every client's vector"
            )
        return self

    @property
    def cohort_size(self) -> int:
        if self.cohort is None:
            return self.clients
        if isinstance(self.cohort, int):
            return self.cohort
        return max(1, round(self.cohort * self.clients))

    @property
    def own_sampling(self) -> Choice | None:
        """The user's function that draws cohorts."""
        return self.sampling if isinstance(self.sampling, Choice) else None

    @property
    def largest_cohort(self) -> int:
        """So many clients a round at the most."""
        return self.clients if self.sampling == "poisson" or self.own_sampling else self.cohort_size

    @property
    def rounds_per_epoch(self) -> int:
        return -(-self.clients // self.cohort_size)

    @property
    def local_updates(self) -> bool:
        """Ranks in data-parallel mode step by themselves, and average how far they came once a round."""
        return self.mode == "data_parallel" and (self.local.steps or 1) > 1

    @property
    def rule(self) -> Optimizer:
        """The server's, of what clients accumulate."""
        gradients = self.mode == "data_parallel" and not self.local_updates
        server, step = self.server, 1.0 if gradients else self.local.lr
        return Optimizer(server.optimizer, server.beta1, server.beta2, server.epsilon, step)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Which tensors travel otherwise than by :attr:`method`."""
        if not self.exact_below:
            return self.parts
        return (*self.parts, Rule(match=f"< {self.exact_below}", travels="exact"))

    def server_lr(self, t: int) -> float:
        """η in round ``t``."""
        lr = self.local.lr if self.server.lr is None else self.server.lr
        return lr * self.server.schedule.factor(t, self.rounds)

    def for_ranks(self, ranks: int) -> Config:
        """The configuration of a run of so many ranks, which in data-parallel mode are its clients.

        Raises:
          ConfigError: another number of clients was asked for.
        """
        if self.mode == "federated":
            return self
        if self.clients not in (0, ranks):
            raise ConfigError(
                f"clients: expected {ranks}, the ranks, with mode: data_parallel, got {self.clients}"
            )
        return self.model_copy(update={"clients": ranks})

    def plain(self) -> dict[str, Any]:
        """The resolved configuration as YAML types."""
        resolved: dict[str, Any] = json.loads(self.model_dump_json())
        return resolved


def parse(values: Any) -> Config:
    """The configuration of parsed YAML.

    Raises:
      ConfigError: with a line for each key that is unknown, missing, of the wrong type or out of range.
    """
    return checked(Config, mapping(values, "config"))


def load(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] | None = None) -> Config:
    """The configuration of a YAML file, or of a mapping, with ``key.path=value`` overrides, whose values are YAML too.

    A file may name another one whose keys it starts from: ``base: ../quickstart.yaml``, relative to itself.
    """
    values = values_of(source)
    for text in overrides or []:
        override(values, text)
    return parse(values)


def values_of(source: str | Path | Mapping[str, Any] | Config) -> Any:
    """The keys and values of a configuration that is not checked yet; the caller may change them."""
    if isinstance(source, Config):
        return source.plain()
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    if isinstance(source, str | Path):
        return mapping(read(Path(source)), "config")
    raise ConfigError(
        f"config: expected a YAML file's path, a mapping or a fedmpi.Config, got {type(source).__name__}"
    )
