"""One phase of launch/gpu-check.sh, as JSON lines:

    python tests/jobs/gpu_check.py facts|tests|train|kernels|hook|ranks|rounds [--device cuda] [--small]

facts    what this machine is
tests    pytest -m gpu: messages of every method with the CPU's bits, runs, DDP
train    configs/quickstart.yaml and ResNet-9 on the device and on the CPU: clients a second, how far parameters differ
kernels  each kernel against a copy on the device of as many floats (2^27), and its bits against the CPU's
hook     a step of DistributedDataParallel on one rank: no hook, torch's bf16 hook, each method (nothing is sent, and
         nothing coded)
ranks    the same of two ranks that share the device, over Gloo under torchrun, and over MPI where mpiexec is here
         (NCCL refuses two ranks on one GPU: collectives between GPUs stay unproven)
rounds   fedmpi bench rounds there

A phase exits with 1 when something was not as it must be; times have no bounds here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
METHODS: tuple[Any, ...] = (
    *("none", "torch's bf16", "bf16", {"name": "signsgd", "feedback": True}),
    *({"name": "topk", "ratio": 0.01, "feedback": True}, {"name": "qsgd", "bits": 4}),
    *(
        {"name": "powersgd", "rank": 4, "feedback": True},
        {"name": "intrinsic", "dim": 4096, "matrix": "hashed"},
    ),
)


class Phase:
    """Attributes:
    wrong: something was not as it must be.
    """

    def __init__(self, name: str, device: torch.device, small: bool) -> None:
        self.name, self.device, self.small, self.wrong = name, device, small, False

    def say(self, what: str, right: bool = True, **values: Any) -> None:
        self.wrong |= not right
        print(json.dumps({"phase": self.name, "what": what, "right": right, **values}), flush=True)

    def ms(self, step: Callable[[], Any], times: int = 7) -> float:
        """The median of a few, after one that is not counted."""
        seconds = []
        for _ in range(times + 1):
            self.settle()
            started = time.perf_counter()
            step()
            self.settle()
            seconds.append(time.perf_counter() - started)
        return sorted(seconds[1:])[times // 2] * 1e3

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def facts(phase: Phase) -> None:
    there = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": str(phase.device)}
    if phase.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(phase.device)
        there |= {"name": torch.cuda.get_device_name(phase.device), "nccl": str(torch.cuda.nccl.version())}
        there |= {"free_GB": f"{free / 1e9:.1f}", "memory_GB": f"{whole / 1e9:.1f}"}
    phase.say("machine", **there)


def tests(phase: Phase) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    phase.say("pytest -m gpu", done.returncode == 0, result=lines[-1] if lines else "", failed=failed)


def train(phase: Phase) -> None:
    """Products of matrices have other last bits on a GPU (and TF32's in convolutions), so parameters are near."""
    from fedmpi import config
    from fedmpi.comm import solo
    from fedmpi.engine.rounds import Simulation

    larger = "cnn" if phase.small else "resnet9"
    of_pictures = [f"model={{name: {larger}}}", "data={name: tests.jobs.gpu_check:pictures}", "cohort=8"]
    for name, changes, rounds in (("quickstart", [], 5 if phase.small else 20), (larger, of_pictures, 1)):
        changes = [*changes, f"rounds={rounds + 1}", f"evaluate_every={rounds + 1}"]
        found, rates = [], []
        for place in (str(phase.device), "cpu"):
            settings = config.load(ROOT / "configs" / "quickstart.yaml", [*changes, f"device={place}"])
            run = Simulation(settings, solo())
            run.round(0)  # does what is done once
            phase.settle()
            started = time.perf_counter()
            lines = [run.round(t) for t in range(1, rounds + 1)]
            phase.settle()
            rates.append(sum(line["clients"] for line in lines) / (time.perf_counter() - started))
            found.append((run.replica.parameters().cpu().double(), lines[-1]["accuracy"]))
        (there, accuracy), (here, expected) = found
        far = float((there - here).norm() / here.norm())
        rate = {"clients_per_s": round(rates[0], 1), "on_cpu": round(rates[1], 1)}
        phase.say(name, far < 0.02, distance=far, accuracy=accuracy, accuracy_on_cpu=expected, **rate)


def pictures(folder: Path) -> Any:
    """Random ones, of the size of CIFAR's."""
    from fedmpi.tasks.data import Data, Split

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1312, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (1312,), generator=generator)
    return Data("pictures", Split(x[:1280], y[:1280]), Split(x[1280:], y[1280:]), 10)


