"""What a hook keeps between steps, as it is saved, and the one door through which it comes back.

A state is compared, on every rank, with what this job's own would be (:mod:`fedmpi.schema`), then all ranks agree on
what must be the same everywhere; only then anything changes. So a state is loaded on all ranks, or refused on all with
one sentence, and a refused one leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, Gathers
from fedmpi.errors import ConfigError, MessageError
from fedmpi.integrations.groups import Group
from fedmpi.integrations.settings import Settings
from fedmpi.integrations.shards import Shards
from fedmpi.method import State, placed
from fedmpi.methods.base import Options
from fedmpi.schema import Schema, differs, schema_of, shown


class Kept(Protocol):
    """What a state is of: a :class:`fedmpi.integrations.reducer.Reducer`."""

    comm: Comm
    shards: Shards | None
    everyone: Gathers
    options: Options
    settings: Settings
    groups: list[Group]
    step: int
    skipped: int

    def begin_span(self) -> None: ...


_KEYS = ("ranks", "rank", "shard", "method", "settings", "step", "skipped", "measuring", "groups")
_GROUP = ("names", "shapes", "state", "memory")
# What a state depends on; when compression starts and how messages meet may change between two parts of a job.
_SETTINGS = ("seed", "exact_below", "steps_per_epoch", "group_mb")
_MEMORY = "the server's memory"  # the same on ranks with the same shards
_MOST = 2**62  # what random.key takes as a step, with room


def saved(reducer: Kept) -> dict[str, Any]:
    """What :func:`load` takes: tensors and plain values, a copy."""
    return {
        "ranks": reducer.comm.size,
        "rank": reducer.comm.rank,
        "shard": _place(reducer),
        "method": reducer.options.model_dump(mode="json"),
        "settings": _settings(reducer),
        "step": reducer.step,
        "skipped": reducer.skipped,
        "measuring": False,
        "groups": [
            {
                "names": list(group.names),
                "shapes": [list(shape) for shape in group.spec.shapes],
                "state": _copy(group.state),
                "memory": _copy(group.memory),
            }
            for group in reducer.groups
        ],
    }


def load(reducer: Kept, state: object) -> None:
    """Go on where :func:`saved` stood. Called by all ranks, each with its own.

    Saved by another number of ranks, the steps and the server's memory are taken over, and what each rank kept
    (residuals, look-back gradients) starts afresh, with a warning.

    Raises:
      ConfigError: on all ranks, and nothing has changed: it is not such a state, or that of another method, model or
        setting, or the ranks' do not belong together.
    """
    comm = reducer.comm
    agreed(reducer.everyone, lambda: check(reducer, state))
    assert isinstance(state, Mapping)
    same = state["ranks"] == comm.size
    if not same:
        warnings.warn(
            f"fedmpi: the state of rank {state['rank']} of {state['ranks']} is loaded by rank {comm.rank} of "
            f"{comm.size}: residuals and look-back gradients start afresh on all ranks",
            stacklevel=2,
        )
    for group, values in zip(reducer.groups, state["groups"], strict=True):
        group.reset()
        group.memory = placed(_copy(values["memory"]), group.device)
        if same:
            group.state = placed(_copy(values["state"]), group.device)
        group.rollback()
        group.believe()
    reducer.step, reducer.skipped = state["step"], state["skipped"]
    reducer.begin_span()


def chosen(comm: Gathers, state: object, among: Sequence[Options]) -> tuple[Options, bool]:
    """The method of a state that ``auto`` saved, and whether it was still measuring. Called by all ranks.

    Raises:
      ConfigError: on all ranks: it is not such a state, or its method is none of these, or not the same everywhere.
    """
    tried = {_plain(options.model_dump(mode="json")): options for options in among}

    def check() -> dict[str, Any]:
        values = _head(state)
        method = _plain(values["method"], "method")
        if method not in tried:
            raise ConfigError(
                f"method: expected one that auto tries here, {', '.join(tried)}, got {shown(values['method'])}"
            )
        return {"method": method, "measuring": values["measuring"]}

    found = agreed(comm, check)
    return tried[found["method"]], found["measuring"]


def agreed(comm: Gathers, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``check`` a state on every rank: what it finds, the same on all.

    Raises:
      ConfigError: on all ranks, in the same words: one found something wrong, or they did not find the same.
    """
    try:
        mine: dict[str, Any] = {"found": check()}
    except ConfigError as error:
        mine = {"wrong": str(error)}
    offers = [json.loads(offer) for offer in comm.allgather(json.dumps(mine).encode())]
    for rank, offer in enumerate(offers):
        if "wrong" in offer:
            raise ConfigError(f"state_dict: {offer['wrong']} (rank {rank}); nothing was loaded on any rank")
    shards: dict[str, int] = {}
    for rank, offer in enumerate(offers):
        same = shards.setdefault(json.dumps(offer["found"].pop("shard", None)), rank)
        for what, got in offer["found"].items():
            other = same if what == _MEMORY else 0
            expected = offers[other]["found"][what]
            if got != expected:
                raise ConfigError(
                    f"state_dict: {what}: rank {other}'s has {expected}, rank {rank}'s has {got}; expected what all "
                    "ranks saved at the same time; nothing was loaded on any rank"
                )
    found: dict[str, Any] = offers[0]["found"]
    return found


