"""What must hold of every row of METHODS, alone and under each wrapper. A new row needs no edit here, and a method
that is no row is named by FEDMPI_METHOD=package.module:ENTRY (else the example in configs/own.py is taken).

The properties are those of the protocol (fedmpi/method.py). Gradients are correlated from round to round
(random ones hide what look-back does), clients have different keys.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedmpi import methods
from fedmpi.comm import run_ranks, solo
from fedmpi.engine.store import ClientStore
from fedmpi.errors import MessageError
from fedmpi.message import CPU, concat, equal, from_bytes, to_bytes
from fedmpi.method import Context, Method, Round, State, believed, placed
from fedmpi.methods import METHODS
from fedmpi.methods.base import FeedbackOptions, Setup
from fedmpi.methods.play import play
from fedmpi.spec import Spec

from .conftest import SMALL
from .jobs.runs import outcome

SPEC = Spec(("conv.weight", "conv.bias", "fc.weight", "fc.bias"), ((4, 2, 3, 3), (4,), (11, 20), (11,)))
CLIENTS, ROUNDS, LR = 5, 8, 0.1
PLACE = CPU  # of gradients, states and parameters; tests/test_device.py puts them elsewhere
OWN = os.environ.get("FEDMPI_METHOD", "configs.own:SIGN")
ROWS = METHODS | {OWN: methods.entry(OWN)}


def cases() -> dict[str, dict[str, Any]]:
    """Each row's example, with error feedback where it can be asked for, and under each wrapper."""
    found = {}
    for name, entry in ROWS.items():
        example = {"name": name, **entry.example}
        found[name] = example
        found |= {f"{name} {variant}": example | options for variant, options in entry.variants.items()}
        if issubclass(entry.options, FeedbackOptions):
            found[f"{name} feedback={not example.get('feedback', False)}"] = {
                **example,
                "feedback": not example.get("feedback", False),
            }
        for wrapper, outer in ROWS.items():
            if name in outer.wraps or (outer.wraps == "any" and not entry.wraps and not entry.two_passes):
                found[f"{wrapper} over {name}"] = {"name": wrapper, **outer.example, "inner": example}
    return found


CASES = cases()


