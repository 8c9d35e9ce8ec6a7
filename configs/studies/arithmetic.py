"""The page of the scale study: its measurements as tables, and what follows from them for jobs that are larger than any
machine at hand. Every formula stands on the page beside its result, with where its inputs come from.

Symbols: W ranks, D parameters, S summed numbers, m a message's bytes, f those of its frame, C a cohort.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fedmpi.engine.progress import human

RANKS = 1000
DEVICES = 1_000_000
COHORT = 1000
LINKS = {"1 Gb/s": 1e9, "10 Gb/s": 1e10, "100 Gb/s": 1e11}
UPLINK, DOWNLINK = 10e6, 50e6  # bits a second of a device: assumed

Rows = list[dict[str, Any]]


def page(measured: dict[str, Any]) -> str:
    """The whole page, Markdown."""
    parts = [
        "# Scale: what was measured, and what follows",
        _prose(
            f"""Made by `python -m configs.studies scale` with {measured["threads"]} torch thread(s) on
            {os.cpu_count()} cores; the numbers behind it are beside it in scale.json. Bytes are counts and exact;
            seconds are those of this machine's processor, without what it did for others meanwhile."""
        ),
        *_wire(measured["wire"], measured["processes"]),
        *_start(measured["start"]),
        *_cost(measured["cost"]),
        *_ranks(measured["messages"]),
        *_devices(measured),
    ]
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> str:
    return " ".join(text.split())


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, whose first column is words."""
    rule = "|:--|" + "--:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def busiest(row: dict[str, Any]) -> float:
    """Bytes a round that the rank receives that receives most."""
    return float(max(row["received"]))


def modelled(row: dict[str, Any], two: dict[str, Any]) -> float:
    """:func:`busiest` of ``row`` by the formulas, from the same case of two ranks."""
    ranks, status = row["ranks"], row["status"]
    if row["mode"] == "aggregator":
        first, *workers = two["received"]
        head = first - status - row["clients"] * row["message"]  # of a worker's frame
        return float(max(first + (ranks - 2) * head, *workers))
    if row["way"] == "gather":
        return float((ranks - 1) * (busiest(two) - status) + status)
    if row["way"] == "merge":
        return float(2 * (ranks - 1) * part(row["message"], ranks, row["entry"]) + status)
    return busiest(two) if row["way"] == two["way"] else float(row["summed"] + status)


def part(message: float, ranks: int, entry: int) -> float:
    """Bytes of the part of a message that a rank merges: whole 64 entries."""
    return -(-message // (64 * entry * ranks)) * 64 * entry


def _wire(rows: Rows, processes: int) -> list[str]:
    sizes = sorted({row["ranks"] for row in rows})
    at = {(row["mode"], row["method"], row["ranks"]): row for row in rows}
    parts = [
        "## Bytes by rank",
        _prose(
            f"""What the busiest rank receives in a round of a model of {rows[0]["parameters"]:,} parameters, as counted
            at the collectives' buffers; 64 clients a round, in data-parallel training one a rank. Up to {processes}
            ranks are MPI processes, more are threads of one process, whose counts are the same code's. Look-back is
            counted while it sends scalars (threshold 1)."""
        ),
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [at[mode, method, n] for n in sizes]
            lines.append([method, *(human(busiest(row)) for row in found), found[-1]["way"]])
        head = [mode, *(f"{n} ranks" for n in sizes), "way at last"]
        last = None if mode == "data_parallel" else -1
        parts.append(table(head[:last], [line[:last] for line in lines]))
    off = {k: abs(busiest(row) / modelled(row, at[k[0], k[1], sizes[0]]) - 1) for k, row in at.items()}
    worst = max(off, key=off.__getitem__)
    parts.append(
        _prose(
            f"""Formulas. allreduce: every rank receives the sum, 4 S (a byte or two a vote), whatever W. aggregator:
            rank 0 receives the cohort's messages (and a frame's head of each worker) and a worker the download,
            whatever W. data_parallel: (W − 1) f
            (gather), 2 (W − 1)/W m with m rounded up to W parts of whole 64 entries (merge), or the sum (sum), by
            `fedmpi/meet/ways.py`; and in all of them the round's counts, some 64 bytes a pass. From two ranks'
            counts these give all others to within {100 * off[worst]:.2g} % (worst: {worst[1]}, {worst[0]}, {worst[2]}
            ranks)."""
        )
    )
    return parts


def _start(rows: Rows) -> list[str]:
    lines = [
        [
            f"{row['clients']:,}",
            *(f"{row['seconds'][name]:.2f} s" for name in ("imports", "data", "preparation", "first round")),
            f"{1e3 * row['seconds']['round']:.1f} ms",
            *(human(row["bytes"][name]) for name in ("imports", "data", "peak")),
        ]
        for row in rows
    ]
    head = ["clients", "imports", "data", "preparation", "first round", "a round"]
    return [
        "## Clients",
        _prose(
            f"""Noise, a sample a client; a linear model of {rows[0]["parameters"]} parameters, {rows[-1]["cohort"]}
            clients a round, dense, one rank in a process of its own. Memory is RssAnon + RssShmem, the peak sampled
            every 10 ms."""
        ),
        table([*head, "memory after imports", "of data", "peak"], lines),
        _prose(
            f"""A client more costs {bytes_a_client(rows):.0f} bytes at the peak beside its sample: the partition (an
            index, an offset, a size), the ledger (three counts) and what making them takes for a moment."""
        ),
    ]


def bytes_a_client(rows: Rows) -> float:
    """Beside the samples' own."""
    first, last = rows[0], rows[-1]
    grown = [row["bytes"]["peak"] - row["bytes"]["data"] for row in (first, last)]
    return float((grown[1] - grown[0]) / max(1, last["clients"] - first["clients"]))


