"""Every row of METHODS with its gradients on an accelerator, a make-believe one (tests/pretend): nothing mixes devices,
nothing as long as the gradient goes to the host, the host waits within a budget, and messages and what they decode to
have the CPU's bits.

A new row needs no edit here: it may wait as :data:`FEW` says, or gets a line in :data:`WAITS`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.comm import Comm, run_ranks
from fedmpi.comm.local import LocalComm
from fedmpi.errors import MessageError, NumericalError
from fedmpi.integrations.reducer import Reducer
from fedmpi.message import CPU, Message, equal, from_bytes, to_bytes
from fedmpi.method import Context, Method, Round, State, placed
from fedmpi.methods import METHODS
from fedmpi.methods.base import Mean, Setup
from fedmpi.methods.dense import Dense
from fedmpi.methods.joint import Part, join
from fedmpi.methods.sparse import Coder
from fedmpi.spec import Spec

from . import pretend
from . import test_conformance as conformance
from .conftest import JOBS, absent, torchrun

CASES, CLIENTS, SPEC = conformance.CASES, conformance.CLIENTS, conformance.SPEC

# How often compress() and decompress() may wait, of any number of clients.
FEW = (1, 1)
WAITS = {
    "dense": (0, 0),
    "signsgd": (1, 1),  # which clients abstain in rows
    "signsgd coin": (0, 0),
    "fp16": (0, 1),  # a receiver looks at what it was sent: whether it is finite,
    "bf16": (0, 1),
    "qsgd": (0, 1),
    "topk feedback=False": (0, 1),  # or lies within the vector
    "rtopk feedback=False": (0, 1),
    "prune": (0, 1),
    "randomk": (0, 0),
    "randomk feedback=True": (0, 0),
    "intrinsic": (1, 0),  # whether its numbers are finite: a sender tells
    "fetchsgd": (0, 0),
    "fetchsgd clear": (0, 0),
    "atomo": (4, 1),  # two layers: the decomposition, and who sends how many atoms
    "atomo truncated": (4, 1),
    "powersgd": (1, 0),
    "powersgd feedback=False": (1, 0),
    "prune of clients": (5, 5),  # who has a mask, and where
    "lookback per tensor": (12, 8),  # four tensors
    "lookback kept as sent": (5, 4),  # what is kept is decoded again
    "lookback clustered": (1, 2),
    "topk coded": (2, 2),  # a look at the indices and one at the values,
    "topk coded, 4 bits": (2, 2),  # or their scales
    "rtopk coded": (2, 2),
    "sparseloco": (2, 2),
    "sparseloco packed": (2, 2),
}
PARTS = {
    "conv.weight": {"name": "powersgd", "rank": 1, "feedback": True},
    "conv.bias": {"name": "dense"},
    "fc.weight": {"name": "lookback", "threshold": 0.5, "inner": {"name": "signsgd"}},
    "fc.bias": {"name": "intrinsic", "dim": 4, "schedule": "time_varying"},
}
WAITS["parts"] = (4 + 1 + 1, 2)  # look-back's over signs, and what powersgd's and intrinsic's senders tell
_PRODUCTS = {"mm", "bmm", "addmm", "mv", "addmv", "baddbmm", "dot", "_linalg_eigh", "linalg_qr"}


def budget(name: str) -> tuple[int, int]:
    """Waits of a sender and a receiver."""
    name = name.removesuffix(" beside others")  # which never make anybody wait
    if name in WAITS:
        return WAITS[name]
    outer, over, inner = name.partition(" over ")
    if outer == "lookback" and over:  # the inner message, what comes of it, and who sends which
        encode, decode = budget(inner)
        return encode + decode + 1, decode + 1
    plain, feedback, _ = name.partition(" feedback=True")
    if feedback:
        encode, decode = budget(plain)
        return encode + decode, decode
    return FEW


def made(name: str) -> Method:
    """The method of a case; of "parts", one of several in one message."""
    if name != "parts":
        return conformance.made(name)
    parts, start = [], 0
    for key, (name, shape, size) in enumerate(zip(SPEC.names, SPEC.shapes, SPEC.sizes, strict=True)):
        spec = Spec((name,), (shape,))
        method = methods.build(PARTS[name], spec, Setup(seed=key))
        parts.append(Part(name.replace(".", "_"), spec, slice(start, start + size), method, key))
        start += size
    return join(SPEC, parts)


class Watch:
    """Calls on the device, looked at; calls on the CPU, as they are."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device, self.products = name, device, False

    @contextmanager
    def __call__(self, what: str, most: int | None = None) -> Iterator[None]:
        """Args: most: how often the host may wait; None: as often as it likes, and for copies of any length."""
        if self.device.type != "pretend":
            yield
            return
        with pretend.watched() as seen:
            yield
        assert not seen.mixed, f"{self.name}: {what} mixes devices: {seen.mixed}"
        if most is not None:
            assert seen.waited <= most, f"{self.name}: {what} waits {seen.waits}, expected at most {most}"
            assert seen.longest < SPEC.size, f"{self.name}: {what} copies {seen.longest} bytes to the host"
        self.products |= not _PRODUCTS.isdisjoint(seen.operations)


