"""Prune-m with a mask of each client: against a transcription, and masks that do not fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import methods, random
from fedmpi.engine.clients import cohort, survivors
from fedmpi.engine.summary import summary
from fedmpi.errors import MessageError
from fedmpi.message import Message
from fedmpi.method import Round
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .codecs import indices, sent
from .softmax import Array, Softmax, assert_close, parameters, simulate
from .test_prune import RTOPK, TOPK, D, build, context, download_bytes, only


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(
    ("inner", "rule", "m"),
    [
        (TOPK, {}, 40),  # masks travel as indices, up and down
        ({**RTOPK, "feedback": True}, {"optimizer": "momentum", "beta1": 0.5}, 100),  # as maps
    ],
)
def test_masks_of_clients(inner: Any, rule: Any, m: int, topology: str) -> None:
    """Each client's own m, chosen at its first message; the union of the first epoch's survives. 24 rounds of 4 of
    12 clients, some of which drop out, before they have a mask and after."""
    clients, per_epoch, k, eta = 12, 3, 20, 0.2
    simulation = simulate(
        method={"name": "prune", "m": m, "mask_from": "client", "inner": inner},
        clients=clients,
        cohort=4,
        dropout=0.3,
        partition={"name": "dirichlet", "alpha": 0.2, "minimum": 3},
        local={"lr": eta, "steps": 2},
        server=rule,
        topology=topology,
    )
    task, calls = Softmax(simulation), sent(simulation)
    beta, feedback = rule.get("beta1", 0.0), inner.get("feedback", False)
    order = random.permutation(random.key(7, stream="ties of the mask"), D).numpy()
    theta, velocity, kept = task.theta, np.zeros(D), np.arange(D)
    masks: dict[int, Array] = {}
    residual = np.zeros((clients, D), np.float32)
    history = [simulation.replica.parameters().clone()]
    seen, uploads, downloads, late, lost = np.zeros(clients, np.int64), 0, 0, 0, [0, 0]
    mask_bytes = min(math.ceil(m * 10 / 8), math.ceil(D / 8))
    for t in range(24):
        called = cohort(simulation.config, simulation.partition, t)
        chosen = survivors(simulation.config, called, t).tolist()
        for c in called.tolist():
            downloads += download_bytes(history, int(seen[c]), per_epoch, kept if t >= per_epoch else None)
            seen[c] = t
            lost[c in masks] += c not in chosen
        simulation.round(t)
        history.append(simulation.replica.parameters().clone())
        g_CD, message, _ = calls[t]
        mean, omega = np.zeros(D), task.sizes[chosen] / task.sizes[chosen].sum()
        new = [c for c in chosen if c not in masks]
        for row, c in enumerate(chosen):
            g = g_CD[row].numpy()  # its own float32: no choice hangs on this test's precision
            first = only(task.gradient(theta, c), kept)
            assert_close(g, first + only(task.gradient(theta - eta * first, c), kept))
            if c in new:
                among = order[np.isin(order, kept)]
                masks[c] = np.sort(among[np.argsort(-abs(g[among]), kind="stable")[:m]])
                assert np.array_equal(uploaded(message, new.index(c), m), masks[c]), f"round {t}"
                uploads += mask_bytes
                late += t >= per_epoch
            own = masks[c]
            p = g[own] + residual[c][own] * feedback
            position = np.sort(np.argsort(-abs(p), kind="stable")[: inner.get("r", k)])
            if "r" in inner:
                position = position[random.sample(random.key(7, t, c, "candidates"), inner["r"], k).numpy()]
            width = math.ceil(math.log2(m))
            assert np.array_equal(indices(message, "inner.index", row, k, width), position), f"round {t}"
            v = np.zeros(D, np.float32)
            v[own[position]] = p[position]
            residual[c][own] = p - v[own]
            uploads += 4 * k + math.ceil(k * width / 8)
            mean += omega[row] * v.astype(np.float64)
        if t == per_epoch - 1:
            kept = np.unique(np.concatenate(list(masks.values())))
            assert m < len(kept) < D
            theta, velocity = only(theta, kept), only(velocity, kept)
        if t >= per_epoch - 1:
            assert simulation.replica.shared()["kept"].tolist() == kept.tolist()
            assert not simulation.replica.parameters()[np.setdiff1d(np.arange(D), kept)].any()
        velocity = beta * velocity + mean
        theta = theta - eta * velocity
        assert_close(parameters(simulation), theta)
    assert min(late, *lost) > 0, "no client came late, or dropped out before or after: choose another seed"
    state = simulation.clients.get(torch.tensor(sorted(masks)))
    for row, c in enumerate(sorted(masks)):
        held = np.unpackbits(state["mask"][row].numpy(), bitorder="little")
        assert np.array_equal(held.nonzero()[0], masks[c])
        if feedback:
            assert np.array_equal(state["inner.residual"][row].numpy(), residual[c][masks[c]])
    found = summary(simulation)
    assert (found["upload_bytes"], found["download_bytes"]) == (uploads, downloads)
    assert found["stored_params"] == len(kept)


def uploaded(message: Message, row: int, m: int) -> Array:
    """The mask of the ``row``-th client that sent one."""
    if "mask.index" in message.arrays:
        return indices(message, "mask.index", row, m, 10)
    return np.unpackbits(message.arrays["mask.map"][row].numpy(), bitorder="little").nonzero()[0]


@pytest.mark.parametrize("m", [40, 100])  # as indices, and as a map
def test_a_mask_that_does_not_fit_is_refused(m: int) -> None:
    """Two from one client, none of its first message, one entry twice, an index beyond D, one beside the union."""
    up, none = build(m=m, mask_from="client").up, torch.empty(0, dtype=torch.int64)
    g_CD = random.normal(random.keys(5, 0, torch.arange(3), "g"), D)
    fresh = {name: value.expand(3, *value.shape) for name, value in up.init_peer().items()}
    first, state = up.compress(g_CD, fresh, context({"kept": none}))
    again, _ = up.compress(g_CD, state, context({"kept": none}))
    _, peer = up.decompress(first, fresh, context({"kept": none}))
    for message, held, rows in (
        (first, peer, r"\[1, 1, 1\] .* \[0, 0, 0\]"),
        (again, fresh, r"\[0, .* \[1, "),
    ):
        with pytest.raises(MessageError, match=rf"{rows}"):
            up.decompress(message, held, context({"kept": none}))
    kept = torch.arange(1, D)  # the union lacks 0
    late, _ = up.compress(g_CD, fresh, context({"kept": kept}))
    up.decompress(late, fresh, context({"kept": kept}))
    name = "mask.index" if m == 40 else "mask.map"
    late.arrays[name][0, 0] |= 1
    with pytest.raises(MessageError, match=f"parameters that the model keeps, expected {m}"):
        up.decompress(late, fresh, context({"kept": torch.arange(m)}))
    first.arrays[name].zero_()
    with pytest.raises(MessageError, match=rf"masks of \[[01], .* expected {m}"):
        up.decompress(first, fresh, context({"kept": none}))
    first.arrays[name].fill_(255)
    with pytest.raises(
        MessageError, match="a mask with 1023, expected less than 650" if m == 40 else "650, 650"
    ):
        up.decompress(first, fresh, context({"kept": none}))


@pytest.mark.parametrize("size", [1, 2, 9, 100, 128, 129, 700])
def test_a_mask_of_any_number_of_indices_is_read(size: int) -> None:
    """The union's size is not told; the bytes tell it, also where zeros would fill them up to one more index."""
    server = methods.build(
        {"name": "prune", "keep": 1.0, "mask_from": "client", "inner": {"name": "topk", "k": 1}},
        Spec(("w",), ((size,),)),
        Setup(),
    ).server
    for n in range(1, size + 1, max(1, size // 20)):
        votes = torch.zeros(size)
        votes[random.sample(random.key(3, n), size, n)] = 0.25
        for votes_D in (votes, votes.flip(0)):
            state = server.finish(
                server.init(torch.ones(size)), torch.cat([votes_D, votes_D]), Round(7, 0, 0.1)
            )
            view = server.reconcile(server.view(torch.ones(size)), server.download(state, 0), 1)
            assert view["kept"].tolist() == state["kept"].tolist() == votes_D.nonzero()[:, 0].tolist()
            assert torch.equal(view["theta"], state["theta"])
