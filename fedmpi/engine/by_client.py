"""What every client's model comes to on what it is tested on itself, and what each keeps of the model.

Shape suffixes: X numbers that all share, L that each client keeps for itself, K clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmpi.comm.base import Comm, together
from fedmpi.engine.store import ClientStore
from fedmpi.engine.trainer import Trainer
from fedmpi.message import CPU
from fedmpi.method import State
from fedmpi.phases import phased
from fedmpi.tasks.data import Split
from fedmpi.tasks.metrics import Measures, Tally
from fedmpi.tasks.partitions import Partition

_AFTER = "after_"


def of_clients(measured: Measures, after: bool = False) -> tuple[str, ...]:
    """Of the first metric of clients on their own test samples: the mean, the median, the mean of the worst tenth, the
    standard deviation. Each client counts once; one where it is not defined does not. ``after`` a round of local steps,
    too."""
    names = measured.first, "median", "worst", "spread"
    return tuple(f"client_{when}{name}" for when in ("", _AFTER)[: 1 + after] for name in names)


class Tested(NamedTuple):
    """Attributes:
    measures: by the names of :func:`of_clients`.
    whole: metrics and mean loss over all these samples, where clients have models of their own.
    clients: int64, who has such samples.
    before, after: the first metric of each of ``clients``, NaN where it is not defined; ``after`` a round of local
      steps, or None.
    """

    measures: dict[str, float | None]
    whole: dict[str, float | None]
    clients: Tensor
    before: Tensor
    after: Tensor | None


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
    tuned: Callable[[int, State], nn.Module] | None = None,
) -> Tested:
    """Every client's model on its own test samples, on all ranks the same.

    Args:
      held: those of ``data``, by client.
      own: what clients keep for themselves; one that never came has what a new one starts with.
      home: the rank that keeps it, of each; None: they are shared out.
      tuned: the model of a client, with what it keeps, after a round of local steps; None: that is not asked for.
    """
    personal, samples = bool(trainer.plan.local.names), trainer.samples(data)
    clients = (held.sizes > 0).nonzero()[:, 0]
    ranks = home(clients)
    ranks = clients % comm.size if ranks is None else ranks
    whole = Tally(measured if personal else measured._replace(metrics={}), held.clients, len(held.index_N))
    first = measured._replace(metrics={measured.first: measured.metrics[measured.first]})
    value_2K = torch.zeros(2, held.clients, dtype=torch.float64)

    def score(output: Tensor, y: Tensor) -> float:
        tally = Tally(first, 1, len(y))
        tally.add(0, slice(None), output, y)
        value = tally.values()[measured.first]
        return math.nan if value is None else value

    if not personal:
        model = trainer.load(x_X).eval()
    asked = measured.own or tuned is not None  # the user's code, whose error on one rank ends all
    with together(comm, "testing clients") if asked else nullcontext():
        for client in clients[ranks == comm.rank].tolist():
            kept = {name: value[0] for name, value in own.get(torch.tensor([client])).items()}
            if personal or tuned is not None:
                model = trainer.load(x_X, kept).eval()
            index = held.of(client)
            x, y = samples.take(index)
            output = model(x)
            value_2K[0, client] = score(output, y)
            if personal:
                begin = int(held.offset[client])
                whole.add(client, slice(begin, begin + len(index)), output, y)
            if tuned is not None:
                value_2K[1, client] = score(tuned(client, kept).eval()(x), y)
    comm.sum([value_2K, *whole.tensors])  # each rank has filled its own places: exact
    names, found = of_clients(measured, tuned is not None), value_2K[:, clients]
    figures = [figure for row in found[: 1 + (tuned is not None)] for figure in _figures(row, measured)]
    return Tested(
        dict(zip(names, figures, strict=True)),
        whole.values(),
        clients,
        found[0],
        None if tuned is None else found[1],
    )


def _figures(value_K: Tensor, measured: Measures) -> tuple[float | None, ...]:
    """As :func:`of_clients` names them."""
    value_K = value_K[~value_K.isnan()].sort(descending=measured.least(measured.first)).values
    if not len(value_K):
        return (None,) * 4
    tenth_K = value_K[: max(1, len(value_K) // 10)]
    found = value_K.mean(), value_K.quantile(0.5), tenth_K.mean(), value_K.std(correction=0)
    return tuple(map(float, found))


def table(found: Tested, sizes: Tensor, metric: str) -> str:
    """clients.csv: a line a client that was tested.

    Args:
      sizes: samples that each client trains with.
    """
    header = ["client", "samples", metric, *([] if found.after is None else [f"after_{metric}"])]
    columns = [found.clients, sizes[found.clients], found.before]
    columns += [] if found.after is None else [found.after]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    lines = [",".join("" if value != value else f"{value}" for value in row) for row in rows]
    return "\n".join([",".join(header), *lines]) + "\n"


def personal_parts(trainer: Trainer, own: ClientStore, clients: int, comm: Comm) -> State:
    """What clients keep of the model, on every rank: ``clients`` int64 ``(K,)``, who has trained, and by the names of
    the model's state dict a row of each one's values, ``(K, …)``. With a row in place of its own values,
    ``model.safetensors`` is that client's model; of a client that never came it is as it is.

    Args:
      clients: of the run.
    """
    local, mine = trainer.plan.local, own.known
    came = torch.zeros(clients, dtype=torch.int64)
    came[mine] = 1
    comm.sum([came])
    ids = came.nonzero()[:, 0]
    kept_KL = torch.zeros(len(ids), local.size)
    if len(mine):
        kept_KL[torch.searchsorted(ids, mine)] = own.get(mine)["local"].to(CPU)
    comm.sum([kept_KL.view(torch.int32)])  # whole numbers, of which each is one rank's: the bits stay
    kinds = {name: value.dtype for name, value in (trainer.model.state_dict()).items()}
    rows = {name: value.to(kinds.get(name, value.dtype)) for name, value in local.views(kept_KL).items()}
    return {
        **{name: value.clone(memory_format=torch.contiguous_format) for name, value in rows.items()},
        "clients": ids,
    }