def check(reducer: Kept, state: object) -> dict[str, Any]:
    """What must be the same on every rank.

    Raises:
      ConfigError: without its beginning: what this rank alone can say of its state.
    """
    values, size, rank = _head(state), reducer.comm.size, reducer.comm.rank
    mine = reducer.options.model_dump(mode="json")
    if _plain(values["method"], "method") != _plain(mine):
        raise ConfigError(f"method: expected {shown(mine)}, got {shown(values['method'])}")
    settings = _settings(reducer)
    if not isinstance(values["settings"], Mapping) or values["settings"].keys() != settings.keys():
        raise ConfigError(f"settings: expected {', '.join(settings)}, got {shown(values['settings'])}")
    for name, expected in settings.items():
        if _plain(values["settings"][name], f"settings.{name}") != _plain(expected):
            raise ConfigError(f"settings.{name}: expected {expected}, got {shown(values['settings'][name])}")
    if _plain(values["shard"], "shard") != _plain(_place(reducer)):
        raise ConfigError(
            f"shard: expected {_shard(_place(reducer))}, got {_shard(values['shard'])}; every rank loads what it "
            "saved, with the model sharded as it was"
        )
    if values["ranks"] == size and values["rank"] != rank:
        raise ConfigError(
            f"rank: expected rank {rank}'s own state, got rank {values['rank']}'s; every rank saves and loads its own "
            "(with accelerate: fedmpi.accelerate.register)"
        )
    _same_groups(reducer.groups, values)
    digest = hashlib.sha256()
    for i, (group, kept) in enumerate(zip(reducer.groups, values["groups"], strict=True)):
        for part, schema in _schemas(group).items():
            if wrong := differs(schema, kept[part], f"groups.{i}.{part}"):
                raise ConfigError(wrong)
        try:
            group.method.up.verify(_copy(kept["state"]))
        except MessageError as error:
            raise ConfigError(f"groups.{i}.state: {error}") from None
        _feed(digest, kept["memory"])
    return {
        **{name: values[name] for name in ("ranks", "step", "skipped", "measuring")},
        "shard": values["shard"],
        _MEMORY: digest.hexdigest()[:16],
    }


def fields(value: object, names: tuple[str, ...], where: str = "") -> Mapping[str, Any]:
    """``value``, which is what a state of these names must be.

    Raises:
      ConfigError: it is not.
    """
    at = f"{where}: " if where else ""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{at}expected what state_dict() returned, got {shown(value)}")
    if missing := [name for name in names if name not in value]:
        raise ConfigError(
            f"{at}expected what this version's state_dict() returned, {', '.join(missing)} is missing"
        )
    if strange := [name for name in value if name not in names]:
        raise ConfigError(f"{at}expected {', '.join(names)}, got {shown(strange[0])} besides")
    return value


