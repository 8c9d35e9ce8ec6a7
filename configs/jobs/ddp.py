"""A training script on DistributedDataParallel; the two lines that are marked compress its gradients.

torchrun --nproc-per-node 2 configs/jobs/ddp.py
torchrun --nproc-per-node 2 configs/jobs/ddp.py none      # without them
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

METHOD = {"name": "topk", "ratio": 0.05, "feedback": True}


def main() -> None:
    dist.init_process_group("gloo")  # nccl on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same initial model and split on every rank
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    mine, test = order[:1400][rank::world], order[1400:]

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    ddp = DistributedDataParallel(model)
    state = None
    if "none" not in sys.argv:
        import fedmpi  # 1

        state = fedmpi.ddp.attach(ddp, METHOD)  # 2
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-3)

    for _ in range(150):
        batch = mine[torch.randint(len(mine), (50,))]
        optimizer.zero_grad()
        F.cross_entropy(ddp(x[batch]), y[batch]).backward()
        optimizer.step()

    if rank == 0:
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
        print(f"test accuracy {accuracy:.1%}")
        if state is not None:
            print(state.table())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
