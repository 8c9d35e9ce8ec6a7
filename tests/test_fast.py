"""The gate to compiled kernels: when they are used, in how many threads, and what they keep."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from fedmpi.ops import fast

from .kernels import smallest

pytest.importorskip("numba")


def test_numba_comes_with_the_first_large_tensor_and_sympy_never() -> None:
    """What takes a second of every process that starts: a run of a small model does without either."""
    code = (
        "import sys, torch, fedmpi.cli, fedmpi.engine.rounds; from fedmpi.tasks import models; "
        "from fedmpi.ops import fast; from fedmpi.ops.hadamard import fwht; few = torch.zeros(fast.SMALLEST - 1); "
        "models.build('cnn', (1, 28, 28), 10, 1); assert 'sympy' not in sys.modules; "
        "assert fast.compiled('hadamard', few) is None; fwht(torch.ones(1 << 12)); assert 'numba' not in sys.modules; "
        "fwht(torch.ones(1 << 17)); assert 'numba' in sys.modules; "
        "assert fast.compiled('hadamard', torch.zeros(fast.SMALLEST)) is not None; "
        "assert fast.compiled('hadamard', few) is not None, 'they are there now'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_torch_does_it() -> None:
    code = (
        "import sys, torch; sys.modules['numba'] = None; from fedmpi.ops import fast, hadamard; "
        "x = torch.ones(1 << 17); assert fast.compiled('hadamard', x) is None; assert hadamard.fwht(x)[0] == 1 << 17"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kernel_that_cannot_be_cached_works_all_the_same() -> None:
    """As in an installation, a home and a temporary folder that are all read-only: numba finds no place."""
    from fedmpi.ops.compiled.base import kernel

    names: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", names)
    assert kernel(names["twice"])(3) == 6


def test_small_or_differentiable_tensors_stay_with_torch() -> None:
    assert fast.compiled("hadamard", torch.zeros(fast.SMALLEST, requires_grad=True)) is None
    assert fast.compiled("hadamard", torch.zeros(fast.SMALLEST, device="meta")) is None
    assert fast.compiled("hadamard", torch.zeros(fast.SMALLEST)) is not None


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_run_does_every_item_once(threads: int, count: int) -> None:
    done = torch.zeros(count, dtype=torch.int64)

    def kernel(first: int, last: int, by: int) -> None:
        done[first:last] += by

    with smallest(0, threads):
        fast.run(kernel, count, 3)
    assert (done == 3).all()


def test_an_error_in_any_thread_arrives() -> None:
    def kernel(first: int, last: int) -> None:
        if last == 100:
            raise ValueError("the last piece")

    with smallest(0, 3), pytest.raises(ValueError, match="the last piece"):
        fast.run(kernel, 100)


def test_scratch_is_kept_for_its_thread_name_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmpi.comm import run_ranks

    cpu = torch.device("cpu")
    first = fast.scratch("a", 2, 50, cpu)
    assert first.shape == (2, 50)
    assert fast.scratch("a", 3, 20, cpu).data_ptr() == first.data_ptr()
    assert fast.scratch("b", 2, 50, cpu).data_ptr() != first.data_ptr()
    buffers = run_ranks(3, lambda comm: fast.scratch("a", 2, 50, cpu))  # held, so that no place is used twice
    assert len({buffer.data_ptr() for buffer in buffers}) == 3
    assert fast.scratch("a", 2, 51, cpu).shape == (2, 51)
    monkeypatch.setattr(fast, "KEPT", 400)
    kept, lost = fast.scratch("c", 10, 10, cpu), fast.scratch("d", 1, 101, cpu)
    assert fast.scratch("c", 10, 10, cpu).data_ptr() == kept.data_ptr()
    assert fast.scratch("d", 1, 101, cpu).data_ptr() != lost.data_ptr()
