"""What a run came to."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from fedmpi.engine.ledger import ratios
from fedmpi.tasks.metrics import TEST_LOSS
from fedmpi.version import __version__

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation


def summary(of: Simulation, done: int | None = None) -> dict[str, Any]:
    """Of a simulation so far, the same on every rank, which all call this; ``done`` are the rounds that it did, if not
    all."""
    ranks = [json.loads(r) for r in of.comm.allgather(json.dumps([of.trained, of.comm.sent]).encode())]
    plain = of.plan.trained.size + of.plan.buffers.size  # what a client of federated averaging sends and gets
    full_up, full_down = (4 * plain * n for n in (of.participations, of.called))
    return {
        "method": of.config.method.name,
        "metric": of.measured.first,
        **{"loss" if name == TEST_LOSS else name: value for name, value in of.measures.items()},
        **({} if of.goals.best is None else {"best": _best(of)}),
        **({"ended": of.ended} if of.ended else {}),
        "rounds": of.config.rounds if done is None else done,
        "clients": of.config.clients,
        "cohort": of.config.cohort_size,
        "params": of.plan.trained.size,
        "upload_bytes": of.bytes["upload"],
        "download_bytes": of.bytes["download"],
        **ratios(full_up, full_down, of.bytes["upload"], of.bytes["download"]),
        "values_only": ratios(full_up, full_down, of.bytes["upload_values"], of.bytes["download_values"]),
        "messages": of.participations,
        **of.counts,
        **({} if of.clock is None else {"simulated_seconds": of.simulated_seconds}),
        **of.method.server.facts(of.replica.state),
        "ranks": of.comm.size,
        "topology": of.config.topology,
        "comm": of.comm.name,
        "lost_ranks": [lost.model_dump() for lost in of.lost],
        "clients_by_rank": [trained for trained, _ in ranks],
        "wire_bytes": sum(sent for _, sent in ranks),
        "wire_bytes_by_rank": [sent for _, sent in ranks],
        "seconds": time.monotonic() - of.started,
        "seed": of.config.seed,
        "reproducible": of.config.reproducible,
        "version": __version__,
    }


def _best(of: Simulation) -> dict[str, Any]:
    """Whose model model-best.safetensors is."""
    peak = of.peaks.get(str(of.goals.best))
    return {"metric": of.goals.best, "value": peak and peak.value, "round": peak and peak.round}
