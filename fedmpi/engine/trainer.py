"""How clients train: one after the other, many small ones at once, or those of one step as one batch.

Shape suffixes: C clients of a chunk, O of them that go on, D parameters, B samples of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmpi import random
from fedmpi.comm.base import Comm, together
from fedmpi.config import Local
from fedmpi.engine.apart import Apart, forward
from fedmpi.engine.batches import Batches, Orders, padded
from fedmpi.engine.draws import generators, seed_all
from fedmpi.engine.layout import Layout
from fedmpi.engine.probe import Traits
from fedmpi.engine.stacked import Stacked
from fedmpi.errors import NumericalError
from fedmpi.message import Message, from_bytes, to_bytes
from fedmpi.method import State
from fedmpi.phases import phase, phased
from fedmpi.plan import Plan
from fedmpi.tasks.data import Split
from fedmpi.tasks.objectives import Objective
from fedmpi.tasks.partitions import Partition

_POOL_VALUES = (
    1 << 19
)  # inputs of a pass; what a convolutional model keeps of each is some hundred times as much
_LEAST = 1e-9  # of a sample; less counts only where nothing does


class Update(NamedTuple):
    """What C clients computed.

    Attributes:
      g_CD: what servers subtract: accumulated gradients; of buffers x before − x after.
      loss_C: mean losses.
      steps_C: local steps τ.
      kept: what they keep besides what their method keeps (:meth:`Trainer.keeps`).
    """

    g_CD: Tensor
    loss_C: Tensor
    steps_C: Tensor
    kept: State = {}  # noqa: RUF012 - a named tuple's default, which nobody changes

    def select(self, rows: Tensor) -> Update:
        """Those of the clients at the positions ``rows``; itself where these are all."""
        if len(rows) == len(self.g_CD):
            return self
        kept = {name: value[rows] for name, value in self.kept.items()}
        return Update(self.g_CD[rows], self.loss_C[rows], self.steps_C[rows], kept)


class Trainer:
    """Local SGD on one flat parameter vector.

    The accumulated gradient is the sum of the local steps' directions, as in LBGM's Algorithm 1
    (lines 3 and 4); for plain SGD it is (θ₀ − θ_τ)/η, and for one step it is the gradient to the bit.

    A client shuffles its samples afresh in every round, or, ``continuing`` (data-parallel training), goes on
    where it was: it sees each sample once before it sees one again.

    Attributes:
      together: small models' clients train at once, which gives the same up to rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        objective: Objective,
        local: Local,
        seed: int,
        continuing: bool = False,
        traits: Traits = Traits(),  # noqa: B008 - a named tuple
    ) -> None:
        """Args:
        plan: what of the model travels, what each client keeps, what nobody changes.
        traits: on what its training depends besides parameters and batch.
        """
        self.model, self.plan, self.loss, self.local, self.seed = model, plan, objective.loss, local, seed
        self.spec = spec = plan.trained
        self.continuing, self.together = continuing, False
        self._objective, self._pads = objective, objective.pads
        self._orders = Orders(seed, local, continuing)
        self._draws, self._apart = traits.draws, Apart(model, plan)
        own = self._apart.trained
        # In the order of their memory, which is not that of ``own`` where convolutions are laid out otherwise.
        self.theta_D = torch.empty(own.size)
        self.grad_D = torch.zeros(own.size)
        self._laid = Layout(model, own)
        self._laid.bind(self.theta_D, self.grad_D)
        self._plain = traits.plain and self._apart.empty
        # θ_s = θ₀ − η Σ g then, and the sum is what is wanted: no pass over the parameters but this one.
        self._sums = not local.momentum and not local.weight_decay and own is spec
        plain = self._plain and local.accumulate == 1 and local.precision == "float32"
        self._stacked = Stacked(model, spec, self.loss) if plain and not continuing else None
        self._worth: bool | None = None  # to train several clients so

    @property
    def pools(self) -> bool:
        """:meth:`pool` can be called: clients make one step, and not in parts."""
        local = self.local
        return (
            self._plain
            and local.accumulate == 1
            and not self.continuing
            and local.epochs is None
            and local.steps in (None, 1)
        )

    def time(self, data: Split, batch: int, threads: int) -> float:
        """Seconds of a step on ``batch`` samples with so many threads: the best of a few."""
        torch.set_num_threads(threads)
        x, y = data.x[:batch], data.y[:batch]
        self.theta_D.zero_()
        seconds = []
        for _ in range(4):
            started = perf_counter()
            self.grad_D.zero_()
            self.loss(self.model(x), y).backward()
            seconds.append(perf_counter() - started)
        return min(seconds)

    def work(self, sizes: Tensor) -> Tensor:
        """Samples that clients of these sizes (int64) go through in a round, the same shape."""
        batch = sizes if self.local.batch is None else sizes.clamp(max=self.local.batch)
        return batch * self.steps(sizes)

    def steps(self, sizes: Tensor) -> Tensor:
        """τ for clients with so many samples, the same shape; 0 for none."""
        if self.local.steps or not self.local.epochs:
            steps = torch.full_like(sizes, self.local.steps or 1)
        else:
            batch = sizes.clamp(min=1) if self.local.batch is None else self.local.batch
            steps = self.local.epochs * -(-sizes // batch)
        return steps.where(sizes > 0, 0)

    def keeps(self) -> State:
        """What a client keeps for itself before its first round, without the axis C; {} for nothing."""
        return {"local": self._apart.kept_L} if self.plan.local.size else {}

    @phased("compute")
    def train(
        self,
        x_X: Tensor,
        data: Split,
        partition: Partition,
        clients_C: Tensor,
        round: int,
        frozen_X: Tensor | None = None,
        kept: State | None = None,
    ) -> Update:
        """Train each of ``clients_C``.

        Args:
          x_X: what all share.
          frozen_X: entries of it that stay as they are, bool.
          kept: what these clients keep for themselves, by :meth:`keeps`.
        """
        sizes_C = partition.sizes_of(clients_C)
        steps_C = self.steps(sizes_C)
        if self._stacks(x_X, data, sizes_C):
            g_CD, loss_C = self._together(x_X, data, partition, clients_C, steps_C, round, frozen_X)
            return Update(g_CD, loss_C, steps_C)
        self._orders.prepare(partition, clients_C, sizes_C, round)
        g_CX, losses = torch.zeros(len(clients_C), self.plan.spec.size), []
        own_CL = (kept or {}).get("local", self._apart.kept_L.expand(len(clients_C), -1))
        after_CL = torch.empty_like(own_CL, memory_format=torch.contiguous_format)
        theta_O = self._laid.inside(x_X) if self._apart.empty else None
        frozen_O = self._apart.mask(frozen_X)
        frozen_O = None if frozen_O is None else self._laid.inside(frozen_O)
        with generators(self._draws):
            for row, (client, steps) in enumerate(zip(clients_C.tolist(), steps_C.tolist(), strict=True)):
                index = partition.of(client)
                if theta_O is not None:
                    losses.append(self._one(theta_O, g_CX[row], data, index, steps, client, round, frozen_O))
                    continue
                start_O = self._laid.inside(self._apart.begin(x_X, own_CL[row]))
                g_O = torch.zeros_like(self.grad_D)
                losses.append(self._one(start_O, g_O, data, index, steps, client, round, frozen_O))
                now_O = self._laid.outside(self.theta_D, torch.empty_like(self.theta_D))
                g_CX[row], after_CL[row] = self._apart.end(x_X, g_O, now_O)
        after = {"local": after_CL} if self.plan.local.size else {}
        return Update(g_CX, torch.tensor(losses, dtype=torch.float64), steps_C, after)

    @phased("compute")
    def servers_own(self, x_X: Tensor, data: Split, samples: int, comm: Comm) -> Tensor:
        """The accumulated gradient ``(X,)`` of the server on so many samples of its own, drawn from the training set.
        Rank 0 makes it for all: another rank's machine may differ in the last bits.

        Raises:
          NumericalError: on every rank; it is not finite.
        """
        g_X = torch.zeros_like(x_X)
        with together(comm, "the server's own training"):
            if comm.rank == 0:
                index = random.sample(random.key(self.seed, stream="server data"), len(data.y), samples)
                steps, g_O = int(self.steps(torch.tensor(samples))), torch.zeros_like(self.grad_D)
                start_O = self._laid.inside(self._apart.begin(x_X))
                with generators(self._draws):
                    self._one(start_O, g_O, data, index, steps, client=-1, round=0, frozen_D=None)
                if not bool(g_O.isfinite().all()):
                    raise NumericalError(
                        f"server: its own gradient is not finite; try a smaller local.lr than {self.local.lr:g}"
                    )
                g_X[: self.spec.size] = g_O[: self.spec.size]
        sent = comm.broadcast(to_bytes(Message({"gradient": g_X[None]})))
        return from_bytes(sent).arrays["gradient"][0]

    def load(self, x_X: Tensor, kept: State | None = None) -> nn.Module:
        """The model with ``x_X``, and what one client keeps for itself (by default, what a new one starts with)."""
        self.theta_D.copy_(self._laid.inside(self._apart.begin(x_X, (kept or {}).get("local"))))
        return self.model

    @phased("compute")
    def pool(
        self,
        theta_D: Tensor,
        data: Split,
        partition: Partition,
        clients_C: Tensor,
        weights_C: Tensor,
        round: int,
        frozen_D: Tensor | None = None,
        samples: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of what clients of one step compute, ``(D,)``, and their losses ``(C,)``.

        One forward and backward pass for about so many ``samples`` of all clients (by default, as many as a small model
        has memory for): the gradient of the weighted sum of their mean losses is the weighted sum of their gradients.
        """
        samples = samples or max(64, _POOL_VALUES // data.x[0].numel())
        loss_C = torch.empty(len(clients_C), dtype=torch.float64)
        self._begin(self._laid.inside(theta_D))
        self.grad_D.zero_()
        for rows in self._alike(partition.sizes_of(clients_C), samples):
            with phase("load"):
                batches = Batches(self.seed, partition, clients_C[rows], round, self.local.batch)
                x_CB, y_CB = batches.step(0, len(rows)).of(data)
            with self._autocast():
                output = self.model(x_CB.flatten(0, 1))
                losses_C = self._objective.losses(output.unflatten(0, x_CB.shape[:2]), y_CB)
            (losses_C * weights_C[rows].to(losses_C.dtype)).sum().backward()
            loss_C[rows] = losses_C.detach().double()
        g_D = self._laid.outside(self.grad_D, torch.empty_like(self.grad_D))
        if self.local.weight_decay:
            g_D.add_(theta_D, alpha=self.local.weight_decay * float(weights_C.sum()))
        return (g_D if frozen_D is None else g_D.masked_fill(frozen_D, 0)), loss_C

    def _alike(self, sizes_C: Tensor, samples: int) -> Iterator[Tensor]:
        """Positions of clients whose steps take equally many samples, or nearly so where samples can be left out: all
        of them, in parts of about ``samples``."""
        batch_C = sizes_C.clamp(max=self.local.batch or int(sizes_C.max()))
        order = batch_C.argsort(stable=True)
        while len(order):
            least = int(batch_C[order[0]])
            rows = order[: max(1, samples // least)]
            rows = rows[batch_C[rows] <= (padded(least) if self._pads else least)]
            yield rows
            order = order[len(rows) :]

    def _begin(self, theta_D: Tensor) -> None:
        self.theta_D.copy_(theta_D)
        self.model.train()

    def _autocast(self) -> torch.autocast:
        mixed = self.local.precision == "bfloat16"
        return torch.autocast(self.theta_D.device.type, torch.bfloat16, enabled=mixed)

    def _stacks(self, theta_D: Tensor, data: Split, sizes_C: Tensor) -> bool:
        """These clients train at once."""
        if not self.together or self._stacked is None or len(sizes_C) == 1:
            return False
        if self._worth is None:
            batch = min(self.local.batch or int(sizes_C.double().mean()), len(data.y))
            self._begin(self._laid.inside(theta_D))
            self._worth = self._stacked.worth(data.x[:batch], data.y[:batch])
        return self._worth and (self._pads or bool((sizes_C == sizes_C[0]).all()))

    def _together(
        self,
        theta_D: Tensor,
        data: Split,
        partition: Partition,
        clients_C: Tensor,
        steps_C: Tensor,
        round: int,
        frozen_D: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """All clients' first steps, then all second ones, and so on: who makes most of them stands first, and from step
        to step fewer are left."""
        local, order = self.local, steps_C.argsort(descending=True, stable=True)
        steps_C, back = steps_C[order], order.argsort()
        batches = Batches(self.seed, partition, clients_C[order], round, local.batch)
        theta_CD = theta_D.expand(padded(len(order)), -1).clone()
        grad_CD, g_CD = torch.empty_like(theta_CD), torch.zeros(len(order), self.spec.size)
        velocity_CD = torch.zeros_like(g_CD) if local.momentum else None
        loss_C, seen_C = (torch.zeros(len(order), dtype=torch.float64) for _ in range(2))
        for step in range(int(steps_C[0])):
            on = int((steps_C > step).sum())
            with phase("load"):
                taken, rows = batches.step(step, on), padded(on)
                x_CB, y_CB = taken.first(rows).of(data)
            assert self._stacked is not None
            losses_C = self._stacked(theta_CD[:rows], x_CB, y_CB, grad_CD[:rows])[:on]
            velocity_OD = None if velocity_CD is None else velocity_CD[:on]
            direction_OD = self._direction(grad_CD[:on], theta_CD[:on], frozen_D, velocity_OD)
            g_CD[:on] += direction_OD
            if self._sums:
                torch.add(theta_D, g_CD[:on], alpha=-local.lr, out=theta_CD[:on])
            else:
                theta_CD[:on].add_(direction_OD, alpha=-local.lr)
            weight_C = self._objective.weights(y_CB[:on])
            loss_C[:on] += losses_C * weight_C
            seen_C[:on] += weight_C
        ordered = bool((steps_C[:-1] == steps_C[1:]).all())
        return (g_CD if ordered else g_CD[back]), (loss_C / seen_C.clamp(min=_LEAST))[back]

    def _direction(
        self, grad: Tensor, theta: Tensor, frozen_D: Tensor | None, velocity: Tensor | None
    ) -> Tensor:
        """What a step subtracts η times, ``(D,)`` or ``(C, D)``; ``velocity`` is changed in place."""
        if self.local.weight_decay:
            grad = grad.add(theta, alpha=self.local.weight_decay)
        if frozen_D is not None:
            grad = grad.masked_fill(frozen_D, 0)
        return grad if velocity is None else velocity.mul_(self.local.momentum).add_(grad)

    def _one(
        self,
        theta_D: Tensor,
        g_D: Tensor,
        data: Split,
        index: Tensor,
        steps: int,
        client: int,
        round: int,
        frozen_D: Tensor | None,
    ) -> float:
        """A client's training, whose accumulated gradient becomes ``g_D``; ``theta_D`` and ``frozen_D`` are laid out as
        the trainer's memory."""
        batch = min(self.local.batch or len(index), len(index))
        self._begin(theta_D)
        self.grad_D.zero_()
        velocity_D = torch.zeros_like(self.theta_D) if self.local.momentum else None
        sum_D = self.grad_D if self._sums else torch.zeros_like(self.theta_D)
        total = seen = 0.0
        for step in range(steps):
            with phase("load"):
                chosen = self._orders.batch(index, batch, client, round, step)
            if self._draws:
                seed_all(random.key(self.seed, round, client, f"draws {step}"))
            loss, weight = self._backward(data, chosen)
            total += loss * weight
            seen += weight
            if self._sums:  # backward adds to what there is
                if frozen_D is not None:
                    self.grad_D.masked_fill_(frozen_D, 0)
                if step + 1 < steps:
                    torch.add(theta_D, self.grad_D, alpha=-self.local.lr, out=self.theta_D)
                continue
            direction_D = self._direction(self.grad_D, self.theta_D, frozen_D, velocity_D)
            sum_D.add_(direction_D)
            self.theta_D.add_(direction_D, alpha=-self.local.lr)
            self.grad_D.zero_()
        self._laid.outside(sum_D, g_D)
        return total / max(seen, _LEAST)

    def _backward(self, data: Split, chosen: Tensor) -> tuple[float, float]:
        """Add the gradient of the mean loss over what counts of the samples, in so many parts as asked for; returns the
        loss and how many samples' worth that is."""
        parts = chosen.chunk(self.local.accumulate)
        weights = [float(self._objective.weights(data.y[part][None])) for part in parts]
        total, whole = 0.0, sum(weights)
        for part, weight in zip(parts, weights, strict=True):
            with phase("load"):
                x, y = data.x[part], data.y[part]
            with self._autocast():
                loss = self.loss(forward(self.model, x), y)
            share = weight / max(whole, _LEAST)
            (loss if share == 1 else loss * share).backward()
            total += loss.item() * share
        return total, whole
