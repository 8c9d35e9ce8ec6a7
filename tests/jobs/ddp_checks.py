"""Checks of the DDP hook, one after the other in one launch of real processes:

    ddp_checks.py ANSWER [COMM [DEVICE [CHECK …]]]

Each check builds its own models; rank 0 writes {check: "" or what went wrong on any rank}.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel as DDP

import fedmpi
from fedmpi.errors import CommError, ConfigError
from fedmpi.methods import METHODS

COMM, DEVICE = "group", "cpu"
CHECKS: dict[str, Callable[[], None]] = {}
TOPK = {"name": "topk", "ratio": 0.05, "feedback": True}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Net(nn.Module):
    """Convolution, norm, two linear layers: 2-D to 4-D and 1-D parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.hidden = nn.Linear(8 * 64, 40)
        self.out = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.out(F.relu(self.hidden(x.flatten(1))))


def batch(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def hooked(method: Any, model: nn.Module | None = None, ddp: dict[str, Any] | None = None, **settings: Any):
    """A module with the hook, and the hook's state."""
    module = DDP((model or Net()).to(DEVICE), **(ddp or {}))
    return module, fedmpi.ddp.attach(module, method, comm=COMM, **{"exact_below": 100, **settings})


def backward(ddp: nn.Module, step: int) -> None:
    x, y = batch(step)
    F.cross_entropy(ddp(x), y).backward()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def steps(module: nn.Module, count: int, start: int = 0, optimizer: Any = None) -> list[dict[str, Tensor]]:
    """So many steps of SGD; the gradients of each."""
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.05)
    got = []
    for t in range(start, start + count):
        optimizer.zero_grad()
        backward(module, t)
        got.append(gradients(module))
        optimizer.step()
    return got


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)
    )


def close(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], atol: float) -> None:
    for t, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.keys() == y.keys()
        for name in x:
            error = (
                float(torch.dist(x[name].float(), y[name].float(), p=float("inf")))
                if x[name].numel()
                else 0.0
            )
            assert error <= atol, f"step {t}, {name}: differs by {error}"


def replicas_are_equal(module: nn.Module) -> None:
    mine = torch.cat([p.detach().float().flatten() for p in module.parameters()]).cpu()
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(other, mine) for other in others)


