"""A DistributedDataParallel job whose model lies on the make-believe device, once for each method, with the hook:

    torchrun --nproc-per-node 2 tests/jobs/device_ddp.py CASES ANSWER

CASES: methods' options by name, JSON. ANSWER: by case what is wrong, "" for nothing: each job must end where
the same job on the CPU does, without an operation that mixes devices.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fedmpi
from tests import pretend


class _Done(dist._Work):
    """What is over when it is launched."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=[tensors[0].device])
        self._future.set_result(tensors)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class _Staged(dist.ProcessGroup):
    """The job's own group: Gloo, with the device's tensors copied to the host and back."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "staged"

    def _call(self, name: str, tensors: list[Tensor], options: Any) -> Any:
        if tensors[0].device.type == "cpu":
            return getattr(self._gloo, name)(tensors, options)
        staged = [tensor.cpu() for tensor in tensors]
        getattr(self._gloo, name)(staged, options).wait()
        for tensor, copy in zip(tensors, staged, strict=True):
            tensor.copy_(copy)
        return _Done(tensors)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        return self._call("broadcast", tensors, options)

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        return self._call("allreduce", tensors, options)

    def allgather(self, received: Any, sent: Any, options: Any) -> Any:
        return self._gloo.allgather(received, sent, options)

    def barrier(self, options: Any) -> Any:
        return self._gloo.barrier(options)


def trained(device: torch.device, method: dict[str, Any]) -> Tensor:
    """The parameters after four steps."""
    torch.manual_seed(0)
    sizes = zip((30, 60, 20), (60, 20, 5), strict=True)
    model = nn.Sequential(*(layer for n, m in sizes for layer in (nn.Linear(n, m), nn.ReLU()))).to(device)
    ddp = DistributedDataParallel(model, init_sync=False, bucket_cap_mb=0.004)
    state = fedmpi.ddp.attach(ddp, method, exact_below=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for t in range(4):
        generator = torch.Generator().manual_seed(10 * t + dist.get_rank())
        x = torch.randn(16, 30, generator=generator).to(device)
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    kept = [
        value
        for group in state._reducer.groups
        for part in (group.state, group.memory, group.peers.state)
        for value in part.values()
    ]
    assert {value.device.type for value in kept} <= {device.type}
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


def wrong(method: dict[str, Any], device: torch.device) -> str:
    expected = trained(torch.device("cpu"), method)
    with pretend.watched(everywhere=True) as seen:
        got = trained(device, method)
    if seen.mixed:
        return f"mixes devices: {seen.mixed}"
    return "" if torch.equal(got, expected) else "other parameters than on the CPU"


def main() -> None:
    torch.set_num_threads(1)
    device = pretend.load()
    dist.Backend.register_backend("staged", _Staged, devices=["cpu", "pretend"])
    dist.init_process_group("staged")
    cases = json.loads(Path(sys.argv[1]).read_text())
    answers = {name: wrong(method, device) for name, method in cases.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
