"""What local updates keep between steps, as it is saved, and as it comes back; and what ranks agree on at the start.

A state is looked at on every rank before anything changes, as :mod:`fedmpi.integrations.state` does it for a method's
part, which is here a part of each fragment's.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmpi.comm import agree as agreement
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError
from fedmpi.integrations import state as reducers
from fedmpi.integrations.fragments import Buffers, Fragment, Outcome, State
from fedmpi.schema import differs, schema_of, shown
from fedmpi.validation import Strict


class Kept(Protocol):
    """What a state is of: a :class:`fedmpi.integrations.local_sgd.LocalSGD`."""

    comm: Comm
    fragments: list[Fragment]
    buffers: Buffers
    told: list[dict[str, Any]]
    span: Span
    step: int
    rounds: int
    dropped: int
    at: int

    @property
    def options(self) -> Strict: ...

    def take_in_all(self, alpha: float = 0.0) -> None: ...


_COUNTS = ("step", "rounds", "dropped", "cycles", "at", "length")
_KEYS = ("ranks", "rank", "options", *_COUNTS, "told", "fragments", "buffers")
_FRAGMENT = ("reducer", "anchor", "outer", "taken", "due", "counts", "odd", "mean", "buffers")
_MOST = 2**62


class Span:
    """Where what is told begins.

    Attributes:
      waited: seconds in which a step waited for what was under way.
    """

    def __init__(self, local: Kept) -> None:
        self.step, self.rounds, self.dropped = local.step, local.rounds, local.dropped
        self.sent, self.received, self.waited = local.comm.sent, local.comm.received, 0.0


def stats(local: Kept) -> dict[str, Any]:
    """What :meth:`fedmpi.integrations.local_sgd.LocalSGD.stats` tells."""
    span, each = local.span, [fragment.reducer.stats() for fragment in local.fragments]
    steps = local.step - span.step
    full = 4 * sum(fragment.reducer.size for fragment in local.fragments) * steps
    payload = sum(told["payload_bytes"] for told in each)
    return {
        "method": each[0]["method"],
        "step": local.step,
        "steps": steps,
        "rounds": local.rounds - span.rounds,
        "dropped": local.dropped - span.dropped,
        "dropped_rounds": [dict(told) for told in local.told],
        "payload_bytes": payload,
        "uncompressed_bytes": full,
        "ratio": full / payload if payload else math.nan,
        "largest_bytes": max(fragment.largest for fragment in local.fragments),
        "wire_sent_bytes": local.comm.sent - span.sent,
        "wire_received_bytes": local.comm.received - span.received,
        "kept_bytes": sum(told["kept_bytes"] for told in each)
        + sum(fragment.kept_bytes for fragment in local.fragments),
        "timed_rounds": min(told["timed_steps"] for told in each),
        **{name: sum(told[name] for told in each) for name in each[0] if name.endswith("_seconds")},
        "waited_seconds": span.waited,
    }


def card(options: Strict, length: int, module: nn.Module) -> dict[str, Any]:
    """What must be the same on all ranks: the arguments, and what the model has."""
    tensors = {name: [str(x.dtype), list(x.shape)] for name, x in tensors_of(module).items()}
    return {**options.model_dump(mode="json"), "first every": length, "model": tensors}


def agree(comm: Comm, options: Strict, length: int, module: nn.Module) -> None:
    """
    Raises:
      CommError: on all ranks: they disagree on it.
    """
    agreement.agree(comm, {**agreement.versions(), **card(options, length, module)})


@torch.no_grad()
def alike(comm: Comm, module: nn.Module) -> None:
    """Parameters and buffers become rank 0's, where any rank's differ, frozen ones as well. Called by all ranks."""
    tensors, digest = tensors_of(module), hashlib.blake2b()
    for x in tensors.values():
        digest.update(to_bytes(x))
    if len(set(comm.allgather(digest.digest()))) == 1:
        return
    for x in tensors.values():
        data = comm.broadcast(to_bytes(x) if comm.rank == 0 else b"")
        if data and comm.rank:
            x.copy_(torch.frombuffer(bytearray(data), dtype=x.dtype).view(x.shape))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def to_bytes(x: Tensor) -> bytes:
    flat = x.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def saved(local: Kept) -> dict[str, Any]:
    """What :func:`load` takes: tensors and plain values, a copy. What is under way has come in by then."""
    return {
        "ranks": local.comm.size,
        "rank": local.comm.rank,
        "options": local.options.model_dump(mode="json"),
        **{name: getattr(local, name) for name in _COUNTS},
        "told": [dict(told) for told in local.told],
        "fragments": [_saved(fragment) for fragment in local.fragments],
        "buffers": {name: value.clone() for name, value in local.buffers.last.items()},
    }


def _saved(fragment: Fragment) -> dict[str, Any]:
    outcome = None if fragment.under_way is None else fragment.under_way.result()
    mean, buffers = {}, {}
    if outcome is not None and outcome.counts:
        mean = {name: v.clone() for group in fragment.groups for name, v in group.views.items()}
        buffers = {} if fragment.buffers is None else fragment.buffers.result()
    return {
        "reducer": reducers.saved(fragment.reducer),
        "anchor": fragment.anchor(),
        "outer": [{name: value.clone() for name, value in kept.items()} for kept in fragment.outer],
        "taken": fragment.taken,
        "due": fragment.due,
        "counts": outcome is not None and outcome.counts,
        "odd": [] if outcome is None else list(outcome.odd),
        "mean": mean,
        "buffers": buffers,
    }


def load(local: Kept, state: object) -> None:
    """Go on where :func:`saved` stood. Called by all ranks, each with its own.

    Raises:
      ConfigError: on all ranks, and nothing has changed.
    """
    reducers.agreed(local.comm, lambda: _check(local, state))
    assert isinstance(state, Mapping)
    same = state["ranks"] == local.comm.size
    for fragment, kept in zip(local.fragments, state["fragments"], strict=True):
        reducers.load(fragment.reducer, kept["reducer"])
        fragment.put(kept["anchor"], kept["outer"])
        fragment.taken, fragment.due, fragment.under_way = kept["taken"], kept["due"], None
        if kept["due"] is not None:
            fragment.under_way = Future()
            fragment.under_way.set_result(Outcome(kept["counts"], tuple(kept["odd"])))
            for group in fragment.groups:
                for name, view in group.views.items():
                    if kept["counts"]:
                        view.copy_(kept["mean"][name])
    local.buffers.last = {name: value.clone() for name, value in state["buffers"].items()}
    arriving = state["fragments"][0]["buffers"]
    if arriving:
        local.buffers.arrived(arriving)
    for name in _COUNTS:
        setattr(local, name, state[name])
    local.told = [dict(told) for told in state["told"]]
    if not same:
        _meet(local, state)


def _meet(local: Kept, state: Mapping[str, Any]) -> None:
    """Other ranks than those that saved: all begin with what those last agreed on."""
    warnings.warn(
        f"fedmpi: the state of {state['ranks']} ranks is loaded by {local.comm.size}: all go on from the last "
        f"synchronisation, without the steps since then",
        stacklevel=4,
    )
    local.take_in_all()
    for fragment in local.fragments:
        fragment.go_back()
    local.buffers.put(local.buffers.last)
    local.at = 0


def _check(local: Kept, state: object) -> dict[str, Any]:
    """What must be the same on every rank.

    Raises:
      ConfigError: without its beginning: what this rank alone can say of its state.
    """
    values = reducers.fields(state, _KEYS, "")
    for name in ("ranks", "rank", *_COUNTS):
        _whole(values[name], name)
    size, rank = local.comm.size, local.comm.rank
    if values["ranks"] == size and values["rank"] != rank:
        raise ConfigError(f"rank: expected rank {rank}'s own state, got rank {values['rank']}'s")
    options = local.options.model_dump(mode="json")
    for name, expected in reducers.fields(values["options"], tuple(options), "options").items():
        if type(expected) is not type(options[name]) or expected != options[name]:
            raise ConfigError(f"{name}: expected {options[name]}, got {shown(expected)}")
    if not values["at"] < max(1, values["length"]):
        raise ConfigError(f"at: expected a step below length, {values['length']}, got {values['at']}")
    parts, told = values["fragments"], values["told"]
    if not isinstance(parts, (list, tuple)) or len(parts) != len(local.fragments):
        raise ConfigError(f"fragments: expected a list of {len(local.fragments)}, got {shown(parts)}")
    if not isinstance(told, (list, tuple)) or not all(isinstance(each, Mapping) for each in told):
        raise ConfigError(f"told: expected a list, got {shown(told)}")
    buffers = schema_of(local.buffers.last)
    buffers = {name: entry._replace(finite=False) for name, entry in buffers.items()}
    if wrong := differs(buffers, values["buffers"], "buffers"):
        raise ConfigError(wrong)
    digest = hashlib.sha256()
    _feed(digest, values["buffers"])
    found: dict[str, Any] = {}
    for i, (fragment, part) in enumerate(zip(local.fragments, parts, strict=True)):
        where = f"fragments.{i}"
        kept = reducers.fields(part, _FRAGMENT, where)
        found |= {
            f"{where}.{name}": value
            for name, value in reducers.check(fragment.reducer, kept["reducer"]).items()
        }
        _whole(kept["taken"], f"{where}.taken")
        if kept["due"] is not None:
            _whole(kept["due"], f"{where}.due")
        if type(kept["counts"]) is not bool or not isinstance(kept["odd"], (list, tuple)):
            raise ConfigError(
                f"{where}.counts: expected what state_dict() returned, got {shown(kept['counts'])}"
            )
        for r in kept["odd"]:
            _whole(r, f"{where}.odd")
        anchor = schema_of(fragment.anchor())
        wrong = differs(anchor, kept["anchor"], f"{where}.anchor")
        wrong = wrong or differs(anchor if kept["counts"] else {}, kept["mean"], f"{where}.mean")
        arriving = buffers if kept["counts"] and fragment.buffers is not None else {}
        wrong = wrong or differs(arriving, kept["buffers"], f"{where}.buffers")
        if not isinstance(kept["outer"], (list, tuple)) or len(kept["outer"]) != len(fragment.outer):
            wrong = (
                wrong or f"{where}.outer: expected {len(fragment.outer)} states, got {shown(kept['outer'])}"
            )
        for mine, theirs in zip(fragment.outer, kept["outer"], strict=False):
            wrong = wrong or differs(schema_of(mine), theirs, f"{where}.outer")
        if wrong:
            raise ConfigError(wrong)
        for tensors in (kept["anchor"], kept["mean"], kept["buffers"], *kept["outer"]):
            _feed(digest, tensors)
        found[f"{where}.due"] = kept["due"]
    return {
        **{name: values[name] for name in ("ranks", *_COUNTS)},
        **found,
        "what ranks agreed on": digest.hexdigest()[:16],
    }


def _whole(value: object, what: str) -> None:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ConfigError(f"{what}: expected a whole number from 0, got {shown(value)}")


def _feed(digest: Any, tensors: State) -> None:
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(to_bytes(x))
