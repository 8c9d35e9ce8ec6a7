"""Checkpoints with other content under right checksums, for a resume; a kind of :mod:`tests.jobs.fuzz`."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine import manifest
from fedmpi.engine.resume import restore
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.errors import FedMPIError

from .outcomes import Attempt

METHODS: list[dict[str, Any]] = [
    {"name": "topk", "ratio": 0.1, "feedback": True},
    {"name": "signsgd"},
    {"name": "powersgd", "rank": 1},
    {"name": "intrinsic", "dim": 8, "schedule": "time_varying"},
    {"name": "lookback", "threshold": 0.5, "inner": {"name": "topk", "ratio": 0.1}},
    {
        "method": {"name": "lookback", "threshold": 0.5, "inner": {"name": "topk", "ratio": 0.2}},
        "parts": [
            {"match": "norm.bias", "travels": "exact"},
            {"match": "first.weight", "travels": {"name": "powersgd", "rank": 1, "feedback": True}},
            {"match": "first.bias", "travels": "signsgd"},
            {
                "match": "middle.weight",
                "travels": {"name": "intrinsic", "dim": 8, "schedule": "time_varying"},
            },
            {"match": "last.bias", "travels": "local"},
            {"match": "norm.running_var", "travels": "local"},
        ],
    },
    {
        "method": {"name": "topk", "ratio": 0.2, "feedback": True},
        "parts": [{"match": "last.*", "travels": "local"}, {"match": "middle.*", "travels": "frozen"}],
        "local": {"scaffold": "exact"},
    },
    {
        "method": {"name": "dense"},
        "parts": [{"match": "norm.*", "travels": "local"}],
        "local": {"optimizer": "adamw", "keep": True},
    },
]
ODD: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    2**40,
    2**63,
    1e308,
    1.5,
    "",
    "evil:ENTRY",
    [],
    {},
    True,
    [[]],
    float("nan"),
)
# What may be another without anybody being able to tell: times, versions of programs, and who did what.
FREE = (
    "seconds",
    "fedmpi",
    "torch",
    "device",  # its kind is said, and not computed with
    "ranks",
    "lost_ranks",
    "accuracy",
    "test_loss",
    "simulated_seconds",
    *("client_accuracy", "client_worst", "client_median", "client_spread"),
    "config",
)


def values(method: dict[str, Any]) -> dict[str, Any]:
    apart: dict[str, Any] = {}
    if (
        "parts" in method
    ):  # and with it what clients keep for themselves: parameters, memories, control variates
        local = {"lr": 0.01, "batch": 20, "steps": 2, **method.get("local", {})}
        apart = {"model": "tests.nets:build", "client_test": 0.2, "local": local, "parts": method["parts"]}
        method = method["method"]
    common = {
        "data": "digits",
        "model": "linear",
        "clients": 6,
        "cohort": 4,
        "rounds": 2,
        "local": {"lr": 0.1, "batch": 20},
        "server": {"optimizer": "adam", "lr": 0.01} if method.get("name") == "topk" else {},
        "checkpoint": {"rounds": 2},
        "method": method,
    }
    return common | apart


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Each container of a tree, with each of its keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in items:
        found += [(tree, key), *places(value)]
    return found


def other_tensor(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Of another shape or dtype, or with a number that no run comes to."""
    how = rng.randrange(5)
    if how == 0 or not value.numel():
        return torch.zeros(*value.shape, 2, dtype=value.dtype)
    if how == 1:
        return value.flatten()[:1].clone() if value.numel() > 1 else value.repeat(3)
    if how == 2:
        return value.to(torch.float64)
    bad = (
        float(rng.choice(("nan", "inf", "-inf")))
        if value.is_floating_point()
        else rng.choice((-5, 2**31 - 1))
    )
    changed = value.clone()
    if value.dtype == torch.uint8:
        return changed[..., :0].contiguous()
    changed.view(-1)[rng.randrange(changed.numel())] = bad
    return changed


def before_value(before: Any, body: Any) -> bool:
    """Whether a manifest means something else than before: keys that stand at their default may be left out."""
    try:
        return bool(manifest.Manifest.model_validate(before) != manifest.Manifest.model_validate(body))
    except ValueError:
        return True


def damage(folder: Path, rng: random.Random) -> str:
    """Change one thing and make the checksums anew; returns what."""
    path = folder / manifest.MANIFEST
    body = json.loads(path.read_bytes())["manifest"]
    how = rng.choice(("manifest", "tensors", "metrics"))
    where = how
    if how == "manifest":
        before = copy.deepcopy(body)
        tree, key = rng.choice(places(body))
        if rng.random() < 0.3:
            del tree[key]
        else:
            tree[key] = rng.choice(ODD)
        if key in ("store", "clients", "counts", "ended", "peaks") and not before_value(before, body):
            where = "manifest format"
        else:
            changed = [name for name in before if before[name] != body.get(name)]
            totals = body.get("totals") if isinstance(body.get("totals"), dict) else {}
            inner = [name for name, value in before["totals"].items() if value != (totals or {}).get(name)]
            where = f"manifest {' '.join(changed + inner)}"
    else:
        ending = ".safetensors" if how == "tensors" else ".jsonl"
        name = rng.choice(sorted(name for name in body["files"] if name.endswith(ending)))
        data = (folder / name).read_bytes()
        if how == "tensors":
            tensors = load(data)
            entry = rng.choice(sorted(tensors))
            tensors[entry] = other_tensor(tensors[entry], rng)
            where = f"tensors {entry}"
            data = save(tensors)
        else:
            lines = data.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            line = json.loads(lines[at])
            key = rng.choice([key for key in line if key not in ("loss", *FREE)])
            odd = [x for x in ODD if x != line[key] or type(x) is not type(line[key])]
            new = [json.dumps({**line, key: rng.choice(odd)}).encode() + b"\n"]
            lines[at : at + 1] = rng.choice((new, [], [lines[at]] * 2, [b"[" * 20_000 + b"\n"], [b"\xff\n"]))
            where = f"metrics {key}"
            data = b"".join(lines)
        (folder / name).unlink()
        file = manifest.write(folder / name, data).model_dump(include={"bytes", "sha256"})
        body["files"][name].update(file)
    path.write_text(json.dumps({"sha256": manifest._digest(body), "manifest": body}))
    return where


def prepare(top: Path) -> Attempt:
    runs = []
    for i, method in enumerate(METHODS):
        parsed = config.parse(values(method))
        run(parsed, solo(), top / str(i), quiet=True)
        runs.append((parsed, top / str(i) / "checkpoints" / "round-00000002"))
    for parsed, folder in runs:
        restore(Simulation(parsed, solo()), folder)

    def attempt(rng: random.Random) -> FedMPIError | None:
        parsed, folder = rng.choice(runs)
        shutil.rmtree(top / "copy", ignore_errors=True)
        copied = Path(shutil.copytree(folder, top / "copy" / folder.name))
        what = damage(copied, rng)
        simulation = Simulation(parsed, solo())
        try:
            restore(simulation, copied)
        except FedMPIError as error:
            return error
        free = any(word in FREE for word in what.split())
        # Nothing else tells how many of the bytes were positions, of messages or downloads of any length.
        if what == "manifest totals bytes":
            free = parsed.method.name in ("topk", "lookback")
        assert free or what == "manifest " or "fingerprint" in what or "format" in what, (
            parsed.method.name,
            what,
        )
        return None

    return attempt
