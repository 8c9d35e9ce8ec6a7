"""What a run came to."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import fedmpi
from fedmpi.engine.ledger import ratios

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation


def summary(of: Simulation) -> dict[str, Any]:
    """Of a simulation so far, the same on every rank, which all call this."""
    ranks = [json.loads(r) for r in of.comm.allgather(json.dumps([of.trained, of.comm.sent]).encode())]
    full_up, full_down = (4 * of.spec.size * n for n in (of.participations, of.called))
    return {
        "method": of.config.method.name,
        "accuracy": of.accuracy,
        "loss": of.test_loss,
        **of.measures,
        "rounds": of.config.rounds,
        "clients": of.config.clients,
        "cohort": of.config.cohort_size,
        "params": of.spec.size,
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
        "version": fedmpi.__version__,
    }
