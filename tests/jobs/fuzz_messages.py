"""Damaged messages of every method, for its receiver; a kind of :mod:`tests.jobs.fuzz`.

Frames that clients really sent are changed where a frame has structure (counts, names, dtypes, shapes, row counts,
values, indices) and where it has none, and go the way of a message to rank 0: from_bytes with the method's layout, one
client after the other, decompress. Only MessageError may come of it, and what is accepted has its shape and finds its
way into state of the right shape. The process may not take more than ROOM bytes beyond what it had.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedmpi import methods, plan
from fedmpi.errors import FedMPIError, MessageError
from fedmpi.message import Layout, from_bytes, to_bytes
from fedmpi.method import Compressor, Context, Round, State
from fedmpi.methods import METHODS
from fedmpi.methods.base import FeedbackOptions, Setup
from fedmpi.methods.play import play
from fedmpi.spec import Spec

from .outcomes import Attempt, of_frame

ROOM = 256 << 20
CLIENTS = 3
SPECS = (
    Spec(("conv.weight", "conv.bias", "fc.weight"), ((3, 2, 3, 3), (3,), (9, 20))),
    Spec(("w",), ((7, 30),)),  # nothing but a layer that factors, none that does not
    Spec(("b",), ((1,),)),  # indices without bits
)
# What a length, a count or a dimension is replaced by.
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
)
# What four bytes of values are replaced by: NaN, infinities, the largest, a subnormal, zero, minus one, all bits.
FLOATS = (float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45, 0.0, -1.0)
WORDS = [*(struct.pack("<f", x) for x in FLOATS), b"\xff" * 4]


class Target(NamedTuple):
    """A receiver and a frame that it takes."""

    name: str
    up: Compressor
    layout: Layout
    peers: State
    ctx: Context
    frame: bytes
    fields: list[int]  # where numbers of the frame's header start
    values: list[range]  # where arrays lie


def options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's example, its variants, with and without error feedback, and under each wrapper."""
    for name, entry in METHODS.items():
        example = {"name": name, **entry.example}
        yield name, example
        for variant, more in entry.variants.items():
            yield f"{name} {variant}", example | more
        if issubclass(entry.options, FeedbackOptions):
            yield f"{name} feedback", {**example, "feedback": not example.get("feedback", False)}
        for wrapper, outer in METHODS.items():
            if name in outer.wraps or (outer.wraps == "any" and not entry.wraps and not entry.two_passes):
                yield f"{wrapper} over {name}", {"name": wrapper, **outer.example, "inner": example}