def _head(state: object) -> Mapping[str, Any]:
    """``state``, if all but its groups' insides are what they should be."""
    state = fields(state, _KEYS)
    for name, least, limit in (
        ("ranks", 1, 2**31),
        ("step", 0, _MOST),
        ("skipped", 0, _MOST),
        ("rank", 0, 2**31),
    ):
        value = state[name]
        if type(value) is not int or not least <= value < limit:
            raise ConfigError(f"{name}: expected a whole number from {least}, got {shown(value)}")
    if state["rank"] >= state["ranks"]:
        raise ConfigError(f"rank: expected one below {state['ranks']}, got {state['rank']}")
    if type(state["measuring"]) is not bool:
        raise ConfigError(f"measuring: expected true or false, got {shown(state['measuring'])}")
    if not isinstance(state["groups"], (list, tuple)):
        raise ConfigError(f"groups: expected a list, got {shown(state['groups'])}")
    for i, group in enumerate(state["groups"]):
        if not isinstance(group, Mapping) or set(group) != set(_GROUP):
            raise ConfigError(f"groups.{i}: expected {', '.join(_GROUP)}, got {shown(group)}")
        names, shapes = group["names"], group["shapes"]
        for part, values, kind in (("names", names, str), ("shapes", shapes, (list, tuple))):
            if not isinstance(values, (list, tuple)) or not all(isinstance(v, kind) for v in values):
                what = "names of parameters" if part == "names" else "a shape a parameter"
                raise ConfigError(f"groups.{i}.{part}: expected {what}, got {shown(values)}")
        if len(names) != len(shapes):
            raise ConfigError(f"groups.{i}.shapes: expected {len(names)}, got {len(shapes)}")
    return state


def _same_groups(groups: Sequence[Group], values: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the saved parameters are these, in these groups."""
    mine = {n: list(s) for group in groups for n, s in zip(group.names, group.spec.shapes, strict=True)}
    theirs: dict[str, list[Any]] = {}
    for group in values["groups"]:
        for name, shape in zip(group["names"], group["shapes"], strict=True):
            if name in theirs:
                raise ConfigError(f"parameters: expected each once, got {shown(name)} twice")
            theirs[name] = list(shape)
    for name in [*mine, *theirs]:
        if _plain(mine.get(name)) != _plain(theirs.get(name), f"the shape of {shown(name)}"):
            expected, got = (
                f"{shown(name)} of shape {shown(of[name])}" if name in of else f"no {shown(name)}"
                for of in (mine, theirs)
            )
            raise ConfigError(f"parameters: expected {expected}, got {got}; it was saved with another model")
    if [list(group.names) for group in groups] != [list(group["names"]) for group in values["groups"]]:
        raise ConfigError(
            f"groups: expected the same parameters together, {len(groups)} groups, got {len(values['groups'])} "
            f"others, of {values['ranks']} ranks (with exchange: owner groups follow the number of ranks)"
        )


def _schemas(group: Group) -> dict[str, Schema]:
    return {
        "state": schema_of(group.method.up.init(), clients=1),
        "memory": schema_of(group.decoder.memory()),
    }


def _place(reducer: Kept) -> list[list[int]]:
    return reducer.shards.place if reducer.shards else []


def _shard(place: object) -> str:
    """Where among the shards, in words."""
    if not place:
        return "the state of whole parameters"
    return f"that of shard {shown(place)} (its number and how many there are, for each dimension)"


def _settings(reducer: Kept) -> dict[str, Any]:
    every = reducer.settings.model_dump(mode="json")
    rules = {"parts": every["parts"]} if every["parts"] else {}
    return {name: every[name] for name in _SETTINGS} | rules


def _plain(value: object, what: str = "") -> str:
    """A tree of plain values as text, equal for equal trees."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise ConfigError(f"{what}: expected plain values, got {shown(value)}") from None


def _feed(digest: Any, state: State) -> None:
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())


def _copy(state: State) -> State:
    """Tensors of one's own, on the CPU: a state is the same wherever it is loaded."""
    return {name: _own(value) for name, value in state.items()}


def _own(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