def played(name: str, device: torch.device, rounds: int) -> tuple[list[tuple[Message, Tensor]], bool]:
    """Each pass's message and what it decodes to; whether it took products of matrices, whose last bits differ from
    device to device."""
    method, watch = made(name), Watch(name, device)
    encode, decode = budget(name)
    ids = torch.arange(CLIENTS)

    def start(state: State) -> State:
        return placed({n: v.expand(CLIENTS, *v.shape).clone() for n, v in state.items()}, device)

    senders, peers = start(method.up.init()), start(method.up.init_peer())
    theta_D = torch.linspace(-1, 1, SPEC.size).to(device)
    server, view = method.server.init(theta_D), method.server.view(theta_D)
    memory = placed(method.decoder.memory(), device) if method.decoder else {}
    done = []
    for t in range(rounds):
        g_CD, now = conformance.gradients(t).to(device), Round(1, t, 0.1, 3)
        for index, up in enumerate(method.passes):
            ctx = Context(now, ids, torch.ones_like(ids), method.server.shared(server))
            held = peers if up is method.up else {}
            with watch("compress", encode):
                message, after = up.compress(g_CD, senders, ctx)
            with watch("decompress", decode):
                v_CS, kept = up.decompress(message, held, ctx)
            total_1S = torch.ones(1, up.size, device=device)
            with watch("add", decode):
                up.add(total_1S.expand(CLIENTS, -1), message, held, ctx, [0.25] * CLIENTS)
            with watch("lift"):
                v_CD = up.lift(v_CS, ctx) if up is method.up else v_CS
            received = from_bytes(to_bytes(message), up.layout(), CLIENTS, device)
            assert {a.device for a in received.arrays.values()} == {device}
            assert equal(received, message)
            assert all(rows_C.device == CPU for rows_C in message.lengths.values())
            done += [(message, v_CS), (message, total_1S), (message, v_CD)]
            mean_S = v_CS.sum(0, dtype=torch.int32) if up.integer else v_CS.mean(0)
            if up is not method.up:
                with watch("between", 0):
                    server = method.server.between(server, index, mean_S, now)
                    memory = method.decoder.between(memory, index, mean_S, now) if method.decoder else memory
        senders, peers = after, kept
        if method.decoder is not None:
            with watch("direction", 0):
                g_D, memory = method.decoder.direction(memory, mean_S, now)
            done.append((message, g_D))
        with watch("finish", 1):
            server = method.server.finish(server, mean_S, now)
        if t % 2 or t + 1 == rounds:
            with watch("download and reconcile"):
                seen = int(view["version"])
                view = method.server.reconcile(view, method.server.download(server, seen), t + 1)
            assert torch.equal(view["theta"], server["theta"])
            assert server["theta"].device == device
            assert server["version"].device == CPU
            done.append((message, server["theta"]))
    return done, watch.products


