"""What every client's model comes to on what the client holds out, and how a model is saved.

Shape suffixes: X numbers that all share, K clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, together
from fedmpi.engine.store import ClientStore
from fedmpi.engine.trainer import Trainer
from fedmpi.message import CPU
from fedmpi.phases import phased
from fedmpi.tasks.data import Split
from fedmpi.tasks.metrics import Measures, Tally
from fedmpi.tasks.partitions import Partition


def of_clients(measured: Measures) -> tuple[str, ...]:
    """Of the first metric of clients on what they held out: the mean, the median, the mean of the worst tenth, the
    standard deviation. Each client counts once; one where it is not defined does not."""
    return f"client_{measured.first}", "client_median", "client_worst", "client_spread"


@torch.no_grad()
def state_dict(trainer: Trainer, x_X: Tensor) -> dict[str, Tensor]:
    """The model's with ``x_X``, which it loads strictly, on the CPU; no two tensors share memory."""
    tensors = trainer.load(x_X).state_dict()
    return {
        name: value.clone(memory_format=torch.contiguous_format).to(CPU) for name, value in tensors.items()
    }


@torch.no_grad()
@phased("evaluate")
def by_client(
    trainer: Trainer,
    measured: Measures,
    x_X: Tensor,
    data: Split,
    held: Partition,
    own: ClientStore,
    home: Callable[[Tensor], Tensor | None],
    comm: Comm,
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """What :func:`of_clients` names, of every client's model on what it holds out; and metrics and mean loss over all
    these samples, where clients have models of their own.

    Args:
      own: what clients keep for themselves; one that never came has what a new one starts with.
      home: the rank that keeps it, of each; None: they are shared out.
    """
    personal, samples = bool(trainer.plan.local.names), trainer.samples(data)
    clients = (held.sizes > 0).nonzero()[:, 0]
    ranks = home(clients)
    ranks = clients % comm.size if ranks is None else ranks
    whole = Tally(measured if personal else measured._replace(metrics={}), held.clients, len(held.index_N))
    first = measured._replace(metrics={measured.first: measured.metrics[measured.first]})
    value_K = torch.zeros(held.clients, dtype=torch.float64)
    if not personal:
        model = trainer.load(x_X).eval()
    with together(comm, "evaluating") if measured.own else nullcontext():
        for client in clients[ranks == comm.rank].tolist():
            if personal:
                kept = own.get(torch.tensor([client]))
                model = trainer.load(x_X, {name: value[0] for name, value in kept.items()}).eval()
            index = held.of(client)
            x, y = samples.take(index)
            output = model(x)
            alone = Tally(first, 1, len(index))
            alone.add(0, slice(None), output, y)
            value = alone.values()[measured.first]
            value_K[client] = math.nan if value is None else value
            if personal:
                begin = int(held.offset[client])
                whole.add(client, slice(begin, begin + len(index)), output, y)
    comm.sum([value_K, *whole.tensors])  # each rank has filled its own places: exact
    value_K = value_K[clients]
    value_K = value_K[~value_K.isnan()].sort(descending=measured.least(measured.first)).values
    tenth_K = value_K[: max(1, len(value_K) // 10)]
    values = dict.fromkeys(of_clients(measured))
    if not len(value_K):
        return values, whole.values()
    found = (value_K.mean(), value_K.quantile(0.5), tenth_K.mean(), value_K.std(correction=0))
    return dict(zip(values, map(float, found), strict=True)), whole.values()
