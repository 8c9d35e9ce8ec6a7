"""A job with local updates, on which a rank is killed: killed_between.py SEED RANK STEP [in]

Under ``mpirun --with-ft ulfm``. RANK kills itself after so many steps: between two synchronisations, or, with ``in``,
within the next one. The first rank that is left prints what :func:`train` found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fedmpi
from fedmpi.comm import connect
from fedmpi.comm.base import Comm

STEPS, H = 120, 10
_SEED = threading.Lock()  # ranks may be threads, which share torch's generator


def train(comm: Comm, seed: int, before: Callable[[Any], None] = lambda _: None) -> dict[str, Any]:
    """The test loss after all steps, and what it was told; ``before`` is called before each step."""
    with _SEED:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    method = {"name": "topk", "ratio": 0.1, "feedback": True}
    outer = fedmpi.local_sgd(net, optimizer, method, every=H, exact_below=0, comm=comm)
    plane = torch.randn(32, 10, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(100 * seed + comm.rank)
    while outer.step < STEPS:
        before(outer)
        x = torch.randn(32, 32, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x @ plane).argmax(1)).backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    rows = outer.comm.allgather_tensor(flat)
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(x), (x @ plane).argmax(1)).item()
    equal = all(torch.equal(row, rows[0]) for row in rows)
    return {"loss": loss, "equal": equal, "rounds": outer.rounds, "ranks": outer.comm.size}


def main() -> None:
    torch.set_num_threads(1)
    seed, rank, step = map(int, sys.argv[1:4])
    comm = connect()
    me = comm.rank

    def before(outer: Any) -> None:
        if me != rank or outer.step != step:
            return
        if len(sys.argv) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        # The others find out within their collectives.
        outer.comm.settle = lambda: os.kill(os.getpid(), signal.SIGKILL)

    found = train(comm, seed, before)
    if comm.rank == 0:
        print(json.dumps({**found, "members": comm.members}), flush=True)


if __name__ == "__main__":
    main()
