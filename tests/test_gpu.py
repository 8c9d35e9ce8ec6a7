"""On a real GPU, where there is one: what test_device.py and rounds_on_a_device.py hold on a make-believe one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmpi import config, random
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.message import equal
from fedmpi.ops import bits, hadamard, select, subspace, sums

from . import test_device
from .conftest import SMALL
from .kernels import by_torch, same
from .rounds_on_a_device import CONFIGS, FEW, METHODS, MIXED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("name", test_device.CASES)
def test_messages_have_the_cpus_bits(name: str) -> None:
    """Up to the last bits of products of matrices, where a method takes them. From the same gradients: the first
    message, before what either end keeps can differ."""
    (there, _), (here, _) = (
        test_device.played(name, place, 1) for place in (torch.device("cuda", 0), torch.device("cpu"))
    )
    products = name.partition(" ")[0] in ("atomo", "powersgd") or any(
        p in name for p in ("atomo", "powersgd")
    )
    for (message, x), (expected, y) in zip(there, here, strict=True):
        if products:
            torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4)
        else:
            assert equal(message, expected)
            assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("size", [1 << 16, 100_003, 1 << 20])
def test_kernels_have_the_references_bits(size: int) -> None:
    """Triton's where it is there, against torch on the CPU."""
    key, n = random.key(1, client=size), 1 << (size - 1).bit_length()
    x, y = (random.normal(random.key(key, stream=s), 2 * size).view(2, size) for s in "xy")
    x[:, ::7] = 0
    keys_C, starts_R = random.keys(1, 0, torch.arange(2), "coins"), torch.tensor([0, 5, 5000, size])
    packed = bits.pack_signs_reference(x, keys_C)
    rows_WB = random.bits(key, 5 * 2048).view(torch.uint8)[: 5 * 9001].view(5, 9001)
    values = random.bits(key, size)[None] & ((1 << 23) - 1)
    integers = bits.pack_integers_reference(values, 23)
    hashed, fastfood = (subspace.MATRICES[kind](size, 300, key, 0.3) for kind in ("hashed", "fastfood"))
    table: dict[str, Callable[..., Tensor]] = {
        "pack": lambda d: bits.pack((x > 0).to(d)),
        "pack signs": lambda d: bits.pack_signs(x.to(d), keys_C),
        "unpack": lambda d: bits.unpack(packed.to(d), size),
        "unpack signs": lambda d: bits.unpack_signs(packed.to(d), size, y[:, 0].contiguous().to(d)),
        "empty rows": lambda d: bits.empty_rows(x.to(d), starts_R.to(d)),
        "vote of two": lambda d: bits.vote(rows_WB[:2].to(d), key, 64),
        "vote of four": lambda d: bits.vote(rows_WB[:4].to(d), key, 64),
        "integers": lambda d: bits.pack_integers(values.to(d), 23),
        "integers again": lambda d: bits.unpack_integers(integers.to(d), size, 23),
        "few": lambda d: select.top_k(x.to(d), size // 1000),
        "many, of equals": lambda d: select.top_k((4 * x).round().to(d), size // 3),
        "FWHT": lambda d: hadamard.fwht(random.normal(key, n).to(d)),
        "FWHT of rows": lambda d: hadamard.fwht(random.normal(key, n).to(d).view(-1, 1 << 14)),
        "dots": lambda d: sums.dots(x.to(d), y.to(d)),
        "absolute": lambda d: sums.absolute(x.to(d)),
        "hashed": lambda d: hashed.lift(y[:, :300].contiguous().to(d)),
        "Fastfood": lambda d: fastfood.lift(y[:, :300].contiguous().to(d)),
    }
    wrong = [
        name
        for name, function in table.items()
        if not same(function("cuda").cpu(), by_torch(function, "cpu"))
    ]
    assert not wrong


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str) -> None:
    values = config.load(CONFIGS / "methods" / f"{name}.yaml", [*FEW, "device=cuda"])
    lines = run_ranks(2, lambda comm: Simulation(values, comm).round(0), timeout=120)
    assert lines[0]["loss"] == lines[1]["loss"] < 5


@pytest.mark.parametrize("name", MIXED)
def test_other_runs(name: str) -> None:
    values = config.parse({**SMALL, "rounds": 2, "evaluate_every": 2, **MIXED[name], "device": "cuda"})

    def main(comm: Comm) -> float:
        simulation = Simulation(values.for_ranks(comm.size), comm)
        return [simulation.round(t) for t in range(values.rounds)][-1]["test_loss"]

    assert all(loss < 20 for loss in run_ranks(2, main, timeout=120))


def test_mixed_precision() -> None:
    local = {"lr": 0.1, "steps": 2, "batch": 20, "precision": "bfloat16"}
    simulation = Simulation(
        config.parse({**SMALL, "model": {"name": "cnn"}, "local": local, "device": "cuda"}), solo()
    )
    assert simulation.round(0)["loss"] < 5
    assert simulation.replica.parameters().dtype == torch.float32


@pytest.mark.parametrize("method", ["topk", "signsgd", "intrinsic", "lookback", "fetchsgd"])
def test_reproducible_runs_repeat_themselves(method: str, tmp_path: Path) -> None:
    """At one rank and at two."""
    values = config.parse({**SMALL, "reproducible": True, "device": "cuda", "method": method})
    models = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        run_ranks(ranks, lambda comm, out=out: run(values, comm, out, quiet=True), timeout=120)
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]
