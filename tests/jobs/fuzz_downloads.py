"""Damaged downloads of every method, for its clients; a kind of :mod:`tests.jobs.fuzz`.

What is accepted has the arrays that the server's rule declares, to the last byte of the frame, and leads to a view of
the right shapes whose numbers are finite.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch

from fedmpi.engine.downloads import receive
from fedmpi.errors import FedMPIError, MessageError
from fedmpi.message import from_bytes, to_bytes
from fedmpi.method import Round, Server, State
from fedmpi.methods.play import play

from .fuzz_messages import NUMBERS, SPECS, WORDS, anatomy, built
from .outcomes import Attempt, of_frame

ROOM = 256 << 20


class Download(NamedTuple):
    """A client and a frame that it takes."""

    name: str
    server: Server
    view: State
    version: int
    frame: bytes
    theta: torch.Tensor


def downloads() -> list[Download]:
    """What a client that saw nothing, and one that saw all rounds but one, get after some rounds of each method."""
    found = []
    for name, method in built(SPECS[0]):
        server, up = method.server, method.up
        theta = torch.linspace(-1, 1, up.spec.size)
        state, view = server.init(theta), server.view(theta)
        senders, peers = ({n: v[None] for n, v in init().items()} for init in (up.init, up.init_peer))
        for t in range(4):
            g = torch.randn(1, up.spec.size, generator=torch.Generator().manual_seed(t))
            now = Round(seed=1, t=t, lr=0.1, rounds_per_epoch=2)
            passes = play(method, g, senders, state, now, peers=peers)
            for index, one in enumerate(passes[:-1]):
                view = server.between(view, index, one.mean_S, now)
            last, before = passes[-1], int(state["version"])
            senders, peers, state = last.after, last.peers, server.finish(last.state, last.mean_S, now)
            version = int(state["version"])
            for seen, held_view in ((before, view), (0, server.view(theta))):
                frame = to_bytes(server.download(state, seen))
                found.append(Download(name, server, held_view, version, frame, server.parameters(state)))
            view = server.reconcile(view, server.download(state, before), version)
    return found


def mutated(one: Download, others: list[Download], rng: random.Random) -> bytes:
    frame = bytearray(one.frame)
    fields, _ = anatomy(one.frame)
    how = rng.randrange(6)
    at = rng.randrange(len(frame))
    if how == 0:
        frame[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del frame[at:]
    elif how == 2:
        return rng.choice(others).frame
    elif how == 3:
        field = rng.choice(fields)
        width = rng.choice((1, 2, 4, 8))
        frame[field : field + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    elif how == 4:
        frame[at : at + 4] = rng.choice(WORDS)
    else:
        frame[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    return bytes(frame)


def take(one: Download, frame: bytes) -> MessageError | None:
    """What a client does with a frame; the error that refused it."""
    try:
        new = receive(one.server, one.view, frame, one.version)
    except MessageError as error:
        return error
    message = from_bytes(frame)
    assert to_bytes(message) == frame, "bytes of it went nowhere"
    declared = one.server.downloads()
    assert declared is not None, "the rule declares no layout"
    for name, array in message.arrays.items():
        dtype, row = declared[name]
        assert array.dtype == dtype, f"{name} is {array.dtype}"
        assert len(array) == 1, f"{name} is of {len(array)} clients"
        fits = [want in (-1, got) for want, got in zip(row, array.shape[1:], strict=True)]
        assert all(fits), f"{name} is {tuple(array.shape)}"
        assert not array.is_floating_point() or array.isfinite().all(), f"{name} is not finite"
    theta = one.server.parameters(new)
    assert (theta.shape, theta.dtype) == (one.theta.shape, torch.float32), "parameters of another shape"
    assert theta.isfinite().all(), "parameters that are not finite"
    assert int(new["version"]) == one.version, "another version"
    for name, value in new.items():
        assert not value.is_floating_point() or value.isfinite().all(), f"{name} comes to what is not finite"
    return None


def prepare(folder: Path) -> Attempt:
    everything = downloads()
    for one in everything:
        new = receive(one.server, one.view, one.frame, one.version)
        assert torch.equal(one.server.parameters(new), one.theta), one.name

    def attempt(rng: random.Random) -> FedMPIError | None:
        one = rng.choice(everything)
        return of_frame(one.name, mutated(one, everything, rng), lambda frame: take(one, frame))

    return attempt
