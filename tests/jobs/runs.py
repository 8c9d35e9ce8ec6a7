"""Runs configurations one after the other on the ranks of one launch: ``runs.py REQUEST ANSWER [CASE …]``.

REQUEST is a JSON list of configurations; ANSWER gets, for each, the summary, a hash of the
parameters' bytes and the parameters. Before them the CASEs of collectives.py.
Also the in-process reference: :func:`outcome`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fedmpi import config
from fedmpi.comm import Comm, connect
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import handshake
from fedmpi.engine.summary import summary
from fedmpi.method import State, believed


def outcome(values: dict[str, Any], comm: Comm) -> dict[str, Any]:
    torch.set_num_threads(1)
    simulation = Simulation(config.parse(values), comm)
    handshake(comm, simulation.config, simulation.spec)
    losses = [simulation.round(t)["loss"] for t in range(simulation.config.rounds)]
    theta_D = simulation.replica.parameters()
    digest = hashlib.sha256(theta_D.numpy().tobytes()).hexdigest()
    digests = comm.allgather(digest.encode())
    assert len(set(digests)) == 1, "ranks hold different parameters"
    both_ends_agree(simulation)
    return {**summary(simulation), "losses": losses, "sha256": digest, "theta": theta_D.tolist()}


def both_ends_agree(simulation: Simulation) -> None:
    """Where rank 0 aggregates: what it keeps of each client is what the client believes, by their hashes."""
    replica, comm = simulation.replica, simulation.comm
    if replica.owner is None:
        return  # one copy serves both ends
    everybody = torch.arange(simulation.config.clients)
    belief = believed(simulation.method.up, simulation.clients.get(everybody))
    offers = [json.loads(part) for part in comm.gather(json.dumps(_hashes(belief, everybody)).encode())]
    if comm.rank == 0 and not simulation.clients.empty:
        held = _hashes(replica.peers.get(everybody), everybody)
        homes = simulation.home(everybody)
        assert homes is not None
        for client, home in enumerate(homes.tolist()):
            assert offers[home][client] == held[client], f"client {client}: the two ends differ"


def _hashes(state: State, clients: torch.Tensor) -> list[str]:
    def row(c: int) -> bytes:
        return b"".join(value[c].double().numpy().tobytes() for value in state.values())

    return [hashlib.sha256(row(c)).hexdigest() for c in range(len(clients))]


if __name__ == "__main__":
    import collectives

    request, answer, *cases = sys.argv[1:]
    for case in cases:
        collectives.main(case)
    comm = connect()
    answers = [outcome(values, comm) for values in json.loads(Path(request).read_text())]
    if comm.rank == 0:
        Path(answer).write_text(json.dumps(answers))
