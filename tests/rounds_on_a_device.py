"""The round loop on an accelerator, a make-believe one (tests/pretend): nothing mixes devices, nothing as long as the
model goes to the host, the host waits as often whatever the number of steps, and a run has the CPU's bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import Comm, placement, run_ranks, solo
from fedmpi.config import Config
from fedmpi.engine import device as devices
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.rules import Rule
from fedmpi.engine.run import run
from fedmpi.engine.trainer import Trainer
from fedmpi.errors import ConfigError, FedMPIError
from fedmpi.message import CPU
from fedmpi.phases import PHASES

from . import pretend
from .conftest import SMALL

CONFIGS = Path(__file__).parent.parent / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
FEW = ("rounds=2", "clients=6", "cohort=4", "evaluate_every=2", "local.steps=2", "checkpoint.minutes=null")
MIXED = {
    "a network that draws, with buffers": {
        "model": {"name": "tests.nets:build"},
        "method": {"name": "topk", "ratio": 0.1},
        "parts": [{"match": "norms", "travels": "exact"}],
    },
    "parts that are clients' own": {
        "model": {"name": "tests.nets:build"},
        "method": {"name": "dense"},
        "parts": [{"match": "last.*", "travels": "local"}, {"match": "buffers", "travels": "local"}],
        "client_test": 0.3,
    },
    "scaffold and an optimizer": {"local": {"lr": 0.1, "steps": 2, "batch": 20, "scaffold": "exact"}},
    "adamw, fednova and accumulation": {
        "local": {
            "lr": 0.01,
            "steps": 2,
            "batch": 20,
            "accumulate": 2,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "keep": True,
        },
        "server": {"optimizer": "momentum"},
    },
    "rejecting and clipping": {
        "method": {"name": "topk", "ratio": 0.1, "feedback": True},
        "on_bad_update": "reject",
        "clip": {"norm": 0.1},
    },
    "an order instead of a mean": {"topology": "aggregator", "server": {"aggregate": "median"}},
    "an aggregator": {
        "topology": "aggregator",
        "method": {"name": "lookback", "threshold": 0.5, "inner": {"name": "topk"}},
    },
    "data-parallel training": {
        "mode": "data_parallel",
        "clients": 2,
        "cohort": None,
        "local": {"lr": 0.1, "batch": 20},
        "method": {"name": "lookback", "threshold": 0.5},
        "server": {"optimizer": "adam", "lr": 0.01},
    },
    "many small models at once": {"rounds": 2, "local": {"lr": 0.1, "steps": 101, "batch": 20}},
    "one step of all as one batch": {"local": {"lr": 0.1}},
    "convolutions": {"model": {"name": "cnn"}, "local": {"lr": 0.1, "steps": 1, "batch": 8}},
}


class Played:
    """A rank's run: lines of metrics, parameters, and what happened on the device."""

    def __init__(self, values: Config, comm: Comm) -> None:
        with pretend.watched() as self.seen:
            self.simulation = Simulation(values.for_ranks(comm.size), comm)
            comm.allgather(b"")  # building a model draws from the generator that a network's training needs
            prepared = self.simulation.place.device
            self.lines = [self.simulation.round(t) for t in range(values.rounds)]
        for line in self.lines:
            del line["seconds"]
        self.x, self.sent = self.simulation.replica.parameters(), comm.sent
        assert self.x.device == prepared


def pair(values: Config, device: torch.device, ranks: int = 2) -> list[tuple[Played, Played]]:
    """Each rank's run on the device and on the CPU, which must be the same."""
    both = [
        run_ranks(
            ranks, lambda c, p=place: Played(values.model_copy(update={"device": str(p)}), c), timeout=120
        )
        for place in (device, CPU)
    ]
    for there, here in zip(*both, strict=True):
        assert there.x.device == device
        assert not there.seen.mixed
        # Ranks that are threads meet on the host: messages and sums are staged there, never more.
        assert there.seen.longest <= there.sent, f"{there.seen.longest} of {there.sent} bytes"
        assert there.lines == here.lines
        assert torch.equal(there.x.cpu(), here.x)
    return list(zip(*both, strict=True))


def _on_a_device(simulation: Simulation) -> None:
    """What is as large as the model lies there; what is counted with does not."""
    device = simulation.place.device
    states = {name: value for name, value in simulation.replica.state.items() if value.is_floating_point()}
    assert {value.device for value in states.values()} == {device}
    assert simulation.replica.state["version"].device == CPU
    for store in simulation.stores:
        kept = store.get(store.known[:1])
        assert {value.device for value in kept.values()} <= {device}
        assert store.known.device == CPU
    assert {p.device for p in simulation.trainer.model.parameters()} == {device}


