"""A data-parallel run goes on with fewer ranks: its data is shared out anew among those who are left.

Each rank is one client there, so that a run of W − 1 ranks is another one than that of W, with shares, batches and ways
of its own. It begins where the last one stood: the model, the server's memory, the counters, and what each rank that is
left keeps (residual, optimizer). What they have computed for the round in which the rank was lost they send again
instead of computing it anew: lost is what the lost rank kept, and its steps of that round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmpi.comm.base import Comm, together
from fedmpi.engine.rounds import Simulation

_COUNTED = ("trained", "best_X", "lost", "started", "asks", "around", "error")


def without(before: Simulation, left: Sequence[int], comm: Comm, counters: Sequence[str]) -> Simulation:
    """The run among the ranks of ``comm``, which were those of ``left``. Called by all of them.

    Args:
      before: the run so far, at the round that is done anew.
      counters: its totals, by name.

    Raises:
      LostError: one more ended; ``before`` is as it was.
    """
    config = before.config.model_copy(update={"clients": comm.size})
    with together(comm, "sharing out the data anew"):
        after = Simulation(config, comm, before.place)
    after.set_threads()
    for name in (*_COUNTED, *counters):
        setattr(after, name, getattr(before, name))
    old_C, new_C = torch.tensor(left), torch.arange(comm.size)
    me = slice(comm.rank, comm.rank + 1)
    for store, kept in ((after.clients, before.clients), (after.own, before.own)):
        if not store.empty:
            store.put(new_C[me], kept.get(old_C[me]))
    for name, value in vars(after.ledger).items():
        value.copy_(getattr(before.ledger, name)[old_C])
    after.replica.take_back(before.replica.held())
    after.replica.believe(before.clients.get(old_C[me]))
    after.passes.made = dict(before.passes.made)
    return after