def kernels(phase: Phase) -> None:
    from fedmpi import random
    from fedmpi.ops import bits, hadamard, select, subspace, sums

    size = 1 << (20 if phase.small else 27)
    host_1D = random.normal(random.key(0, stream="bench"), 1 << 20).repeat(size >> 20)[None]
    there_1D = host_1D.to(phase.device)
    other_1D = torch.empty_like(there_1D)
    copy = phase.ms(lambda: other_1D.copy_(there_1D))
    phase.say("copy", ms=round(copy, 3), GBs=round(8 * size / copy / 1e6, 1))
    keys = random.keys(0, 0, torch.zeros(1, dtype=torch.int64), "bench")
    packed = bits.pack_signs(host_1D, keys)

    def projected(kind: str, x_1D: Tensor) -> Tensor:
        found: Tensor = getattr(subspace, kind)(x_1D.shape[1], 1 << 12, 7).project(x_1D)
        return found

    table: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "sign pack": (lambda x: bits.pack_signs(x, keys.to(x.device)), host_1D),
        "sign unpack": (lambda x: bits.unpack_signs(x, 8 * x.shape[1]), packed),
        "top 0.1 %": (lambda x: select.top_k(x, x.shape[1] // 1000), host_1D),
        "FWHT": (hadamard.fwht, host_1D),
        "FWHT, rows of 2^14": (lambda x: hadamard.fwht(x.view(-1, 1 << 14)), host_1D),
        "dots": (lambda x: sums.dots(x, x), host_1D),
        "Fastfood project": (partial(projected, "Fastfood"), host_1D),
        "hashed project": (partial(projected, "Hashed"), host_1D),
    }
    for name, (kernel, x) in table.items():
        try:
            part = x[:, : 1 << 18]
            same = torch.equal(kernel(part.to(phase.device)).cpu(), kernel(part))
            on_device = x.to(phase.device)
            took = phase.ms(lambda kernel=kernel, x=on_device: kernel(x), 3)
            phase.say(name, same, ratio_to_copy=round(took / copy, 2), cpus_bits=same)
        except Exception as error:  # one that fails does not hide the others
            phase.say(name, False, error=f"{type(error).__name__}: {error}"[:300])


def network(small: bool) -> tuple[nn.Module, Callable[[nn.Module, torch.device], Tensor], str]:
    """A model, its loss on a batch, and what it is."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        width = 256 if small else 4096
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

        def loss(net: nn.Module, device: torch.device) -> Tensor:
            output: Tensor = net(torch.randn(64, width, device=device))
            return output.square().mean()

        return model, loss, f"perceptron of width {width}"
    settings = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=512) if small else GPT2Config()
    shape = (2, 64) if small else (8, 1024)

    def of_tokens(net: nn.Module, device: torch.device) -> Tensor:
        x = torch.randint(0, settings.vocab_size, shape, device=device)
        value: Tensor = net(input_ids=x, labels=x).loss
        return value

    return GPT2LMHeadModel(settings), of_tokens, f"GPT-2 from a configuration, batch {shape}"


def hook(phase: Phase) -> None:
    backend = "nccl" if phase.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        steps(phase, backend, "group", 9)
        dist.destroy_process_group()


def steps(phase: Phase, backend: str, comm: str, times: int) -> None:
    """Each method's step of this rank; rank 0 tells. Parameters stay finite, and the same on all ranks."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    import fedmpi

    rank, plain = dist.get_rank(), None
    for method in METHODS:
        if method == "torch's bf16" and backend != "nccl":  # which it wants
            continue
        torch.manual_seed(0)
        model, loss, what = network(phase.small)
        ddp = DistributedDataParallel(model.to(phase.device))
        state = None
        if method == "torch's bf16":
            ddp.register_comm_hook(None, bf16_compress_hook)
        elif method != "none":
            state = fedmpi.ddp.attach(ddp, method, comm=comm)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        torch.manual_seed(rank)

        def step(ddp: Any = ddp, loss: Any = loss, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(phase.device.type, torch.bfloat16):
                value = loss(ddp, phase.device)
            value.backward()
            optimizer.step()

        try:
            took = phase.ms(step, 3 if phase.small else times)
            plain = plain or took
            last = [p.detach().flatten()[:1000].cpu() for p in model.parameters()]
            everybody: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, hashlib.sha256(torch.cat(last).numpy().tobytes()).hexdigest())
            right = all(bool(p.isfinite().all()) for p in last) and len(set(everybody)) == 1
            found = {"ms": round(took, 1), "to_none": round(took / plain, 2)}
            if state is not None:
                stats = state.stats()
                found |= {what: stats[what] for what in ("steps", "payload_bytes", "wire_sent_bytes")}
            if rank == 0:
                phase.say(str(method), right, model=what, ranks=len(everybody), comm=comm, **found)
        except Exception as error:
            phase.say(str(method), False, error=f"{type(error).__name__}: {error}"[:300])
        del ddp, model, optimizer, state, step


def ranks(phase: Phase) -> None:
    rest = [str(Path(__file__)), "pair", "--device", phase.device.type, *(["--small"] if phase.small else [])]
    launches = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    }
    if shutil.which("mpiexec"):
        launches["mpiexec"] = ["mpiexec", "-n", "2", sys.executable]
    for name, launch in launches.items():
        done = subprocess.run([*launch, *rest], cwd=ROOT, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            told = json.loads(line)
            del told["phase"]
            phase.say(f"{told.pop('what')} under {name}", told.pop("right"), **told)
        if done.returncode or not lines:
            phase.say(name, False, exit=done.returncode, error=done.stderr[-600:])


def pair(phase: Phase) -> None:
    """A rank of two: torchrun's or MPI's."""
    import fedmpi

    fedmpi.ddp.init_process_group("gloo")
    steps(phase, "gloo", "group" if "TORCHELASTIC_RUN_ID" in os.environ else "mpi", 3)


def rounds(phase: Phase) -> None:
    from fedmpi.bench import rounds as bench

    table = bench.run(1 if phase.small else 5, str(phase.device))
    for row in table.rows:
        phase.say(row.name, ms=round(1e3 * row.seconds.median, 2), ratio=round(row.ratio.median, 3))


PHASES = {row.__name__: row for row in (facts, tests, train, kernels, hook, ranks, pair, rounds)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "pretend":
        from tests import pretend

        device = pretend.load()
    else:
        device = torch.device(arguments.device)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                print(f"gpu_check: --device: expected one that is here, got {device}", file=sys.stderr)
                return 1
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
    phase = Phase(arguments.phase, device, arguments.small)
    PHASES[arguments.phase](phase)
    sys.stdout.flush()
    return int(phase.wrong)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