def fitted(values: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """The same options for a small model."""
    small = {
        key: min(value, spec.size) if key in ("k", "dim", "r", "m") else value
        for key, value in values.items()
    }
    return small | ({"inner": fitted(small["inner"], spec)} if "inner" in small else {})


def several(spec: Spec) -> methods.Method:
    """Parts of two passes, of votes, of numbers that are kept at both ends, of a subspace that turns, exact ones, a
    buffer and a counter, in one message."""
    shapes = dict(zip(spec.names, spec.shapes, strict=True)) | {"mean": (4,), "steps": (2,), "scale": ()}
    shapes |= {f"more.{i}": (6, 5) for i in range(3)}
    buffers = {name: shapes.pop(name) for name in ("mean", "steps")}
    travels: dict[str, Any] = {
        "more.0": {"name": "powersgd", "rank": 1, "feedback": True},
        "more.1": "signsgd",
        "more.2": {"name": "intrinsic", "dim": 8, "schedule": "time_varying"},
        "scale": "exact",
    }
    rules = [plan.Rule.model_validate({"match": name, "travels": way}) for name, way in travels.items()]
    run = methods.parse({"name": "lookback", "threshold": 0.5, "inner": {"name": "topk", "ratio": 0.2}})
    tensors = plan.Tensors(shapes, buffers, frozenset({"steps"}), frozenset())
    return plan.make(tensors, run, rules, Setup(seed=1)).method


def built(spec: Spec) -> Iterator[tuple[str, methods.Method]]:
    """Each of :func:`options` that the model is large enough for; and, of the first, several in one message."""
    for name, values in options():
        try:
            yield name, methods.build(fitted(values, spec), spec, Setup(seed=1))
        except methods.ConfigError:
            continue
    if spec is SPECS[0]:
        for turn in range(3):  # drawn as often as a method with its variants
            yield f"parts {turn}", several(spec)


def targets(specs: tuple[Spec, ...] = SPECS) -> list[Target]:
    return [
        target
        for spec in specs
        for name, method in built(spec)
        for target in _of(f"{name}, {spec.size} parameters", method)
    ]


def _of(name: str, method: methods.Method) -> Iterator[Target]:
    """Frames of some rounds: first messages, later ones, those after a change of phase."""
    server, up = method.server, method.up
    state = server.init(torch.linspace(-1, 1, up.spec.size))
    senders, peers = (_stacked(init()) for init in (up.init, up.init_peer))
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(CLIENTS, up.spec.size, generator=generator)
    for t in range(4):
        g = base + 0.1 * torch.randn(base.shape, generator=generator)
        now = Round(seed=1, t=t, lr=0.1, rounds_per_epoch=2)
        passes = play(method, g, senders, state, now, peers=peers)
        for one in passes if t != 1 else ():
            frame, held = to_bytes(one.message), peers if one.codec is up else {}
            yield Target(name, one.codec, one.codec.layout(), held, one.ctx, frame, *anatomy(frame))
        last = passes[-1]
        senders, peers, state = last.after, last.peers, server.finish(last.state, last.mean_S, now)


def _stacked(state: State) -> State:
    return {n: v.expand(CLIENTS, *v.shape).clone() for n, v in state.items()}


def anatomy(frame: bytes) -> tuple[list[int], list[range]]:
    """Where the numbers of a frame's header lie, and its arrays: a second reading of the format."""
    fields, values, at = [4, 8], [], 10
    (clients,) = struct.unpack_from("<I", frame, 4)
    while at < len(frame):
        fields.append(at)
        at += 1 + frame[at]
        code, ragged, ndim = frame[at : at + 3]
        fields += [at, at + 1, at + 2, *(at + 3 + 8 * i for i in range(ndim))]
        shape = struct.unpack_from(f"<{ndim}Q", frame, at + 3)
        at += 3 + 8 * ndim
        rows = clients
        if ragged:
            fields += [at + 4 * c for c in range(clients)]
            rows = sum(struct.unpack_from(f"<{clients}i", frame, at))
            at += 4 * clients
        size = rows * (1, 1, 2, 4, 8, 2, 2, 4, 8)[code]
        for n in shape:
            size *= n
        values.append(range(at, at + size))
        at += size
    return fields, values


def _number(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    at = rng.choice(target.fields)
    width = rng.choice((1, 2, 4, 8))
    frame[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")


def _word(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    array = rng.choice(target.values)
    if len(array) >= 4:
        at = rng.randrange(array.start, array.stop - 3)
        at -= (at - array.start) % 4 if rng.random() < 0.8 else 0
        frame[at : at + 4] = rng.choice(WORDS)


def _array(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    array = rng.choice(target.values)
    fill = rng.choice((b"\0", b"\xff", None))
    frame[array.start : array.stop] = rng.randbytes(len(array)) if fill is None else fill * len(array)


def _bytes(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)


def _cut(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    a, b = sorted(rng.randrange(len(frame) + 1) for _ in range(2))
    del frame[a : rng.choice((b, len(frame)))]


def _insert(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    at = rng.randrange(len(frame) + 1)
    frame[at:at] = rng.randbytes(rng.randint(1, 40))


def _splice(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    other = rng.choice(others).frame
    frame[rng.randrange(len(frame)) :] = other[rng.randrange(len(other)) :]


def _foreign(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    frame[:] = rng.choice(others).frame


def _counts(frame: bytearray, target: Target, others: list[Target], rng: random.Random) -> None:
    """Row counts move from one client to another: the frame's length stays right."""
    a, b = rng.choice(target.fields), rng.choice(target.fields)
    frame[a : a + 4], frame[b : b + 4] = frame[b : b + 4], frame[a : a + 4]


MUTATIONS: tuple[Callable[[bytearray, Target, list[Target], random.Random], None], ...] = (
    *(_number, _number, _word, _word, _array, _bytes, _cut, _insert, _splice, _foreign, _counts),
)


def mutated(target: Target, others: list[Target], rng: random.Random) -> bytes:
    frame = bytearray(target.frame)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if frame:
            rng.choice(MUTATIONS)(frame, target, others, rng)
    return bytes(frame)


def receive(target: Target, frame: bytes) -> MessageError | None:
    """What rank 0 does with a frame; the error that refused it. Anything else that comes out is a bug."""
    try:
        message = from_bytes(frame, target.layout, CLIENTS)
        for client in range(CLIENTS):
            rows = torch.tensor([client])
            peer = {name: value[rows] for name, value in target.peers.items()}
            v_1S, after = target.up.decompress(message.select(rows), peer, target.ctx.select(rows))
            assert v_1S.shape == (1, target.up.size), "a vector of another shape"
            assert {n: (v.shape, v.dtype) for n, v in after.items()} == {
                n: (v.shape, v.dtype) for n, v in peer.items()
            }, "a state of another shape"
    except MessageError as error:
        return error
    assert to_bytes(message) == frame, "bytes of it went nowhere"
    return None


def prepare(folder: Path, specs: tuple[Spec, ...] = SPECS) -> Attempt:
    everything = targets(specs)
    for target in everything:
        assert receive(target, target.frame) is None, target.name

    def attempt(rng: random.Random) -> FedMPIError | None:
        target = rng.choice(everything)
        frame = mutated(target, everything, rng)
        return of_frame(target.name, frame, lambda frame: receive(target, frame))

    return attempt
