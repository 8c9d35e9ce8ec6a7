"""Compiles every Triton kernel for GPUs that are not here, and says what each takes, a JSON line each:

    python tests/jobs/triton_aot.py 80 90

The interpreter runs kernels that no GPU can be given; and only a compiled one shows whether its registers suffice.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedmpi.ops.triton.base import OPTIONS

# Of each kernel: its arguments' types, and those of its constants that callers give it.
BITS = {"BYTES": 256}
KERNELS: dict[str, list[tuple[str, str, dict[str, int], int]]] = {
    "bits": [
        ("pack_kernel", "*u8 *u8 i32 i32 i32", BITS, 4),
        ("pack_signs_kernel", "*fp32 *i64 *u8 *u8 i32 i32 i32", BITS, 4),
        *(
            ("pack_votes_kernel", f"*{votes} i64 *u8 i32 i32", BITS, 4)
            for votes in ("i8", "i16", "i32", "fp32")
        ),
        ("unpack_kernel", "*u8 *fp32 *fp32 *fp32 i32 i32 i32", BITS, 4),
        ("unpack_kernel", "*u8 *i8 *i8 *i8 i32 i32 i32", BITS, 4),
        ("majority_kernel", "*u8 *u8 *u8 i32 i32", BITS, 4),
        ("vote_of_two_kernel", "*u8 i64 i32 *u8 i32", BITS, 4),
        ("empty_rows_kernel", "*fp32 *i64 *u8 i32 i32", {"ROW": 1024}, 4),
        ("clear_rows_kernel", "*u8 *i64 *fp32 i32 i32", {"ROW": 1024}, 4),
        ("clear_rows_kernel", "*u8 *i64 *i8 i32 i32", {"ROW": 1024}, 4),
        ("pack_integers_kernel", "*i64 *u8 i32 i32 i32", BITS, 4),
        ("unpack_integers_kernel", "*u8 *i64 i32 i32 i32", {"COUNT": 1024}, 4),
    ],
    "hadamard": [  # whole rows, tiles of longer ones, and sweeps over those
        (
            "stages_kernel",
            "*fp32 *fp32 i32 i32",
            {"ROWS": 1 << log2, "LANES": 1 << lanes, "LOG": log2},
            max(1, 1 << (log2 + lanes) >> 9),
        )
        for log2, lanes in ((5, 0), (9, 0), (12, 0), (13, 0), (14, 0), (1, 5), (5, 5), (7, 5), (8, 5))
    ],
    "select": [
        *(
            ("count_kernel", "*i32 *i32 *i32 i32", {"SHIFT": shift, "WIDTH": width, "BLOCK": 4096}, 4)
            for shift, width in ((20, 11), (10, 10), (0, 10))
        ),
        ("above_kernel", "*i32 *i32 *i32 *i32 i32", {"BLOCK": 4096}, 4),
        ("list_kernel", "*i32 *i32 *i64 *i64 *i64 *i64 i32", {"BLOCK": 4096}, 8),
    ],
    "sums": [
        ("dots_kernel", "*fp32 *fp32 *fp64 i32 i32", {"LOG": 10}, 4),
        ("absolute_kernel", "*fp32 *fp64 i32", {"LOG": 10}, 4),
        ("add_fixed_kernel", "*i64 *fp32 *fp64 *fp64 *fp64 *u8 i32", {"BLOCK": 1024}, 4),
    ],
    "counters": [
        ("spread_kernel", "*fp32 i64 *i64 *i64 *fp32 i32 i32", {"ROUNDS": 6, "CHUNK": 1024}, 4),
        ("weigh_kernel", "*fp32 i64 *i64 *i64 *i64 i32 i32", {"ROUNDS": 6, "CHUNK": 1024}, 4),
        ("flip_kernel", "*fp32 i64 fp32 *fp32 i32 i32", {"CHUNK": 1024}, 4),
        ("hashed_lift_kernel", "*fp32 i64 i64 fp32 *fp32 i32 i32", {"CHUNK": 1024}, 4),
        ("hashed_sign_kernel", "*fp32 i64 i64 *fp32 *i64 i32 i32", {"CHUNK": 1024}, 4),
    ],
}


def used(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a binary."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def compiled(module: str, name: str, types: str, constants: dict[str, int], warps: int, target: int) -> Any:
    kernel = getattr(import_module(f"fedmpi.ops.triton.{module}"), name)
    names = [a for a in kernel.arg_names if a not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    places = {a: (kernel.arg_names.index(a),) for a in kernel.arg_names}
    # As a launch finds them: tensors begin at multiples of 16 bytes.
    attributes = {places[a]: [["tt.divisibility", 16]] for a in names if signature[a].startswith("*")}
    source = ASTSource(
        kernel, signature, constexprs={places[a]: v for a, v in constants.items()}, attrs=attributes
    )
    options = {"num_warps": warps, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def main() -> None:
    for target in map(int, sys.argv[1:]):
        for module, kernels in KERNELS.items():
            for name, types, constants, warps in kernels:
                made = compiled(module, name, types, constants, warps, target)
                line = {"kernel": f"{module}.{name}", "types": types, **constants, "sm": target}
                line |= {"bytes": len(made.asm["cubin"]), **used(made.asm["cubin"])}
                line |= {
                    "fused": len(re.findall(r"\bfma\.", made.asm["ptx"])),
                    "flushed": made.asm["ptx"].count(".ftz"),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
