"""``fedmpi methods``: the table of methods as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmpi.engine.progress import human
from fedmpi.message import Field
from fedmpi.methods import METHODS, build, parse
from fedmpi.methods.base import Entry, Setup
from fedmpi.spec import Spec
from fedmpi.validation import choose


def listing(params: int, names: Sequence[str] = ()) -> str:
    """Each method's options, what sums, and the bytes of one message for a model of ``params`` parameters."""
    for name in names:
        choose("METHOD", {"name": name}, METHODS)
    rows = {name: entry for name, entry in METHODS.items() if not names or name in names}
    size = f"{params:,} parameters ({human(4 * params)} uncompressed)"
    title = f"Bytes of one client's message for a model of {size}:"
    return "\n\n".join([title, *(_row(name, entry, params) for name, entry in rows.items())])


def _row(name: str, entry: Entry, params: int) -> str:
    spec = Spec(("parameters",), ((params,),))
    options = parse({"name": name, **entry.example})
    method = build(options, spec, Setup())
    layout = method.up.layout()
    fixed = sum(_nbytes(field) for field in layout.values() if not field.ragged)
    ragged = [_nbytes(field) for field in layout.values() if field.ragged]
    cost = (
        human(fixed)
        if not ragged
        else f"{human(fixed + min(ragged))} to {human(fixed + sum(ragged) - min(ragged))}"
    )
    shown = ", ".join(f"{k}: {v}" for k, v in options.model_dump(exclude={"name"}).items())
    lines = [
        f"{name}: {entry.summary}",
        f"    upload   {cost} with {{{shown}}}",
        f"    sums     {entry.sums} = {method.up.size:,} numbers",
        f"    client   keeps {entry.keeps}",
        f"    source   {entry.source}",
    ]
    for key, field in entry.options.model_fields.items():
        if key != "name":
            default = "required" if field.is_required() else f"default {field.default}"
            lines.append(f"    .{key:<10} {field.description} ({default})")
    return "\n".join(lines)


def _nbytes(field: Field) -> int:
    return math.prod(field.row) * field.dtype.itemsize