@pytest.fixture(params=CASES, ids=CASES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.fixture
def method(options: dict[str, Any]) -> Method:
    return methods.build(options, SPEC, Setup(seed=1))


def gradients(round: int, seed: int = 0) -> Tensor:
    """``(CLIENTS, D)``: each client's own direction, turning slowly, plus noise; some exact zeros."""
    generator = torch.Generator().manual_seed(1000 + seed)
    base = torch.randn(2, CLIENTS, SPEC.size, generator=generator)
    noise = torch.randn(CLIENTS, SPEC.size, generator=generator.manual_seed(seed * 100 + round))
    g = base[0] + 0.25 * round * base[1] + 0.3 * noise
    g[:, ::17] = 0
    return g.to(PLACE)


def at(method: Method, t: int, clients: Tensor | None = None, state: State | None = None) -> Context:
    """Round ``t``, with what the server publishes at the start or (given its state) now."""
    clients = torch.arange(CLIENTS) if clients is None else clients
    round = Round(seed=1, t=t, lr=LR, rounds_per_epoch=3)
    state = method.server.init(torch.zeros(SPEC.size, device=PLACE)) if state is None else state
    return Context(round, clients, torch.ones_like(clients), method.server.shared(state))


class Store(ClientStore):
    """What clients keep, which is handed out where methods compute."""

    def get(self, clients_C: Tensor) -> State:
        return placed(super().get(clients_C), PLACE)

    def put(self, clients_C: Tensor, state: State) -> None:
        super().put(clients_C, placed(state, CPU))


def start(method: Method) -> tuple[Store, Store]:
    return Store(method.up.init), Store(method.up.init_peer)


def test_bytes_are_measured_and_frames_round_trip(method: Method) -> None:
    senders, _ = start(method)
    ids = torch.arange(CLIENTS)
    for t in range(ROUNDS):
        for up in method.passes:
            message, state = up.compress(gradients(t), senders.get(ids), at(method, t))
            assert message.clients == CLIENTS
            assert int(message.nbytes().sum()) == sum(a.nbytes for a in message.arrays.values())
            assert message.nbytes().min() > 0
            frame = to_bytes(message)
            assert equal(from_bytes(frame, up.layout(), CLIENTS, PLACE), message)
            alone = [message.select(torch.tensor([c])) for c in range(CLIENTS)]
            assert [int(m.nbytes()[0]) for m in alone] == message.nbytes().tolist()
            assert equal(concat(alone), message)
            for cut in (*range(0, len(frame), 97), len(frame) - 1):
                with pytest.raises(MessageError):
                    from_bytes(frame[:cut], up.layout(), CLIENTS)
            with pytest.raises(MessageError, match="oversized"):
                from_bytes(frame + b"\0", up.layout(), CLIENTS)
        senders.put(ids, state)


def test_additive_is_true_of_what_is_sent(method: Method) -> None:
    """Over rounds, and with other clients sending a, b and a + b: v(a) + v(b) = v(a + b) exactly when ``additive``."""
    senders, receivers = zip(*(start(method) for _ in range(3)), strict=True)
    holds = dict.fromkeys(method.passes, True)
    for t in range(ROUNDS):
        a, b = gradients(t, seed=0), gradients(t, seed=1)
        for up in method.passes:
            decoded = []
            for i, (g, sender, receiver) in enumerate(zip((a, b, a + b), senders, receivers, strict=True)):
                ids = torch.arange(CLIENTS) + i * CLIENTS
                message, state = up.compress(g, sender.get(ids), at(method, t, ids))
                peer = receiver.get(ids) if up is method.up else {}
                v, peer = up.decompress(message, peer, at(method, t, ids))
                if up is method.up:
                    sender.put(ids, state)
                    receiver.put(ids, peer)
                decoded.append(v.float())
            scale = float(decoded[2].abs().max())
            holds[up] &= bool(torch.allclose(decoded[0] + decoded[1], decoded[2], rtol=0, atol=1e-5 * scale))
    assert all(holds[up] == up.additive for up in holds)


def test_tensors_without_dimensions_or_numbers(options: dict[str, Any]) -> None:
    """A learned temperature, one number, none: three rounds, whose mean has each tensor's own shape."""
    spec = Spec(("scale", "none", "one", "flat", "weight"), ((), (0,), (1,), (3, 0, 2), (30, 20)))
    method = methods.build(options, spec, Setup(seed=1))
    ids = torch.arange(CLIENTS)
    senders, receivers = start(method)
    memory = method.server.init(torch.zeros(spec.size, device=PLACE))
    for t in range(3):
        g_CD = torch.randn(CLIENTS, spec.size, generator=torch.Generator().manual_seed(t)).to(PLACE)
        for up in method.passes:
            ctx = at(method, t, state=memory)
            message, state = up.compress(g_CD, senders.get(ids), ctx)
            frame = from_bytes(to_bytes(message), up.layout(), CLIENTS, PLACE)
            v, peer = up.decompress(frame, receivers.get(ids) if up is method.up else {}, ctx)
            assert v.shape == (CLIENTS, up.size)
            assert bool(v.float().isfinite().all())
            if up is not method.up:
                index = method.passes.index(up)
                memory = method.server.between(memory, index, v.float().mean(0), ctx.round)
        senders.put(ids, state)
        receivers.put(ids, peer)
        if method.decoder is not None:
            mean_D, memory = method.decoder.direction(memory, v.float().mean(0), ctx.round)
            assert {n: tuple(x.shape) for n, x in spec.views(mean_D).items()} == dict(
                zip(spec.names, spec.shapes, strict=True)
            )


def test_adding_is_decoding_and_adding(method: Method) -> None:
    """Methods that add without writing out what they decode come to the same, and to the same state."""
    weights = [0.25 * (c + 1) for c in range(CLIENTS)]
    senders, receivers = start(method)
    ids = torch.arange(CLIENTS)
    for t in range(2):
        for up in method.passes:
            message, state = up.compress(gradients(t), senders.get(ids), at(method, t))
            peer = receivers.get(ids) if up is method.up else {}
            v, expected = up.decompress(message, peer, at(method, t))
            total = torch.ones(1, up.size, device=PLACE)
            new = up.add(total.expand(CLIENTS, -1), message, peer, at(method, t), weights)
            torch.testing.assert_close(
                total[0], 1 + torch.tensor(weights, device=PLACE) @ v.float(), rtol=1e-4, atol=1e-4
            )
            assert all(torch.equal(a, b) for a, b in _pairs(new, expected))
        senders.put(ids, state)
        receivers.put(ids, new)


def test_decoded_size_is_what_sums(method: Method) -> None:
    for up in method.passes:
        message, _ = up.compress(gradients(0), start(method)[0].get(torch.arange(CLIENTS)), at(method, 0))
        v, _ = up.decompress(message, start(method)[1].get(torch.arange(CLIENTS)), at(method, 0))
        assert v.shape == (CLIENTS, up.size)
        assert v.is_floating_point() != up.integer
    assert method.up.lift(v, at(method, 0)).shape == (CLIENTS, SPEC.size)


def test_sender_believes_what_the_receiver_holds(method: Method) -> None:
    """Also under sampling: in each round only some clients take part."""
    up, (senders, receivers) = method.up, start(method)
    for t in range(ROUNDS):
        ids = torch.tensor([c for c in range(CLIENTS) if (c * 7 + t * 3) % 4])
        message, state = up.compress(gradients(t)[ids.to(PLACE)], senders.get(ids), at(method, t, ids))
        senders.put(ids, state)
        received = from_bytes(to_bytes(message), up.layout(), device=PLACE)
        _, peer = up.decompress(received, receivers.get(ids), at(method, t, ids))
        receivers.put(ids, peer)
        everybody = torch.arange(CLIENTS)
        held = receivers.get(everybody)
        for name, belief in believed(up, senders.get(everybody)).items():
            assert torch.equal(belief, held[name]), name


def test_one_call_for_all_equals_a_call_each(method: Method) -> None:
    together, alone = start(method)[0], start(method)[0]
    ids = torch.arange(CLIENTS)
    for t in range(3):
        g, everybody = gradients(t), together.get(ids)
        each = [alone.get(ids[c : c + 1]) for c in range(CLIENTS)]
        for up in method.passes:
            message, state = up.compress(g, everybody, at(method, t))
            v, _ = up.decompress(message, believed(up, everybody), at(method, t))
            for c, before in enumerate(each):
                one = ids[c : c + 1]
                single, after = up.compress(g[c : c + 1], before, at(method, t, one))
                v_one, _ = up.decompress(single, believed(up, before), at(method, t, one))
                assert torch.allclose(v_one[0].float(), v[c].float(), rtol=1e-5, atol=1e-6)
                assert int(single.nbytes()[0]) == int(message.nbytes()[c])
                if up is method.up:  # what a first pass leaves is not kept
                    alone.put(one, after)
        together.put(ids, state)


def test_pure_and_random_only_by_key(method: Method) -> None:
    """Inputs stay as they were, a call can be repeated, torch's own generator is neither read nor moved."""
    ids = torch.arange(CLIENTS)
    state = start(method)[0].get(ids)
    for t in range(3):
        g, kept = gradients(t), {name: value.clone() for name, value in state.items()}
        g_kept = g.clone()
        for up in method.passes:
            torch.manual_seed(t)
            generator = torch.random.get_rng_state()
            first, new = up.compress(g, state, at(method, t))
            v, _ = up.decompress(first, believed(up, state), at(method, t))
            assert torch.equal(torch.random.get_rng_state(), generator)
            torch.manual_seed(99)
            second, _ = up.compress(g, state, at(method, t))
            v_again, _ = up.decompress(second, believed(up, state), at(method, t))
            assert equal(first, second)
            assert torch.equal(v, v_again)
            assert torch.equal(g, g_kept)
            assert state.keys() == kept.keys()
            assert all(torch.equal(state[n], kept[n]) for n in kept)
        state = new


def rounds_of(method: Method, rounds: int) -> Any:
    """Server states after each round, starting with the initial one."""
    server, senders = method.server, start(method)[0].get(torch.arange(CLIENTS))
    state = server.init(torch.linspace(-1, 1, SPEC.size, device=PLACE))
    yield state
    for t in range(rounds):
        last = play(method, gradients(t), senders, state, at(method, t).round)[-1]
        senders, state = last.after, server.finish(last.state, last.mean_S, last.ctx.round)
        assert int(state["version"]) == t + 1
        yield state


def test_a_client_that_missed_any_rounds_rebuilds_the_parameters(method: Method) -> None:
    """From θ₀, the seed and its downloads alone, to the bit; each client misses other rounds."""
    server = method.server
    views = {c: server.view(torch.linspace(-1, 1, SPEC.size, device=PLACE)) for c in range(4)}
    comes = {0: lambda v: True, 1: lambda v: v % 3 == 1, 2: lambda v: v in (1, 39), 3: lambda v: v == 40}
    for version, state in enumerate(rounds_of(method, 40)):
        for client, view in views.items():
            if comes[client](version):
                download = server.download(state, int(view["version"]))
                published = sum(value.nbytes for value in server.shared(state).values())
                assert int(download.nbytes()[0]) <= 4 * SPEC.size + published + 8 * 40
                received = from_bytes(to_bytes(download), device=PLACE)
                views[client] = view = server.reconcile(view, received, version)
                assert torch.equal(server.parameters(view), server.parameters(state)), (client, version)
                assert all(torch.equal(a, b) for a, b in _pairs(server.shared(view), server.shared(state)))
                assert int(view["version"]) == version


def _pairs(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert a.keys() == b.keys()
    return [(a[name], b[name]) for name in a]


def test_states_survive_a_file_exactly(method: Method) -> None:
    """Sender and server states are plain tensors; saved and loaded they continue to the same bits."""
    up, ids = method.up, torch.arange(CLIENTS)

    def through_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
        read = load(save({name: value.cpu().clone().contiguous() for name, value in state.items()}))
        return {name: value.to(state[name].device) for name, value in read.items()}

    kept, saved = start(method)[0].get(ids), start(method)[0].get(ids)
    for t in range(4):
        message, kept = up.compress(gradients(t), kept, at(method, t))
        again, saved = up.compress(gradients(t), through_file(saved), at(method, t))
        assert equal(message, again)
    states = list(rounds_of(method, 3))
    total = torch.ones(up.size, dtype=torch.int32 if up.integer else torch.float32, device=PLACE)
    round = at(method, 3).round
    resumed = method.server.finish(through_file(states[-1]), total, round)
    direct = method.server.finish(states[-1], total, round)
    assert all(torch.equal(a, b) for a, b in _pairs(resumed, direct))


RUNS = {
    f"{name} {variant}".strip(): {**SMALL, "method": {"name": name, **entry.example, **options}}
    for name, entry in METHODS.items()
    for variant, options in {"": {}, **entry.variants}.items()
}


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_and_both_topologies_are_the_same_run(name: str) -> None:
    """Threads as ranks; tests/test_ranks.py does the same with real MPI processes. The fast suite leaves out what adds
    least: one rank, four, two with an aggregator, and sums of floats (which differ from exact ones where ranks meet
    only) at another number than three."""
    full = "FEDMPI_FULL" in os.environ
    for exact in (True, False):
        reference = outcome({**RUNS[name], "reproducible": exact}, solo())
        for topology in ("allreduce", "aggregator"):
            few = (2, 3) if exact and topology == "allreduce" else (3,)
            for ranks in (1, 2, 3, 4) if full else few:
                values = {**RUNS[name], "reproducible": exact, "topology": topology}
                results = run_ranks(ranks, lambda comm, values=values: outcome(values, comm), timeout=60)
                for result in results:
                    assert_same_run(result, reference, exact)


def assert_same_run(result: dict[str, Any], reference: dict[str, Any], exact: bool) -> None:
    for field in ("upload_bytes", "download_bytes", "messages"):
        assert result[field] == reference[field], field
    if exact:
        assert result["sha256"] == reference["sha256"]
        assert result["accuracy"] == reference["accuracy"]
        assert result["loss"] == reference["loss"]
    else:
        got, expected = torch.tensor(result["theta"]), torch.tensor(reference["theta"])
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
