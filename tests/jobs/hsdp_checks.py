"""``fedmpi.sync`` between replicas that FSDP2 shards, 2 × 2 ranks in one launch: hsdp_checks.py FOLDER [all].

Prints "ok" for each rank. ``all``: the long ones, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import fedmpi
from fedmpi.comm.base import LostError
from fedmpi.errors import CheckpointError, CommError, ConfigError
from fedmpi.integrations import folder
from fedmpi.methods import METHODS

TOPK = {"name": "topk", "ratio": 0.05, "feedback": True}
SIGNS = {"name": "signsgd", "feedback": True}


class Net(nn.Module):
    """Rows that do not divide evenly, parameters of one number (no shard but the first has any), a frozen layer, and a
    branch that not every step takes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 33)) for _ in range(2)
        )
        self.gate = nn.Parameter(torch.ones(1))
        self.branch = nn.Linear(33, 33)
        self.head = nn.Linear(33, 1)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.frozen(x)
        for layer in self.layers:
            x = x + layer(x)
        x = x * self.gate
        return self.head(self.branch(x) if branch else x)


def sharded(mesh: Any, seed: int = 0, **options: Any) -> Net:
    model = Net(seed)
    for module in (*model.layers, model.branch, model):
        fully_shard(module, mesh=mesh, **options)
    return model


class Job:
    """Steps of a model on this rank's own data."""

    def __init__(self, model: nn.Module, average: Callable[[], None] | None = None) -> None:
        self.model, self.average, self.count = model, average, 0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def batch(self, part: int = 0) -> Tensor:
        seed = 1000 * dist.get_rank() + 10 * self.count + part
        return torch.randn(8, 33, generator=torch.Generator().manual_seed(seed))

    def steps(self, count: int, accumulate: int = 1, clip: bool = False, branch: bool = True) -> Job:
        for _ in range(count):
            self.optimizer.zero_grad()
            for part in range(accumulate):
                self.model.set_requires_gradient_sync(part == accumulate - 1)
                (self.model(self.batch(part), branch).float().pow(2).mean() / accumulate).backward()
            if self.average is not None:
                self.average()
            if clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            self.count += 1
        return self

    def parameters(self) -> Tensor:
        return torch.cat([p.to_local().detach().flatten() for p in self.model.parameters()])


def equal_replicas(job: Job, group: Any) -> None:
    mine = job.parameters()
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine, group=group)
    assert torch.equal(*others), "replicas are apart"
    assert torch.isfinite(mine).all()


