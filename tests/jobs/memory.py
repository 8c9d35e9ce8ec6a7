"""Two rounds of 100 of 10,000 clients with residuals of ResNet-9's size in mapped files: ``memory.py FOLDER``.

Prints the peak of RssAnon + RssShmem (sampled by a thread) as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.tasks import data

peak = 0
done = threading.Event()


def watch() -> None:
    global peak
    while not done.is_set():
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        peak = max(peak, sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")))
        time.sleep(0.02)


threading.Thread(target=watch, daemon=True).start()
torch.set_num_threads(2)
x, y = torch.rand(10_000, 3, 32, 32), torch.arange(10_000) % 10
noise = data.Data("mnist", data.Split(x, y), data.Split(x[:10], y[:10]), 10)
data.DATA["mnist"] = lambda places: noise  # one image a client; what it shows does not matter here
values = {
    "data": {"name": "mnist"},
    "model": "resnet9",
    "clients": 10_000,
    "cohort": 100,
    "rounds": 2,
    "local": {"lr": 0.01, "batch": 1},
    "method": {"name": "topk", "ratio": 0.001, "feedback": True},
    "store": "mmap",
    "store_folder": sys.argv[1],
}
simulation = Simulation(config.parse(values), solo())
trained = sum(simulation.round(t)["clients"] for t in range(2))
done.set()
print(json.dumps({"clients": trained, "peak_anonymous_and_shared": peak, "parameters": simulation.spec.size}))
