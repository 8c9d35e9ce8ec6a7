"""How clients train: one after the other, many small ones at once, or those of one step as one batch.

Shape suffixes: C clients of a chunk, O of them that go on, D parameters, B samples of a step.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from fedmpi import random
from fedmpi.comm.base import Comm
from fedmpi.engine.apart import Apart
from fedmpi.engine.batches import Batches, Orders, alike, local_steps
from fedmpi.engine.device import Place, Samples, synchronize
from fedmpi.engine.draws import generators, held, seed_all
from fedmpi.engine.gradient import LEAST, Gradient
from fedmpi.engine.layout import Layout
from fedmpi.engine.own_optimizer import TorchOptimizer
from fedmpi.engine.probe import Traits
from fedmpi.engine.rules import Rule
from fedmpi.engine.stacked import Stacked, at_once, suits
from fedmpi.engine.tallied import tallied
from fedmpi.engine.updates import Update, on_host
from fedmpi.local import Local
from fedmpi.message import CPU
from fedmpi.method import State, nest, placed, unnest
from fedmpi.phases import phase, phased
from fedmpi.plan import Plan
from fedmpi.tasks.data import Split
from fedmpi.tasks.metrics import Measures
from fedmpi.tasks.objectives import Objective
from fedmpi.tasks.partitions import Partition

# Inputs of a pass; what a convolutional model keeps of each is some hundred times as much.
_POOL_VALUES = 1 << 19


class Trainer:
    """Local SGD on one flat parameter vector.

    The accumulated gradient is the sum of the local steps' directions, as in LBGM's Algorithm 1
    (lines 3 and 4); for plain SGD it is (θ₀ − θ_τ)/η, and for one step it is the gradient to the bit.

    A client shuffles its samples afresh in every round, or, ``continuing`` (data-parallel training), goes on where it
    was: it sees each sample once before it sees one again, and its rate changes from step to step.

    Attributes:
      together: small models' clients train at once, which gives the same up to rounding.
      device: where it computes; all tensors of its calls lie there but for ids, numbers of steps, weights and losses.
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
        rounds: int = 1,
        place: Place = Place(),  # noqa: B008 - a named tuple
    ) -> None:
        """Args:
        plan: what of the model travels, what each client keeps, what nobody changes.
        traits: on what its training depends besides parameters and batch.
        rounds: of the run, over which the clients' rate changes.
        place: where it computes; the model goes there.
        """
        model = model.to(place.device)
        self._place, self.device = place, place.device
        self._samples: dict[int, Samples] = {}  # those on a device
        self.model, self.plan, self.loss, self.local, self.seed = model, plan, objective.loss, local, seed
        self.spec = spec = plan.trained
        self.continuing, self.together = continuing, False
        self._objective, self._pads = objective, objective.pads
        self._gradient = Gradient(model, objective, local, place.device)
        self._orders = Orders(seed, local, continuing)
        self._draws, self._held, self._apart = traits.draws, held(model), Apart(model, plan)
        own = self._apart.trained  # what follows lies otherwise where convolutions do
        self.theta_D, self.grad_D = (torch.zeros(own.size, device=self.device) for _ in range(2))
        self._laid = Layout(model, own)
        self._laid.bind(self.theta_D, self.grad_D)
        self.rule, self._rounds = Rule.of(local), rounds
        self._parts = (local.steps or 1) if continuing else 1  # of a round, each with a rate of its own
        keep = self._parts > 1 if local.keep is None else local.keep
        self._foreign = TorchOptimizer.of(local, model, own.names, keep)
        self._draws = self._draws or (self._foreign is not None and self._foreign.draws)
        self._keeps = keep and bool(self._memory(self.theta_D[:0]))
        self._plain = traits.plain and self._apart.empty and not (self._keeps or plan.control)
        # θ_s = θ₀ − η Σ g then, and the sum is what is wanted: no pass over the parameters but this one.
        self._sums = self.rule.plain and own is spec and not plan.control and self._parts == 1
        self._alone, whole = traits.alone, local.accumulate == 1 and local.precision == "float32"
        stacks = whole and traits.maps and not (traits.draws or plan.control or continuing or self._foreign)
        self._stacked = Stacked(model, own, self.loss, self._apart.changing) if stacks else None
        self._worth: bool | None = None  # to train several clients so

    @property
    def pools(self) -> bool:
        """:meth:`pool` can be called: clients make one step, and not in parts."""
        local, one_each = self.local, self._plain and not self.continuing
        one_step = local.epochs is None and local.steps in (None, 1)
        return one_each and one_step and self.rule.first and local.accumulate == 1

    def samples(self, data: Split) -> Samples:
        """A split as it comes to the trainer's device; one that lies there stays."""
        if self.device == CPU:
            return Samples(data)
        if id(data) not in self._samples:  # which it holds: no other split has its id
            self._samples[id(data)] = Samples(data, self._place)
        return self._samples[id(data)]

    def time(self, data: Split, batch: int, threads: int) -> float:
        """Seconds of a step on ``batch`` samples with so many threads: the best of a few."""
        torch.set_num_threads(threads)
        x, y = self.samples(data).take(torch.arange(min(batch, len(data.y))))
        self.theta_D.zero_()
        seconds = []
        with generators(self._draws, self.device):  # another rank of this process may be training
            for _ in range(4):
                started = perf_counter()
                self.grad_D.zero_()
                self.loss(self.model(x), y).backward()
                synchronize(self.device)
                seconds.append(perf_counter() - started)
        return min(seconds)

    def keeps(self) -> State:
        """What a client keeps for itself before its first round, without the axis C; {} for nothing."""
        kept = {"local": self._apart.kept_L} if self.plan.local.size else {}
        if self._keeps:
            kept |= nest(self._memory(self.theta_D), "optimizer.")
        if self.plan.control:
            kept["control"] = torch.zeros(self.spec.size, device=self.device)
        return kept

    def _mask(self, frozen_X: Tensor | None) -> Tensor | None:
        """Of what a client steps, as it lies, what stays as it is."""
        frozen_O = self._apart.mask(frozen_X)
        return None if frozen_O is None else self._laid.inside(frozen_O)

    def _memory(self, like: Tensor) -> State:
        """The rule's, of vectors of this length, or the own optimizer's, before a client's first step."""
        return self._foreign.fresh if self._foreign else self.rule.init(like)

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
        steps_C = local_steps(self.local, sizes_C)
        if stacked := self._stacks(x_X, data, sizes_C):
            lr = self.local.lr * self.local.schedule.factor(round, self._rounds)
            batches = partial(Batches, self.seed, partition, round=round, batch=self.local.batch)
            how = stacked, self._apart, self.rule, self._objective, lr, x_X, self.samples(data), batches
            update = at_once(*how, clients_C, steps_C, frozen_X, kept or {})
            return update._replace(g_CD=self._scaled(update.g_CD, steps_C, round))
        self._orders.prepare(partition, clients_C, sizes_C, round)
        g_CX, losses = torch.zeros(len(clients_C), self.plan.spec.size, device=self.device), []
        after = {name: value.clone() for name, value in (kept or {}).items()}
        theta_O, frozen_O = self._laid.inside(x_X) if self._plain else None, self._mask(frozen_X)
        with generators(self._draws, self.device):
            for row, (client, steps) in enumerate(zip(clients_C.tolist(), steps_C.tolist(), strict=True)):
                call = self.samples(data), partition.of(client), steps, client, round, frozen_O
                if theta_O is not None:
                    losses.append(self._one(theta_O, g_CX[row], *call))
                else:
                    own = {name: value[row] for name, value in after.items()}
                    losses.append(self._with_kept(x_X, g_CX[row], own, *call))
        loss_C = on_host(losses)
        return Update(self._scaled(g_CX, steps_C, round), loss_C, steps_C, after)

    def _with_kept(
        self,
        x_X: Tensor,
        g_X: Tensor,
        own: State,
        data: Samples,
        index: Tensor,
        steps: int,
        client: int,
        round: int,
        frozen_O: Tensor | None,
    ) -> float | Tensor:
        """A client's training with buffers and what it keeps: ``g_X`` is filled, ``own`` changed in place.

        SCAFFOLD's part is c_i − c_i⁺ with c_i⁺ = c_i − c + (x − y)/(τη), option II; c_i itself stays, until it is known
        what of the difference arrives.
        """
        start_O = self._laid.inside(self._apart.begin(x_X, own.get("local")))
        g_O = torch.zeros_like(self.grad_D)
        size, control, shift_O = self.spec.size, self.plan.control, None
        if control:
            drift_D = x_X[control] - own["control"]
            shift_O = self._laid.inside(torch.cat([drift_D, drift_D.new_zeros(len(g_O) - size)]))
        memory = unnest(own, "optimizer.") or None
        loss = self._one(start_O, g_O, data, index, steps, client, round, frozen_O, memory, shift_O)
        now_O = self._laid.outside(self.theta_D, torch.empty_like(self.theta_D))
        ended_X, local_L = self._apart.end(x_X, g_O, now_O)
        if control:
            g_X[control] = x_X[control] - g_O[:size] / steps
        g_X[: len(ended_X)] = ended_X
        if "local" in own:
            own["local"].copy_(local_L)
        return loss

    def _scaled(self, g_CX: Tensor, steps_C: Tensor, round: int) -> Tensor:
        """Accumulated gradients as the server takes them: in units of ``local.lr``, divided by what FedNova says."""
        factor = self.local.schedule.factor(round, self._rounds) if self._parts == 1 else 1.0
        if (factor_C := self.rule.factors(self.local, steps_C, factor)) is not None:
            g_CX[:, : self.spec.size] *= factor_C.to(g_CX.device)
        return g_CX

    def alone(self, x_X: Tensor, data: Split, index: Tensor) -> Tensor:
        """The accumulated gradient ``(D,)`` of nobody's training on these samples."""
        steps, g_O = int(local_steps(self.local, torch.tensor(len(index)))), torch.zeros_like(self.grad_D)
        start_O = self._laid.inside(self._apart.begin(x_X))
        with generators(self._draws, self.device):
            self._one(start_O, g_O, self.samples(data), index, steps, -1, 0, None)
        return g_O[: self.spec.size]

    def load(self, x_X: Tensor, kept: State | None = None) -> nn.Module:
        """The model with ``x_X``, and what one client keeps for itself (by default, what a new one starts with)."""
        kept = placed(kept or {}, self.device)
        self.theta_D.copy_(self._laid.inside(self._apart.begin(x_X, kept.get("local"))))
        return self.model

    @torch.enable_grad()
    def after(
        self,
        x_X: Tensor,
        data: Split,
        partition: Partition,
        round: int,
        frozen_X: Tensor | None,
        client: int,
        kept: State,
    ) -> nn.Module:
        """The model as one client has it after its local steps of a round from ``x_X``; ``kept`` stays as it is."""
        index = partition.of(client)
        steps = int(local_steps(self.local, torch.tensor(len(index))))
        if not steps:  # no sample
            return self.load(x_X, kept)
        own = {name: value.clone() for name, value in placed(kept, self.device).items()}
        call = self.samples(data), index, steps, client, round
        with generators(self._draws, self.device):
            self._with_kept(x_X, torch.zeros_like(x_X), own, *call, self._mask(frozen_X))
        if self._sums:  # which leaves out the last step
            start_O = self._laid.inside(self._apart.begin(x_X, own.get("local")))
            lr = self.local.lr * self.local.schedule.factor(round, self._rounds)
            torch.add(start_O, self.grad_D, alpha=-lr, out=self.theta_D)
        return self.model

    @phased("evaluate")
    def evaluate(
        self, measured: Measures, x_X: Tensor, test: Split, batch: int, comm: Comm
    ) -> dict[str, float | None]:
        """Metrics and mean loss of ``x_X`` on a test set, on every rank, as :func:`tallied`."""
        return tallied(self.load(x_X).eval(), self.samples(test), measured, len(test.y), batch, comm)

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
        parts, losses = [], []
        self._begin(self._laid.inside(theta_D))
        self.grad_D.zero_()
        batch_C = partition.sizes_of(clients_C)
        batch_C = batch_C.clamp(max=self.local.batch or int(batch_C.max()))
        for rows in alike(batch_C, samples, self._pads):
            with phase("load"):
                batches = Batches(self.seed, partition, clients_C[rows], round, self.local.batch)
                x_CB, y_CB = batches.step(0, len(rows)).of(self.samples(data))
            with self._gradient.autocast():
                output = self.model(x_CB.flatten(0, 1))
                losses_C = self._objective.losses(output.unflatten(0, x_CB.shape[:2]), y_CB)
            (losses_C * weights_C[rows].to(losses_C)).sum().backward()
            parts.append(rows)
            losses.append(losses_C.detach().double())
        loss_C[torch.cat(parts)] = torch.cat(losses).to(CPU)
        g_D = self._laid.outside(self.grad_D, torch.empty_like(self.grad_D))
        if self.local.weight_decay:
            g_D.add_(theta_D, alpha=self.local.weight_decay * float(weights_C.sum()))
        g_D.mul_(self.local.schedule.factor(round, self._rounds))
        return (g_D if frozen_D is None else g_D.masked_fill(frozen_D, 0)), loss_C

    def _begin(self, theta_D: Tensor) -> None:
        self.theta_D.copy_(theta_D)
        self.model.train()

    def _stacks(self, x_X: Tensor, data: Split, sizes_C: Tensor) -> Stacked | None:
        """What trains these clients at once; None where they train one after the other."""
        several = len(sizes_C) > 1 and suits(sizes_C, self.local.batch, self._pads, self._alone)
        if not (self.together and several) or self._stacked is None:
            return None
        if self._worth is None:
            batch = min(self.local.batch or int(sizes_C.double().mean()), len(data.y))
            self._begin(self._laid.inside(self._apart.begin(x_X)))
            self._worth = self._stacked.worth(*self.samples(data).take(torch.arange(batch)))
        return self._stacked if self._worth else None

    def _one(
        self,
        theta_D: Tensor,
        g_D: Tensor,
        data: Samples,
        index: Tensor,
        steps: int,
        client: int,
        round: int,
        frozen_D: Tensor | None,
        memory: State | None = None,
        shift_D: Tensor | None = None,
    ) -> float | Tensor:
        """A client's training, whose directions' sum becomes ``g_D``; ``theta_D``, ``frozen_D``, the rule's ``memory``
        and ``shift_D``, which is added to every gradient, are laid out as the trainer's memory."""
        batch = min(self.local.batch or len(index), len(index))
        self._begin(theta_D)
        self.grad_D.zero_()
        factor, parts = partial(self.local.schedule.factor, round, self._rounds), self._parts
        lr = self.local.lr * (factor() if parts == 1 else 1)
        foreign, kept = self._foreign, memory
        memory = self.rule.init(self.theta_D) if memory is None else memory
        if foreign:
            foreign.begin(kept)
        sum_D = self.grad_D if self._sums else torch.zeros_like(self.theta_D)
        total: float | Tensor = 0.0
        seen = 0.0
        for step in range(steps):
            with phase("load"):
                chosen = self._orders.batch(index, batch, client, round, step)
            if self._draws:
                key = random.key(self.seed, round, client, f"draws {step}")
                seed_all(key, self.device, self._held)
            loss, weight = self._gradient.add(data, chosen)
            total += loss * weight
            seen += weight
            if self._sums:  # backward adds to what there is
                if frozen_D is not None:
                    self.grad_D.masked_fill_(frozen_D, 0)
                if step + 1 < steps:
                    torch.add(theta_D, self.grad_D, alpha=-lr, out=self.theta_D)
                continue
            if shift_D is not None:
                self.grad_D.add_(shift_D)
            direction_D = self.rule.direction(memory, self.grad_D, self.theta_D, theta_D, frozen_D)
            share = factor(step, parts) if parts > 1 else 1.0
            if foreign:
                self.grad_D.copy_(direction_D)
                foreign.step(lr * share)
                if frozen_D is not None:
                    self.theta_D.copy_(torch.where(frozen_D, theta_D, self.theta_D))
                self.grad_D.zero_()
                continue
            sum_D.add_(direction_D, alpha=share)
            self.theta_D.add_(direction_D, alpha=-lr * share)
            self.grad_D.zero_()
        if foreign:
            foreign.end(kept)
            torch.sub(theta_D, self.theta_D, out=sum_D).div_(lr)
        self._laid.outside(sum_D, g_D)
        return total / max(seen, LEAST)