@pytest.mark.parametrize("reproducible", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_there_with_the_cpus_bits(
    name: str, reproducible: bool, device: torch.device
) -> None:
    path = CONFIGS / "methods" / f"{name}.yaml"
    values = config.load(path, [*FEW, f"reproducible={str(reproducible).lower()}"])
    for there, _ in pair(values, device):
        _on_a_device(there.simulation)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aggregator", "data_parallel"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_there_otherwise(name: str, kind: str, device: torch.device) -> None:
    path = CONFIGS / "methods" / f"{name}.yaml"
    how = ["topology=aggregator"] if kind == "aggregator" else ["mode=data_parallel", "cohort=null"]
    few = FEW if kind == "aggregator" else ["rounds=2", "clients=0", "evaluate_every=2", "local.steps=1"]
    try:
        values = config.load(path, [*few, *how])
    except ConfigError as error:  # prune's own server, say, has no data-parallel form
        pytest.skip(f"no such run of this configuration: {error}")
    pair(values, device)


@pytest.mark.parametrize("name", MIXED)
def test_other_runs_there(name: str, device: torch.device) -> None:
    values = config.parse({**SMALL, "rounds": 2, "evaluate_every": 2, **MIXED[name]})
    pair(values, device)


def test_steps_wait_for_nothing(device: torch.device) -> None:
    """The host asks once a chunk of clients, whatever these do: a batch is on its way while the one before is
    computed."""

    def waits(steps: int) -> int:
        values = {**SMALL, "local": {"lr": 0.1, "steps": steps, "batch": 20}, "device": str(device)}
        played = Played(config.parse(values), solo())
        assert played.seen.longest < played.x.nbytes / 10
        return played.seen.waited

    assert waits(2) == waits(7)


def _with_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.pretend, "mem_get_info", lambda device: (free, free), raising=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("store", ["memory", "mmap"])
def test_what_does_not_fit_there_comes_from_the_host(
    store: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples by the batch, clients' states by the chunk."""
    _with_memory(monkeypatch, 40_000)  # of which data and states may take a fourth
    method = {"name": "topk", "ratio": 0.1, "feedback": True}
    values = config.parse({**SMALL, "rounds": 2, "method": method, "store": store})
    there, here = (Played(values.model_copy(update={"device": str(p)}), solo()) for p in (device, CPU))
    assert there.simulation.clients.on_host
    assert there.simulation.memory.startswith("client state needs")
    assert there.lines == here.lines
    assert torch.equal(there.x.cpu(), here.x)
    assert not there.seen.mixed
    assert {v.device for v in there.simulation.clients.get(torch.tensor([0, 1])).values()} == {device}
    _with_memory(monkeypatch, 1 << 30)
    roomy = Simulation(values.model_copy(update={"device": str(device)}), solo())
    assert roomy.clients.on_host == (store == "mmap")


def test_too_little_memory_is_said_before_the_run(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_memory(monkeypatch, 10_000)
    sentence = (
        r"device: training 650 numbers takes at least 15.6 kB of pretend:0's memory, 5 kB are free for each"
    )

    def main(comm: Comm) -> None:
        run(config.parse({**SMALL, "device": "pretend"}), comm)

    with pytest.raises(ConfigError, match=sentence):
        run_ranks(2, main, timeout=30)


def test_out_of_memory_on_one_rank_ends_all_with_a_sentence(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer.train

    def full(self: Trainer, x_X: Tensor, data: Any, partition: Any, clients_C: Tensor, *rest: Any) -> Any:
        if 5 in clients_C:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train(self, x_X, data, partition, clients_C, *rest)

    monkeypatch.setattr(Trainer, "train", full)
    values = config.parse({**SMALL, "cohort": None, "device": "pretend", "on_bad_update": "reject"})
    with pytest.raises(FedMPIError) as caught:
        run_ranks(2, lambda comm: run(values, comm), timeout=30)
    said = str(caught.value)
    assert "device: pretend:0 ran out of memory while training in round 0" in said
    assert "Tried to allocate 2.00 GiB; ways out: a smaller local.batch" in said


def test_a_tensor_made_without_its_device_is_noticed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    direction = Rule.direction

    def forgets(self: Rule, memory: Any, grad: Tensor, *rest: Any) -> Tensor:
        return direction(self, memory, grad, *rest) + torch.zeros(len(grad))

    monkeypatch.setattr(Rule, "direction", forgets)
    local = {"lr": 0.1, "steps": 2, "batch": 20, "momentum": 0.9}
    with pytest.raises((AssertionError, RuntimeError), match="at least two devices"):
        pair(config.parse({**SMALL, "rounds": 1, "local": local}), device, ranks=1)


def test_train_on_the_command_line(device: torch.device, tmp_path: Path) -> None:
    hashes = []
    for place in ("cpu", "pretend"):
        out = tmp_path / place
        command = ["train", str(CONFIGS / "quickstart.yaml"), *FEW, f"device={place}", "--out", str(out)]
        assert main([*command, "--quiet", "--local-ranks", "2", "--profile"]) == 0
        hashes.append((out / "model.safetensors").read_bytes())
        assert set(json.loads((out / "profile.json").read_text())["seconds"][0]) == set(PHASES)
    assert hashes[0] == hashes[1]


SAVED = {
    "topk": {"method": {"name": "topk", "ratio": 0.1, "feedback": True}},
    "lookback, at an aggregator": {
        "method": {"name": "lookback", "threshold": 0.5},
        "topology": "aggregator",
    },
    "k-varying subspaces, momentum": {
        "method": {"name": "intrinsic", "dim": 16, "schedule": "k_varying", "subspaces": 2},
        "server": {"optimizer": "momentum"},
    },
    "data-parallel look-back": {**MIXED["data-parallel training"], "rounds": 4},
    "parts and what clients keep": {**MIXED["parts that are clients' own"], "rounds": 4},
}


@pytest.mark.parametrize("name", SAVED)
def test_a_run_goes_on_on_the_other_device(
    name: str, device: torch.device, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {**SMALL, "rounds": 4, "evaluate_every": 4, **SAVED[name]}
    values["checkpoint"] = {"rounds": 2, "minutes": None}

    def trained(place: str, rounds: int, out: Path, resume: bool = False) -> None:
        parsed = config.parse({**values, "device": place, "rounds": rounds})
        run_ranks(2, lambda comm: run(parsed, comm, out, resume=resume), timeout=60)

    trained("cpu", 4, tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for first, then in (("cpu", "pretend"), ("pretend", "cpu")):
        out = tmp_path / first
        trained(first, 2, out)
        capfd.readouterr()
        (out / "summary.json").unlink(missing_ok=True)  # as if it had been interrupted
        trained(then, 4, out, resume=True)
        assert f"written on {first}, this is {then}: products of matrices" in capfd.readouterr().err
        assert (out / "model.safetensors").read_bytes() == expected
        manifest = json.loads((out / "checkpoints" / "round-00000004" / "manifest.json").read_text())
        assert manifest["manifest"]["device"] == then


class Fake(Comm):
    """A rank of some on a machine."""

    def __init__(self, local_rank: int, device: str = "cpu") -> None:
        self.local_rank, self.device = local_rank, torch.device(device)

    _sum = _allgather_rows = _alltoall_rows = _alltoall = _broadcast = _gather = _allgather = abort = None  # type: ignore[assignment]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets this process see so many."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return see


def test_a_ranks_device(gpus: Callable[[int], None]) -> None:
    gpus(2)
    for wish in ("auto", "cuda"):
        assert [str(placement.own_device(wish, Fake(rank))) for rank in range(3)] == [
            "cuda:0",
            "cuda:1",
            "cuda:0",
        ]
    assert str(placement.own_device("cuda:1", Fake(0))) == "cuda:1"
    assert str(placement.own_device("auto", Fake(0, "cuda:1"))) == "cuda:1", "NCCL's"
    assert placement.own_device("cpu", Fake(1)) == CPU
    gpus(0)
    assert placement.own_device("auto", Fake(0)) == CPU


@pytest.mark.parametrize("wish", ["cuda", "cuda:0", "cuda:5", "meta", "nonsense", "pretend:1"])
def test_a_device_that_is_not_there(wish: str, device: torch.device) -> None:
    with pytest.raises(ConfigError, match=rf"device: expected auto, cpu, cuda or cuda:N.* got {wish}; torch"):
        Simulation(config.parse({**SMALL, "device": wish}), solo())


@pytest.mark.parametrize("wish", ["", "GPU 1", "cuda:", "cuda:-1"])
def test_a_device_that_cannot_be_read(wish: str) -> None:
    with pytest.raises(ConfigError, match="device: "):
        config.parse({**SMALL, "device": wish})


def test_the_same_bits_again_or_a_sentence(device: torch.device) -> None:
    """Kernels of an accelerator may add up in any order: torch is asked for those that do not."""
    asked = []

    def look() -> None:
        asked.append(torch.are_deterministic_algorithms_enabled())

    with devices.repeatable(device, True):
        look()
        with devices.repeatable(device, True):
            look()
        look()
    with devices.repeatable(device, False), devices.repeatable(CPU, True):
        look()
    assert asked == [True, True, True, False]
    error = RuntimeError("put_ does not have a deterministic implementation, but you set")
    with (
        pytest.raises(
            ConfigError, match="reproducible: torch has no form of put_ that gives the same bits again"
        ),
        devices.explained(device, "training"),
    ):
        raise error
    with pytest.raises(RuntimeError, match="put_"), devices.explained(CPU, "training"):
        raise error


@pytest.mark.slow
def test_the_script_for_a_gpu(tmp_path: Path) -> None:
    """Its phases on the CPU: that it runs, not what it measures."""
    script, out = str(CONFIGS.parent / "launch" / "gpu-check.sh"), tmp_path / "found.json"
    phases = ["facts", "train", "hook", "ranks"]
    command = ["bash", script, "--device", "cpu", "--small", "--out", str(out), *phases]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["phase"] for line in found} == set(phases)
    assert all(line["right"] for line in found)
    without = ["bash", script, "--device", "cuda", "facts"]
    if not torch.cuda.is_available():
        done = subprocess.run(
            without, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "--device: expected one that is here, got cuda" in done.stderr
