"""``fedmpi bench kernels``: each kernel of ``fedmpi.ops`` against copying the vector that it works on.

Shape suffixes: D numbers of the vector, d of a subspace, B packed bytes, W voters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.bench.timing import Table, Work, measure, named, place
from fedmpi.errors import ConfigError
from fedmpi.ops import bits, fast
from fedmpi.ops.hadamard import fwht
from fedmpi.ops.select import top_k
from fedmpi.ops.sketch import CountSketch
from fedmpi.ops.subspace import Embedding, Fastfood, Hashed
from fedmpi.ops.sums import add_fixed, dots

_DIM = 1 << 16
_COPIES = 6  # of the vector that are in memory at a time, at most


class Case(NamedTuple):
    """``make(x, y)`` gives the work on a vector ``x`` (1, D); ``y`` is like it, to write into."""

    make: Callable[[Tensor, Tensor], Work]
    target: float | None = None


def _dim(x: Tensor) -> int:
    return min(_DIM, x.numel() >> 4)


def _project(kind: type[Embedding], x: Tensor, y: Tensor) -> Work:
    return partial(kind(x.numel(), _dim(x), 1).project, x)


def _lift(kind: type[Embedding], x: Tensor, y: Tensor) -> Work:
    return partial(kind(x.numel(), _dim(x), 1).lift, x[:, : _dim(x)].clone(), y)


def _packed(x: Tensor) -> Tensor:
    return bits.pack_signs(x, _key(x))


def _key(x: Tensor) -> Tensor:
    return random.keys(0, 0, torch.zeros(1, dtype=torch.int64, device=x.device), "bench")


def _vote(x: Tensor, y: Tensor) -> Work:
    packed_WB = _packed(x).view(8, -1)
    return partial(bits.majority, packed_WB, packed_WB[0])


def _unpack(x: Tensor, y: Tensor) -> Work:
    return partial(bits.unpack_signs, _packed(x), x.numel(), None, torch.empty_like(x, dtype=torch.int8))


def _sketch(x: Tensor) -> CountSketch:
    return CountSketch(x.numel(), 5, _dim(x), 1)


def _fixed(x: Tensor, y: Tensor) -> Work:
    return partial(add_fixed, torch.zeros(x.numel(), dtype=torch.int64, device=x.device), x[0], 0.3, 2.0**20)


CASES: dict[str, Case] = {
    "FWHT": Case(lambda x, y: partial(fwht, x, y), 15),
    "Fastfood project": Case(partial(_project, Fastfood), 40),
    "Fastfood lift": Case(partial(_lift, Fastfood), 40),
    "hashed project": Case(partial(_project, Hashed), 8),
    "hashed lift": Case(partial(_lift, Hashed), 8),
    "sign pack": Case(lambda x, y: partial(bits.pack_signs, x, _key(x)), 1),
    "sign unpack": Case(_unpack, 1),
    "top 0.1 %": Case(lambda x, y: partial(top_k, x, max(1, x.numel() // 1000)), 5),
    "vote of 8, D/8 signs each": Case(_vote),
    "look-back's dots": Case(lambda x, y: partial(dots, x, y)),
    "fixed-point sum": Case(_fixed),
    "Count-Sketch encode, 5 rows": Case(lambda x, y: partial(_sketch(x).encode, x)),
    "Count-Sketch estimate, 5 rows": Case(lambda x, y: partial(_sketch(x).estimate, _sketch(x).encode(x))),
}


def run(log2: int = 27, repeats: int = 5, device: str = "auto") -> Table:
    """Time every kernel on 2^log2 float32 numbers, on the GPU where there is one.

    Raises:
      ConfigError: no such device is here, or its memory would not do.
    """
    where = place(device)
    need = _COPIES * 4 << log2
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else there
    if need > there:
        raise ConfigError(
            f"--size: 2^{log2} numbers need {need >> 20} MiB of memory, there are {there >> 20}"
        )
    x = random.normal(random.key(0, stream="bench"), 1 << min(log2, 20), where)
    x = x.repeat(1, 1 << max(0, log2 - 20))
    y = torch.empty_like(x)
    rows = [
        measure(name, case.make(x, y), partial(y.copy_, x), case.target, repeats, where)
        for name, case in CASES.items()
    ]
    facts: dict[str, str | int] = {
        "numbers": f"2^{log2}",
        "device": named(where),
        "threads": torch.get_num_threads(),
        "kernels": "torch" if fast.compiled("hadamard", x) is None else "compiled",
        "memcpy": f"{8e-9 * x.numel() / rows[0].reference.median:.1f} GB/s",
        "repeats": repeats,
    }
    return Table("kernels", facts, "memcpy", rows)
