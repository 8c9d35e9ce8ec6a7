"""Ranks that come and go, and what each saw: elastic.py FOLDER SECONDS EVERY [SEED]

Four ranks train with fedmpi.local_sgd(…, elastic=…) for SECONDS. Every EVERY seconds one is killed, or stopped and
continued 4 seconds later, and another one is started. EVERY 0 is a plan instead, whatever time it takes: one is killed,
one comes, the coordinator is killed and another one takes its place; and nobody is disturbed in SECONDS that are
negative, in which the job ends after so many steps. After the plan a coordinator is stopped, and one rank comes.

Each rank writes FOLDER/<name>.jsonl: a line when it joins, one for each synchronisation, and its end. All are forks of
this process, which imports once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

import fedmpi
from fedmpi.comm.coordinated import serve
from fedmpi.errors import FedMPIError
from fedmpi.integrations.local_sgd import LocalSGD

H, SHORT, STEP, RANKS, AWAY = 40, 10, 0.025, 4, 4.0
PATIENT = {"lease": 4.0, "late": 60.0, "collective": 30.0, "coordinator": 60.0, "join": 60.0}
LIMITS = {"lease": 0.8, "late": 1.5, "collective": 2.0, "coordinator": 15.0, "join": 30.0}
METHOD = {"name": "topk", "ratio": 0.1, "feedback": True}


def batch(generator: torch.Generator, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    plane = torch.randn(32, 10, generator=torch.Generator().manual_seed(7))
    x = torch.randn(size, 32, generator=generator)
    return x, (x @ plane).argmax(1)


def digest(net: nn.Module) -> str:
    found = hashlib.sha256()
    for x in net.state_dict().values():
        found.update(x.numpy().tobytes())
    return found.hexdigest()[:16]


def worker(
    name: str,
    port: int,
    folder: Path,
    seed: int,
    steps: int,
    end: float,
    limits: dict[str, float],
    **how: Any,
) -> None:
    """Trains until ``end`` or the file "enough" is there, or for so many ``steps`` without a pause."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    log = (folder / f"{name}.jsonl").open("a", buffering=1)
    net = nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    generator, test = torch.Generator().manual_seed(seed), batch(torch.Generator().manual_seed(1), 500)
    at = {"at": f"127.0.0.1:{port}", "workers": RANKS, **limits}

    def tell(what: str, **more: Any) -> None:
        log.write(json.dumps({"time": time.time(), "what": what, **more}) + "\n")

    tell("start")
    how = {"method": METHOD, "every": H, "elastic": at, **how}
    outer = LocalSGD(net, optimizer, **how)
    tell("joined", step=outer.step, digest=digest(net), synchronisation=outer.stats()["synchronisations"])
    made, spent = 0, 0.0
    while outer.step < steps if steps else time.time() < end and not (folder / "enough").exists():
        began = time.monotonic()
        x, y = batch(generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        if not steps:
            time.sleep(max(0.0, STEP - (time.monotonic() - began)))
        seen = outer.stats()
        made, spent, then = made + 1, spent + time.monotonic() - began, time.monotonic()
        optimizer.step()
        stats, waited = outer.stats(), time.monotonic() - then
        if stats["synchronisations"] > seen["synchronisations"]:
            lost = stats["rejoined"] > seen["rejoined"]
            mine = {"step": outer.step, "digest": digest(net), "counted": 0 if lost else made, "lost": lost}
            mine |= {"spent": 0.0 if lost else spent, "waited": waited}
            made, spent = 0, 0.0
            net.eval()
            with torch.no_grad():
                loss = nn.functional.cross_entropy(net(test[0]), test[1]).item()
            net.train()
            tell(
                "synchronised",
                **mine,
                synchronisation=stats["synchronisations"],
                ranks=stats["ranks"],
                loss=loss,
            )
        else:
            spent += waited  # the optimizer's own time
    tell("end", **{name: value for name, value in outer.stats().items() if name != "dropped_rounds"})


class Children:
    """The processes of a job, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pids, self.codes = folder, dict[str, int](), dict[str, int]()

    def fork(self, name: str, task: Callable[[], None]) -> None:
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would have one thread of several"
        if pid := os.fork():
            self.pids[name] = pid
            return
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        out = os.open(self.folder / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 0
        try:
            task()
        except FedMPIError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            code = 2
        sys.exit(code)  # as a job ends, not os._exit: what runs when Python ends is a part of this

    def kill(self, name: str) -> None:
        os.kill(self.pids[name], signal.SIGKILL)
        self.wait(name, 10)

    def wait(self, name: str, seconds: float) -> int | None:
        """Its exit code; None where it does not end, and then it is killed."""
        end = time.monotonic() + seconds
        while name in self.pids:
            pid, status = os.waitpid(self.pids[name], os.WNOHANG)
            if pid:
                self.codes[name] = os.waitstatus_to_exitcode(status)
                del self.pids[name]
            elif time.monotonic() > end:
                os.kill(self.pids[name], signal.SIGKILL)
                os.waitpid(self.pids.pop(name), 0)
                self.codes[name] = 999
            else:
                time.sleep(0.01)
        return self.codes.get(name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class Job:
    def __init__(self, folder: Path, seconds: float, seed: int, limits: dict[str, float]) -> None:
        self.limits = limits
        self.children, self.folder, self.seed = Children(folder), folder, seed
        self.port, self.count, self.coordinators = free_port(), 0, 0
        self.began = time.time()
        self.steps, self.end = (int(-seconds), 0.0) if seconds < 0 else (0, self.began + seconds)
        self.away: dict[str, float] = {}  # stopped ones, and when they are continued
        self.events: list[dict[str, Any]] = []
        self.coordinate()
        for _ in range(RANKS):
            self.start()

    def note(self, what: str, name: str) -> None:
        self.events.append({"time": time.time(), "what": what, "name": name})

    def coordinate(self) -> None:
        self.coordinators += 1
        name = f"coordinator{self.coordinators}"
        self.children.fork(name, lambda: serve("127.0.0.1", self.port, lambda _: None))
        self.note("start", name)

    def start(self, **how: Any) -> str:
        self.count += 1
        if self.limits is PATIENT and not self.steps:
            how["every"] = SHORT
        name, seed = f"rank{self.count:03d}", 1000 * self.seed + self.count
        plan = self.port, self.folder, seed, self.steps, self.end, self.limits
        self.children.fork(name, lambda: worker(name, *plan, **how))
        self.note("start", name)
        return name

    @property
    def ranks(self) -> list[str]:
        return sorted(name for name in self.children.pids if name.startswith("rank"))

    def rolling(self, every: float) -> None:
        """Every so many seconds one is killed, or stopped for a while, and one comes, or comes back."""
        choose, due, stops = random.Random(self.seed), self.began + every, True
        while time.time() < self.end - 2:
            for name, back in list(self.away.items()):
                if time.time() > back:
                    os.kill(self.children.pids[name], signal.SIGCONT)
                    self.note("continue", name)
                    del self.away[name]
            if time.time() > due and time.time() < self.end - AWAY - 3:
                due += every
                name = choose.choice([name for name in self.ranks if name not in self.away])
                more = len(self.ranks) > RANKS  # one that was stopped has come back
                kill, stops = more or stops, not (more or stops)  # in turn
                if kill:
                    self.children.kill(name)
                    self.note("kill", name)
                else:
                    os.kill(self.children.pids[name], signal.SIGSTOP)
                    self.away[name] = time.time() + AWAY
                    self.note("stop", name)
                if not more:
                    self.start()
            time.sleep(0.02)

    def planned(self) -> None:
        self.wait_for("rank002", 2)
        self.note("kill", "rank002")
        self.children.kill("rank002")
        stranger = self.start(method="dense")
        self.note("refused", stranger)
        newcomer = self.start()
        self.wait_for(newcomer, 1)
        self.children.wait(stranger, 60)
        self.children.kill("coordinator1")
        self.note("kill", "coordinator1")
        time.sleep(0.5)
        self.coordinate()
        self.wait_for(newcomer, 2)
        (self.folder / "enough").touch()

    def wait_for(self, name: str, more: int) -> None:
        """Until this rank has had so many more synchronisations; what has not come by the job's end is seen in what the
        ranks wrote."""
        path, begun = self.folder / f"{name}.jsonl", None
        while time.time() < self.end:
            if path.exists():
                count = path.read_text().count('"synchronised"')
                begun = count if begun is None else begun
                if count >= begun + more:
                    return
            time.sleep(0.02)

    def finish(self) -> None:
        for name in self.away:
            os.kill(self.children.pids[name], signal.SIGCONT)
        for name in self.ranks:
            self.children.wait(name, max(0.0, self.end - time.time()) + 60)
        coordinators = [name for name in self.children.pids if name.startswith("coordinator")]
        for name in coordinators:
            self.children.kill(name)
        codes = {name: code for name, code in self.children.codes.items() if name.startswith("rank")}
        (self.folder / "events.json").write_text(json.dumps({"events": self.events, "codes": codes}))


def stopped(folder: Path) -> None:
    """What a rank says whose coordinator is there, and does not answer."""
    children, port = Children(folder), free_port()
    children.fork("coordinator", lambda: serve("127.0.0.1", port, lambda _: (folder / "up").touch()))
    while not (folder / "up").exists():
        time.sleep(0.01)
    os.kill(children.pids["coordinator"], signal.SIGSTOP)
    limits = {**PATIENT, "coordinator": 0.1}
    children.fork("alone", lambda: worker("alone", port, folder, 0, 10, 0.0, limits))
    code = children.wait("alone", 90)
    children.kill("coordinator")
    print((folder / "alone.out").read_text())
    assert code == 2, code


def main() -> None:
    folder, seconds, every = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    limits = LIMITS if seconds > 0 and every else PATIENT
    job = Job(folder, seconds, int(sys.argv[4]) if len(sys.argv) > 4 else 0, limits)
    if seconds > 0 and every:
        job.rolling(every)
    elif seconds > 0:
        job.planned()
    job.finish()
    if seconds > 0 and not every:
        stopped(folder)


if __name__ == "__main__":
    assert fedmpi.__version__
    main()
