"""A GAN as public examples write it, two DistributedDataParallel models and their optimizers: gan.py [fedmpi].

What fedmpi changes are the lines marked so. Prints, for each rank, "ok" and what each model's hook has done.
"""

import sys
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fedmpi  # fedmpi

SIGNS = {"name": "signsgd", "feedback": True}


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    generator, discriminator = DDP(mlp(16, 64, 64)), DDP(mlp(64, 64, 1))
    made = fedmpi.ddp.attach(generator, SIGNS)  # fedmpi
    judged = fedmpi.ddp.attach(discriminator, "bf16")  # fedmpi
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    ones, zeros = torch.ones(32, 1), torch.zeros(32, 1)
    torch.manual_seed(1 + dist.get_rank())
    real = torch.randn(16, 64) @ torch.diag(torch.linspace(0.1, 2, 64))
    for _ in range(20):
        fake = generator(torch.randn(16, 16))
        d_optimizer.zero_grad()
        verdict = discriminator(torch.cat([real, fake.detach()]))
        loss = F.binary_cross_entropy_with_logits(verdict, torch.cat([ones[:16], zeros[:16]]))
        loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        # Through the discriminator, whose own gradients of this pass nobody wants.
        discriminator.requires_grad_(False)
        F.binary_cross_entropy_with_logits(discriminator.module(fake), ones[:16]).backward()
        discriminator.requires_grad_(True)
        g_optimizer.step()
    for model, state, least in ((generator, made, 15), (discriminator, judged, 1.9)):
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), "replicas are apart"
        stats = state.stats()
        assert (stats["steps"], stats["skipped"]) == (20, 0), stats
        assert stats["ratio"] > least, stats
    print("ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