def dense_is_native(mesh: Any) -> None:
    """With the same bits: two replicas' mean is exact, whoever takes it."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options, how in (({}, {}), ({"mp_policy": half}, {"accumulate": 2, "clip": True})):
        native = Job(sharded(mesh, **options)).steps(4, **how)
        model = sharded(mesh["shard"], **options)
        job = Job(model, fedmpi.sync(model, "dense", group=mesh["replicate"].get_group())).steps(4, **how)
        full = [
            torch.cat([p.full_tensor().detach().flatten() for p in of.model.parameters()])
            for of in (native, job)
        ]
        assert torch.equal(*full), float((full[0] - full[1]).abs().max())
        assert not torch.equal(full[1], torch.cat([p.detach().flatten() for p in Net().parameters()]))


def replicas_stay_equal(mesh: Any, methods: list[Any]) -> None:
    group = mesh["replicate"].get_group()
    for method in methods:
        model = sharded(mesh["shard"])
        average = fedmpi.sync(model, method, group=group, exact_below=100)
        job = Job(model, average)
        # One replica takes the branch that the other leaves out, then neither does.
        job.steps(2).steps(2, branch=mesh.get_coordinate()[0] == 0).steps(1, branch=False)
        equal_replicas(job, group)
        assert model.branch.weight.grad is None
        stats = average.stats()
        assert stats["steps"] == 5
        if method in (SIGNS, TOPK):
            assert stats["payload_bytes"] < stats["uncompressed_bytes"] / 4


def auto_is_of_one_mind(mesh: Any) -> None:
    model = sharded(mesh["shard"])
    average = fedmpi.sync(model, {"name": "auto", "steps": 3}, group=mesh["replicate"].get_group())
    equal_replicas(Job(model, average).steps(12), mesh["replicate"].get_group())
    told: list[Any] = [None] * 4
    dist.all_gather_object(told, average.stats()["auto"])
    assert told[0]["chosen"]
    assert all(other == told[0] for other in told), told


def exact_alike(mesh: Any) -> None:
    """What is compressed does not depend on how many rows a shard got: 17 and 16 of 33 columns, 561 and 528 numbers."""
    model = sharded(mesh["shard"])
    average = fedmpi.sync(model, SIGNS, group=mesh["replicate"].get_group(), exact_below=1089)
    names = {name for group in average._job.reducer.groups[:-1] for name in group.names}
    assert "branch.weight" in names, names


def one_bad_shard(mesh: Any) -> None:
    """One rank's loss overflows: no rank's step counts, each GradScaler goes down, residuals are as they were."""
    group = mesh["replicate"].get_group()
    model = sharded(mesh["shard"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    average = fedmpi.sync(model, TOPK, group=group, scaler=scaler, exact_below=100)
    job = Job(model, average).steps(0)
    for step in range(4):
        job.optimizer.zero_grad()
        loss = model(job.batch()).pow(2).mean()
        scaler.scale(loss).backward()
        # After FSDP2's own reduction: a gradient that only one shard of one replica sees.
        if step == 2 and dist.get_rank() == 3:
            model.layers[0][0].weight.grad.to_local()[0, 0] = float("nan")
        before = job.parameters(), average.state_dict()["groups"][0]["state"]["residual"].clone()
        average()
        finite = [bool(p.grad.to_local().isfinite().all()) for p in average._parameters.values()]
        assert all(finite) == (step != 2), "a step without a scaler sees it, too, on every rank"
        scaler.step(job.optimizer)
        scaler.update()
        job.count += 1
        after = job.parameters(), average.state_dict()["groups"][0]["state"]["residual"]
        stood = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert stood == [step == 2] * 2, (step, stood)
    assert scaler.get_scale() == 2.0
    assert (average.stats()["steps"], average.stats()["skipped"]) == (3, 1)
    equal_replicas(job, group)


def resumes(mesh: Any, out: Path) -> None:
    group = mesh["replicate"].get_group()

    def start() -> Job:
        model = sharded(mesh["shard"])
        return Job(model, fedmpi.sync(model, TOPK, group=group, exact_below=100))

    whole, first, then = start().steps(5), start().steps(3), start()
    folder.save(first.average, out)
    dist.barrier()
    names = [f"fedmpi-rank{r}-shard{s}.pt" for r in range(2) for s in range(2)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert folder.load(then.average, out)
    then.model.load_state_dict(first.model.state_dict())
    then.optimizer.load_state_dict(first.optimizer.state_dict())
    then.count = first.count
    assert torch.equal(then.steps(2).parameters(), whole.parameters())

    states: list[Any] = [None] * 4
    dist.all_gather_object(states, first.average.state_dict())
    mine = then.average.state_dict()
    with pytest.raises(
        ConfigError, match=r"shard: expected that of shard \[\[., 2\]\].*every rank loads what it"
    ):
        then.average.load_state_dict(states[dist.get_rank() ^ 1])
    # One rank's alone is of another step, or gone: refused on all, those of the other column, too.
    late = states[dist.get_rank()] | ({"step": 7} if dist.get_rank() == 1 else {})
    with pytest.raises(ConfigError, match="step: rank 0's has 3, rank 1's has 7"):
        then.average.load_state_dict(late)
    assert then.average.state_dict()["step"] == mine["step"]
    dist.barrier()
    if dist.get_rank() == 0:
        (out / names[3]).unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"fedmpi-rank1-shard1.pt is missing on rank 3"):
        folder.load(then.average, out)


def refuses(mesh: Any) -> None:
    group, rank = mesh["replicate"].get_group(), dist.get_rank()
    way_out = r'fully_shard\(module, mesh=mesh\["shard"\]\).*group=mesh\["replicate"\]'
    for model, over in ((sharded(mesh), group), (sharded(mesh["shard"]), None)):
        with pytest.raises(ConfigError, match=rf"is sharded over ranks \[.*{way_out}"):
            fedmpi.sync(model, "dense", group=over)
    with pytest.raises(ConfigError, match=rf"sharded over ranks \(FSDP\).*{way_out}"):
        fedmpi.sync(
            FullyShardedDataParallel(
                nn.Linear(4, 4), mesh["shard"].get_group(), device_id=torch.device("cpu")
            ),
            "dense",
            group=group,
        )
    part = Net()
    fully_shard(part.branch, mesh=mesh["shard"])
    with pytest.raises(ConfigError, match=r"is whole on every rank.*fully_shard the outermost module"):
        fedmpi.sync(part, "dense", group=group)
    whole = sharded(mesh["shard"], reshard_after_forward=False)
    with torch.no_grad():
        whole(torch.ones(1, 33))
    with pytest.raises(ConfigError, match=r"model\.reshard\(\)"):
        fedmpi.sync(whole, "dense", group=group)
    with pytest.raises(CommError, match=r"frozen\.weight is not the same on rank 0 and rank 2"):
        fedmpi.sync(sharded(mesh["shard"], seed=rank // 2), "dense", group=group)
    with torch.device("meta"):
        empty = sharded(mesh["shard"])
    with pytest.raises(ConfigError, match=r"is on the meta device.*to_empty"):
        fedmpi.sync(empty, "dense", group=group)
    # Columns that would not do the same.
    with pytest.raises(CommError, match="ranks disagree on seed: rank 0 has 0, rank 1 has 1"):
        fedmpi.sync(sharded(mesh["shard"]), "randomk", group=group, seed=rank % 2)


def nobody_waits(mesh: Any) -> None:
    """One rank cannot go on: all others of the mesh hear why, also those who wait for it through others only."""
    model = sharded(mesh["shard"])
    average = fedmpi.sync(model, SIGNS, group=mesh["replicate"].get_group())
    job = Job(model, average).steps(1)
    model(job.batch()).sum().backward()
    if dist.get_rank() == 0:
        average._parameters["head.weight"].grad = torch.sparse_coo_tensor(size=(1, 33), check_invariants=True)
    with pytest.raises((ConfigError, LostError)) as caught:
        average()
    assert "head.weight has sparse gradients" in str(caught.value)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    dense_is_native(mesh)
    long = "all" in sys.argv[2:]
    powersgd = {"name": "powersgd", "rank": 4, "feedback": True}
    every = {name: {"name": name, **entry.example} for name, entry in METHODS.items() if name != "prune"}
    replicas_stay_equal(mesh, [SIGNS, TOPK, *((powersgd, *every.values()) if long else ())])
    if long:
        auto_is_of_one_mind(mesh)
    exact_alike(mesh)
    one_bad_shard(mesh)
    resumes(mesh, Path(sys.argv[1]))
    refuses(mesh)
    nobody_waits(mesh)
    print("ok", flush=True)


if __name__ == "__main__":
    main()