def refuses(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        call()


@check
def a_lossless_setting_is_the_plain_hook() -> None:
    plain = DDP(Net().to(DEVICE))
    plain.register_comm_hook(None, allreduce_hook)
    expected = steps(plain, 3)
    for method in (
        "dense",
        {"name": "topk", "ratio": 1.0},
        {"name": "lookback", "threshold": 0.0},
        {"name": "lookback", "threshold": 0.0, "scope": "tensor"},
        {"name": "randomk", "ratio": 1.0},
        {"name": "powersgd", "rank": 40},
    ):
        close(steps(hooked(method)[0], 3), expected, 1e-5)
    options = {"name": "intrinsic", "dim": 640, "matrix": "dense", "orthonormal": True}
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    reference = DDP(copy.deepcopy(narrow).to(DEVICE))
    close(steps(hooked(options, narrow)[0], 3), steps(reference, 3), 1e-4)


@check
def every_method_keeps_replicas_equal() -> None:
    for name, entry in METHODS.items():
        if name == "prune":
            continue
        for settings in ({}, {"group_mb": 0.01}):
            module, state = hooked({"name": name, **entry.example}, **settings)
            steps(module, 4)
            replicas_are_equal(module)
            stats = state.stats()
            assert stats["steps"] == 4
            assert stats["payload_bytes"] > 0
            assert stats["wire_sent_bytes"] > 0


@check
def buckets_do_not_matter() -> None:
    """Small buckets, rebuilt after the first pass, against one: state belongs to parameters."""
    few = steps(hooked(TOPK, ddp={"bucket_cap_mb": 100})[0], 6)
    many = steps(hooked(TOPK, ddp={"bucket_cap_mb": 0.01})[0], 6)
    assert same(few, many)
    grouped = steps(hooked(TOPK, ddp={"bucket_cap_mb": 0.01}, group_mb=0.01)[0], 6)
    close(grouped, few, 10.0)
    assert not same(grouped, few), "top-k of each group"


@check
def views_of_buckets_work() -> None:
    plain = steps(hooked(TOPK)[0], 4)
    assert same(steps(hooked(TOPK, ddp={"gradient_as_bucket_view": True})[0], 4), plain)
    assert same(steps(hooked(TOPK, ddp={"static_graph": True})[0], 4), plain)


@check
def only_the_synchronised_sum_is_compressed() -> None:
    def accumulate(module: nn.Module) -> dict[str, Tensor]:
        with module.no_sync():
            backward(module, 0)
            backward(module, 1)
        backward(module, 2)
        return gradients(module)

    reference = accumulate(DDP(Net().to(DEVICE)))
    module, state = hooked("dense")
    close([accumulate(module)], [reference], 1e-5)
    assert state.stats()["steps"] == 1


@check
def a_skipped_step_leaves_what_is_kept() -> None:
    """Mixed precision's inf on one rank: no rank's residual, counter or seed moves, and the scale does not matter."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, growth_interval=2)
    module, state = hooked(TOPK, scaler=scaler)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    got = []
    for t in range(6):
        bad = t in (1, 4)
        optimizer.zero_grad()
        x, y = batch(100 if bad else len(got))
        loss = F.cross_entropy(module(x), y)
        if bad and dist.get_rank() == dist.get_world_size() - 1:
            loss = loss * float("inf")
        before, scale = state.state_dict(), scaler.get_scale()
        scaler.scale(loss).backward()
        if not bad:
            got.append({n: g / scale for n, g in gradients(module).items()})
        scaler.step(optimizer)
        scaler.update()
        if bad:
            after = state.state_dict()
            assert scaler.get_scale() == scale / 2, "skipped on every rank"
            assert after["step"] == before["step"]
            for old, new in zip(before["groups"], after["groups"], strict=True):
                assert all(torch.equal(old["state"][n], new["state"][n]) for n in old["state"])
    assert state.stats()["skipped"] == 2
    assert same(got, steps(hooked(TOPK)[0], 4)), "powers of two change no bit"
    replicas_are_equal(module)


class Partly(nn.Module):
    """A branch that is never taken, a frozen layer, a half-precision parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.used, self.unused = nn.Linear(64, 30), nn.Linear(64, 30)
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.narrow = nn.Parameter(torch.ones(30, 20, dtype=torch.float16))
        self.out = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.frozen(self.used(x.flatten(1))) @ self.narrow.float())


@check
def unused_frozen_and_half_parameters() -> None:
    options = {"find_unused_parameters": True}
    expected = steps(DDP(Partly().to(DEVICE), **options), 3)
    module, _ = hooked("dense", Partly(), options)
    got = steps(module, 3)
    assert [g.keys() for g in got] == [e.keys() for e in expected]
    assert not any("unused" in name or "frozen" in name for name in got[0])
    assert got[0]["module.narrow"].dtype == torch.float16
    close(got, expected, 2e-3)
    module, _ = hooked(TOPK, Partly(), options)
    steps(module, 3)
    replicas_are_equal(module)


@check
def interrupted_is_uninterrupted() -> None:
    """A new DDP starts with other buckets than the old one ended with."""
    for method in (TOPK, {"name": "lookback", "threshold": 0.9}, {"name": "signsgd", "momentum": 0.9}):
        whole, _ = hooked(method, ddp={"bucket_cap_mb": 0.01})
        expected = steps(whole, 6)
        first, state = hooked(method, ddp={"bucket_cap_mb": 0.01})
        steps(first, 3)
        saved, model = copy.deepcopy(state.state_dict()), copy.deepcopy(first.module.state_dict())
        again = Net()
        again.load_state_dict(model)
        second, state = hooked(method, again, {"bucket_cap_mb": 0.01})
        state.load_state_dict(saved)
        assert same(steps(second, 3, start=3), expected[3:]), method


