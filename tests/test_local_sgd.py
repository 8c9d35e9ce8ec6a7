"""Local updates: what they compute, on ranks that are threads, and in real jobs (tests/jobs/local_checks.py)."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedmpi
from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.errors import CommError, ConfigError

from .conftest import JOBS, find_mpi, torchrun
from .jobs import local_checks

_SEED = threading.Lock()  # threads share torch's generator
TOPK = {"name": "topk", "ratio": 0.1, "feedback": True}


class Tied(nn.Module):
    """Two layers of one weight, a norm that counts, a mask that never was finite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.out = (
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 8),
            nn.Linear(8, 1),
        )
        self.b.weight = self.a.weight
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.b(torch.tanh(self.norm(self.a(x))))))
        return y


def model(seed: int = 0) -> Tied:
    with _SEED:
        torch.manual_seed(seed)
        return Tied()


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    """Two parameter groups."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=0.01)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05)


def backward(net: nn.Module, t: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(100 * t + rank)
    x = torch.randn(16, 8, generator=generator)
    net.zero_grad()
    (net(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int) -> None:
    for t in steps:
        backward(net, t, rank)
        optimizer.step()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def whole(net: nn.Module) -> Tensor:
    return torch.cat([flat(net), *(b.flatten().double() for b in net.buffers())])


def on(ranks: int, job: Callable[[Comm], Any]) -> list[Any]:
    return run_ranks(ranks, job, timeout=60)


def test_every_step_with_sgd_is_data_parallel_sgd() -> None:
    def job(comm: Comm) -> Tensor:
        net = model(comm.rank)  # rank 0's is everybody's
        optimizer = sgd(net)
        fedmpi.local_sgd(net, optimizer, every=1, outer="sgd", comm=comm)
        train(net, optimizer, range(100), comm.rank)
        return flat(net)

    got = on(3, job)
    nets = [model(0) for _ in range(3)]
    for t in range(100):
        for rank, net in enumerate(nets):
            backward(net, t, rank)
        for ps in zip(*(net.parameters() for net in nets), strict=True):
            mean = torch.stack([p.grad for p in ps]).mean(0)
            for p in ps:
                p.data.sub_(mean, alpha=0.05)
    expected = flat(nets[0])
    assert all(torch.equal(each, got[0]) for each in got)
    assert float((got[0] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("make", [sgd, adamw])
def test_one_rank_with_plain_averaging_trains_to_the_bit_as_without(make: Any) -> None:
    nets = [model(), model()]
    for net, wrapped in zip(nets, (True, False), strict=True):
        optimizer = make(net)
        if wrapped:
            fedmpi.local_sgd(net, optimizer, TOPK, every=3, outer="sgd", warmup=2, comm=solo())
        train(net, optimizer, range(20), 0)
    assert torch.equal(whole(nets[0]), whole(nets[1]))


RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.8},
    "momentum": {"lr": 0.5, "beta1": 0.8},
    "nesterov": {},
    "adam": {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "epsilon": 0.01},
}


@pytest.mark.parametrize("outer", RULES)
def test_the_outer_optimizer_steps_from_the_anchor_by_the_mean_difference(outer: str) -> None:
    """Two rounds of exact averaging while it warms up, then four of H = 5, against a transcription on one thread."""
    values = RULES[outer]

    def job(comm: Comm) -> Tensor:
        net = model()
        optimizer = sgd(net)
        fedmpi.local_sgd(net, optimizer, every=5, outer=outer, warmup=2, comm=comm, **values)
        train(net, optimizer, range(22), comm.rank)
        return flat(net)

    got = on(2, job)
    nets = [model() for _ in range(2)]
    optimizers = [sgd(net) for net in nets]
    anchor = flat(nets[0]).double()
    m, v = torch.zeros_like(anchor), torch.full_like(anchor, values.get("epsilon", 1.0) ** 2)
    b1, b2 = values.get("beta1", 0.9), values.get("beta2", 0.99)
    eta = values.get("lr", 0.7)
    done = 0
    for length in (1, 1, 5, 5, 5, 5):
        for rank, net in enumerate(nets):
            train(net, optimizers[rank], range(done, done + length), rank)
        done += length
        delta = torch.stack([anchor - flat(net).double() for net in nets]).mean(0)
        if length == 1:
            step = delta
        elif outer == "sgd":
            step = eta * delta
        elif outer == "adam":
            m = b1 * m + (1 - b1) * delta
            v = b2 * v + (1 - b2) * delta**2
            step = eta * m / (v.sqrt() + values["epsilon"])
        else:
            m = b1 * m + delta
            step = eta * (m if outer == "momentum" else delta + b1 * m)
        anchor = anchor - step
        for net in nets:
            at = 0
            for p in net.parameters():
                p.data.copy_(anchor[at : at + p.numel()].view_as(p))
                at += p.numel()
        for buffers in zip(*(net.buffers() for net in nets), strict=True):
            mean = torch.stack([b.double() for b in buffers]).mean(0)
            for b in buffers:
                b.copy_(mean)
    assert torch.equal(got[0], got[1])
    assert torch.allclose(got[0].double(), anchor, rtol=1e-4, atol=1e-5)


def test_parts_under_way_are_merged_by_their_weight() -> None:
    """One fragment of two: at step 3 of each 6 the second, at 6 the first; τ = 2, α = 0.25."""

    def job(comm: Comm) -> tuple[list[Tensor], Any]:
        net = model()
        optimizer = sgd(net)
        outer = fedmpi.local_sgd(
            net, optimizer, every=6, outer="sgd", lr=0.5, fragments=2, overlap=2, alpha=0.25, comm=comm
        )
        seen = []
        for t in range(14):
            train(net, optimizer, range(t, t + 1), comm.rank)
            seen.append(flat(net))
        return seen, [set(f.parameters) for f in outer.fragments]

    got = on(2, job)
    first, second = got[0][1]
    assert first | second == {n for n, _ in model().named_parameters()}
    assert not first & second
    nets = [model() for _ in range(2)]
    optimizers = [sgd(net) for net in nets]
    anchor = {n: p.detach().clone() for n, p in nets[0].named_parameters()}
    sent: dict[int, tuple[set[str], dict[str, Tensor]]] = {}
    buffers: dict[int, list[Tensor]] = {}
    for t in range(1, 15):
        for rank, net in enumerate(nets):
            train(net, optimizers[rank], range(t - 1, t), rank)
        if t in sent:
            names, mean = sent[t]
            for n in names:
                anchor[n] = anchor[n] - 0.5 * mean[n]
                for net in nets:
                    p = net.get_parameter(n)
                    p.data.copy_(0.25 * p.data + 0.75 * anchor[n])
            for i, b in enumerate(buffers.get(t, [])):
                for net in nets:
                    list(net.buffers())[i].copy_(b)
        if t % 3 == 0:
            names = first if t % 6 == 0 else second
            mean = {
                n: torch.stack([anchor[n] - net.get_parameter(n).detach() for net in nets]).mean(0)
                for n in names
            }
            sent[t + 2] = names, mean
            if names is first:
                pairs = zip(*(net.buffers() for net in nets), strict=True)
                buffers[t + 2] = [torch.stack([b.double() for b in pair]).mean(0) for pair in pairs]
        for rank, net in enumerate(nets):
            assert torch.allclose(got[rank][0][t - 1], flat(net), rtol=1e-4, atol=1e-6), (t, rank)


METHODS: dict[str, Any] = {
    "dense": "dense",
    "topk": TOPK,
    "signs": {"name": "signsgd", "feedback": True},
    "votes": {"name": "signsgd"},
    "qsgd": {"name": "qsgd", "bits": 4},
    "powersgd": {"name": "powersgd", "rank": 1, "feedback": True},
    "intrinsic": {"name": "intrinsic", "dim": 10},
}


IN_FRAGMENTS = ({"fragments": 3}, {"fragments": 2, "overlap": 2})


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, {}) for name in METHODS),
        *((name, how) for how in IN_FRAGMENTS for name in ("topk", "votes", "powersgd")),
    ],
    ids=str,
)
def test_ranks_are_equal_after_every_synchronisation_and_a_state_goes_on_exactly(
    name: str, how: dict[str, Any]
) -> None:
    def job(comm: Comm, method: Any, cut: int | None) -> Any:
        def wrapped(net: nn.Module) -> Any:
            optimizer = adamw(net)
            lengths = {**how, "every": lambda cycle: 4 + cycle % 2}
            return optimizer, fedmpi.local_sgd(
                net, optimizer, method, lr=0.05, exact_below=0, comm=comm, **lengths
            )

        net = model()
        optimizer, outer = wrapped(net)
        train(net, optimizer, range(cut or 19), comm.rank)
        if cut:
            saved = [copy.deepcopy(x.state_dict()) for x in (net, optimizer, outer)]
            net = model(7)
            optimizer, outer = wrapped(net)
            for x, state in zip((net, optimizer, outer), saved, strict=True):
                x.load_state_dict(state)
            train(net, optimizer, range(cut, 19), comm.rank)
        stats = outer.stats()
        assert stats["dropped"] == 0
        assert (stats["step"], stats["steps"]) == (19, 19 - (cut or 0))
        before = whole(net)
        outer.synchronize()
        after = whole(net)
        outer.synchronize()
        assert torch.equal(whole(net), after), "the same step: nothing to average"
        return before, after, stats["rounds"]

    straight = on(2, partial(job, method=METHODS[name], cut=None))
    assert torch.equal(straight[0][1], straight[1][1])
    assert straight[0][2] >= 4 * how.get("fragments", 1) - 1
    for cut in (9, 10) if name == "topk" else ():
        resumed = on(2, partial(job, method=METHODS[name], cut=cut))
        for a, b in zip(straight, resumed, strict=True):
            assert torch.equal(a[0], b[0]), cut
            assert torch.equal(a[1], b[1]), cut


@pytest.mark.parametrize("how", [{}, {"fragments": 2, "overlap": 1}], ids=str)
def test_an_update_that_is_not_finite_drops_the_round_on_all_ranks(how: dict[str, Any]) -> None:
    def job(comm: Comm) -> Any:
        net = model()
        optimizer = adamw(net)
        outer = fedmpi.local_sgd(net, optimizer, TOPK, every=4, comm=comm, **how)
        for t in range(24):
            backward(net, t, comm.rank)
            if t == 5 and comm.rank == 1:
                net.out.weight.grad.fill_(math.inf)
            if t == 6 and comm.rank == 1:
                net.norm.running_mean.fill_(math.nan)
            optimizer.step()
        outer.synchronize()
        finite = all(bool(v.isfinite().all()) for s in optimizer.state.values() for v in s.values())
        return whole(net), outer.stats(), finite

    got = on(3, job)
    assert all(torch.equal(x[0], got[0][0]) for x in got)
    assert int((~got[0][0].isfinite()).sum()) == 1, "the mask's"
    for _, stats, finite in got:
        assert finite
        assert stats["dropped"] >= 1
        assert stats["dropped_rounds"] == got[0][1]["dropped_rounds"]
        assert {rank for told in stats["dropped_rounds"] for rank in told["ranks"]} == {1}
        assert stats["rounds"] >= 3


def test_buffers_are_averaged_and_what_counts_takes_the_largest() -> None:
    def job(comm: Comm) -> tuple[Tensor, Tensor, int, Tensor]:
        net = model()
        optimizer = sgd(net)
        outer = fedmpi.local_sgd(net, optimizer, every=100, comm=comm)
        net.norm.running_mean.fill_(float(comm.rank))
        net.norm.running_var.fill_(0.1)
        net.norm.num_batches_tracked.fill_(10 + comm.rank)
        outer.step = 1
        outer.synchronize()
        return (
            net.norm.running_mean[0],
            net.norm.running_var[0],
            int(net.norm.num_batches_tracked),
            net.mask,
        )

    for mean, same, count, mask in on(3, job):
        assert float(mean) == 1.0
        assert float(same) == float(torch.tensor(0.1)), "the mean of equal numbers is that number"
        assert count == 12
        assert mask.tolist() == [0.0, -math.inf]


def test_a_step_that_a_scaler_leaves_out_on_one_rank_counts_on_all() -> None:
    def job(comm: Comm) -> Any:
        net = model()
        optimizer = adamw(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        outer = fedmpi.local_sgd(net, optimizer, every=3, scaler=scaler, comm=comm)
        seen = []
        for t in range(9):
            net.zero_grad()
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t + 100 * comm.rank))
            scaler.scale(net(x).square().mean()).backward()
            if t in (1, 5) and comm.rank == 1:
                net.out.weight.grad.fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
            seen.append(flat(net))
        return seen, outer.stats()

    (a, told), (b, other) = on(2, job)
    assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [False, False, True] * 3
    assert told["steps"] == other["steps"] == 9
    assert told["dropped"] == other["dropped"] == 0

    def without(comm: Comm) -> None:
        net = model()
        optimizer = adamw(net)
        scaler = torch.amp.GradScaler("cpu")
        fedmpi.local_sgd(net, optimizer, comm=comm)
        scaler.scale(net(torch.ones(4, 8)).sum()).backward()
        scaler.step(optimizer)

    with pytest.raises(ConfigError, match="scaler: expected the job's GradScaler, which leaves out steps"):
        on(2, without)


def test_the_inner_state_can_be_forgotten() -> None:
    """Adagrad's exists from the start; it goes back to that."""
    for inner in ("keep", "reset"):
        net = model()
        optimizer = torch.optim.Adagrad(net.parameters(), lr=0.01)
        fedmpi.local_sgd(net, optimizer, every=5, inner=inner, comm=solo())
        train(net, optimizer, range(5), 0)
        largest = max(float(state["sum"].max()) for state in optimizer.state.values())
        assert (largest == 0) == (inner == "reset")


