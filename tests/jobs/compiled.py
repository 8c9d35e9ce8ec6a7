"""A compiled DistributedDataParallel, with the hook attached before it is compiled, and after: compiled.py.

Prints "ok" for each rank, if both train as the one that is not compiled.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fedmpi  # fedmpi

POWERSGD = {"name": "powersgd", "rank": 4, "feedback": True}


def train(when: str) -> tuple[Tensor, Any]:
    torch.manual_seed(0)
    model: Any = DDP(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)))
    if when == "before":
        state = fedmpi.ddp.attach(model, POWERSGD)  # fedmpi
    if when:
        model = torch.compile(model, backend="aot_eager")
    if when != "before":
        state = fedmpi.ddp.attach(model, POWERSGD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(8):
        optimizer.zero_grad()
        x = torch.randn(16, 64, generator=generator)
        (model(x) - x).pow(2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), state.stats()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected, plain = train("")
    for when in ("before", "after"):
        got, stats = train(when)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert stats["steps"] == 8
        assert stats["payload_bytes"] == plain["payload_bytes"]
        assert stats["ratio"] > 4, stats
    print("ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