def check(name: str, device: torch.device, rounds: int = 4) -> None:
    there, products = played(name, device, rounds)
    here, _ = played(name, CPU, rounds)
    for (message, x), (expected, y) in zip(there, here, strict=True):
        if not products:
            assert equal(message, expected)
            assert torch.equal(x.cpu(), y)
            continue
        assert message.arrays.keys() == expected.arrays.keys()
        for array, (wanted) in zip(message.arrays.values(), expected.arrays.values(), strict=True):
            torch.testing.assert_close(array.cpu(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


def _few(cases: list[str]) -> list[Any]:
    """With --full all; else what a row is alone."""
    combined = (" over ", " feedback=", " beside ")
    return [
        pytest.param(name, marks=[pytest.mark.slow] if any(c in name for c in combined) else [])
        for name in cases
    ]


@pytest.mark.parametrize("name", _few([*CASES, *conformance.BESIDE, "parts"]))
def test_property_9_nothing_mixes_devices_and_the_host_waits_within_its_budget(
    name: str, device: torch.device
) -> None:
    check(name, device)


def test_a_question_in_a_method_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Dense.compress

    def asks(self: Dense, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        assert g_CD.sum().item() < 1e9
        return plain(self, g_CD, state, ctx)

    monkeypatch.setattr(Dense, "compress", asks)
    with pytest.raises(AssertionError, match=r"dense: compress waits \{'item': 1\}, expected at most 0"):
        check("dense", device, 1)


def test_a_copy_of_the_gradient_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(self: Dense, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        g_CD = message.arrays["gradient"]
        return g_CD.cpu().to(g_CD.device), peer

    monkeypatch.setattr(Dense, "decompress", copies)
    monkeypatch.setitem(WAITS, "dense", (0, 1))
    with pytest.raises(AssertionError, match=r"dense: decompress copies \d+ bytes to the host"):
        check("dense", device, 1)


@pytest.mark.parametrize("index", [False, True])
def test_a_tensor_made_without_its_device_is_noticed(
    index: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(self: Dense, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        g_CD = message.arrays["gradient"]
        return (g_CD[torch.arange(len(g_CD))] if index else g_CD + torch.zeros(self.size)), peer

    monkeypatch.setattr(Dense, "decompress", forgets)
    with pytest.raises((AssertionError, RuntimeError), match=r"mixes devices|at least two devices"):
        check("dense", device, 1)


SHAPES = {"a": (30, 40), "b": (40,), "c": (16, 5, 3, 3)}
DROP_INS = [
    name for name, options in CASES.items() if methods.build(options, SPEC, Setup(seed=1)).decoder is not None
]


# How often the host may wait in a step of a drop-in: once, for whether it counts, of all groups together. Where
# messages differ in length it has to know what it sends,
STEP = {
    "signsgd": 4,  # who abstains, here and among all, and in which rows
    "lookback": 3,  # what comes of the gradient, and the message
    "lookback over signsgd": 4,
    "lookback per tensor": 4,
    "lookback kept as sent": 5,  # what is kept is decoded again
    "atomo": 7,  # two layers: the decomposition, and how many atoms, of each
    "lookback over atomo": 9,
    "signsgd coin": 1,  # but for these, which do not
}
RAGGED = 3  # of a new row


def of_a_step(name: str, reducer: Reducer) -> int:
    plain = name.removesuffix(" feedback=True").removesuffix(" feedback=False")
    up = reducer.groups[0].method.up
    ragged = up.nbytes() is None
    for known in (plain, plain.partition(" over ")[0], plain.partition(" ")[0]):
        if known in STEP:
            return STEP[known]
    return RAGGED if ragged else 1


def collectives(reducer: Reducer) -> int:
    """Most of a step: where they leave from the host, the host waits for a copy each."""
    way = {"merge": 2}
    methods = [(group.method, group.ways) for group in reducer.groups]
    return 1 + sum(
        way.get(ways[c].name, 1) + (c.optional is not None) for method, ways in methods for c in method.passes
    )


def averaged(name: str, device: torch.device, wire: torch.device = CPU) -> Callable[[Comm], list[Tensor]]:
    """A rank's gradients after each of three steps, of ranks that meet on ``wire``; in the second one rank has
    NaN, and it does not count."""

    def main(comm: Comm) -> list[Tensor]:
        comm.device = wire
        reducer, found = Reducer(SHAPES, CASES[name], comm, device, exact_below=100), []
        for t in range(3):
            parameters = {}
            for i, (n, shape) in enumerate(SHAPES.items()):
                generator = torch.Generator().manual_seed(100 * t + 10 * i + comm.rank)
                gradient = torch.randn(shape, generator=generator)
                gradient[::3] = 0
                if (t, comm.rank) == (1, 1):
                    gradient[1] = float("nan")
                parameters[n] = torch.zeros(shape, device=device, requires_grad=True)
                parameters[n].grad = gradient.to(device)
            before = comm.sent
            with pretend.watched() as seen:
                reducer.average(parameters)
            assert not seen.mixed, f"{name}: {seen.mixed}"
            most = of_a_step(name, reducer) + (0 if wire == device else collectives(reducer))
            assert seen.waited <= most, f"{name}: a step waits {seen.waits}, expected at most {most}"
            # What goes to the host is what is sent from there: messages, never a gradient beside them. (One that is not
            # usable may go with the answer that says so.)
            sent = comm.sent - before
            assert seen.longest <= sent or t == 1, f"{name}: {seen.longest} of {sent} bytes"
            found.append(
                torch.cat([p.grad.flatten().cpu() for p in parameters.values() if p.grad is not None])
            )
        kept = [
            v for g in reducer.groups for part in (g.state, g.memory, g.peers.state) for v in part.values()
        ]
        assert {v.device for v in kept} <= {device}
        assert (reducer.step, reducer.skipped) == (2, 1)
        return found

    return main


@pytest.mark.parametrize("name", _few(DROP_INS))
def test_ranks_average_gradients_that_lie_on_a_device(name: str, device: torch.device) -> None:
    """Over a communicator whose tensors travel from the host: messages are staged. And over one that takes them where
    they are, as NCCL does."""
    here = run_ranks(2, averaged(name, CPU), timeout=60)
    for wire in (CPU, device):
        for mine, expected in zip(run_ranks(2, averaged(name, device, wire), timeout=60), here, strict=True):
            for got, wanted in zip(mine, expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_question_of_a_step_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Mean.direction

    def asks(self: Mean, memory: State, mean_S: Tensor, *rest: Any) -> tuple[Tensor, State]:
        assert mean_S.sum().item() < 1e9
        return plain(self, memory, mean_S, *rest)

    monkeypatch.setattr(Mean, "direction", asks)
    with pytest.raises(
        AssertionError, match=r"bf16: a step waits \{'copy': 1, 'item': 2\}, expected at most 1"
    ):
        run_ranks(2, averaged("bf16", device, device), timeout=60)


def test_out_of_memory_in_a_step_ends_with_a_sentence(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Mean, *rest: Any) -> tuple[Tensor, State]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")

    monkeypatch.setattr(Mean, "direction", full)
    with pytest.raises(NumericalError) as caught:
        run_ranks(2, averaged("topk", device), timeout=60)
    assert str(caught.value).startswith(
        "device: pretend:0 ran out of memory while averaging 1,960 gradients by topk, which keeps 7.68e-06 GB there "
        "between steps: CUDA out of memory. Tried to allocate 2.00 GiB.; ways out: a smaller batch"
    )


@pytest.mark.parametrize("wire", ["host", "device"])
def test_a_message_that_is_refused_ends_the_step_on_a_device(
    wire: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its check is asked with the step's other questions, and until then it harms nobody."""
    plain = Coder.encode

    def beyond(self: Coder, index_CK: Tensor) -> dict[str, Tensor]:
        return plain(self, torch.full_like(index_CK, self.size))

    monkeypatch.setattr(Coder, "encode", beyond)
    with pytest.raises(MessageError, match=r"message: index \d+, expected less than"):
        run_ranks(2, averaged("topk", device, device if wire == "device" else CPU), timeout=60)


def test_a_missing_wait_for_a_copy_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(self: Comm, x: Tensor) -> Tensor:
        return x.detach().to(self.device, non_blocking=True)

    def summed(comm: Comm) -> Tensor:
        x = torch.full((4,), 1.0 + comm.rank, device=device)
        comm.sum([x])
        return x.cpu()

    assert [x.tolist() for x in run_ranks(2, summed, timeout=60)] == [[3.0] * 4] * 2
    monkeypatch.setattr(LocalComm, "_stage", hurried)
    assert [x.tolist() for x in run_ranks(2, summed, timeout=60)] != [[3.0] * 4] * 2


def test_late_copies_come_with_the_event_that_follows_them(device: torch.device) -> None:
    x, event, host = torch.ones(3, device=device), torch.Event(device="pretend"), torch.zeros(3)
    event.record()
    host.copy_(x, non_blocking=True)
    event.synchronize()  # it was recorded before
    assert host.tolist() == [0, 0, 0]
    event.record()
    x.add_(1)
    event.synchronize()
    assert host.tolist() == [1, 1, 1]  # as it was when the copy was asked for
    source = torch.ones(3)
    there = source.to(device, non_blocking=True)
    source.fill_(7)  # too early
    assert (there + 0).cpu().tolist() == [7, 7, 7]


@pytest.mark.parametrize("name", ["topk", "powersgd", "lookback"])
def test_a_state_goes_on_on_the_other_device(name: str, device: torch.device) -> None:
    """Saved on the CPU and loaded on the device, or the other way: the steps after it are the same."""

    def steps(reducer: Reducer, first: int, last: int) -> Tensor:
        for t in range(first, last):
            parameters = {}
            for n, shape in SHAPES.items():
                parameters[n] = torch.zeros(shape, device=reducer.device, requires_grad=True)
                generator = torch.Generator().manual_seed(100 * t + reducer.comm.rank)
                parameters[n].grad = torch.randn(shape, generator=generator).to(reducer.device)
            reducer.average(parameters)
        return torch.cat([p.grad.flatten().cpu() for p in parameters.values() if p.grad is not None])

    def main(comm: Comm, places: tuple[torch.device, torch.device]) -> Tensor:
        before, after = (Reducer(SHAPES, CASES[name], comm, place, exact_below=100) for place in places)
        steps(before, 0, 2)
        state = before.state_dict() | {"measuring": False}
        tensors = [v for g in state["groups"] for part in ("state", "memory") for v in g[part].values()]
        assert {v.device for v in tensors} <= {CPU}
        after.load_state_dict(state)
        return steps(after, 2, 4)

    expected = run_ranks(2, lambda comm: main(comm, (CPU, CPU)), timeout=60)
    for places in ((CPU, device), (device, CPU)):
        for got, wanted in zip(
            run_ranks(2, lambda c, p=places: main(c, p), timeout=60), expected, strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_ci_fails_and_others_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    why = pretend.missing()
    assert why == "no no-such-compiler to compile the make-believe device with"
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=why):
        absent(why)
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=why):
        absent(why)


@pytest.mark.parametrize("rows", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_hook_computes_where_the_parameters_are(rows: bool, device: torch.device, tmp_path: Path) -> None:
    """DistributedDataParallel on the device in two processes, each method one job after the other: rows as they are,
    and all that is made of them."""
    cases, answer = tmp_path / "cases.json", tmp_path / "answer.json"
    asked = {name: CASES[name] for name in DROP_INS if (name in METHODS) == rows}
    cases.write_text(json.dumps(asked))
    done = torchrun(2, str(JOBS / "device_ddp.py"), str(cases), str(answer))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(answer.read_text()) == dict.fromkeys(asked, "")


PROPERTIES = [name for name in dir(conformance) if name.startswith("test_") and "ranks" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("property", PROPERTIES)
def test_conformance_on_a_device(
    property: str, case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite itself (tests/test_conformance.py), whose gradients, states and parameters lie there."""
    monkeypatch.setattr(conformance, "PLACE", device)
    test, options = getattr(conformance, property), CASES[case]
    takes_method = "method" in inspect.signature(test).parameters
    with pretend.watched() as seen:
        test(methods.build(options, SPEC, Setup(seed=1)) if takes_method else options)
    assert not seen.mixed