def test_a_state_of_other_ranks_goes_on_from_the_last_synchronisation(
    recwarn: pytest.WarningsRecorder,
) -> None:
    def first(comm: Comm) -> Any:
        net = model()
        optimizer = adamw(net)
        outer = fedmpi.local_sgd(net, optimizer, TOPK, every=4, comm=comm)
        train(net, optimizer, range(8), comm.rank)
        agreed = flat(net)
        train(net, optimizer, range(8, 10), comm.rank)
        return agreed, outer.state_dict()

    agreed, state = on(2, first)[1]

    def second(comm: Comm) -> Tensor:
        net = model()
        optimizer = adamw(net)
        fedmpi.local_sgd(net, optimizer, TOPK, every=4, comm=comm).load_state_dict(state)
        return flat(net)

    assert all(torch.equal(x, agreed) for x in on(3, second))
    assert any("the state of 2 ranks is loaded by 3" in str(w.message) for w in recwarn)


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "state_dict: outer: expected nesterov, got 'sgd' (rank 0)": lambda s: s["options"].update(outer="sgd"),
    "state_dict: expected what this version's state_dict() returned, at is missing": lambda s: s.pop("at"),
    "state_dict: fragments.0.anchor.out.weight: expected finite": lambda s: s["fragments"][0]["anchor"][
        "out.weight"
    ].fill_(math.nan),
    "state_dict: fragments.0.outer.momentum: expected float32 of shape (64)": lambda s: s["fragments"][0][
        "outer"
    ][0].update(momentum=torch.zeros(3)),
    "state_dict: step: expected a whole number": lambda s: s.update(step=-1),
    "state_dict: rank: expected rank 0's own": lambda s: s.update(rank=1),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_state_that_is_not_one_is_refused(sentence: str) -> None:
    def wrapped() -> Any:
        net = model()
        optimizer = sgd(net)
        return net, fedmpi.local_sgd(net, optimizer, TOPK, every=4, exact_below=60, comm=solo())

    _, outer = wrapped()
    state = outer.state_dict()
    if "rank 0's own" in sentence:
        state["ranks"] = 1
    WRONG[sentence](state)
    net, outer = wrapped()
    before = flat(net)
    with pytest.raises(ConfigError) as error:
        outer.load_state_dict(state)
    assert sentence.rstrip(")") in str(error.value)
    assert "nothing was loaded" in str(error.value)
    assert torch.equal(flat(net), before)


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    net = model()

    def wrap(**how: Any) -> Any:
        return fedmpi.local_sgd(net, how.pop("optimizer", sgd(net)), comm=solo(), **how)

    for how, sentence in (
        (
            {"every": 3, "overlap": 3},
            "every: expected a whole number from 4 with fragments: 1 and overlap: 3, got 3",
        ),
        ({"every": 2, "fragments": 3}, "every: expected a whole number from 3 with fragments: 3"),
        ({"fragments": 50}, "fragments: expected at most 7, the model's trained tensors, got 50"),
        ({"outer": "adam"}, "lr: expected a rate with outer: adam, got none"),
        ({"start_after": 3}, "start_after: expected warmup here"),
        ({"fragment": 3}, "fragment: unknown; did you mean 'fragments'?"),
        ({"method": "signsgd", "exact_below": 0}, "lr: expected an outer rate with a majority vote"),
        ({"method": "prune", "exact_below": 0}, "method: expected one whose server only averages"),
        ({"optimizer": sgd(model())}, "optimizer: expected parameters of the model, 7 of its are not"),
        ({"every": lambda cycle: "x"}, "every: expected a whole number from 1 with"),
    ):
        with pytest.raises(ConfigError) as error:
            wrap(**how)
        assert sentence in str(error.value), str(error.value)
    with pytest.raises(ConfigError, match=r"optimizer: expected a .*, got Tied"):
        fedmpi.local_sgd(net, net, comm=solo())  # type: ignore[arg-type]
    net.a.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fedmpi.local_sgd(net, optimizer, every=1, comm=solo())
    net.a.bias.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"model: parameter a.bias was frozen, or not there, when fedmpi.local_sgd"
    ):
        train(net, optimizer, range(1), 0)


