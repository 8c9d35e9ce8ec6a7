"""Kills processes with SIGKILL while they write checkpoints: ``killed.py CONFIG FOLDER KILLS``.

A child trains and saves after every round; as soon as an unfinished checkpoint is there it is killed, and the next one
continues. Prints, a line a kill: whether it was that which ended the child, whether an unfinished checkpoint was left,
the last round that the child said to be saved, the round at which the next one starts, and whether its parameters are
those of that round.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.rounds import Simulation

torch.set_num_threads(1)
values = config.load(sys.argv[1])
folder, kills = Path(sys.argv[2]), int(sys.argv[3])


def start() -> tuple[Simulation, Checkpoints, int, list[str]]:
    simulation, said = Simulation(values, solo()), []
    checkpoints = Checkpoints(folder, values.checkpoint, simulation.comm)
    done, lines = checkpoints.load(simulation, said.append)
    (folder / "metrics.jsonl").write_bytes(lines or b"")
    return simulation, checkpoints, done, said


def train(saved: int) -> None:
    simulation, checkpoints, done, _ = start()
    for t in range(done, values.rounds):
        line = simulation.round(t)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        checkpoints.save(simulation, t + 1)
        os.write(saved, b"%9d\n" % (t + 1))


reference: list[Any] = []
simulation = Simulation(values, solo())
for t in range(values.rounds):
    reference.append(simulation.replica.parameters())
    simulation.round(t)
folder.mkdir(exist_ok=True)
for kill in range(kills):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        train(into)
        os._exit(0)
    os.close(into)
    seen = 0
    while seen <= kill % 3:  # the first, second or third that this child begins
        os.read(out, 10) if seen else None
        while not any((folder / "checkpoints").glob(".round-*")):
            time.sleep(0.0002)
        seen += 1
    time.sleep(0.0004 * (kill % 10))
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    rest = b""
    while more := os.read(out, 10):
        rest = more
    os.close(out)
    left = any((folder / "checkpoints").glob(".round-*"))
    simulation, _, done, said = start()
    same = torch.equal(simulation.replica.parameters(), reference[done])
    kept = {"left": left, "saved": int(rest or 0), "start": done, "same": same, "said": said}
    print(json.dumps({"killed": killed, **kept}))
