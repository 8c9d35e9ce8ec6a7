"""What averaging gradients costs in a DDP job: CPU seconds of a step over those of its computing, by hook.

Two ranks of one thread on this machine, a fully connected model whose batch is small: what a rank computes is little
beside what a hook does with its gradients. Hooks take turns, and the least of several turns counts: other programs only
add to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fedmpi.integrations import ddp as drop_in

RANKS, _BATCH, _STEPS, _WARM = 2, 4, 6, 3
_WIDTHS = (1024, 2048, 2048, 2048, 256)  # 11.0 M parameters
_TIMEOUT = 600  # seconds

Attach = Callable[[DistributedDataParallel], object]

OURS: dict[str, dict[str, Any]] = {
    "bf16": {"name": "bf16"},
    "signsgd": {"name": "signsgd"},
    "signsgd, feedback": {"name": "signsgd", "feedback": True},
    "powersgd": {"name": "powersgd", "rank": 4, "feedback": True},
    "topk 1 %, feedback": {"name": "topk", "ratio": 0.01, "feedback": True},
}
"""Methods that are attached."""


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for a, b in pairwise(_WIDTHS) for part in (nn.Linear(a, b), nn.GELU())))


def _attach_ours(options: dict[str, Any]) -> Attach:
    return lambda ddp: drop_in.attach(ddp, options)


def _torch_bf16(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    """torch's hook by another name: registered by its own, DDP refuses it but with NCCL, though Gloo does the same."""
    return default_hooks.bf16_compress_hook(group, bucket)


_torch_bf16.__annotations__.clear()  # DDP compares them with classes, and they are strings here


def _attach_torch(name: str) -> Attach:
    def attach(ddp: DistributedDataParallel) -> object:
        if name == "bf16":
            ddp.register_comm_hook(dist.group.WORLD, _torch_bf16)
        elif name == "PowerSGD":
            state = powerSGD_hook.PowerSGDState(None, 4, start_powerSGD_iter=2, min_compression_rate=1)
            ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return None

    return attach


class _Job:
    """A model with a hook, and the least CPU seconds of a step so far."""

    def __init__(self, name: str, attach: Attach) -> None:
        # On Gloo torch's PowerSGD fails with two buckets: it starts collectives in callbacks.
        self.ddp = DistributedDataParallel(
            _model(), bucket_cap_mb=1024 if name == "torch: PowerSGD" else None
        )
        self.attached = attach(self.ddp)
        self.x = torch.randn(_BATCH, _WIDTHS[0])
        self.least = self.computing = float("inf")

    def step(self) -> Tensor:
        self.ddp.zero_grad(set_to_none=False)
        loss: Tensor = self.ddp(self.x).square().sum()
        loss.backward()
        return loss

    def turn(self) -> None:
        dist.barrier()
        begin = time.process_time()
        for _ in range(_STEPS):
            self.step()
        dist.barrier()
        self.least = min(self.least, (time.process_time() - begin) / _STEPS)
        begin = time.process_time()
        with self.ddp.no_sync():
            for _ in range(_STEPS):
                self.step()
        self.computing = min(self.computing, (time.process_time() - begin) / _STEPS)
        dist.barrier()


def _rank(rank: int, folder: str, turns: int) -> None:
    """One of the ranks: the first prints what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    hooks: dict[str, Attach] = {
        f"torch: {name}": _attach_torch(name) for name in ("fp32", "bf16", "PowerSGD")
    }
    hooks |= {name: _attach_ours(options) for name, options in OURS.items()}
    jobs = {name: _Job(name, attach) for name, attach in hooks.items()}
    for job in jobs.values():
        for _ in range(_WARM):
            job.step()
    for _ in range(turns):
        for job in jobs.values():
            job.turn()
    computing = min(job.computing for job in jobs.values())
    if rank == 0:
        print(
            json.dumps({name: job.least - computing for name, job in jobs.items()} | {"computing": computing})
        )
    dist.barrier()
    dist.destroy_process_group()


def run(turns: int = 5) -> dict[str, float]:
    """CPU seconds a step over computing of each hook on rank 0, and those of computing.

    Raises:
      RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="fedmpi-hooks-") as folder:
        ranks = []
        for rank in range(RANKS):
            out = (Path(folder) / f"out.{rank}").open("w+")
            command = [sys.executable, "-m", "fedmpi.bench.hooks", str(rank), folder, str(turns)]
            ranks.append((subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT), out))
        try:
            failed = [process.wait(_TIMEOUT) for process, _ in ranks]
        finally:
            for process, _ in ranks:
                process.kill()
        said = []
        for _, out in ranks:
            out.seek(0)
            said.append(out.read())
            out.close()
    if any(failed):
        raise RuntimeError(f"a rank failed: {said[failed.index(next(filter(None, failed)))][-2000:]}")
    found: dict[str, float] = json.loads(said[0].strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
