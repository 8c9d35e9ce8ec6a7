"""``fedmpi methods``: the table of methods as text, and what their messages cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmpi import plan, random
from fedmpi.engine.progress import human
from fedmpi.errors import ConfigError
from fedmpi.method import Method, Round, State
from fedmpi.methods import METHODS, build, entry, parse
from fedmpi.methods.base import Entry, Setup
from fedmpi.methods.play import play
from fedmpi.spec import Spec
from fedmpi.validation import checked, yaml_value


def describe(names: Sequence[str] = ()) -> str:
    """Each method (all, or those named) with its options, what clients keep, what sums, what it can be laid over."""
    return "\n\n".join(_description(name, entry(name, "METHOD")) for name in names or METHODS)


def _description(name: str, row: Entry) -> str:
    lines = [
        f"{name}: {row.summary}",
        f"    client   keeps {row.keeps}",
        f"    sums     {row.sums}",
        f"    source   {row.source}",
    ]
    if row.wraps:
        over = "any method that is no wrapper" if row.wraps == "any" else ", ".join(row.wraps)
        lines.append(f"    goes over {over}")
    for key, field in row.options.model_fields.items():
        if key != "name":
            default = "required" if field.is_required() else f"default {field.default}"
            lines.append(f"    .{key:<10} {field.description} ({default})")
    return "\n".join(lines)


def costs(spec: Spec, chosen: Sequence[str] = ()) -> str:
    """A Markdown table of bytes, measured on the messages of one client for a model of this layout.

    ``chosen`` are YAML: names or ``{name: topk, ratio: 0.1}``; default: all, with their example options.

    A client sends one random gradient twice: "first" and "again" differ where a method looks back. The
    download is that of a client that missed one round.
    """
    full = 4 * spec.size
    rows = ["| method | options | upload first | again | upload ratio | download | download ratio |"]
    rows.append("|:--|:--|--:|--:|--:|--:|--:|")
    everything = [{"name": name, **row.example} for name, row in METHODS.items()]
    for value in [yaml_value(text, "METHOD") for text in chosen] or everything:
        options = parse(value, "METHOD")
        name, method = options.name, build(options, spec, Setup())
        first, again, download = measured(method, spec)
        shown = {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else {}
        given = ", ".join(f"{k}: {v}" for k, v in shown.items())
        ratios = (f"{full / again:,.1f}x", f"{full / download:,.1f}x" if download else "-")
        cells = (name, given, f"{first:,}", f"{again:,}", ratios[0], f"{download:,}", ratios[1])
        rows.append(f"| {' | '.join(cells)} |")
    title = f"Bytes of one client for {spec.size:,} parameters ({human(full)} uncompressed), as measured:"
    return "\n".join([title, "", *rows])


def parts(model: nn.Module, rules: str, method: str) -> str:
    """A Markdown table of the parts of a model under ``rules`` (YAML: ``[{match: ..., travels: ...}]``), the rest by
    ``method``: numbers, and the bytes of one client as :func:`costs` measures them."""
    listed = [checked(plan.Rule, rule, "--parts") for rule in _rules(rules)]
    keeping = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    buffers = [name for name, _ in model.named_buffers() if name.startswith(keeping)]
    made = plan.make(plan.Tensors.of(model, buffers), parse(yaml_value(method, "METHOD"), "METHOD"), listed)
    rows = ["| part | tensors | numbers | upload first | again | download |", "|:--|--:|--:|--:|--:|--:|"]
    for p in made.parts:
        rows.append(_row(p.name, p.method, p.spec))
    rows.append(_row("all", made.method, made.spec))
    if made.local.names:
        rows.append(f"| local | {len(made.local.names)} | {made.local.size:,} | 0 | 0 | 0 |")
    return "\n".join(rows)


def _row(name: str, method: Method, spec: Spec) -> str:
    found = (f"{n:,}" for n in measured(method, spec))
    return f"| {' | '.join((name, str(len(spec.names)), f'{spec.size:,}', *found))} |"


def _rules(text: str) -> list[Any]:
    rules = yaml_value(text, "--parts")
    if not isinstance(rules, list) or not rules:
        raise ConfigError(
            f"--parts: expected a list of rules, [{{match: ..., travels: ...}}], got {text:.80}"
        )
    return rules


def measured(method: Method, spec: Spec) -> tuple[int, int, int]:
    """A client's bytes: its first message, its second one, and the download after a missed round."""
    server = method.server
    g_CD = random.normal(random.key(0, stream="listing"), spec.size)[None]
    state: State = {name: value[None] for name, value in method.up.init().items()}
    held = server.init(torch.zeros(spec.size))
    uploads, between = [], 0
    for t in range(2):
        now = Round(0, t, 0.1)
        passes = play(method, g_CD, state, held, now)
        uploads.append(sum(int(one.message.nbytes()[0]) for one in passes))
        between = sum(one.mean_S.nbytes for one in passes[:-1])  # every client downloads these
        state, held = passes[-1].after, server.finish(passes[-1].state, passes[-1].mean_S, now)
    return uploads[0], uploads[1], between + int(server.download(held, 1).nbytes()[0])
