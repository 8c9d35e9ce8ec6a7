"""A training script as it stands in somebody's repository: DistributedDataParallel, Adam, a small network.

    torchrun --nproc-per-node 2 tests/jobs/plain_ddp.py
    torchrun --nproc-per-node 2 tests/jobs/plain_ddp.py --fedmpi signsgd
    torchrun --nproc-per-node 2 tests/jobs/plain_ddp.py --fedmpi no --fedmpi signsgd    (one after the other)
    mpirun -n 2 python tests/jobs/plain_ddp.py --fedmpi

All that ``--fedmpi`` changes are the two lines marked below (and, under mpirun, who tells a process its rank).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def transmitted() -> int:
    """Bytes that have left through the loopback interface of this network namespace."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (counters,) = (line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[8])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--fedmpi", nargs="?", const="signsgd", action="append", help="a method, as YAML, or no"
    )
    parser.add_argument("--comm", default="group")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        import fedmpi

        fedmpi.ddp.init_process_group("gloo")
    for method in args.fedmpi or ["no"]:
        train(args, None if method == "no" else yaml.safe_load(method))
    dist.destroy_process_group()


def train(args: argparse.Namespace, method: Any) -> None:
    torch.manual_seed(args.seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]

    model = nn.Sequential(
        nn.Linear(64, args.hidden),
        nn.ReLU(),
        nn.Linear(args.hidden, args.hidden),
        nn.ReLU(),
        nn.Linear(args.hidden, 10),
    )
    ddp = DistributedDataParallel(model)
    if method:
        import fedmpi  # 1

        state = fedmpi.ddp.attach(ddp, method, comm=args.comm)  # 2
    optimizer = torch.optim.Adam(ddp.parameters(), lr=args.lr)

    dist.barrier()
    before = transmitted()
    generator = torch.Generator().manual_seed(100 + rank)
    mine = train[rank::world]
    for _ in range(args.steps):
        batch = mine[torch.randint(len(mine), (50,), generator=generator)]
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
    dist.barrier()
    wire = transmitted() - before

    model.eval()
    with torch.no_grad():
        logits = model(x[test])
        test_loss = F.cross_entropy(logits, y[test]).item()
        accuracy = (logits.argmax(1) == y[test]).float().mean().item()
    if rank == 0:
        report = {
            "test_loss": test_loss,
            "accuracy": accuracy,
            "ranks": world,
            "parameters": sum(p.numel() for p in model.parameters()),
            "interface_bytes": wire,
        }
        if method:
            report["stats"] = state.stats()
        print(json.dumps(report))


if __name__ == "__main__":
    main()
