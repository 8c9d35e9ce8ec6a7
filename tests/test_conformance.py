"""What must hold of every row of METHODS, alone, under each wrapper, and as one part beside an exact one and averaged
buffers. A new row needs no edit here, and a method that is no row is named by FEDMPI_METHOD=package.module:ENTRY (else
the example in configs/own.py is taken).

The properties are those of the protocol (fedmpi/method.py), by number: 1 bytes are measured, and frames that are
not whole are refused; 2 ``additive`` is true; 3 any number of ranks and both topologies are the same run; 4 protocol
bytes do not depend on the ranks; 5 the sender believes what the receiver holds; 6 who missed rounds rebuilds the
parameters; 7 nothing is random but by key (tests/test_random.py has golden vectors); 8 states survive a checkpoint
(tests/test_resume.py: and re-shard); 9 nothing mixes devices (tests/test_device.py); 10 a part beside others gives what
it gives alone. Gradients are correlated from round to round (random ones hide what look-back does), clients have
different keys.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedmpi import methods, plan
from fedmpi.comm import run_ranks, solo
from fedmpi.engine.downloads import receive
from fedmpi.engine.store import ClientStore
from fedmpi.errors import MessageError
from fedmpi.meet.sums import Sums
from fedmpi.message import CPU, Message, concat, equal, from_bytes, to_bytes
from fedmpi.method import Compressor, Context, Method, Round, State, believed, placed, unnest
from fedmpi.methods import METHODS
from fedmpi.methods.base import FeedbackOptions, Setup
from fedmpi.methods.joint import JointServer
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
BESIDE = {f"{name} beside others": CASES[name] for name in ROWS}


def planned(options: dict[str, Any], spec: Spec = SPEC) -> plan.Plan:
    """One vector's tensors: the last of one dimension is averaged exactly, the first is a buffer, the others travel by
    the method."""
    buffer, *_, exact = [name for name, shape in zip(spec.names, spec.shapes, strict=True) if len(shape) < 2]
    shapes = dict(zip(spec.names, spec.shapes, strict=True))
    tensors = plan.Tensors(shapes, {buffer: shapes.pop(buffer)}, frozenset(), frozenset())
    rules = [plan.Rule.model_validate({"match": exact, "travels": "exact"})]
    return plan.make(tensors, methods.parse(options), rules, Setup(seed=1))


def made(case: str, spec: Spec = SPEC) -> Method:
    """The method of a case; of one beside others, that of all parts."""
    if case in BESIDE:
        return planned(BESIDE[case], spec).method
    return methods.build(CASES[case], spec, Setup(seed=1))


@pytest.fixture(params=[*CASES, *BESIDE])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(case: str) -> Method:
    return made(case)


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


def test_property_1_bytes_are_measured_and_frames_round_trip(method: Method) -> None:
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
            for foreign in (b"not one of ours", *(bloated(frame) if t in (0, ROUNDS - 1) else ())):
                with pytest.raises(MessageError):
                    from_bytes(foreign, up.layout(), CLIENTS)
        senders.put(ids, state)


def bloated(frame: bytes) -> Iterator[bytes]:
    """The frame with each dimension of its arrays, and each ragged array's rows, as large as they can be said to be."""
    for at, width in dimensions(frame):
        yield frame[:at] + (2 ** (8 * width - 1) - 1).to_bytes(width, "little") + frame[at + width :]


def dimensions(frame: bytes) -> Iterator[tuple[int, int]]:
    """Where these numbers lie, and of how many bytes they are: a second reading of the format."""
    (clients,), at = struct.unpack_from("<I", frame, 4), 10
    while at < len(frame):
        at += 1 + frame[at]
        code, ragged, ndim = frame[at : at + 3]
        shape = struct.unpack_from(f"<{ndim}Q", frame, at + 3)
        yield from ((at + 3 + 8 * i, 8) for i in range(ndim))
        at += 3 + 8 * ndim
        rows = clients
        if ragged:
            yield at, 4
            rows = sum(struct.unpack_from(f"<{clients}i", frame, at))
            at += 4 * clients
        at += torch.Size(shape).numel() * rows * (1, 1, 2, 4, 8, 2, 2, 4, 8)[code]


def test_property_1_downloads_that_are_not_whole_are_refused(method: Method) -> None:
    server = method.server
    *_, state = rounds_of(method, 4)
    view, frame = (
        server.view(torch.linspace(-1, 1, SPEC.size, device=PLACE)),
        to_bytes(server.download(state, 0)),
    )
    if PLACE == CPU:  # as rank 0 sends it
        got = receive(server, view, frame, 4)
        assert torch.equal(server.parameters(got), server.parameters(state))
    assert equal(from_bytes(frame, clients=1), server.download(state, 0))
    for cut in (*range(0, len(frame), 97), len(frame) - 1):
        with pytest.raises(MessageError):
            receive(server, view, frame[:cut], 4)
    for foreign in (b"not one of ours", frame + b"\0", *bloated(frame)):
        with pytest.raises(MessageError):
            receive(server, view, foreign, 4)


