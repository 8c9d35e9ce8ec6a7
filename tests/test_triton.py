"""Triton's kernels without a GPU: which tensors they serve, their bits in the interpreter (with --full all of
test_kernels.py), and what a compiler makes of them. None of it has been run on a GPU.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedmpi import random
from fedmpi.ops import bits, fast, hadamard, select, sums

from .conftest import JOBS
from .kernels import by_kernel, normals, same, served_by

pytest.importorskip("triton", reason="no Triton here: launch/test.sh --full installs it")
NAMES = ("bits", "counters", "hadamard", "select", "sums")


def on_cuda(count: int = 1 << 20) -> Any:
    """What the gate looks at of a tensor there."""
    return SimpleNamespace(device=torch.device("cuda", 0), numel=lambda: count, requires_grad=False)


def test_one_table_says_which_kernels_serve_a_device() -> None:
    for name in NAMES:
        kernels = fast.compiled(name, on_cuda())
        assert kernels is not None
        assert kernels.__name__ == f"fedmpi.ops.triton.{name}"
    assert fast.compiled("lowrank", on_cuda()) is None, "torch's"
    assert fast.compiled("counters", on_cuda(), having="sketch_encode") is None
    assert fast.compiled("bits", torch.zeros(1 << 20, device="meta")) is None


def test_where_no_kernel_can_be_launched_torch_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU but without a C compiler; here, with neither."""
    from fedmpi.ops import triton as package

    if torch.cuda.is_available():
        pytest.skip("kernels can be launched here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cached in (package.problem, fast.lacking, fast._module):
        cached.cache_clear()
    with pytest.warns(UserWarning, match="Triton's kernels do not work here, torch stands in: "):
        assert fast.compiled("bits", on_cuda()) is None
    monkeypatch.undo()
    for cached in (package.problem, fast.lacking, fast._module):
        cached.cache_clear()
    assert fast.compiled("bits", on_cuda()) is not None


@pytest.mark.parametrize("name", NAMES)
def test_both_packages_have_the_same_functions(name: str) -> None:
    """With the same arguments, so that callers need not know whose they are."""
    pytest.importorskip("numba")
    numba, triton = (import_module(f"fedmpi.ops.{package}.{name}") for package in ("compiled", "triton"))
    public = {
        n: f
        for n, f in vars(triton).items()
        if inspect.isfunction(f) and f.__module__ == triton.__name__ and not n.startswith("_")
    }
    assert public
    others = {
        n
        for n, f in vars(numba).items()
        if callable(f) and not n.startswith("_") and getattr(f, "py_func", f).__module__ == numba.__name__
    } - public.keys()
    source = "".join(path.read_text() for path in Path(fast.__file__).parent.glob("*.py"))
    for n in others - {"reach", "fold"}:  # top-k's, and a part of another
        assert f'having="{n}"' in source, f"Triton has no {name}.{n}, and nobody asks whether it does"
    for n in public.keys() - {"top_k"}:  # numba's is given a threshold, by a sample
        assert list(inspect.signature(public[n]).parameters) == list(
            inspect.signature(getattr(numba, n)).parameters
        ), n


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py looks at them there")
def test_they_have_the_references_bits_in_the_interpreter() -> None:
    """A look at each module; test_kernels.py has the rest."""
    g = normals(1, 2, 700).round()
    g[:, ::7] *= float("inf")
    keys_C, odd_1 = random.keys(1, 0, torch.arange(2), "coins"), torch.zeros(1, dtype=torch.uint8)
    with served_by("triton"):
        packed = by_kernel(bits.pack_signs, g, keys_C, odd_1)
        assert same(packed, bits.pack_signs_reference(g, keys_C))
        assert odd_1
        assert same(by_kernel(bits.unpack_signs, packed, 700), bits.unpack_signs_reference(packed, 700))
        assert same(by_kernel(bits.vote, packed, -3, 64), bits.vote_reference(packed, -3, 64))
        x = normals(2, 2, 1 << 10)
        assert same(by_kernel(hadamard.fwht, x), hadamard.fwht_reference(x))
        for k in (1, 100, 1 << 10):
            assert same(
                by_kernel(select.top_k, x.mul(4).round(), k), select.top_k_reference(x.mul(4).round(), k)
            )
        assert same(by_kernel(sums.dots, x, x.flip(0)), sums.dots_reference(x, x.flip(0)))


def test_choosing_asks_the_device_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between the kernels of top-k, with tensors of the make-believe device."""
    from fedmpi.ops.triton import select as kernels

    from . import pretend

    for name in ("count_kernel", "above_kernel", "list_kernel"):
        monkeypatch.setattr(kernels, name, {(1,): lambda *_, **__: None})
    x = torch.zeros(2, 100, device=device)
    with pretend.watched() as seen:
        kernels.top_k(x, 5)
    assert not seen.mixed
    assert seen.waited == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", [80, 90])
def test_they_compile_for_gpus_without_spilling(target: int) -> None:
    """Ahead of time. Every kernel: no stack, no local memory, no product fused with a sum, no small number flushed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(JOBS / "triton_aot.py"), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    for line in made:
        assert (line["STACK"], line["LOCAL"], line["fused"], line["flushed"]) == (0, 0, 0, 0), line
    there = {
        f"{name}.{kernel}"
        for name in NAMES
        for kernel in vars(import_module(f"fedmpi.ops.triton.{name}"))
        if kernel.endswith("_kernel")
    }
    assert {line["kernel"] for line in made} == there
