"""Two rounds of a configuration, with noise as its pictures: ``memory.py CONFIG IMAGES [key=value …]``.

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
from fedmpi.tasks.data import Data, Split

peak = 0
done = threading.Event()


def noise(folder: Path, images: int) -> Data:
    """So many pictures of CIFAR-10's size; what they show does not matter here."""
    x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10
    return Data("noise", Split(x, y), Split(x[:10], y[:10]), 10)


def watch() -> None:
    global peak
    while not done.is_set():
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        peak = max(peak, sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")))
        time.sleep(0.02)


def main() -> None:
    path, images, *overrides = sys.argv[1:]
    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(2)
    pictures = f"data={{name: 'tests.jobs.memory:noise', images: {images}}}"
    simulation = Simulation(config.load(path, [pictures, "rounds=2", *overrides]), solo())
    lines = [simulation.round(t) for t in range(2)]
    done.set()
    print(
        json.dumps(
            {
                "clients": sum(line["clients"] for line in lines),
                "upload_bytes": sum(line["upload_bytes"] for line in lines),
                "peak_anonymous_and_shared": peak,
                "parameters": simulation.spec.size,
            }
        )
    )


if __name__ == "__main__":
    main()