@check
def sync_is_the_hook_without_overlap() -> None:
    method = {"name": "intrinsic", "dim": 200, "schedule": "time_varying"}
    expected = steps(hooked(method)[0], 4)
    module = DDP(Net().to(DEVICE))
    average = fedmpi.sync(module, method, comm=COMM, exact_below=100)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    got = []
    for t in range(4):
        optimizer.zero_grad()
        with module.no_sync():
            backward(module, t)
        average()
        got.append(gradients(module))
        optimizer.step()
    assert same(got, expected)
    assert average.stats()["steps"] == 4


@check
def auto_stays_with_one_method_on_all_ranks() -> None:
    module, state = hooked({"name": "auto", "steps": 3, "candidates": ["signsgd", TOPK]})
    steps(module, 12)
    replicas_are_equal(module)
    facts = state.stats()["auto"]
    assert set(facts["seconds_a_step"]) == {"bf16", "signsgd", "topk (feedback: True, ratio: 0.05)"}
    chosen = [None] * dist.get_world_size()
    dist.all_gather_object(chosen, facts["chosen"])
    assert chosen[0] is not None
    assert all(c == chosen[0] for c in chosen)


@check
def misuse_is_named() -> None:
    module, _ = hooked("bf16")
    refuses(ConfigError, "has a fedmpi hook already", lambda: fedmpi.ddp.attach(module, "bf16", comm=COMM))
    other = DDP(Net())
    other.register_comm_hook(None, allreduce_hook)
    refuses(ConfigError, "another communication hook", lambda: fedmpi.ddp.attach(other, "bf16", comm=COMM))
    refuses(ConfigError, "expected a DistributedDataParallel", lambda: fedmpi.ddp.attach(Net(), "bf16"))
    prune = {"name": "prune", **METHODS["prune"].example}
    refuses(ConfigError, "train with it through `fedmpi train`", lambda: hooked(prune))
    refuses(
        ConfigError,
        "comm: expected group, mpi or a Comm",
        lambda: fedmpi.ddp.attach(DDP(Net()), "bf16", comm="x"),
    )
    mine = "signsgd" if dist.get_rank() else "bf16"
    refuses(CommError, "ranks disagree on method.name: rank 0 has 'bf16'", lambda: hooked(mine))


@check
def modules_that_no_hook_fits_are_named() -> None:
    def attach(module: Any, method: Any = "bf16", **settings: Any) -> Any:
        return fedmpi.ddp.attach(module, method, comm=COMM, **settings)

    late = Net()
    late = DDP(
        late,
        delay_all_reduce_named_params=[("out.bias", late.out.bias)],
        param_to_hook_all_reduce=late.norm.bias,
    )
    refuses(ConfigError, "without delay_all_reduce_named_params", lambda: attach(late))
    bag = nn.Sequential(nn.Linear(3, 3), nn.EmbeddingBag(20, 8, sparse=True))
    refuses(ConfigError, "parameter 1.weight has sparse gradients", lambda: attach(DDP(bag)))
    refuses(
        ConfigError, "parameter 1.weight has sparse gradients", lambda: fedmpi.sync(bag, "bf16", comm=COMM)
    )
    rows = nn.Linear(4, 4)
    average = fedmpi.sync(rows, "dense", comm=COMM)
    rows.weight.grad = torch.ones(4, 4).to_sparse()
    refuses(ConfigError, "parameter weight has sparse gradients", average)
    wide = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40).double())
    refuses(ConfigError, "parameter 1.weight is torch.float64", lambda: attach(DDP(wide)))
    refuses(ConfigError, "parameter 1.weight is torch.float64", lambda: fedmpi.sync(wide, "bf16", comm=COMM))
    fake = type("DeepSpeedEngine", (nn.Linear,), {})(2, 2)
    refuses(ConfigError, "DeepSpeed shards and averages", lambda: attach(fake))
    refuses(ConfigError, "start one process a device", lambda: attach(nn.DataParallel(nn.Linear(2, 2))))
    refuses(ConfigError, "one process has nothing to average", lambda: attach(nn.Linear(2, 2)))
    frozen = nn.Linear(4, 4).requires_grad_(False)
    refuses(ConfigError, "with requires_grad, got none", lambda: fedmpi.sync(frozen, "bf16", comm=COMM))
    early = nn.Linear(4, 4)
    _apply_optimizer_in_backward(torch.optim.SGD, early.parameters(), {"lr": 0.1})
    for make in (lambda: attach(DDP(early)), lambda: fedmpi.sync(early, "bf16", comm=COMM)):
        refuses(ConfigError, "parameter weight steps during backward", make)
    with pytest.warns(UserWarning, match=r"signsgd compresses nothing.*the largest is weight, .6, 5..*=30"):
        attach(DDP(nn.Linear(5, 6)), "signsgd")