def test_property_2_additive_is_true_of_what_is_sent(method: Method) -> None:
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


def test_tensors_without_dimensions_or_numbers(case: str) -> None:
    """A learned temperature, one number, none: three rounds, whose mean has each tensor's own shape."""
    spec = Spec(("scale", "none", "one", "flat", "weight"), ((), (0,), (1,), (3, 0, 2), (30, 20)))
    method = made(case, spec)
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
            sums = 1 + (counts(up, weights) * v.float()).sum(0)
            torch.testing.assert_close(total[0], sums, rtol=1e-4, atol=1e-4)
            assert all(torch.equal(a, b) for a, b in _pairs(new, expected))
        senders.put(ids, state)
        receivers.put(ids, new)


def counts(up: Compressor, weights: list[float]) -> Tensor:
    """What each client's numbers count in a sum ``(CLIENTS, S)``: a vote beside other kinds counts one."""
    several = len(up.segments) > 1
    rows = [
        torch.ones(CLIENTS) if several and kind == "votes" else torch.tensor(weights)
        for size, kind in up.segments
        for _ in range(size)
    ]
    return torch.stack(rows, 1).to(PLACE)


def test_decoded_size_is_what_sums(method: Method) -> None:
    for up in method.passes:
        message, _ = up.compress(gradients(0), start(method)[0].get(torch.arange(CLIENTS)), at(method, 0))
        v, _ = up.decompress(message, start(method)[1].get(torch.arange(CLIENTS)), at(method, 0))
        assert v.shape == (CLIENTS, up.size)
        assert v.is_floating_point() != up.integer
    assert method.up.lift(v, at(method, 0)).shape == (CLIENTS, SPEC.size)


def test_property_5_the_sender_believes_what_the_receiver_holds(method: Method) -> None:
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


def test_property_7_pure_and_random_only_by_key(method: Method) -> None:
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


def test_property_6_a_client_that_missed_any_rounds_rebuilds_the_parameters(method: Method) -> None:
    """From θ₀, the seed and its downloads alone, to the bit; each client misses other rounds."""
    server = method.server
    views = {c: server.view(torch.linspace(-1, 1, SPEC.size, device=PLACE)) for c in range(4)}
    comes = {0: lambda v: True, 1: lambda v: v % 3 == 1, 2: lambda v: v in (1, 39), 3: lambda v: v == 40}
    for version, state in enumerate(rounds_of(method, 40)):
        for client, view in views.items():
            if comes[client](version):
                download = server.download(state, int(view["version"]))
                published = sum(value.nbytes for value in server.shared(state).values())
                assert download.total_nbytes() <= 4 * SPEC.size + published + 8 * 40
                received = from_bytes(to_bytes(download), device=PLACE)
                views[client] = view = server.reconcile(view, received, version)
                assert torch.equal(server.parameters(view), server.parameters(state)), (client, version)
                assert all(torch.equal(a, b) for a, b in _pairs(server.shared(view), server.shared(state)))
                assert int(view["version"]) == version


def _pairs(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert a.keys() == b.keys()
    return [(a[name], b[name]) for name in a]


def test_property_8_states_survive_a_file_exactly(method: Method) -> None:
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


def met(
    method: Method, g_CD: Tensor, senders: State, state: State, round: Round
) -> tuple[list[Message], State, State]:
    """A round whose messages meet as in a run: each pass's message, the clients' state and the server's."""
    weights_C, sent = torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64), []
    for index, up in enumerate(method.passes):
        ctx = at(method, round.t, state=state)
        message, after = up.compress(g_CD, senders, ctx)
        v_CS, _ = up.decompress(message, believed(up, senders) if up is method.up else {}, ctx)
        total = Sums(device=PLACE)(up, CLIENTS)
        total.add(v_CS, weights_C)
        sent.append(message)
        if up is not method.up:
            state = method.server.between(state, index, total.value(), round)
    return sent, after, method.server.finish(state, total.value(), round)


