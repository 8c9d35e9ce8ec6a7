"""What fedmpi.horovod must do, on the ranks of one launch: ``with_horovod.py [name of a check ...]``.

Prints a line for each check that held; the first one that does not ends the launch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

import fedmpi
from fedmpi.comm import horovod as comm_horovod
from fedmpi.errors import CommError, ConfigError
from tests.jobs import collectives as suite

LOSSLESS = {"name": "intrinsic", "matrix": "dense", "orthonormal": True}
TOPK = {"name": "topk", "ratio": 0.05, "feedback": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 rounding of some steps of numbers about 1

Wrap = Callable[[torch.optim.Optimizer, nn.Module], Any]


def small_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 10))


def batches(n: int) -> Iterable[tuple[Tensor, Tensor]]:
    """``n`` batches of this rank's own: a task that can be learned."""
    teacher = torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(100 + hvd.rank())
    for _ in range(n):
        x = torch.randn(32, 16, generator=generator)
        yield x, (x @ teacher).argmax(1)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(wrap: Wrap, steps: int = 3) -> Tensor:
    model = small_model()
    optimizer = wrap(sgd(model), model)
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return vector(model)


def plain(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    return hvd.DistributedOptimizer(optimizer, model.named_parameters())


def ours(method: Any, **settings: Any) -> Wrap:
    return lambda optimizer, model: fedmpi.horovod.DistributedOptimizer(
        optimizer, model.named_parameters(), method, **settings
    )


def before(method: Any, **settings: Any) -> Wrap:
    def wrap(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        compression = fedmpi.horovod.Compression(method, model.parameters(), **settings)
        return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)

    return wrap


def alike(value: Tensor) -> None:
    """Every rank has the same, to the bit."""
    everybody = hvd.allgather(value[None], name="alike")
    assert torch.equal(everybody, everybody[:1].expand_as(everybody))


def collectives() -> None:
    suite.check(comm_horovod.HorovodComm())
    whole, comm_horovod._CHUNK = comm_horovod._CHUNK, 400  # in several pieces, as above 2^30 numbers
    suite.DTYPES = (torch.float32,)
    suite.check(comm_horovod.HorovodComm())
    comm_horovod._CHUNK = whole


def lossless_compression() -> None:
    expected, size = train(plain), 16 * 20 + 20 * 10  # what is not exact: the matrices
    alike(expected)
    assert not torch.allclose(expected, vector(small_model()), **CLOSE)
    assert torch.equal(train(before("dense", exact_below=100)), expected)
    for method in (
        {**LOSSLESS, "dim": size},
        {**LOSSLESS, "dim": size, "schedule": "time_varying"},
        {"name": "randomk", "ratio": 1.0},
    ):
        got = train(before(method, exact_below=100))
        alike(got)
        torch.testing.assert_close(got, expected, **CLOSE)
    # Something is lost as soon as something is left out, on all ranks the same.
    for method in ({"name": "intrinsic", "dim": 100}, {"name": "randomk", "ratio": 0.5}):
        got = train(before(method, exact_below=100))
        alike(got)
        assert not torch.allclose(got, expected, **CLOSE)


def lossless_optimizer() -> None:
    expected, size = train(plain), vector(small_model()).numel()
    for method in ({**LOSSLESS, "dim": size}, {"name": "topk", "ratio": 1.0}, "dense"):
        got = train(ours(method, exact_below=0))
        alike(got)
        torch.testing.assert_close(got, expected, **CLOSE)
    got = train(ours({"name": "topk", "ratio": 0.5}, exact_below=0))
    alike(got)
    assert not torch.allclose(got, expected, **CLOSE)
    # ... and so does the choice by measurement, which all ranks make alike.
    alike(train(ours({"name": "auto", "steps": 3}, exact_below=0), steps=12))
    # By default, what is small goes exactly, whatever the method does; where all is small, that is said.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(train(ours("signsgd")), expected, **CLOSE)
    assert any("signsgd compresses nothing" in str(warning.message) for warning in said)


def as_horovod_users_know_it() -> None:
    """Accumulation, clipping, schedulers, mixed precision and closures, step by step beside Horovod's own."""

    def accumulating(wrap: Callable[..., Any]) -> Tensor:
        model = small_model()
        optimizer = wrap(sgd(model), model.named_parameters(), backward_passes_per_step=2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for i, batch in enumerate(batches(6)):
            loss_of(model, batch).backward()
            if i % 2:
                optimizer.synchronize()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                with optimizer.skip_synchronize():
                    optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["lr"] == 0.2 / 8
        return vector(model)

    def topk(optimizer: Any, named: Any, **settings: Any) -> Any:
        return fedmpi.horovod.DistributedOptimizer(
            optimizer, named, {"name": "topk", "ratio": 1.0}, exact_below=0, **settings
        )

    torch.testing.assert_close(accumulating(topk), accumulating(hvd.DistributedOptimizer), **CLOSE)

    def closures(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # lays itself over optimizer.step
        return topk(optimizer, None)

    model = small_model()
    optimizer = closures(sgd(model), model)
    for batch in batches(3):

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    torch.testing.assert_close(vector(model), train(plain), **CLOSE)
    assert optimizer.compression.reducer.step == 3

    # A step that follows synchronize() does not average again what is averaged.
    loss_of(model, batch).backward()
    optimizer.synchronize()
    optimizer.step()
    assert optimizer.compression.reducer.step == 4


def mixed_precision() -> None:
    """A scale that changes, and a step that overflows on one rank, leave residuals as without them."""

    def run(scaled: bool) -> Tensor:
        model = small_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        optimizer = ours(TOPK, exact_below=0, scaler=scaler)(sgd(model), model)
        for i, batch in enumerate(batches(6)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if i == 3 and hvd.rank() == hvd.size() - 1:
                next(model.parameters()).grad[0] = float("inf")
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            skip = i == 3 and not scaled
            with optimizer.skip_synchronize():
                if not skip:
                    scaler.step(optimizer)
            scaler.update()
        assert (optimizer.compression.reducer.step, optimizer.compression.reducer.skipped) == (5, 1)
        return vector(model)

    scaled = run(True)
    alike(scaled)
    assert bool(scaled.isfinite().all())
    assert torch.equal(scaled, run(False))  # scales are powers of two: the same to the bit


def resume() -> None:
    """Interrupted = uninterrupted to the last bit; hvd.broadcast_optimizer_state costs no step of ours."""

    def steps(model: nn.Module, optimizer: Any, data: Iterable[tuple[Tensor, Tensor]]) -> None:
        for batch in data:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    data = list(batches(8))
    model = small_model()
    optimizer = ours(TOPK, exact_below=0)(sgd(model), model)
    steps(model, optimizer, data[:5])
    saved = (model.state_dict(), optimizer.state_dict(), optimizer.compression.state_dict())
    parameters, moments, kept = torch.load(_roundtrip(saved), weights_only=True)
    assert set(moments) == {"state", "param_groups"}
    steps(model, optimizer, data[5:])

    again = small_model()
    optimizer = ours(TOPK, exact_below=0)(sgd(again), again)
    again.load_state_dict(parameters)
    if hvd.rank() == 0:  # as a Horovod job does: rank 0 loads, the others are told
        optimizer.load_state_dict(moments)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.compression.reducer.step == 0
    optimizer.compression.load_state_dict(kept)
    steps(again, optimizer, data[5:])
    assert torch.equal(vector(again), vector(model))
    assert optimizer.compression.reducer.step == 8

    forgetful = small_model()
    forgetful.load_state_dict(parameters)
    optimizer = ours(TOPK, exact_below=0)(sgd(forgetful), forgetful)
    optimizer.load_state_dict(moments)
    steps(forgetful, optimizer, data[5:])
    assert not torch.equal(vector(forgetful), vector(model))  # the residual matters


def _roundtrip(value: Any) -> Any:
    from io import BytesIO

    buffer = BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def learning() -> None:
    """Feedback methods train; the bytes are those that they promise."""
    torch.manual_seed(5)
    start = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 10)).state_dict()
    weights = 16 * 256 + 256 * 10
    biases = 256 + 10
    for method, lr, payload in (
        ({"name": "signsgd"}, 0.005, weights / 8),
        ({"name": "signsgd", "feedback": True}, 0.2, weights / 8 + 4),
        ({"name": "topk", "ratio": 0.05, "feedback": True}, 0.2, 0.05 * weights * (4 + 13 / 8)),
    ):
        model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 10))
        model.load_state_dict(start)
        optimizer = ours(method)(torch.optim.SGD(model.parameters(), lr), model)
        losses = []
        for batch in batches(40):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        alike(vector(model))
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), (method, losses)
        stats = optimizer.compression.stats()
        per_step = stats["payload_bytes"] / 40 - 4 * biases
        assert payload <= per_step <= 1.02 * payload + 8, (method, per_step, payload)
        # On the wire of two ranks: a vote's half shards twice, other messages once; the biases' exact sums.
        wire = stats["wire_sent_bytes"] / 40 - 4 * biases
        assert payload <= wire <= 1.05 * payload + 100, (method, wire, payload)
        assert stats["wire_sent_bytes"] == stats["wire_received_bytes"]


