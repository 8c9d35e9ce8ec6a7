"""A make-believe accelerator, ``torch.device("pretend")``, for machines without one: see pretend.cpp.

What it proves: nothing mixes devices, how often the host waits, what crosses over. What it cannot: CUDA's arithmetic
(it computes with the CPU's kernels, to the CPU's bits) and more than one stream.

    with pretend.watched() as seen:
        step()
    assert not seen.mixed
    assert seen.waits == {"item": 1}
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("pretend.cpp")
_THREAD, _PROCESS = 0, 1


def missing() -> str:
    """Why it cannot be made here; "" where it can."""
    return "" if shutil.which(_compiler()) else f"no {_compiler()} to compile the make-believe device with"


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@lru_cache(maxsize=1)
def load() -> torch.device:
    """The device, compiled unless it was before, in this process from now on."""
    library = _built()
    torch.ops.load_library(str(library))
    _library().pretend_hooks()
    torch.utils.rename_privateuse1_backend("pretend")
    module = types.ModuleType("torch.pretend")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=0: torch.accelerator.synchronize(),
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=0: torch.get_rng_state(),
        set_rng_state=lambda state, device=0: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    torch._register_device_module("pretend", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device("pretend", 0)


def _built() -> Path:
    """The library, by its source and torch's version; several processes may want it at once."""
    of = _SOURCE.read_bytes() + f"{torch.__version__} {_compiler()}".encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmpi-pretend"
    library = cache / f"{hashlib.sha256(of).hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / "pretend.so"
        subprocess.run(
            [
                *(_compiler(), "-O0", "-w", "-std=c++20", "-shared", "-fPIC"),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                *(f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"),
                *(str(_SOURCE), "-o", str(made)),
                *(f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"),
            ],
            check=True,
        )
        made.replace(library)  # whole, whoever comes first
    return library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_built()))


@dataclass
class Seen:
    """What happened on the device.

    Attributes:
      mixed: operations that had tensors of both places, by name.
      waits: what made the host wait for the device, by name; copies to the host among it.
      operations: all of them, by name.
      copies: from the host, how many.
      longest: bytes of the largest copy to the host.
    """

    mixed: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    copies: int = 0
    longest: int = 0

    @property
    def waited(self) -> int:
        """How often the host waited."""
        return sum(self.waits.values())


@contextmanager
def watched(everywhere: bool = False) -> Iterator[Seen]:
    """What this thread does meanwhile (or all of the process), once it is done."""
    library, which = _library(), _PROCESS if everywhere else _THREAD
    library.pretend_reset(which)
    seen = Seen()
    try:
        yield seen
    finally:
        room = ctypes.create_string_buffer(1 << 20)
        library.pretend_report(which, room, len(room))
        for line in room.value.decode().splitlines():
            kind, name, count = line.split("\t")
            if kind == "mixed":
                seen.mixed[name] = int(count)
            elif kind == "waits":
                seen.waits[name] = int(count)
            elif kind == "ops":
                seen.operations[name] = int(count)
            elif name == "longest":
                seen.longest = int(count)
            else:
                seen.copies = int(count)