def _cost(axes: dict[str, Any]) -> list[str]:
    fixed = {"clients": "cohort 10", "D": "cohort 10", "d": "intrinsic with Fastfood, cohort 10"}
    lines = [
        [
            f"{name} ({fixed.get(name, 'dense')})",
            ", ".join(f"{row['at']:,}: {1e3 * row['seconds']:.1f}" for row in axis["rows"]),
            f"{axis['slope']:.2f}",
        ]
        for name, axis in axes.items()
    ]
    base, client, parameter = fit(axes)
    return [
        "## Cost of a round",
        _prose(
            """One rank, one thread, two local steps on one sample (on the last axis one step, with which the clients of
            an additive method are a single batch); medians, and the slope of log ms over the axis's log."""
        ),
        table(["axis", "ms a round", "slope"], lines),
        _prose(
            f"""So a round takes about t₀ + C (t₁ + t₂ D): t₀ = {1e3 * base:.2f} ms and t₁ = {1e3 * client:.3f} ms by
            least squares of relative errors over the cohorts, t₂ = {1e9 * parameter:.2f} ns from the first and last
            D."""
        ),
    ]


def fit(axes: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of a round, of a client in it, and of a client's parameter: t₀, t₁, t₂."""
    rows = axes["cohort"]["rows"]
    weights = [row["seconds"] ** -2 for row in rows]  # errors are in proportion to the time

    def mean(values: Sequence[float]) -> float:
        return float(sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights))

    cohorts, seconds = ([row[name] for row in rows] for name in ("cohort", "seconds"))
    middle = mean(cohorts), mean(seconds)
    client = mean([(c - middle[0]) * (t - middle[1]) for c, t in zip(cohorts, seconds, strict=True)])
    client /= mean([(c - middle[0]) ** 2 for c in cohorts])
    low, high = axes["D"]["rows"][0], axes["D"]["rows"][-1]
    parameter = (high["seconds"] - low["seconds"]) / (high["parameters"] - low["parameters"]) / high["cohort"]
    return max(0.0, middle[1] - client * middle[0]), client, parameter


def sent(passes: Sequence[dict[str, Any]], ranks: int) -> float:
    """Bytes that a rank sends in a data-parallel step, sums by a ring or by halving and doubling."""

    def one(found: dict[str, Any]) -> float:
        if found["way"] == "gather":
            return float((ranks - 1) * found["frame"])
        if found["way"] == "merge":
            return 2 * (ranks - 1) * part(found["message"], ranks, found["entry"])
        return float(2 * (ranks - 1) / ranks * found["summed"])

    return sum(one(found) for found in passes)


