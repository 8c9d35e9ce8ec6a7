"""The fast Walsh–Hadamard transform with vectors held in registers.

Butterflies are written in LLVM's vector instructions, since its optimiser cannot see that rows h apart never
overlap: 16 vectors of 16 numbers are loaded, taken through up to eight stages and stored. A block that
fits a core's cache goes through 16 stages in one sweep over memory; four more stages take a sweep each.
Every number passes its stages in the reference's order, so the bits are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.ops.compiled.base import kernel

SMALLEST = 256  # the shortest row
_LANES = 16
_BLOCK = 1 << 16  # 256 KiB
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)
_CHOICE = ir.VectorType(ir.IntType(32), _LANES)

Floats = NDArray[np.float32]


def _butterflies(rows: int, *, within: bool) -> Any:
    """stages(source, target, i, h): ``rows`` vectors that begin at i, i + h, …, through the stages that mix lanes
    (``within``: h = 1, 2, 4, 8 of the transform) and those that mix vectors."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(which: int, row: int) -> Any:
            array = context.make_array(signature.args[which])(context, builder, arguments[which])
            step = builder.mul(arguments[3], ir.Constant(ir.IntType(64), row))
            begin = builder.gep(array.data, [builder.add(arguments[2], step)])
            return builder.bitcast(begin, _VECTOR.as_pointer())

        v = [builder.load(place(0, row), align=4) for row in range(rows)]
        for half in (1, 2, 4, 8) if within else ():
            partner = ir.Constant(_CHOICE, [lane ^ half for lane in range(_LANES)])
            merge = ir.Constant(_CHOICE, [lane + _LANES * bool(lane & half) for lane in range(_LANES)])
            for row in range(rows):
                other = builder.shuffle_vector(v[row], v[row], partner)
                total, difference = builder.fadd(v[row], other), builder.fsub(other, v[row])
                v[row] = builder.shuffle_vector(total, difference, merge)
        half = 1
        while half < rows:
            for row in range(rows):
                if not row & half:
                    a, b = v[row], v[row + half]
                    v[row], v[row + half] = builder.fadd(a, b), builder.fsub(a, b)
            half *= 2
        for row in range(rows):
            builder.store(v[row], place(1, row), align=4)
        return context.get_dummy_value()

    @intrinsic
    def stages(typing: Any, source: Any, target: Any, i: Any, h: Any) -> Any:
        return types.void(source, target, i, h), emit

    return stages


_first_8 = _butterflies(16, within=True)
_next_4 = _butterflies(16, within=False)
_next_3 = _butterflies(8, within=False)
_next_2 = _butterflies(4, within=False)
_next_1 = _butterflies(2, within=False)


@kernel
def _sweep(first: int, last: int, x: Floats, h: int, rows: int) -> None:
    """Stages h to h · rows / 2, for the groups ``first`` to ``last`` of ``rows`` vectors."""
    group, across = first, h // _LANES
    while group < last:
        outer = group // across
        inner = group - outer * across
        run = min(across - inner, last - group)
        begin = outer * rows * h + inner * _LANES
        if rows == 16:
            for i in range(run):
                _next_4(x, x, begin + i * _LANES, h)
        elif rows == 8:
            for i in range(run):
                _next_3(x, x, begin + i * _LANES, h)
        elif rows == 4:
            for i in range(run):
                _next_2(x, x, begin + i * _LANES, h)
        else:
            for i in range(run):
                _next_1(x, x, begin + i * _LANES, h)
        group += run


@kernel
def _blocks(first: int, last: int, source: Floats, x: Floats, size: int) -> None:
    """All stages below ``size`` of blocks of so many numbers."""
    for block in range(first, last):
        for i in range(block * size, (block + 1) * size, _LANES * _LANES):
            _first_8(source, x, i, _LANES)
        h = _LANES * _LANES
        while h < size:
            rows = min(16, size // h)
            groups = size // (rows * _LANES)
            _sweep(block * groups, (block + 1) * groups, x, h, rows)
            h *= rows


def fwht(source: Tensor, target: Tensor) -> None:
    """``target`` = H ``source`` over the last axis, whose length is a power of two from 256 on. Both contiguous
    float32; they may be the same tensor."""
    n, x = target.shape[-1], target.view(-1).numpy()
    size = min(n, _BLOCK)
    fast.run(_blocks, len(x) // size, source.view(-1).numpy(), x, size)
    h = size
    while h < n:
        rows = min(16, n // h)
        fast.run(_sweep, len(x) // (rows * _LANES), x, h, rows)
        h *= rows
