"""Prune-m: against a transcription, what the mask costs, its options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config, methods, random
from fedmpi.engine.clients import cohort
from fedmpi.engine.summary import summary
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message, from_bytes, to_bytes
from fedmpi.method import Context, Method, Round, State
from fedmpi.methods.base import Setup
from fedmpi.methods.prune import PruneServer
from fedmpi.spec import Spec

from .codecs import indices, sent
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, parameters, simulate

D = 650  # softmax regression on digits
TOPK = {"name": "topk", "k": 20}
RTOPK = {"name": "rtopk", "k": 20, "r": 60}


def build(size: int = D, seed: int = 7, **options: Any) -> Method:
    return methods.build(
        {"name": "prune", "m": 100, "inner": TOPK, **options}, Spec(("w",), ((size,),)), Setup(seed)
    )


def context(shared: State, clients: int = 3, t: int = 0, per_epoch: int = 1) -> Context:
    ids = torch.arange(clients)
    return Context(Round(7, t, 0.1, per_epoch), ids, torch.ones_like(ids), shared)


# --- the algorithm ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask_from", "topology"), [("dense", "allreduce"), ("compressed", "aggregator")])
@pytest.mark.parametrize(
    ("inner", "rule", "m"),
    [
        (TOPK, {}, 100),
        ({**TOPK, "feedback": True}, {"optimizer": "momentum", "beta1": 0.5}, 128),
        ({**RTOPK, "feedback": True}, {}, 129),
        (RTOPK, {"optimizer": "momentum", "beta1": 0.5}, 600),
    ],
)
def test_against_a_transcription(inner: Any, rule: Any, m: int, mask_from: str, topology: str) -> None:
    """Algorithm 1 for 24 rounds, 3 an epoch: masks, choices, parameters, residuals, and every byte."""
    clients, per_epoch, k, eta = 6, 3, 20, 0.2
    simulation = simulate(
        method={"name": "prune", "m": m, "mask_from": mask_from, "inner": inner},
        clients=clients,
        cohort=2,
        local={"lr": eta, "steps": 2},
        server=rule,
        topology=topology,
    )
    task, calls = Softmax(simulation), sent(simulation)
    beta, feedback = rule.get("beta1", 0.0), inner.get("feedback", False)
    theta, velocity, total = task.theta, np.zeros(D), np.zeros(D)
    kept, closest = np.arange(D), math.inf
    residual = np.zeros((clients, D), np.float32)
    history = [simulation.replica.parameters().clone()]
    seen, uploads, downloads = np.zeros(clients, np.int64), 0, 0

    def choose(p: Array, key: int) -> Array:
        """Positions in ``p`` that are sent."""
        order = np.argsort(-abs(p), kind="stable")
        if inner["name"] == "topk":
            return np.sort(order[:k])
        return np.sort(order[:60])[random.sample(key, 60, k).numpy()]

    for t in range(24):
        chosen = cohort(simulation.config, simulation.partition, t).tolist()
        masked = t >= per_epoch
        for c in chosen:
            downloads += download_bytes(history, int(seen[c]), per_epoch, kept if masked else None)
            seen[c] = t
        simulation.round(t)
        history.append(simulation.replica.parameters().clone())
        g_CD, message, _ = calls[t]
        mean, omega = np.zeros(D), task.sizes[chosen] / task.sizes[chosen].sum()
        for row, c in enumerate(chosen):
            g = g_CD[row].numpy()  # its own float32: no choice hangs on this test's precision
            first = only(task.gradient(theta, c), kept)
            assert_close(g, first + only(task.gradient(theta - eta * first, c), kept))
            v, width = np.zeros(D, np.float32), math.ceil(math.log2(m if masked else D))
            if not masked and mask_from == "dense":
                v = g
                uploads += 4 * D
            else:
                p = g[kept] + residual[c][kept] * feedback
                position = choose(p, random.key(7, t, c, "candidates"))
                name = f"{'after' if masked else 'before'}.index"
                assert np.array_equal(indices(message, name, row, k, width), position), f"round {t}"
                v[kept[position]] = p[position]
                residual[c] = 0
                residual[c][kept] = p - v[kept]
                uploads += 4 * k + math.ceil(k * width / 8)
            mean += omega[row] * v.astype(np.float64)
        if not masked:
            total += mean
        if t == per_epoch - 1:
            order = random.permutation(random.key(7, stream="ties of the mask"), D).numpy()
            order = order[np.argsort(-abs(total[order]), kind="stable")]
            cut, beyond = abs(total[order[m - 1]]), abs(total[order[m]])
            closest = min(closest, cut / beyond - 1 if cut != beyond else math.inf)
            kept = np.sort(order[:m])
            assert simulation.replica.shared()["kept"].tolist() == kept.tolist()
            theta, velocity, mean = only(theta, kept), only(velocity, kept), only(mean, kept)
        velocity = beta * velocity + mean
        theta = theta - eta * velocity
        assert_close(parameters(simulation), theta)
        outside = np.setdiff1d(np.arange(D), kept)
        assert not simulation.replica.parameters()[outside].any(), "pruned, hence exactly zero"
    state = simulation.clients.get(torch.arange(clients))
    if feedback:
        assert np.array_equal(state["after.residual"].numpy(), residual[:, kept])
        assert not state.get("before.residual", torch.zeros(1)).any()
    assert closest > 1e-5, "a choice that rounding could turn: choose another seed"
    found = summary(simulation)
    assert (found["upload_bytes"], found["download_bytes"]) == (uploads, downloads)


def only(x: Array, kept: Array) -> Array:
    return np.where(np.isin(np.arange(D), kept), x, 0)


def download_bytes(history: list[torch.Tensor], seen: int, pruned: int, kept: Array | None) -> int:
    """Of a client that last came before round ``seen``: 4 for each value that has changed in some round since
    then, and the cheaper of indices and map for the positions, or all values; the mask if it came since."""
    size = D if kept is None else len(kept)
    rounds = torch.stack(history[seen:])[:, slice(None) if kept is None else kept]
    changed = int((rounds[1:] != rounds[:-1]).any(0).sum())
    positions = min(math.ceil(changed * math.ceil(math.log2(size)) / 8), math.ceil(size / 8))
    mask = 0
    if kept is not None and seen < pruned:
        mask = min(math.ceil(len(kept) * 10 / 8), math.ceil(D / 8))
    return min(4 * changed + positions, 4 * size) + mask


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
def test_a_mask_from_the_servers_own_data(topology: str) -> None:
    """Section 4: the mask is there before round 0, from 100 samples; local training of 3 steps under the mask."""
    k, m, eta = 20, 100, 0.2
    method = {"name": "prune", "m": m, "mask_from": "auxiliary", "samples": 100, "inner": TOPK}
    simulation = simulate(method=method, local={"lr": eta, "steps": 3}, cohort=3, topology=topology)
    task, calls = Softmax(simulation), sent(simulation)
    index = random.sample(random.key(7, stream="server data"), 1437, 100)
    own = Softmax(simulation)
    own.x = [simulation.data.train.x[index].flatten(1).double().numpy()]
    own.y = [np.eye(10)[simulation.data.train.y[index].numpy()]]
    score = abs(own.accumulated(task.theta, 0, 3, eta))
    order = random.permutation(random.key(7, stream="ties of the mask"), D).numpy()
    order = order[np.argsort(-score[order], kind="stable")]
    assert score[order[m - 1]] / score[order[m]] > 1 + 1e-5, "choose another seed"
    kept = np.sort(order[:m])
    theta, met, history, downloads = only(task.theta, kept), {}, [], 0
    history.append(torch.tensor(theta))
    for t in range(20):
        chosen = cohort(simulation.config, simulation.partition, t).tolist()
        for c in chosen:
            new = c not in met
            downloads += new * math.ceil(D / 8) + download_bytes(history, met.get(c, 0), 0, kept)
            met[c] = t
        simulation.round(t)
        history.append(simulation.replica.parameters().clone())
        assert simulation.replica.shared()["kept"].tolist() == kept.tolist()
        mean, omega = np.zeros(D), task.sizes[chosen] / task.sizes[chosen].sum()
        for row, c in enumerate(chosen):
            local, g = theta, np.zeros(D)
            for _ in range(3):
                direction = only(task.gradient(local, c), kept)
                local, g = local - eta * direction, g + direction
            sent_g = calls[t].g_CD[row].numpy()
            assert_close(sent_g, g)
            assert not sent_g[np.setdiff1d(np.arange(D), kept)].any()
            position = np.sort(np.argsort(-abs(sent_g[kept]), kind="stable")[:k])
            assert np.array_equal(indices(calls[t].message, "after.index", row, k, 7), position)
            mean[kept[position]] += omega[row] * sent_g[kept[position]]
        theta = theta - eta * mean
        assert_close(parameters(simulation), theta)
    found = summary(simulation)
    assert found["upload_bytes"] == 20 * 3 * (4 * k + math.ceil(k * 7 / 8))
    assert found["download_bytes"] == downloads


def test_a_view_follows_from_a_mask_before_round_0() -> None:
    method, theta = build(m=60, mask_from="auxiliary", inner={**TOPK, "feedback": True}), torch.ones(D)
    state = method.server.prepare(method.server.init(theta), random.normal(random.key(9), D))
    view, first = method.server.view(theta), method.server.download(state, 0)
    assert int(first.nbytes()[0]) == math.ceil(60 * 10 / 8), "the mask, and no value: θ₀ is known"
    view = method.server.reconcile(view, first, 1)
    assert torch.equal(view["theta"], state["theta"])
    state = method.server.finish(state, random.normal(random.key(10), D), Round(7, 0, 0.1))
    view = method.server.reconcile(view, method.server.download(state, 1), 2)
    assert torch.equal(view["theta"], state["theta"])
    assert int((state["theta"] != 0).sum()) == 60


def test_the_server_holds_no_more_samples_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"method.samples: expected at most 1437 .*, got 1438"):
        simulate(method={"name": "prune", "mask_from": "auxiliary", "samples": 1438})


def test_ties_are_broken_by_the_seed() -> None:
    """Fewer than m non-zeros: all of them, and of the zeros the first in an order that the seed draws."""
    chosen = set()
    for seed in range(3):
        server = build(seed=seed).server
        state = server.init(torch.ones(D))
        mean = torch.zeros(D)
        mean[::10] = -1.0  # 65 of the 100
        state = server.finish(state, mean, Round(seed, 0, 0.1))
        zeros = [
            i for i in random.permutation(random.key(seed, stream="ties of the mask"), D).tolist() if i % 10
        ]
        assert state["kept"].tolist() == sorted([*range(0, D, 10), *zeros[:35]])
        chosen.add(tuple(state["kept"].tolist()))
    assert len(chosen) == 3


def test_what_is_no_number_survives() -> None:
    """So that the engine finds it in the parameters of the next round."""
    server, lost = build().server, torch.tensor([math.nan, math.inf, -math.inf])
    mean = torch.ones(D).index_copy(0, torch.tensor([5, 300, 640]), lost)
    state = server.finish(server.init(torch.ones(D)), mean, Round(7, 0, 0.1))
    assert (~state["theta"].isfinite()).nonzero()[:, 0].tolist() == [5, 300, 640]


def test_near_zero_starts_from_a_tenth() -> None:
    method, theta = build(init="near_zero"), random.normal(random.key(1), D)
    for state in (method.server.init(theta), method.server.view(theta)):
        assert torch.equal(method.server.parameters(state), theta * 0.1)


def test_stored_parameters_are_counted() -> None:
    simulation = simulate(method={"name": "prune", "keep": 0.2, "inner": "topk"}, cohort=2)
    stored = []
    for t in range(5):
        simulation.round(t)
        stored.append(summary(simulation)["stored_params"])
    assert stored == [650] * 2 + [130] * 3


@pytest.mark.parametrize("m", [60, 500])  # the mask as indices, and as a map
def test_the_mask_costs_its_bits_once(m: int) -> None:
    """min(m·⌈log2 D⌉, D) bits, on top of a download that a client which knows the mask would get."""
    method, theta = build(m=m, mask_from="compressed"), random.normal(random.key(2), D)
    state, states = method.server.init(theta), []
    for t in range(6):
        states.append(state)
        state = method.server.finish(state, random.normal(random.key(3, t), D), Round(7, t, 0.1, 3))
        masked = len(state["kept"]) > 0
        assert masked == (t >= 2)
        for seen, then in enumerate(states):
            view = {"theta": then["theta"], "version": then["version"], "kept": then["kept"]}
            download = method.server.download(state, seen)
            names = {"theta", "mask.index" if m == 60 else "mask.map"} if masked and seen < 3 else {"theta"}
            assert download.arrays.keys() == names
            values = 4 * (m if masked else D)
            mask = {60: math.ceil(60 * 10 / 8), 500: math.ceil(650 / 8)}[m] if len(names) == 2 else 0
            assert int(download.nbytes()[0]) == values + mask
            view = method.server.reconcile(view, from_bytes(to_bytes(download)), t + 1)
            assert torch.equal(view["theta"], state["theta"])
            assert torch.equal(view["kept"], state["kept"])


# --- refused ----------------------------------------------------------------------------------------


def test_a_message_of_the_other_phase_is_refused() -> None:
    up, kept = build(mask_from="compressed").up, torch.arange(0, 200, 2)
    g_CD = random.normal(random.keys(5, 0, torch.arange(3), "g"), D)
    none, mask = {"kept": kept[:0]}, {"kept": kept}
    early, _ = up.compress(g_CD, {}, context(none))
    late, _ = up.compress(g_CD, {}, context(mask))
    with pytest.raises(
        MessageError, match=r"\[1, 1, 1\] rows of 'before.values', expected 0 of each .* after"
    ):
        up.decompress(early, {}, context(mask))
    with pytest.raises(
        MessageError, match=r"\[0, 0, 0\] rows of 'before.values', expected 1 of each .* before"
    ):
        up.decompress(late, {}, context(none))
    lengths = {name: torch.tensor([0, 2, 1]) if name[0] == "a" else n for name, n in late.lengths.items()}
    with pytest.raises(MessageError, match=r"\[0, 2, 1\] rows of 'after.values'"):
        up.decompress(Message(late.arrays, lengths), {}, context(mask))


def test_an_index_beyond_the_survivors_is_refused() -> None:
    up, shared = build().up, {"kept": torch.arange(100)}
    message, _ = up.compress(random.normal(random.key(6), D)[None], {}, context(shared, 1))
    message.arrays["after.index"].fill_(255)  # 127 in 7 bits
    with pytest.raises(MessageError, match="index 127, expected less than 100"):
        up.decompress(message, {}, context(shared, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 651}, r"method.m: expected 1 to 650 \(the model's parameters\), got 651"),
        ({"m": 0}, r"method.m: expected 1 to 650 .*, got 0"),
        ({"m": 19}, r"method.inner.k: expected at most m = 19 \(the parameters kept\), got 20"),
        ({"m": None, "keep": 0.02}, r"method.inner.k: expected at most m = 13 .*, got 20"),
        ({"inner": {"name": "topk", "ratio": 0.2}}, r"method.inner.k: expected at most m = 100 .*, got 130"),
        ({"inner": {"name": "topk", "k": 651}}, r"method.inner.k: expected 1 to 650 .*, got 651"),
        ({"inner": {**RTOPK, "r": 101}}, r"method.inner.r: expected k = 20 to m = 100 .*, got 101"),
        ({"inner": {**RTOPK, "r": 19}}, r"method.inner.r: expected k = 20 to m = 100 .*, got 19"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"method\.keep: expected greater than 0, got 0"),
        (
            {"mask_from": "luck"},
            r"method\.mask_from: expected 'dense', 'compressed', 'auxiliary' or 'client', got 'luck'",
        ),
        ({"inner": "signsgd"}, r"method\.inner: prune does not go over signsgd; valid: topk, rtopk"),
        ({"inner": "randomk"}, r"method\.inner: prune does not go over randomk; valid: topk, rtopk"),
        ({"inner": "prune"}, r"method\.inner: prune does not go over prune; valid: topk, rtopk"),
        ({"inner": {"name": "topk", "r": 3}}, r"method\.inner\.r: unknown key"),
        ({"feedback": True}, r"method\.feedback: unknown key"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse({**SMALL, "method": {"name": "prune", **options}})


def test_k_is_a_share_of_all_parameters_and_m_may_be_all() -> None:
    up = methods.build({"name": "prune", "keep": 0.5, "inner": {"name": "topk", "ratio": 0.1}}, *FULL).up
    assert up.layout()["after.values"].row == (65,)
    server = build(m=D).server
    assert isinstance(server, PruneServer)
    state = server.finish(server.init(torch.ones(D)), torch.ones(D), Round(0, 0, 0.5))
    assert state["kept"].tolist() == list(range(D))
    assert torch.equal(state["theta"], torch.full((D,), 0.5))


FULL = (Spec(("w",), ((D,),)), Setup())
