"""The drop-ins over a part of the ranks, in one launch of four: part_checks.py. Prints "ok" for each rank, after
what collectives.py prints of a group that the job has started.

Groups: two pairs, beside each other; two that share ranks, used in turn and together; each rank alone.
"""

from __future__ import annotations

import copy
from typing import Any

import collectives
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fedmpi
from fedmpi.errors import ConfigError


class Summed(torch.autograd.Function):
    """The job's own collective on the module's group in both passes, as SyncBatchNorm has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.clone()
        dist.all_reduce(g, group=ctx.group)
        return g, None


class Net(nn.Module):
    def __init__(self, group: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(5))
        self.group = [group]  # in a list: copies of the net share it

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        other = Net(self.group[0], 0)
        other.load_state_dict(self.state_dict())
        return other

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = x - Summed.apply(x.mean(0, keepdim=True), self.group[0]) / 2
        return x


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def trained(module: nn.Module, count: int, call: Any = None) -> list[Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(count):
        optimizer.zero_grad()
        module(torch.randn(8, 48, generator=generator)).pow(2).mean().backward()
        if call is not None:
            call()
        optimizer.step()
    return gradients(module)


def alike(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=1e-6), float((x - y).abs().max())


def replicas_are_equal(net: nn.Module, group: Any) -> None:
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, mine, group=group)
    assert all(torch.equal(other, mine) for other in others)


def over(group: Any, seed: int, count: int) -> None:
    """The hook and sync over ``group``: dense is plain DDP, signs keep its replicas, and only them, equal."""
    options = {"process_group": group, "bucket_cap_mb": 0.01}
    net = Net(group, seed)
    expected = trained(DDP(copy.deepcopy(net), **options), count)
    module = DDP(copy.deepcopy(net), **options)
    fedmpi.ddp.attach(module, "dense", group_mb=0.01)
    alike(trained(module, count), expected)
    average = fedmpi.sync(DDP(plain := copy.deepcopy(net), **options), "dense")
    alike(trained(plain, count, average), expected)
    average = fedmpi.sync(plain := copy.deepcopy(net), "dense", group=group)
    alike(trained(plain, count, average), expected)
    module = DDP(net, **options)
    state = fedmpi.ddp.attach(module, {"name": "signsgd", "feedback": True}, group_mb=0.01)
    got = trained(module, count)
    replicas_are_equal(net, group)
    assert state.stats()["steps"] == count
    if group.size() == 1:
        alike(got, expected)  # nothing is compressed where nothing is averaged
        assert state.stats()["payload_bytes"] == 0


def at_once(held: list[Any]) -> None:
    """A model a group that this rank belongs to, each averaged by sync, all in one step: as each alone."""
    signs = {"name": "signsgd", "feedback": True}

    def start(group: Any) -> tuple[nn.Module, Any]:
        return (net := Net(group, 6)), fedmpi.sync(DDP(net, process_group=group), signs)

    def step(nets: list[tuple[nn.Module, Any]], number: int) -> None:
        for net, _ in nets:
            generator = torch.Generator().manual_seed(10 * dist.get_rank() + number)
            net(torch.randn(8, 48, generator=generator)).pow(2).mean().backward()
        for net, average in nets:
            average()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None

    together = [start(group) for group in held]
    for number in range(3):
        step(together, number)
    for (net, average), group in zip(together, held, strict=True):
        alone = start(group)
        for number in range(3):
            step([alone], number)
        for p, q in zip(net.parameters(), alone[0].parameters(), strict=True):
            assert torch.equal(p, q)
        replicas_are_equal(net, group)
        assert average.stats()["steps"] == 3


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    over(mine, seed=rank // 2, count=3 + rank // 2)  # one pair makes more steps than the other
    if rank < 2:
        over(mine, 5, 2)  # or more modules
    shared = [dist.new_group([0, 1, 2]), dist.new_group([1, 2, 3])]
    held = [group for group in shared if dist.get_rank(group) >= 0]
    modules = [DDP(Net(group, 3), process_group=group) for group in held]
    for module in modules:
        fedmpi.ddp.attach(module, "signsgd")
    for module, group in zip(modules, held, strict=True):
        trained(module, 3)
        replicas_are_equal(module, group)
    at_once(held)
    for other in range(4):
        alone = dist.new_group([other])
        if other == rank:
            over(alone, rank, 2)
    with pytest.raises(ConfigError, match=r"group: expected the ranks of the module's own, \[., .\]"):
        fedmpi.sync(DDP(Net(mine, 0), process_group=mine), "bf16", group=dist.group.WORLD)
    total = torch.ones(1)
    dist.all_reduce(total)  # the job's own groups go on
    assert total.item() == 4
    collectives.main("wrap")
    print("ok", flush=True)  # and the groups are left as they are: the processes end all the same


if __name__ == "__main__":
    main()
