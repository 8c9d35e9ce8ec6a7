"""What a model comes to on a test set, for all clients or for each, and how it is saved.

Shape suffixes: X numbers that all share, K clients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.engine.store import ClientStore
from fedmpi.engine.trainer import Trainer
from fedmpi.message import CPU
from fedmpi.phases import phased
from fedmpi.tasks.data import Split
from fedmpi.tasks.objectives import Objective
from fedmpi.tasks.partitions import Partition

MEASURES = ("client_accuracy", "client_median", "client_worst", "client_spread")
"""Of clients' accuracies on what they held out: the mean, the median, the mean of the worst tenth, the standard
deviation. Each client counts once."""


@torch.no_grad()
@phased("evaluate")
def evaluate(
    trainer: Trainer, objective: Objective, x_X: Tensor, test: Split, batch: int, comm: Comm
) -> tuple[float, float]:
    """Accuracy and mean loss of ``x_X`` on a test set, whose batches the ranks share out."""
    model = trainer.load(x_X).eval()
    batches = torch.arange(len(test.y)).split(batch)
    # A place a batch, of which each rank fills its own: the sum over ranks is exact in any order.
    sums = torch.zeros(2, len(batches), dtype=torch.float64, device=trainer.device)
    samples = trainer.samples(test)
    for b in range(comm.rank, len(batches), comm.size):
        x, y = samples.take(batches[b])
        output = model(x)
        sums[0, b] = objective.correct(output, y)
        sums[1, b] = objective.loss(output, y).double() * objective.count(test.y[batches[b]])
    sums = sums.to(CPU)  # asked for at once
    comm.sum([sums])
    count = objective.count(test.y)
    return float(sums[0].sum()) / count, float(sums[1].sum()) / count


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
    objective: Objective,
    x_X: Tensor,
    data: Split,
    held: Partition,
    own: ClientStore,
    home: Callable[[Tensor], Tensor | None],
    comm: Comm,
) -> tuple[dict[str, float | None], float, float]:
    """The :data:`MEASURES` of every client's model on what it holds out; and accuracy and mean loss over all these
    samples.

    Args:
      own: what clients keep for themselves; one that never came has what a new one starts with.
      home: the rank that keeps it, of each; None: they are shared out.
    """
    clients = (held.sizes > 0).nonzero()[:, 0]
    ranks = home(clients)
    ranks = clients % comm.size if ranks is None else ranks
    sums_K = torch.zeros(3, held.clients, dtype=torch.float64)
    personal, samples = bool(trainer.plan.local.names), trainer.samples(data)
    if not personal:
        model = trainer.load(x_X).eval()
    for client in clients[ranks == comm.rank].tolist():
        if personal:
            kept = own.get(torch.tensor([client]))
            model = trainer.load(x_X, {name: value[0] for name, value in kept.items()}).eval()
        index = held.of(client)
        x, y = samples.take(index)
        output, count = model(x), objective.count(data.y[index])
        told = torch.stack([objective.correct(output, y).double(), objective.loss(output, y).double()])
        sums_K[:2, client] = told.to(CPU)
        sums_K[1, client] *= count
        sums_K[2, client] = count
    comm.sum([sums_K])  # each rank has filled its own places: exact in any order
    correct_K, loss_K, count_K = sums_K[:, sums_K[2] > 0]
    accuracy_K = (correct_K / count_K).sort().values
    tenth = accuracy_K[: max(1, len(accuracy_K) // 10)]
    values = (accuracy_K.mean(), accuracy_K.quantile(0.5), tenth.mean(), accuracy_K.std(correction=0))
    measures: dict[str, float | None] = dict(zip(MEASURES, map(float, values), strict=True))
    total = float(count_K.sum())
    return measures, float(correct_K.sum()) / total, float(loss_K.sum()) / total