def test_parameters_that_were_replaced_are_noticed() -> None:
    """Those of a model loaded with assign=True are other objects: an optimizer's, and so the mean's, are not."""

    def job(comm: Comm) -> str:
        net = model()
        old = sgd(net)
        fedmpi.local_sgd(net, old, every=1, outer="sgd", comm=comm)
        other = copy.deepcopy(net)
        net.load_state_dict({name: t.clone() for name, t in net.state_dict().items()}, assign=True)
        with pytest.raises(ConfigError) as found:
            backward(net, 0, comm.rank)
        with pytest.raises(ConfigError, match="is another object than"):
            old.step()  # of a compiled model, in whose forward pass nobody looks
        other.load_state_dict(net.state_dict(), assign=True)
        backward(other, 0, comm.rank)  # a copy is nobody's
        fedmpi.local_sgd(net, sgd(net), every=2, outer="sgd", comm=comm)
        backward(net, 0, comm.rank)
        return str(found.value)

    assert run_ranks(1, job)[0] == (
        "model: parameter a.weight is another object than when fedmpi.local_sgd was called, and averaged by nobody; "
        "expected load_state_dict without assign=True, or call fedmpi.local_sgd after all parameters are as they will "
        "be trained"
    )


def test_ranks_that_disagree_find_out() -> None:
    def other(comm: Comm) -> None:
        net = model()
        fedmpi.local_sgd(net, sgd(net), every=5 + comm.rank, comm=comm)

    with pytest.raises(CommError, match="ranks disagree on every: rank 0 has 5, rank 1 has 6"):
        on(2, other)

    def later(comm: Comm) -> None:
        net = model()
        optimizer = sgd(net)
        fedmpi.local_sgd(net, optimizer, every=lambda cycle: 2 + cycle * comm.rank, comm=comm)
        train(net, optimizer, range(6), comm.rank)

    with pytest.raises(
        ConfigError, match=r"every: expected a function .* on all ranks, got \[2, 3\] of them after 1"
    ):
        on(2, later)


_FULL = [("mpirun", 3), ("mpirun", 4), ("torchrun", 2), ("torchrun", 3), ("torchrun", 4)]


@pytest.mark.parametrize(
    ("start", "ranks"), [("mpirun", 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in _FULL)]
)
def test_in_real_jobs(start: str, ranks: int, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    launch = torchrun if start == "torchrun" else find_mpi("openmpi")
    done = launch(ranks, str(JOBS / "local_checks.py"), str(answer))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(answer.read_text())
    assert not [f"{name}: {text}" for name, text in found.items() if text]
    expected = local_checks.names(start == "torchrun", ranks)
    assert sorted(found) == sorted(expected), "every check ran"
