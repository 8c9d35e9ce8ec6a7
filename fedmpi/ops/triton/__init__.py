"""Kernels for CUDA written in Triton, beside the torch references in ``fedmpi.ops`` and with the names of
``fedmpi.ops.compiled``; imported through ``ops.fast`` only.

They are held to their references bit by bit in Triton's interpreter, and compiled ahead of time for sm_80 and sm_90
(tests/test_triton.py); they have not been run on a GPU yet. Nothing here asks the device anything.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def problem() -> str:
    """Why no kernel can be compiled, launched and be right here; "" where one was. Triton needs a C compiler, and a GPU
    that it knows. Tried once; a warning says it, too."""
    if not torch.cuda.is_available():
        return ""  # nobody has a tensor to give one
    from fedmpi.ops.triton import bits

    try:
        packed_11 = torch.empty(1, 1, dtype=torch.uint8, device="cuda")
        bits.pack(torch.ones(1, 8, dtype=torch.bool, device="cuda"), packed_11)
        why = "" if int(packed_11) == 255 else "a kernel came to another result than its reference"
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
    if why:
        warnings.warn(f"fedmpi: Triton's kernels do not work here, torch stands in: {why}", stacklevel=2)
    return why