@pytest.mark.parametrize("name", CASES)
def test_property_10_a_part_beside_others_gives_what_it_gives_alone(name: str) -> None:
    """The same messages, states, downloads and parameters to the bit, as a method of its own for its tensors alone."""
    beside = planned(CASES[name])
    part = next(p for p in beside.parts if p.seed == 1)
    alone = methods.build(CASES[name], part.spec, Setup(seed=1))
    theta_D = torch.linspace(-1, 1, SPEC.size, device=PLACE)
    rule, own = beside.method.server, alone.server
    assert isinstance(rule, JointServer)
    state, view = rule.init(theta_D), rule.view(theta_D)
    state_alone, view_alone = own.init(theta_D[part.at].clone()), own.view(theta_D[part.at].clone())
    senders, senders_alone = (start(m)[0].get(torch.arange(CLIENTS)) for m in (beside.method, alone))
    prefix = f"{part.name}."
    for t in range(5):
        g_CD, round = gradients(t), at(alone, t).round
        wide, senders, state = met(beside.method, g_CD, senders, state, round)
        narrow = g_CD[:, part.at].contiguous()
        single, senders_alone, state_alone = met(alone, narrow, senders_alone, state_alone, round)
        for whole, message in zip(wide, single, strict=True):
            assert equal(Message(unnest(whole.arrays, prefix), unnest(whole.lengths, prefix)), message)
        assert all(torch.equal(a, b) for a, b in _pairs(unnest(senders, prefix), senders_alone))
        assert all(torch.equal(a, b) for a, b in _pairs(rule.part(state, part), state_alone))
        if t % 3 == 1:
            seen = int(view["version"])
            download, single_download = rule.download(state, seen), own.download(state_alone, seen)
            assert equal(Message(unnest(download.arrays, prefix)), single_download)
            view = rule.reconcile(view, download, t + 1)
            view_alone = own.reconcile(view_alone, single_download, t + 1)
            assert all(torch.equal(a, b) for a, b in _pairs(rule.part(view, part), view_alone))
    buffer = beside.parts[-1].at  # x before - x after
    changes = sum((gradients(t)[:, buffer].mean(0) for t in range(5)), theta_D.new_zeros(4))
    torch.testing.assert_close(state["theta"][buffer], theta_D[buffer] - changes)


# Clients differ in their samples, by a partition that costs little.
_COMMON = SMALL | {"partition": {"name": "power"}}
RUNS = {
    f"{name} {variant}".strip(): {**_COMMON, "method": {"name": name, **entry.example, **options}}
    for name, entry in ROWS.items()
    for variant, options in {"": {}, **entry.variants}.items()
}
RUNS_BESIDE = {
    f"{name} beside others": {
        **_COMMON,
        "model": {"name": "tests.nets:build"},
        "parts": [{"match": "norm.*", "travels": "exact"}],
        "method": {"name": name, **entry.example},
        "rounds": 3,
    }
    for name, entry in ROWS.items()
}


def meetings(name: str, exact: bool) -> Iterator[tuple[str, int]]:
    """The topologies and numbers of ranks at which a run is tried. The fast suite leaves out what adds least: one rank,
    four, two with an aggregator, and sums of floats (which differ from exact ones where ranks meet only) at another
    number than three; and of parts, which add up as their methods do, what a second number or topology adds."""
    full, parts = "FEDMPI_FULL" in os.environ, name in RUNS_BESIDE
    for topology in ("allreduce", "aggregator"):
        if full:
            numbers: tuple[int, ...] = (1, 2, 3, 4)
        elif parts:
            numbers = (2,) if exact and topology == "allreduce" else (3,) if topology == "aggregator" else ()
        else:
            numbers = (2, 3) if exact and topology == "allreduce" else (3,)
        yield from ((topology, ranks) for ranks in numbers)


class Runs(NamedTuple):
    """One configuration, in one process and over ranks.

    Attributes:
      exact: equal bits are promised.
      alone: what came of it in one process.
      ranks: the same, of each rank of each of :func:`meetings`.
    """

    exact: bool
    alone: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[(name, exact) for name in RUNS | RUNS_BESIDE for exact in (True, False)],
    ids=lambda param: param[0] if param[1] else f"{param[0]}, floats",
)
def runs(request: pytest.FixtureRequest) -> Runs:
    """Threads as ranks; tests/test_ranks.py does the same with real MPI processes."""
    name, exact = request.param
    values = {**(RUNS | RUNS_BESIDE)[name], "reproducible": exact}
    if not exact and not methods.build(values["method"], SPEC, Setup()).up.additive:
        values["rounds"] = 1  # after which signs, choices and roundings may differ that hang on last bits
    ranks = []
    for topology, n in meetings(name, exact):
        there = {**values, "topology": topology}
        ranks += run_ranks(n, lambda comm, there=there: outcome(there, comm), timeout=60)
    return Runs(exact, outcome(values, solo()), ranks)


def test_property_3_any_number_of_ranks_and_both_topologies_are_the_same_run(runs: Runs) -> None:
    for result in runs.ranks:
        assert_same_run(result, runs.alone, runs.exact)


def test_property_4_protocol_bytes_do_not_depend_on_the_number_of_ranks(runs: Runs) -> None:
    for result in runs.ranks:
        assert {n: result[n] for n in PROTOCOL} == {n: runs.alone[n] for n in PROTOCOL}


PROTOCOL = ("upload_bytes", "download_bytes", "messages")


def assert_same_run(result: dict[str, Any], reference: dict[str, Any], exact: bool) -> None:
    for field in PROTOCOL:
        assert result[field] == reference[field], field
    if exact:
        assert result["sha256"] == reference["sha256"]
        assert result["accuracy"] == reference["accuracy"]
        assert result["loss"] == reference["loss"]
    else:
        got, expected = torch.tensor(result["theta"]), torch.tensor(reference["theta"])
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
