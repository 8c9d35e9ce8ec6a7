"""One rank of the job that the link study times: DistributedDataParallel, SGD with momentum, a small model.

    python configs/studies/link_job.py        with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them

It reads requests from its standard input, one JSON object a line, and answers each with one on its standard
output. All ranks get the same requests. A *case* says how gradients are averaged: ``{"plain": "fp32"}`` by DDP
itself, ``{"plain": "bf16"}`` by torch's hook for that, ``{"plain": "powersgd", "rank": r}`` by torch's too,
``{"plain": "nothing"}`` not at all, ``{"plain": "one number"}`` neither, but ranks wait for each other;
``{"method": …, "settings": …}`` by :func:`fedmpi.ddp.attach`. With ``"one_bucket": true`` DDP hands over all
gradients at once, at the end of the backward pass; else in the buckets that it makes by default.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fedmpi.errors import FedMPIError
from fedmpi.integrations import ddp as hooks
from fedmpi.tasks import data

MOMENTUM = 0.9


def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """About as many parameters as the CNN, 1,863,690 on 28×28, and a tenth of its arithmetic."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The CNN of McMahan et al. 2017: 1,663,370 parameters on 28×28."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, classes),
    )


MODELS = {"cnn": cnn, "mlp": mlp}


def sent() -> int:
    """Bytes that have left through this network namespace's interfaces."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


class Trial:
    """A model in training."""

    def __init__(
        self, model: str, samples: data.Data, case: dict[str, Any], lr: float, seed: int, batch: int
    ) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        module = MODELS[model](samples.shape, samples.classes)
        self.ddp = DistributedDataParallel(module, bucket_cap_mb=100 if case.get("one_bucket") else None)
        self.hook: hooks.State | None = None
        self.alone = case.get("plain") == "nothing"
        if "method" in case:
            self.hook = hooks.attach(self.ddp, case["method"], seed=seed, **case.get("settings", {}))
        elif case["plain"] == "bf16":
            # By its own name DDP refuses it over Gloo, which can add bf16.
            self.ddp.register_comm_hook(None, _bf16)
        elif case["plain"] == "one number":
            self.ddp.register_comm_hook(torch.zeros(1), _one_number)
        elif case["plain"] == "powersgd":
            # Compression from the earliest step that it allows, as ours.
            state = powerSGD_hook.PowerSGDState(None, case["rank"], start_powerSGD_iter=2)
            self.ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=lr, momentum=MOMENTUM)
        self.samples, self.batch = samples, batch
        self.mine = torch.arange(rank, len(samples.train.x), ranks)
        self.draws = torch.Generator().manual_seed(1000 * seed + rank)

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of so many steps, and bytes that this rank's interface sent in them."""
        self.ddp.train()
        x_N, y_N = self.samples.train.x, self.samples.train.y
        dist.barrier()
        before, cpu, started = sent(), process_time(), perf_counter()
        for _ in range(count):
            index_B = self.mine[torch.randint(len(self.mine), (self.batch,), generator=self.draws)]
            self.optimizer.zero_grad()
            with self.ddp.no_sync() if self.alone else nullcontext():
                F.cross_entropy(self.ddp(x_N[index_B]), y_N[index_B]).backward()
            self.optimizer.step()
        seconds = perf_counter() - started
        return {"seconds": seconds, "cpu": process_time() - cpu, "sent": sent() - before}

    @torch.no_grad()
    def accuracy(self, count: int) -> float:
        """Of the first ``count`` test images, shared out among the ranks."""
        module, test = self.ddp.module.eval(), self.samples.test
        mine = slice(dist.get_rank(), min(count, len(test.x)), dist.get_world_size())
        found = [
            (module(x).argmax(1) == y).sum()
            for x, y in zip(test.x[mine].split(250), test.y[mine].split(250), strict=True)
        ]
        right = torch.stack([*found]).sum()
        dist.all_reduce(right)
        return float(right) / min(count, len(test.x))


def _bf16(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    return default_hooks.bf16_compress_hook(state, bucket)


def _one_number(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    if bucket.is_last():
        future = dist.all_reduce(state, async_op=True).get_future()
        answer: torch.futures.Future[Tensor] = future.then(lambda done: buffer)
        return answer
    at_once: torch.futures.Future[Tensor] = torch.futures.Future()
    at_once.set_result(buffer)
    return at_once


for _hook in (_bf16, _one_number):
    _hook.__annotations__.clear()  # DDP compares them with classes, and they are strings here


class Rank:
    """What a rank has in hand, and its answers."""

    def __init__(self) -> None:
        self.trials: dict[str, Trial] = {}

    def load(self, trial: str, model: str, **options: Any) -> dict[str, Any]:
        self.model, self.samples = model, data.load(**options)
        module = MODELS[model](self.samples.shape, self.samples.classes)
        return {"parameters": sum(p.numel() for p in module.parameters())}

    def start(self, trial: str, **options: Any) -> dict[str, Any]:
        self.trials[trial] = Trial(self.model, self.samples, **options)
        return {}

    def stop(self, trial: str) -> dict[str, Any]:
        del self.trials[trial]
        return {}

    def steps(self, trial: str, count: int) -> dict[str, Any]:
        return self.trials[trial].steps(count)

    def accuracy(self, trial: str, count: int) -> dict[str, Any]:
        return {"accuracy": self.trials[trial].accuracy(count)}

    def checksum(self, trial: str) -> dict[str, Any]:
        """Of the parameters' bits: equal trainings have equal ones."""
        values = [p.detach().reshape(-1).view(torch.int32) for p in self.trials[trial].ddp.parameters()]
        return {"bits": int(torch.cat(values).sum())}

    def stats(self, trial: str) -> dict[str, Any]:
        hook = self.trials[trial].hook
        return hook.stats() if hook else {}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = Rank()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(rank, request.pop("do"))(**request)
        except FedMPIError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