def _ranks(messages: dict[str, Any]) -> list[str]:
    methods = messages["methods"]
    dense = sent(methods["dense"]["passes"], RANKS)
    lines = []
    for name, row in methods.items():
        nbytes = sent(row["passes"], RANKS)
        ways = " + ".join(one["way"] for one in row["passes"])
        times = [f"{8e3 * nbytes / bits:,.2f} ms" for bits in LINKS.values()]
        lines.append([name, ways, human(row["message"]), human(nbytes), *times, f"{dense / nbytes:,.1f}x"])
    return [
        f"## {RANKS:,} ranks",
        _prose(
            f"""Data-parallel training of ResNet-9 (D = {messages["parameters"]:,}). Inputs: each method's message,
            frame and summed vector of this model, measured on one gradient (look-back's third of the same, a scalar),
            and the way that the engine takes at W = {RANKS:,}. A rank sends 2 (W − 1)/W · 4 S (sum), 2 (W − 1)/W · m
            (merge) or (W − 1) f (gather) bytes a step. The time is those bytes over the link and nothing else: add
            2 ⌈log₂ W⌉ = {2 * (RANKS - 1).bit_length()} latencies of the fabric, and the codec's time
            (`fedmpi bench methods`)."""
        ),
        table(["method", "way", "message", "sent a step", *LINKS, "less than dense"], lines),
        _prose(
            """Where a sparse method or look-back goes by sum it saves nothing here: what W − 1 others send, or what has
            to be kept of them, is more than the D numbers. (The drop-ins give each tensor an owner, who keeps
            look-back's state of it.)"""
        ),
    ]


def _devices(measured: dict[str, Any]) -> list[str]:
    messages, (base, client, parameter) = measured["messages"], fit(measured["cost"])
    lines = [
        [
            name,
            *(human(row[way]) for way in ("message", "download")),
            f"{8 * row['message'] / UPLINK:,.3f} s",
            f"{8 * row['download'] / DOWNLINK:,.3f} s",
            *(human(COHORT * row[way]) for way in ("message", "download")),
            human(DEVICES * row["message"]),
            human(DEVICES * row["state"]) if row["state"] else "nothing",
        ]
        for name, row in messages["methods"].items()
    ]
    head = [
        "method",
        "up",
        "down",
        "uplink",
        "downlink",
        "server in",
        "server out",
        "all once, up",
        "state of all",
    ]
    own = bytes_a_client(measured["start"])
    simulated = [
        [f"{ranks:,}", f"{base + -(-COHORT // ranks) * (client + parameter * messages['parameters']):,.2f} s"]
        for ranks in (2, 64, RANKS)
    ]
    return [
        f"## {DEVICES:,} devices",
        _prose(
            f"""ResNet-9 again, {COHORT:,} devices a round. Assumed: {UPLINK / 1e6:.0f} Mb/s up and {DOWNLINK / 1e6:.0f}
            Mb/s down. A device sends m and gets the download of one missed round (after more of them a sparse or
            intrinsic one is larger, up to 4 D); the server gets and sends {COHORT:,} of these a round. When each has
            come once, after {DEVICES // COHORT:,} rounds of `sampling: epoch_shuffle`, {DEVICES:,} m have gone up.
            Residuals and look-back gradients stay on the devices (look-back's at the server, too); who simulates
            them all keeps them all."""
        ),
        table(head, lines),
        _prose(
            f"""To simulate such a round with two local steps on one sample: t₀ + ⌈C/W⌉ (t₁ + t₂ D) with the inputs from
            above, t₂ being that of a fully connected model (a convolution uses each parameter many times: take its
            own from `fedmpi train --profile`), and the all-reduce of the summed vector. Every rank keeps
            {human(DEVICES * own)} for the {DEVICES:,} clients ({own:.0f} bytes each), whatever the number of ranks."""
        ),
        table(["ranks", "a round's training"], simulated),
    ]
