"""``fedmpi bench methods``: what each method's coding costs, against copying the gradients that it codes.

Every row of METHODS is here by itself. What is timed is the third of three rounds with the same gradients, when
look-back has something to look back at and Prune-m has its mask.

Shape suffixes: C clients, D parameters, S summed numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from fedmpi import methods, random
from fedmpi.bench.timing import Row, Work, columns, measure, named, place
from fedmpi.errors import ConfigError
from fedmpi.method import Method, Round, State, believed, placed
from fedmpi.methods import METHODS
from fedmpi.methods.base import Setup
from fedmpi.methods.play import Pass, play
from fedmpi.spec import Spec
from fedmpi.validation import yaml_value

_ROUNDS = 2  # before the one that is timed
_COPIES = 12  # of the gradients that are in memory at a time, about, with wrappers' states


class Coding(NamedTuple):
    """One method.

    Attributes:
      nbytes: of a client's message (of both passes', where there are two), measured on it.
      compression: the gradient's bytes over those.
      compress, decompress: of C clients, against copying their gradients.
      finish: the server's, against copying one gradient.
    """

    options: dict[str, Any]
    nbytes: float
    compression: float
    compress: Row
    decompress: Row
    finish: Row


class Codings(NamedTuple):
    """What the benchmark comes to. It has no targets: those of the kernels inside are ``bench kernels``'."""

    facts: dict[str, str | int]
    rows: list[Coding]

    def missed(self) -> list[str]:
        return []

    def text(self) -> str:
        """Medians, with quartiles in brackets."""
        head = ("method", "bytes", "smaller", "compress", "decompress", "finish")
        lines = [
            (
                yaml.safe_dump(row.options, default_flow_style=True, sort_keys=False, width=999).strip(),
                f"{row.nbytes:,.0f}",
                f"{row.compression:,.1f}x",
                *(
                    f"{part.ratio.median:.2f} [{part.ratio.low:.2f} … {part.ratio.high:.2f}]"
                    for part in (row.compress, row.decompress, row.finish)
                ),
            )
            for row in self.rows
        ]
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        return f"methods, times as multiples of a copy (memcpy): {facts}\n{columns([head, *lines])}"

    def json(self) -> str:
        rows = [
            {
                "method": row.options,
                "bytes": row.nbytes,
                "compression": row.compression,
                "compress": row.compress.plain(),
                "decompress": row.decompress.plain(),
                "finish": row.finish.plain(),
            }
            for row in self.rows
        ]
        return json.dumps({"bench": "methods", **self.facts, "against": "memcpy", "rows": rows}, indent=2)


class Third(NamedTuple):
    """The third of three rounds with the same gradients: what was before it, and its passes."""

    method: Method
    senders: State
    passes: list[Pass]

    @property
    def nbytes(self) -> float:
        """Of a client's messages."""
        clients = len(self.passes[0].ctx.clients_C)
        return sum(int(one.message.nbytes().sum()) for one in self.passes) / clients


def run(
    log2: int = 20, clients: int = 4, repeats: int = 5, chosen: Sequence[str] = (), device: str = "cpu"
) -> Codings:
    """Time every method on a matrix of 2^log2 parameters and so many clients' gradients of it.

    Args:
      chosen: only these methods, as YAML; default: every row of METHODS with its example's options.

    Raises:
      ConfigError: no such device is here; the memory would not do; an unknown method or option, or one that does not
        fit so many parameters.
    """
    where = place(device)
    need, there = _COPIES * clients * 4 << log2, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else there
    if need > there:
        raise ConfigError(
            f"--size: {clients} clients' 2^{log2} numbers need about {need >> 20} MiB of memory, "
            f"there are {there >> 20}"
        )
    spec = Spec(("matrix",), ((1 << log2 // 2, 1 << (log2 + 1) // 2),))
    g_CD = torch.stack([random.normal(random.key(0, 0, c, "bench"), spec.size) for c in range(clients)]).to(
        where
    )
    everything: list[Any] = [{"name": name, **entry.example} for name, entry in METHODS.items()]
    rows = [_coding(options, spec, g_CD, repeats) for options in _read(chosen) or everything]
    copied = rows[0].compress.reference.median
    facts: dict[str, str | int] = {
        "parameters": f"2^{log2}",
        "clients": clients,
        "device": named(where),
        "threads": torch.get_num_threads(),
        "memcpy": f"{8e-9 * g_CD.numel() / copied:.1f} GB/s",
        "repeats": repeats,
    }
    return Codings(facts, rows)


def _read(chosen: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for text in chosen:
        value = yaml_value(text, "METHOD")
        methods.parse(value, "METHOD")
        found.append({"name": value} if isinstance(value, str) else value)
    return found


def _coding(options: dict[str, Any], spec: Spec, g_CD: Tensor, repeats: int) -> Coding:
    method, senders, passes = third = third_round(options, spec, g_CD)
    copy_CD = torch.empty_like(g_CD)

    def compress() -> None:
        for one in passes:
            one.codec.compress(g_CD, senders, one.ctx)

    def decompress() -> None:
        for one in passes:
            one.codec.decompress(one.message, believed(one.codec, senders), one.ctx)

    def timed(work: Work, rows: int) -> Row:
        copy = partial(copy_CD[:rows].copy_, g_CD[:rows])
        return measure(str(options["name"]), work, copy, None, repeats, g_CD.device)

    return Coding(
        options,
        third.nbytes,
        4 * spec.size / third.nbytes,
        timed(compress, len(g_CD)),
        timed(decompress, len(g_CD)),
        timed(partial(finished, method, passes), 1),
    )


def third_round(options: dict[str, Any], spec: Spec, g_CD: Tensor) -> Third:
    """What clients with the gradients ``g_CD`` send, once look-back has something to look back at."""
    clients = len(g_CD)
    method = methods.build(options, spec, Setup(clients=clients))
    fresh = {name: value.expand(clients, *value.shape).clone() for name, value in method.up.init().items()}
    senders, state = (
        placed(fresh, g_CD.device),
        method.server.init(torch.zeros(spec.size, device=g_CD.device)),
    )
    for t in range(_ROUNDS):
        passes = play(method, g_CD, senders, state, Round(0, t, 0.1))
        senders, state = passes[-1].after, finished(method, passes)
    return Third(method, senders, play(method, g_CD, senders, state, Round(0, _ROUNDS, 0.1)))


def finished(method: Method, passes: list[Pass]) -> State:
    """What the server makes of the passes' means."""
    state, now = passes[0].state, passes[0].ctx.round
    for index, one in enumerate(passes[:-1]):
        state = method.server.between(state, index, one.mean_S, now)
    return method.server.finish(state, passes[-1].mean_S, now)