def mistakes() -> None:
    model = small_model()
    wrap = fedmpi.horovod.DistributedOptimizer

    def named() -> Any:
        return model.named_parameters()

    rank = hvd.rank()
    with pytest.raises(
        CommError, match=r"ranks disagree on method\.ratio: rank 0 has 0\.25, rank 1 has 0\.5"
    ):
        wrap(sgd(model), named(), {"name": "topk", "ratio": 0.25 if rank == 0 else 0.5})
    with pytest.raises(CommError, match="ranks disagree on parameters"):
        wrap(sgd(model), ((f"{n}{rank}", p) for n, p in named()), "topk")
    prune = {"name": "prune", "keep": 0.5, "inner": {"name": "topk", "ratio": 0.1}}
    with pytest.raises(ConfigError, match="changes parameters itself"):
        wrap(sgd(model), named(), prune, exact_below=0)
    with pytest.raises(ConfigError, match="exact_bellow"):
        wrap(sgd(model), named(), "signsgd", exact_bellow=3)
    with pytest.raises(ConfigError, match=r"optimizer: expected a torch\.optim\.Optimizer, got Sequential"):
        wrap(model, named(), "signsgd")
    with pytest.raises(ConfigError, match="optimizer: expected a plain one"):
        wrap(plain(sgd(other := small_model()), other), other.named_parameters(), "signsgd")
    with pytest.raises(
        ConfigError, match=r"named_parameters: expected all of the optimizer's 4.*3 are missing"
    ):
        wrap(sgd(model), list(named())[:1], "signsgd")
    with pytest.raises(ConfigError, match="each name once, got w more than once"):
        wrap(sgd(model), [("w", p) for _, p in named()], "signsgd")
    with pytest.raises(ConfigError, match="expected pairs of name and parameter"):
        wrap(sgd(model), model.parameters(), "signsgd")
    with pytest.raises(ConfigError, match="backward_passes_per_step: expected a whole number from 1, got 0"):
        wrap(sgd(model), named(), "signsgd", backward_passes_per_step=0)

    optimizer = wrap(sgd(model), named(), "signsgd")
    [batch] = batches(1)
    loss_of(model, batch).backward()
    with pytest.raises(ConfigError, match="had 2 backward passes before step"):
        loss_of(model, batch).backward()
    optimizer.set_backward_passes_per_step(2)
    optimizer.zero_grad()
    for _ in range(2):
        loss_of(model, batch).backward()
    optimizer.step()
    model[0].bias.grad = None
    optimizer.step()  # no gradient counts as zero

    frozen = small_model()
    frozen[0].requires_grad_(False)
    optimizer = wrap(sgd(frozen), frozen.named_parameters(), "signsgd")
    frozen[0].requires_grad_(True)
    loss_of(frozen, batch).backward()
    with pytest.raises(ConfigError, match="frozen, or not there"):
        optimizer.step()

    table = nn.Embedding(50, 30, sparse=True)
    optimizer = wrap(torch.optim.SGD(table.parameters(), 0.1), table.named_parameters(), "signsgd")
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="weight has a sparse gradient, expected a dense one"):
        optimizer.step()


