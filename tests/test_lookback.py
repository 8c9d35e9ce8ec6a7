"""Look-back: Algorithms 1 and 3 against a numpy transcription, its options, its stores, and both ends over every inner
method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config, methods
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Round, believed
from fedmpi.methods import METHODS
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .codecs import codec, context
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, assert_same_sums, drawn, parameters, simulate

SPEC = Spec(("w", "b"), ((6, 10), (6,)))


def compressor(**options: Any) -> Compressor:
    return methods.build({"name": "lookback", **options}, SPEC, Setup(seed=1)).up


def turning(t: int, clients: int = 4) -> torch.Tensor:
    """Gradients that turn by 3° a round; client c's are (c + 1) times as long, tensor b's turn faster."""
    angle = np.deg2rad(3.0 * t)
    g = torch.zeros(clients, SPEC.size)
    g[:, 0], g[:, 1] = np.cos(angle), np.sin(angle)
    g[:, 60], g[:, 61] = 0.1 * np.cos(9 * angle), 0.1 * np.sin(9 * angle)
    return g * torch.arange(1.0, clients + 1)[:, None]


def dense_turning(t: int) -> torch.Tensor:
    """The same without zeros, whose signs would be coins."""
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 4, SPEC.size, generator=generator)
    return a + 0.1 * t * b


def run(up: Compressor, rounds: int, steps: int = 1, gradients: Any = turning) -> list[Message]:
    """Send ``rounds`` rounds; each message is decoded, and both ends' copies compared."""
    clients = 4
    sender = {name: torch.stack([v] * clients) for name, v in up.init().items()}
    receiver = {name: torch.stack([v] * clients) for name, v in up.init_peer().items()}
    sent = []
    for t in range(rounds):
        ctx = context(clients, t, steps)
        message, sender = up.compress(gradients(t), sender, ctx)
        _, receiver = up.decompress(message, receiver, ctx)
        assert all(torch.equal(v, receiver[n]) for n, v in believed(up, sender).items())
        sent.append(message)
    return sent


def scalars(messages: list[Message]) -> list[list[int]]:
    return [m.arrays["scalar"].tolist() for m in messages]


def test_each_client_may_have_its_own_threshold() -> None:
    """sin²(3°·j) ≤ δ: a client's LBG lasts as many rounds as its δ allows."""
    deltas = (0.0, 0.006, 0.02, 0.2)
    sent = scalars(run(compressor(threshold=deltas), 12))
    for client, delta in enumerate(deltas):
        since, expected = None, []
        for t in range(12):
            g, last = turning(t)[client].double().numpy(), turning(since or 0)[client].double().numpy()
            sin2 = 1 - (g @ last) ** 2 / ((g @ g) * (last @ last))
            scalar = since is not None and max(sin2, 0) <= delta
            expected.append(int(scalar))
            since = since if scalar else t
        assert [row[client] for row in sent] == expected
    assert 0 == sum(row[0] for row in sent) < sum(row[1] for row in sent) < sum(row[3] for row in sent)