@check
def sharded_modules_are_refused() -> None:
    """What a rank has of a parameter is a part, which its peers have other parts of. FSDP2's real ones; of FSDP1, which
    shards on accelerators only, the class."""
    whole = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    second = fully_shard(copy.deepcopy(whole).to(DEVICE), mesh=mesh)
    first = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(first)
    first._modules["_fsdp_wrapped_module"] = copy.deepcopy(whole).to(DEVICE)
    for module in (second, first):
        refuses(
            ConfigError,
            "shards and averages gradients by itself",
            lambda module=module: fedmpi.ddp.attach(module, "bf16", comm=COMM),
        )
    for module in (second, nn.Sequential(second)):
        refuses(
            ConfigError, "is sharded over ranks", lambda module=module: fedmpi.sync(module, "bf16", comm=COMM)
        )


class Odd(nn.Module):
    """A learned temperature, and parameters of one number and of none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body, self.scale = nn.Linear(64, 10), nn.Parameter(torch.ones(()))
        self.one, self.none = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(0))
        self.flat = nn.Parameter(torch.zeros(3, 0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1)) * self.scale + self.one + self.none.sum() + self.flat.sum()


@check
def parameters_of_any_shape() -> None:
    expected = steps(DDP(Odd().to(DEVICE)), 2)
    for below in (0, 100):
        close(steps(hooked("dense", Odd(), exact_below=below)[0], 2), expected, 1e-5)
    for name, entry in METHODS.items():
        if name != "prune":
            module, _ = hooked({"name": name, **entry.example}, Odd(), exact_below=0, group_mb=1e-5)
            steps(module, 2)
            replicas_are_equal(module)


@check
def copies_have_no_hook() -> None:
    """In memory, in a file, as an average: as those of a module that never had one."""
    module, _ = hooked(TOPK)
    steps(module, 1)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    ema = torch.optim.swa_utils.AveragedModel(module)
    ema.update_parameters(module)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), ema.module):
        plain = copy.deepcopy(other.module)
        close(steps(other, 2), steps(DDP(plain), 2), 1e-6)
        fedmpi.ddp.attach(other, "bf16", comm=COMM)
    steps(module, 1)


@check
def compiled_modules_are_their_originals() -> None:
    def trained(compiled: bool) -> list[dict[str, Tensor]]:
        module = DDP(Net().to(DEVICE))
        outer = torch.compile(module, backend="eager") if compiled else module
        fedmpi.ddp.attach(outer, TOPK, comm=COMM, exact_below=100)
        for t in range(2):
            backward(outer, t)
        return [gradients(module)]

    close(trained(True), trained(False), 1e-6)


@check
def a_gradient_that_no_rank_has_stays_missing() -> None:
    """One that some have counts as zero on the others."""
    net = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(3))
    average = fedmpi.sync(net, TOPK | {"ratio": 1.0}, comm=COMM)
    used = net[:1] if dist.get_rank() else net[:2]
    sum(layer.weight.sum() for layer in used).backward()
    average()
    assert net[2].weight.grad is None
    assert torch.equal(net[0].weight.grad, torch.ones(40, 40))
    assert torch.allclose(net[1].weight.grad, torch.full((40, 40), 1 / dist.get_world_size()))


@check
def plain_bf16_is_torchs_own() -> None:
    """Whole buckets, to the bit; and with a setting that says how tensors travel, small ones go exactly."""
    mine, torchs, exactly = (DDP(Net().to(DEVICE)) for _ in range(3))
    fedmpi.ddp.attach(mine, "bf16", seed=3)

    def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations
        return bf16_compress_hook(group, bucket)

    torchs.register_comm_hook(dist.group.WORLD, hook)
    fedmpi.ddp.attach(exactly, "bf16", exact_below=100)
    for t in range(3):
        for module in (mine, torchs, exactly):
            module.zero_grad()
            backward(module, t)
    assert same([gradients(mine)], [gradients(torchs)])
    small = {name for name, g in gradients(exactly).items() if g.dim() < 2}
    assert small
    rounded = {name for name, g in gradients(exactly).items() if torch.equal(g, g.bfloat16().float())}
    assert not small & rounded
    assert small <= {name for name, g in gradients(mine).items() if torch.equal(g, g.bfloat16().float())}


@check
def an_error_inside_the_hook_ends_the_pass() -> None:
    """The error comes out of backward(), with its own words."""
    module, state = hooked("bf16")

    def broken(*groups: int) -> None:
        raise CommError("the link is gone")

    state._job.reducer.start = broken
    refuses(RuntimeError, "the link is gone", lambda: backward(module, 0))


@check
def an_error_is_final() -> None:
    """Also one that comes late, on one rank, with several groups under way: no later step may count on some ranks."""
    module, state = hooked("signsgd", ddp={"bucket_cap_mb": 0.01}, group_mb=0.01)
    steps(module, 2)
    groups = state._job.reducer.groups
    assert len(groups) > 2

    def broken() -> bool:
        raise CommError("a broken message")

    groups[0].finish = broken
    for _ in range(2):
        refuses(RuntimeError, "a broken message", lambda: backward(module, 0))
    assert state.stats()["steps"] == 2


@check
def a_parameter_that_is_in_no_bucket_is_named() -> None:
    net = Net()
    frozen, p = next(iter(net.named_parameters()))
    p.requires_grad_(False)
    module = DDP(net.to(DEVICE))
    p.requires_grad_(True)
    fedmpi.ddp.attach(module, "bf16", comm=COMM)
    refuses(ConfigError, f"no bucket has {frozen};", lambda: backward(module, 0))


@check
def an_error_on_one_rank_is_known_to_all() -> None:
    """Anything that is raised in the hook, in the thread behind it, or in sync, on the last rank alone."""
    if COMM != "group":
        return  # under MPI it ends all ranks: tests/test_ddp.py
    last = dist.get_world_size() - 1
    mine = dist.get_rank() == last
    said = "expected" if mine else f"rank {last} failed: "

    module, state = hooked("signsgd", ddp={"bucket_cap_mb": 0.01}, group_mb=0.01)
    steps(module, 1)
    if mine:
        state._names = {}
    refuses(
        KeyError if mine else RuntimeError, "" if mine else f"{said}KeyError", lambda: backward(module, 0)
    )

    module, state = hooked("signsgd", ddp={"bucket_cap_mb": 0.01}, group_mb=0.01)
    if mine:
        state._reducer = state._job.reducer
        state._reducer.groups[1].start = lambda *_: 1 / 0
    refuses(RuntimeError, "division by zero", lambda: backward(module, 0))

    table = nn.Linear(40, 40)
    average = fedmpi.sync(table, "signsgd", comm=COMM)
    table.weight.grad = torch.ones(40, 40).to_sparse() if mine else torch.ones(40, 40)
    kind = ConfigError if mine else CommError
    refuses(kind, "parameter weight has sparse gradients", average)
    refuses(kind, "weight has sparse gradients", average)

    wrong = {"name": "topk", "ratio": 2.0} if mine else "bf16"
    refuses(kind, "ratio", lambda: hooked(wrong))
    bag = nn.Sequential(nn.Linear(3, 3), nn.EmbeddingBag(20, 8, sparse=mine))
    refuses(kind, "1.weight has sparse gradients", lambda: fedmpi.sync(bag, "bf16", comm=COMM))


@check
def a_scaler_that_was_not_given_is_noticed() -> None:
    for given in (True, False):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4096.0)
        module, state = hooked(TOPK, **({"scaler": scaler} if given else {}))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for t in range(3):
                optimizer.zero_grad()
                x, y = batch(t)
                scaler.scale(F.cross_entropy(module(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
        said = ["scaler: expected the job's GradScaler" in str(w.message) for w in told]
        assert sum(said) == (0 if given else 1), [str(w.message) for w in told]
        kept = [
            group["state"]["residual"].abs().max() for group in state.state_dict()["groups"] if group["state"]
        ]
        assert max(kept) < 10, "in units of the gradients, not of the scaled ones"


@check
def replaced_parameters_are_averaged_or_named() -> None:
    """load_state_dict(assign=True) makes other objects of a model's parameters."""
    torch.manual_seed(5)
    net = nn.Linear(40, 40).to(DEVICE)
    loaded = {name: torch.zeros_like(t) for name, t in net.state_dict().items()}
    module, _ = hooked("bf16", copy.deepcopy(net))
    average = fedmpi.sync(net, "dense", comm=COMM)
    net.load_state_dict(loaded, assign=True)
    net(torch.full((1, 40), float(dist.get_rank()), device=DEVICE)).sum().backward()
    average()
    mean = (dist.get_world_size() - 1) / 2
    assert torch.equal(net.weight.grad, torch.full_like(net.weight, mean)), net.weight.grad[0, :3]
    net.weight = nn.Parameter(torch.zeros(40, 20))
    refuses(ConfigError, "expected parameter weight to stay (40, 40) of torch.float32, got (40, 20)", average)
    module.module.load_state_dict(loaded, assign=True)
    with torch.no_grad():
        module(torch.ones(1, 40, device=DEVICE))
    refuses(
        ConfigError,
        "parameter weight is another object than when DistributedDataParallel, and fedmpi.ddp.attach, was called",
        lambda: module(torch.ones(1, 40, device=DEVICE)),
    )