def one_rank() -> None:
    """Nothing is averaged, so nothing compressed."""
    assert hvd.size() == 1
    expected = train(lambda optimizer, model: optimizer)
    for method in ({"name": "randomk", "ratio": 0.05}, "dense"):
        assert torch.equal(train(before(method, exact_below=0)), expected)
    for method in (TOPK, "signsgd", "auto"):
        assert torch.equal(train(ours(method, exact_below=0)), expected)
    model = small_model()
    optimizer = ours("signsgd", exact_below=0)(sgd(model), model)
    for batch in batches(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    stats = optimizer.compression.stats()
    assert (stats["steps"], stats["payload_bytes"]) == (2, 0)


CHECKS = {
    f.__name__: f
    for f in (
        collectives,
        lossless_compression,
        lossless_optimizer,
        as_horovod_users_know_it,
        mixed_precision,
        resume,
        learning,
        mistakes,
        one_rank,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="fedmpi:")
    warnings.filterwarnings("ignore", message="fedmpi: .* compresses nothing")  # so small are the models here
    with pytest.raises(CommError, match=r"hvd\.init\(\)"):
        ours("signsgd")(sgd(model := small_model()), model)
    hvd.init()
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        if hvd.rank() == 0:
            print(f"held on {hvd.size()} ranks: {name}", flush=True)
