"""Checks of local updates, one after the other in one launch of real processes: local_checks.py ANSWER

Rank 0 writes {check: "" or what went wrong on any rank}. Under mpirun the ranks meet through MPI, without
torch.distributed.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fedmpi
from fedmpi.comm import connect
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError
from fedmpi.integrations import folder

CHECKS: dict[str, Callable[[Comm, Path], None]] = {}
EVERYWHERE: list[str] = []
TOPK = {"name": "topk", "ratio": 0.05, "feedback": True}
Check = Callable[[Comm, Path], None]


def check(function: Check) -> Check:
    """Of any launcher's ranks."""
    EVERYWHERE.append(function.__name__)
    return over_torch(function)


def over_torch(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def names(torch_only: bool, ranks: int) -> list[str]:
    """The checks that run over torch.distributed, or through any library, on so many ranks."""
    found = list(CHECKS) if torch_only else EVERYWHERE
    return [name for name in found if ranks == 3 or name != around_ddp_over_islands.__name__]


class Net(nn.Module):
    """An embedding whose weight the output shares, and a norm with buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.hidden, self.norm = nn.Embedding(30, 12), nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 30)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(F.gelu(self.hidden(self.embed(x)))))
        return y


def groups(net: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(net), lr=0.01)


def train(
    net: nn.Module,
    optimizer: Any,
    steps: range,
    rank: int,
    scaler: Any = None,
    passes: int = 1,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    for t in steps:
        optimizer.zero_grad()
        for i in range(passes):
            generator = torch.Generator().manual_seed(1000 * t + 10 * i + rank)
            x = torch.randint(30, (16,), generator=generator)
            loss = F.cross_entropy(net(x), (7 * x + 3) % 30) / passes
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        after(t + 1)


def flat(net: nn.Module) -> Tensor:
    tensors = [*net.parameters(), *net.buffers()]
    return torch.cat([x.detach().double().flatten() for x in tensors])


def all_of(comm: Comm, x: Tensor) -> Tensor:
    return comm.allgather_tensor(x)


def equal(comm: Comm, net: nn.Module) -> None:
    rows = all_of(comm, flat(net))
    assert all(torch.equal(row, rows[0]) for row in rows), float((rows - rows[0]).abs().max())


@check
def a_job_with_tied_weights_groups_scaler_and_accumulation_goes_on_exactly(comm: Comm, path: Path) -> None:
    def job(cut: int | None, how: dict[str, Any]) -> nn.Module:
        def wrapped(seed: int) -> Any:
            net = Net(seed)
            optimizer, scaler = adamw(net), torch.amp.GradScaler("cpu", init_scale=16.0)
            return (
                net,
                optimizer,
                scaler,
                fedmpi.local_sgd(net, optimizer, TOPK, every=4, scaler=scaler, **how),
            )

        def after(step: int) -> None:
            anchors = [x.flatten() for part in outer.fragments for x in part.anchor().values()]
            rows = all_of(comm, torch.cat(anchors))
            assert all(torch.equal(row, rows[0]) for row in rows), f"after step {step}"
            if not how and step % 4 == 0:
                equal(comm, net)

        net, optimizer, scaler, outer = wrapped(comm.rank)
        train(net, optimizer, range(cut or 14), comm.rank, scaler, passes=2, after=after)
        if cut:
            saved = copy.deepcopy([x.state_dict() for x in (net, optimizer, scaler)])
            folder.save(outer, path / "states")
            net, optimizer, scaler, outer = wrapped(99)
            for x, state in zip((net, optimizer, scaler), saved, strict=True):
                x.load_state_dict(state)
            assert folder.load(outer, path / "states")
            train(net, optimizer, range(cut, 14), comm.rank, scaler, passes=2, after=after)
        mine = flat(net)
        assert not torch.equal(*all_of(comm, mine)[:2]), "between two synchronisations"
        outer.synchronize()
        equal(comm, net)
        assert outer.stats()["dropped"] == 0
        assert outer.stats()["wire_sent_bytes"] > 0
        return net

    for how in ({}, {"fragments": 2, "overlap": 2}):
        straight = flat(job(None, how))
        assert torch.equal(flat(job(9, how)), straight), f"{how}: interrupted is uninterrupted"


@check
def what_is_under_way_is_sent_while_steps_go_on(comm: Comm, path: Path) -> None:
    results = []
    for method in ("dense", {"name": "signsgd", "feedback": True}, {"name": "bf16"}):
        net = Net(0)
        optimizer = adamw(net)
        outer = fedmpi.local_sgd(net, optimizer, method, every=6, fragments=3, overlap=1, exact_below=0)
        train(net, optimizer, range(20), comm.rank)
        outer.synchronize()
        equal(comm, net)
        stats = outer.stats()
        assert stats["rounds"] == 3 * 3 + 3, stats["rounds"]
        results.append((stats["payload_bytes"], stats["largest_bytes"]))
    assert results[1][0] < results[0][0] / 8
    assert results[0][1] < 0.7 * 4 * sum(p.numel() for p in Net(0).parameters()), "a part at a time"


@check
def an_update_that_is_not_finite_on_one_rank(comm: Comm, path: Path) -> None:
    net = Net(0)
    optimizer = adamw(net)
    outer = fedmpi.local_sgd(net, optimizer, TOPK, every=4)
    train(net, optimizer, range(4), comm.rank)
    before = flat(net)
    if comm.rank == comm.size - 1:
        net.hidden.weight.data[0, 0] = float("nan")
    train(net, optimizer, range(4, 8), comm.rank)
    assert torch.equal(flat(net), before), "the round is dropped"
    assert outer.stats()["dropped_rounds"] == [{"step": 8, "fragment": 0, "ranks": [comm.size - 1]}]
    train(net, optimizer, range(8, 12), comm.rank)
    equal(comm, net)
    assert bool(flat(net).isfinite().all())
    assert outer.stats()["rounds"] == 2


@over_torch
def every_step_with_sgd_is_ddp(comm: Comm, path: Path) -> None:
    local, ddp = Net(0), DDP(Net(0))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (local, ddp)]
    fedmpi.local_sgd(local, optimizers[0], every=1, outer="sgd", comm="group")
    for net, optimizer in zip((local, ddp), optimizers, strict=True):
        net.eval()  # the norm's own averages differ: DDP takes rank 0's
        train(net, optimizer, range(100), comm.rank)
    a, b = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (local, ddp))
    equal(comm, local)
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@over_torch
def around_ddp_over_islands(comm: Comm, path: Path) -> None:
    """Ranks 0 and 1 are an island, rank 2 is one of its own: equal positions average."""
    islands = [dist.new_group([0, 1]), dist.new_group([2])]
    positions = [dist.new_group([0, 2]), dist.new_group([1])]
    mine, group = (islands[comm.rank // 2], positions[comm.rank % 2])
    ddp = DDP(Net(0), process_group=mine)
    optimizer = adamw(ddp)
    outer = fedmpi.local_sgd(ddp, optimizer, every=5, outer="sgd", group=group)
    train(ddp, optimizer, range(5), comm.rank)
    outer.synchronize()
    rows = all_of(comm, torch.cat([p.detach().flatten() for p in ddp.parameters()]))
    assert torch.equal(rows[0], rows[2])
    net = DDP(Net(0))
    with pytest.raises(ConfigError, match="averages gradients over the same ranks in every step"):
        fedmpi.local_sgd(net, adamw(net), every=5)


def main() -> None:
    comm, answer = connect(), Path(sys.argv[1])
    found = {}
    for name in names(comm.name == "gloo", comm.size):
        torch.manual_seed(0)
        try:
            CHECKS[name](comm, answer.parent)
            wrong = ""
        except Exception:
            wrong = traceback.format_exc()
        reports = [report.decode() for report in comm.allgather(wrong.encode())]
        found[name] = "\n".join(report for report in reports if report)
        if found[name]:
            break  # ranks may stand at different places
    if comm.rank == 0:
        answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