def test_theorem_1_compares_with_the_normalised_gradient() -> None:
    """sin²α ≤ Δ² τ² / ‖g‖²: longer gradients are held to a tighter condition, more local steps to a looser."""
    sent = scalars(run(compressor(threshold={"delta_sq": 0.02}), 12))
    counts = [sum(row[client] for row in sent) for client in range(4)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[3]
    looser = scalars(run(compressor(threshold={"delta_sq": 0.02}), 12, steps=4))
    assert sum(row[3] for row in looser) > counts[3]
    g0, g1 = (turning(t)[1].double().numpy() for t in (0, 1))
    sin2 = 1 - (g0 @ g1) ** 2 / ((g0 @ g0) * (g1 @ g1))
    edge = sin2 * (g1 @ g1)  # the Δ² at which client 1's second message just becomes a scalar
    assert scalars(run(compressor(threshold={"delta_sq": edge * 1.001}), 2))[1][1] == 1
    assert scalars(run(compressor(threshold={"delta_sq": edge * 0.999}), 2))[1][1] == 0


def test_tensors_decide_for_themselves() -> None:
    """w turns slowly and b fast: b is sent in full while w's scalar lasts, and only its 6 values travel."""
    up = compressor(threshold=0.05, scope="tensor")
    sent = run(up, 3)
    assert sent[1].arrays["0.scalar"].tolist() == [1] * 4
    assert sent[1].arrays["1.scalar"].tolist() == [0] * 4
    assert sent[1].nbytes().tolist() == [2 + 4 + 6 * 4] * 4
    assert up.count(sent[1]) == {"scalars": 0, "scalar_tensors": 4}
    whole = run(compressor(threshold=0.05), 3)
    assert whole[1].nbytes().tolist() == [1 + 4] * 4, "for the whole model w decides"


PRESENCE = len(SPEC.rows) - 1  # numbers beside the votes: which rows have a gradient


@pytest.mark.parametrize(
    ("keep", "inner", "size"),
    [
        ("exact", {"name": "signsgd"}, (66 + PRESENCE) * 4),
        ("half", {"name": "signsgd"}, (66 + PRESENCE) * 2),
        ("message", {"name": "signsgd"}, 1 + 9 + 1 + -(-PRESENCE // 8)),
        ("message", {"name": "topk", "k": 5}, 1 + 5 * 4 + 5),
        ("message", {"name": "dense"}, 1 + 66 * 4),
    ],
)
def test_how_it_is_kept_and_how_large_that_is(keep: str, inner: dict[str, Any], size: int) -> None:
    up = compressor(threshold=0.3, keep=keep, inner=inner)
    assert sum(value.nbytes for value in up.init_peer().values()) == size
    exact = run(compressor(threshold=0.3, inner=inner), 10, gradients=dense_turning)
    kept = run(up, 10, gradients=dense_turning)
    assert 0 < sum(map(sum, scalars(kept))) < 40
    if keep == "message":  # nothing is lost by it
        for a, b in zip(exact, kept, strict=True):
            assert torch.equal(a.arrays["rho"], b.arrays["rho"])


def test_clusters_hold_a_number_a_client_and_their_broadcasts_are_counted() -> None:
    """Four directions, four clients each: with 4 centroids the second round is all scalars, and then one message
    in full moves one centroid half the way, which every client downloads."""
    clients, c = 16, 4
    options = {"name": "lookback", "threshold": 0.1, "keep": "clustered", "clusters": c}
    method = methods.build(options, SPEC, Setup(seed=1))
    up, server = method.up, method.server
    assert up.init_peer() == {"cluster": torch.tensor(-1)}
    directions = torch.eye(SPEC.size)[:c]
    g = directions[torch.arange(clients) % c]
    state, held = server.init(torch.zeros(SPEC.size)), {"cluster": torch.full((clients,), -1)}
    ids, scalars_of, downloads = torch.arange(clients), [], []
    for t in range(3):
        if t == 2:
            g = g.clone()
            g[5] = directions[1] + directions[2]  # 45° from centroids 1 and 2
        ctx = Context(Round(1, t, 0.1), ids, torch.ones_like(ids), server.shared(state))
        message, after = up.compress(g, held, ctx)
        v, peer = up.decompress(message, held, ctx)
        assert torch.equal(peer["cluster"], after["cluster"])
        held, state = after, server.finish(state, v.mean(0), ctx.round)
        scalars_of.append(message.arrays["scalar"].tolist())
        downloads.append(int(server.download(state, t).nbytes()[0]) - 4 * SPEC.size)
    assert scalars_of == [[0] * 16, [1] * 16, [1] * 5 + [0] + [1] * 10]
    assert downloads == [c * (4 * SPEC.size + 1), 0, 4 * SPEC.size + 1]
    moved = state["clusters.centroids"][held["cluster"][5]]
    assert torch.allclose(moved[[1, 2]].sort().values, torch.tensor([0.5, 1.0]))
    assert torch.allclose(server.parameters(state)[0], torch.tensor(-0.1 * 3 / 4))


OVER = [name for name, entry in METHODS.items() if not entry.wraps and not entry.two_passes]


@pytest.mark.parametrize("name", OVER)
@pytest.mark.parametrize(
    "options", [{}, {"feedback": True}, {"keep": "half"}, {"keep": "clustered", "clusters": 2}], ids=str
)
def test_both_ends_agree_after_every_round_under_sampling_and_dropouts(name: str, options: Any) -> None:
    inner = {"name": name, **METHODS[name].example}
    method = {"name": "lookback", "threshold": 0.6, "inner": inner, **options}
    values = {**SMALL, "topology": "aggregator", "dropout": 0.3, "rounds": 12, "method": method}
    if (
        options.get("feedback")
        and (up := methods.build(inner, Spec(("w", "b"), ((10, 64), (10,))), Setup()).up).size - up.presence
        != 650
    ):
        with pytest.raises(
            ConfigError, match=r"method\.feedback: expected an inner method that sums D numbers"
        ):
            Simulation(config.parse(values), solo())
        return
    simulation = Simulation(config.parse(values), solo())
    assert simulation.replica.owner == 0
    everybody, sent = torch.arange(6), 0
    for t in range(12):
        sent += simulation.round(t)["scalars"]
        held = simulation.replica.peers.get(everybody)
        for entry, belief in believed(simulation.method.up, simulation.clients.get(everybody)).items():
            assert torch.equal(belief, held[entry]), (t, entry)
    assert simulation.participations < 48, "some dropped out"


def test_a_message_whose_counts_do_not_fit_its_tags_is_refused() -> None:
    up = compressor()
    message = run(up, 2)[1]
    peer = {name: torch.stack([v] * 4) for name, v in up.init_peer().items()}
    wrong = Message({**message.arrays, "scalar": 1 - message.arrays["scalar"]}, message.lengths)
    with pytest.raises(MessageError, match="row counts of rho do not fit"):
        up.decompress(wrong, peer, context(4))


def test_a_message_with_a_centroid_that_there_is_not_is_refused() -> None:
    up = compressor(keep="clustered", clusters=3)
    state = {name: torch.stack([v] * 4) for name, v in up.init().items()}
    ctx = replace(context(4), shared={"centroids": torch.zeros(3, SPEC.size)})
    message, _ = up.compress(turning(0), state, ctx)
    wrong = message._replace(arrays={**message.arrays, "cluster": torch.tensor([0, 1, 2, 3]).byte()})
    with pytest.raises(MessageError, match="centroid 3, expected 0 to 2"):
        up.decompress(wrong, believed(up, state), ctx)


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_at_the_threshold_the_scalar_is_sent(factor: float) -> None:
    """sin²α ≤ δ, not <: a multiple of the look-back gradient has sin²α = 0, and needs no tolerance."""
    up = compressor(threshold=0.0)
    state = {name: torch.stack([v] * 4) for name, v in up.init().items()}
    _, state = up.compress(turning(0), state, context(4))
    message, _ = up.compress(factor * turning(0), state, context(4, t=1))
    assert message.arrays["scalar"].tolist() == [1] * 4
    assert message.arrays["rho"].tolist() == [factor] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": {"name": "topk", "q": 1}}, "method.inner.q: unknown key"),
        ({"inner": "lookback"}, "method.inner: lookback does not go over lookback; valid: dense, signsgd"),
        ({"inner": {"name": "powersgd", "rank": 1}}, "method.inner: lookback does not go over powersgd"),
        ({"keep": "clustered", "feedback": True}, "method.keep: clustered goes with scope: model"),
        ({"threshold": 2}, "method.threshold: expected δ from 0 to 1, got 2"),
        ({"threshold": [0.1, 0.2]}, "method.threshold: expected one δ a client, 6, got 2"),
        ({"threshold": {"delta_sq": -1}}, "method.threshold.*: expected greater than 0, got -1"),
        ({"keep": "message", "inner": "randomk"}, "method.keep: message is for inner methods whose messages"),
        (
            {"keep": "message", "inner": {"name": "randomk", "feedback": True}},
            "method.keep: message is for inner methods whose messages",
        ),
        (
            {"scope": "tensor", "inner": {"name": "intrinsic", "dim": 4}},
            "method.scope: expected an inner method that sums D numbers",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulation(config.parse({**SMALL, "method": {"name": "lookback", **options}}), solo())


class Lbgm:
    """Azam et al., Algorithm 1; with a sampled cohort its lines 15 to 17 become those of Algorithm 3."""

    def __init__(self, task: Softmax, delta: float, steps: int, eta: float) -> None:
        self.task, self.delta, self.steps, self.eta = task, delta, steps, eta
        self.theta = task.theta
        self.lbg_worker: dict[int, Array] = {}
        self.lbg_server: dict[int, Array] = {}
        self.closest = math.inf  # to the threshold

    def round(self, chosen: list[int]) -> list[bool]:
        """One global aggregation; returns s_k, True for a scalar, of each chosen worker."""
        messages: list[tuple[bool, Any]] = []
        for k in chosen:
            g = self.task.accumulated(self.theta, k, self.steps, self.eta)
            scalar = False
            if k in self.lbg_worker:
                lbg = self.lbg_worker[k]
                cosine = (g @ lbg) / (np.sqrt(g @ g) * np.sqrt(lbg @ lbg))
                sin2 = 1 - cosine**2
                self.closest = min(self.closest, abs(sin2 - self.delta))
                scalar = bool(sin2 <= self.delta)
            if scalar:
                messages.append((True, (g @ lbg) / (lbg @ lbg)))
            else:
                messages.append((False, g))
                self.lbg_worker[k] = g
        omega = self.task.sizes[chosen] / self.task.sizes[chosen].sum()
        update = np.zeros_like(self.theta)
        for k, weight, (scalar, mu) in zip(chosen, omega, messages, strict=True):
            if not scalar:
                self.lbg_server[k] = mu
            update += weight * (mu * self.lbg_server[k] if scalar else mu)
        self.theta = self.theta - self.eta * update
        return [scalar for scalar, _ in messages]


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(
    ("clients", "sampled", "steps", "delta"), [(5, None, 1, 0.013), (5, None, 2, 0.1), (8, 3, 2, 0.1)]
)
def test_lbgm_is_algorithm_1_and_3(clients, sampled, steps, delta, topology):
    method = {"name": "lookback", "threshold": delta}
    simulation = simulate(
        clients=clients,
        cohort=sampled,
        local={"lr": 0.2, "steps": steps},
        method=method,
        topology=topology,
    )
    reference = Lbgm(Softmax(simulation), delta, steps, 0.2)
    scalars = 0
    for t in range(30):
        chosen = drawn(simulation, t)
        before = simulation.clients.get(torch.arange(clients))["lookback"]
        line = simulation.round(t)
        after = simulation.clients.get(torch.arange(clients))["lookback"]
        decisions = reference.round(chosen)
        kept = [torch.equal(before[k], after[k]) for k in chosen]
        assert kept == decisions, f"round {t}"
        assert line["scalars"] == sum(decisions)
        scalars += sum(decisions)
        for k, lbg in reference.lbg_worker.items():
            assert_close(after[k].double().numpy(), lbg)
        assert_close(parameters(simulation), reference.theta)
    assert reference.closest > 1e-4, "a decision that rounding could turn: choose another seed"
    messages = 30 * (sampled or clients)
    assert 0.2 * messages < scalars < 0.9 * messages, "both kinds of message are needed"
    assert simulation.bytes["upload"] == messages * 1 + scalars * 4 + (messages - scalars) * 4 * 650


def test_lbgm_with_threshold_0_is_fedavg():
    """Every message is sent in full, and the sums are those of dense."""
    lookback, dense = simulate(method={"name": "lookback", "threshold": 0.0}), simulate()
    for t in range(5):
        assert lookback.round(t)["scalars"] == 0
        dense.round(t)
    # Five rounds of two steps over all samples.
    assert_same_sums(lookback.replica.parameters(), dense.replica.parameters(), terms=10 * 1437)


def test_lbgm_sends_zero_gradients_in_full_and_negative_coefficients():
    method = methods.build({"name": "lookback", "threshold": 0.5}, Spec(("w",), ((4,),)), Setup())
    ctx, peer = context(3), {"lookback": torch.zeros(3, 4)}
    first = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [1, 1, 1, 1]])
    second = torch.tensor([[-2.0, -4, -6, -8], [1, 0, 0, 0], [0, 0, 0, 0]])
    message, state = method.up.compress(first, {"lookback": torch.zeros(3, 4)}, ctx)
    assert message.arrays["scalar"].tolist() == [0, 0, 0]
    _, peer = method.up.decompress(message, peer, ctx)
    message, state = method.up.compress(second, state, context(3, 1))
    assert message.arrays["scalar"].tolist() == [1, 0, 0]
    assert message.arrays["rho"].tolist() == [-2]
    decoded, peer = method.up.decompress(message, peer, context(3, 1))
    assert torch.equal(decoded, second)
    assert torch.equal(peer["lookback"], torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert torch.equal(state["lookback"], peer["lookback"])


def test_a_zero_gradient_is_sent_in_full_by_look_back() -> None:
    """ρ and α have no value where either vector is zero; nothing that is not a number comes of it."""
    up = codec("lookback", 5, threshold=1.0)
    zero, g = torch.zeros(1, 5), torch.tensor([[1.0, -2.0, 0.0, 3.0, 0.5]])
    state, peer = ({n: v[None] for n, v in made.items()} for made in (up.init(), up.init_peer()))
    scalars: list[int] = []
    steps: list[Callable[[], torch.Tensor]] = [lambda: g, lambda: zero, lambda: g, lambda: 2 * g]
    for t, step in enumerate(steps):
        message, state = up.compress(step(), state, context(1, t))
        v, peer = up.decompress(message, peer, context(1, t))
        scalars.append(int(message.arrays["scalar"]))
        assert torch.equal(v, step())
        assert torch.equal(state["lookback"], peer["lookback"])
    assert scalars == [0, 0, 0, 1]


def test_a_look_back_coefficient_that_no_float32_holds_is_not_sent() -> None:
    up = codec("lookback", 3, threshold=1.0)
    state = {n: v[None] for n, v in up.init().items()}
    _, state = up.compress(torch.full((1, 3), 1e-20), state, context(1))
    message, after = up.compress(torch.full((1, 3), 1e20), state, context(1, 1))
    assert int(message.arrays["scalar"]) == 0
    v, _ = up.decompress(message, state, context(1, 1))
    assert torch.equal(v, torch.full((1, 3), 1e20))
    assert torch.equal(after["lookback"], v)