@check
def attachments_leave_nothing() -> None:
    """Neither a group, nor threads, nor connections, once the modules are gone."""
    if COMM != "group":
        return
    from fedmpi.comm.torch import _open

    def held() -> tuple[int, int, int]:
        gc.collect()
        dist.barrier()
        threads, files = (len(list(Path(f"/proc/self/{what}").iterdir())) for what in ("task", "fd"))
        return len(_open), threads, files

    def used(count: int) -> None:
        for i in range(count):
            module, _ = hooked("signsgd", nn.Linear(40, 40))
            module(torch.ones(2, 40)).sum().backward()
            if i % 5 == 0:
                fedmpi.sync(module, "bf16", comm=COMM)()

    used(2)
    before = held()
    used(50)
    after = held()
    assert after[0] == before[0]
    assert all(b < a + 20 for a, b in zip(before, after, strict=True)), f"of 60 groups: {before}, {after}"


COMM_CHECKS = (  # what depends on who carries the messages; the fast suite does only these over MPI
    "every_method_keeps_replicas_equal",
    "interrupted_is_uninterrupted",
    "buckets_do_not_matter",
    "a_skipped_step_leaves_what_is_kept",
    "sync_is_the_hook_without_overlap",
    "only_the_synchronised_sum_is_compressed",
    "unused_frozen_and_half_parameters",
    "auto_stays_with_one_method_on_all_ranks",
    "an_error_is_final",
)


def main() -> None:
    global COMM, DEVICE
    torch.set_num_threads(1)
    COMM, DEVICE = [*sys.argv[2:4], *["group", "cpu"][len(sys.argv[:4]) - 2 :]]
    fedmpi.ddp.init_process_group("gloo")
    wrong = {}
    for name in sys.argv[4:] or CHECKS:
        warnings.simplefilter("ignore")
        try:
            CHECKS[name]()
            mine = ""
        except Exception:
            mine = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        all_of_them = [""] * dist.get_world_size()
        dist.all_gather_object(all_of_them, mine)
        wrong[name] = "\n".join(filter(None, all_of_them))
        if wrong[name]:
            break  # ranks may have stopped at different places
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(wrong))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
