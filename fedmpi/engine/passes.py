"""The passes of one round: this rank's clients train, compress and send, one pass or more over the same gradients.

Shape suffixes: C clients, D numbers that all share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.config import Config
from fedmpi.engine import updates
from fedmpi.engine.device import explained
from fedmpi.engine.ledger import Ledger
from fedmpi.engine.replica import Replica
from fedmpi.engine.status import Status
from fedmpi.engine.store import ClientStore
from fedmpi.engine.trainer import Trainer
from fedmpi.engine.updates import Update
from fedmpi.errors import NumericalError
from fedmpi.meet.sums import LARGEST
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Method, Round, State, believed
from fedmpi.methods.joint import Joint
from fedmpi.ops.sums import finite, to_fixed
from fedmpi.phases import phase
from fedmpi.tasks.data import Split
from fedmpi.tasks.partitions import Partition


class Call(NamedTuple):
    """A round's clients."""

    now: Round
    called: Tensor  # int64, who downloads
    clients: Tensor  # int64, those of them whose message arrives
    weights: Tensor  # float64, theirs; the sum is 1
    placed: dict[int, Tensor]  # each worker's positions in clients
    chunks: Sequence[Tensor]  # this rank's positions, so many as are held at a time


class Sent(NamedTuple):
    """What some clients computed and made of it, as an observer sees it."""

    codec: Compressor
    update: Update
    before: State  # the clients' state when they compressed
    message: Message
    ctx: Context


class Passes:
    """What this rank does in a round's passes.

    Args:
      clients, own: the stores of what clients keep for their method, and for themselves.

    Attributes:
      observe: is shown everything that this rank's clients send.
      made: what this rank computed, by round, of the last two: a round that is done anew without a rank that ended
        takes it from here. Of data-parallel runs whose ranks survive each other.
    """

    def __init__(
        self,
        config: Config,
        comm: Comm,
        method: Method,
        trainer: Trainer,
        replica: Replica,
        ledger: Ledger,
        partition: Partition,
        clients: ClientStore,
        own: ClientStore,
    ) -> None:
        self.config, self.comm, self.method, self.trainer, self.replica = (
            config,
            comm,
            method,
            trainer,
            replica,
        )
        self.ledger, self._partition = ledger, partition
        self._clients, self._own = clients, own
        self.observe: Callable[[Sent], None] | None = None
        self.made: dict[int, Update] = {}
        self._again = config.mode == "data_parallel" and comm.survives
        self._rejects = config.on_bad_update == "reject"
        self._fusable = self._can_fuse()

    def _can_fuse(self) -> bool:
        """The method is additive and keeps nothing, all messages have one size, and nothing asks for a single one."""
        up, config = self.method.up, self.config
        single = (
            config.on_bad_update == "reject"
            or config.clip
            or config.reproducible
            or len(self.method.passes) > 1
        )
        plain = up.additive and not (up.counters or up.init() or self.trainer.keeps())
        plain = plain and up.nbytes() is not None
        return self.replica.fuses and plain and not single

    def run(self, call: Call, data: Split, status: Status, exchange: Callable[[], None]) -> Tensor:
        """Train this rank's clients and send their messages, in one pass or more over the same gradients. Returns whose
        message counts, bool, by positions in ``call.clients``. ``exchange`` ends a pass: it adds up what all ranks
        counted."""
        self._data = data
        up, replica = self.method.up, self.replica
        kept: dict[int, tuple[Tensor, Update]] = {}  # from one pass to the next
        for codec in self.method.passes:
            way = replica.open(codec, call.clients, call.weights, call.placed, call.now)
            sent: list[Tensor] = []
            with status.watch(), explained(self.trainer.device, f"training in round {call.now.t}"):
                if self.fuses and call.chunks:
                    sent.append(self._send_sum(call, status))
                for i, chunk in enumerate(() if self.fuses else call.chunks):
                    positions, update = kept.pop(i) if i in kept else self._train(call, chunk, status)
                    if codec is not up:
                        kept[i] = positions, update
                    ctx = Context(call.now, call.clients[positions], update.steps_C, replica.shared())
                    sent.append(self._send(call, update, positions, ctx, status))
            exchange()
            sent_C = self._counts(sent, len(call.clients))
            if not bool(sent_C.any()):
                break
            way.only(sent_C)
            if codec is not up:
                mean = Message({"mean": replica.between()[None]})
                status.reset()
                status.download += self.ledger.download_of(self.replica.served(call.called), mean)
        return sent_C

    def _counts(self, sent: list[Tensor], clients: int) -> Tensor:
        """Whose message counts, bool, of so many clients, when this rank's at the positions ``sent`` have sent one."""
        if not self._rejects:
            return torch.ones(clients, dtype=torch.bool)
        sent_C = torch.zeros(clients, dtype=torch.int32)
        sent_C[torch.cat([*sent, torch.zeros(0, dtype=torch.int64)])] = 1
        self.comm.sum([sent_C])
        return sent_C.bool()

    def _kept(self, update: Update, message: Message, before: State, ctx: Context) -> State:
        """What clients keep for themselves once ``message`` counts: of SCAFFOLD's c_i − c_i⁺ they take off what
        arrives."""
        kept = update.kept
        if self.trainer.plan.control and isinstance(up := self.method.up, Joint):
            arrives_CD = up.decoded("control", message, believed(up, before), ctx)
            kept = kept | {"control": kept["control"] - arrives_CD}
        return kept

    def _train(self, call: Call, positions: Tensor, status: Status) -> tuple[Tensor, Update]:
        """Train some of this rank's clients; returns those of their positions whose update is usable, and the updates.

        Raises:
          NumericalError: one is not, with ``on_bad_update: stop``.
        """
        replica, server, clients_C = self.replica, self.method.server, call.clients[positions]
        if (made := self.made.get(call.now.t)) is not None:
            return positions, made
        update = self.trainer.train(
            replica.parameters(),
            self._data,
            self._partition,
            clients_C,
            call.now.t,
            server.frozen(replica.state),
            {} if self._own.empty else self._own.get(clients_C),
        )
        finite_C = updates.finite(update)
        if not (self._rejects or bool(finite_C.all())):
            bad = int(clients_C[~finite_C][0])
            raise NumericalError(
                f"client {bad}, round {call.now.t}: the loss or gradient is not finite (loss "
                f"{float(update.loss_C[~finite_C][0])}); try a smaller local.lr than {self.config.local.lr:g}"
            )
        rows = finite_C.nonzero()[:, 0]
        update = update.select(rows)
        if self.config.clip is not None:
            update, clipped = updates.clip(update, self.config.clip.norm)
            status.count({"clipped": clipped})
        if self._again:
            self.made = {t: u for t, u in self.made.items() if t == call.now.t - 1} | {call.now.t: update}
        return positions[rows], update

    @property
    def fuses(self) -> bool:
        """A rank's clients' messages are made as one, for the sum of their gradients."""
        return self._fusable and self.observe is None

    @property
    def pools(self) -> bool:
        """Even their gradients are made as one."""
        return self.fuses and self.trainer.pools

    def _send_sum(self, call: Call, status: Status) -> Tensor:
        """Train this rank's clients, some at a time, and hand over one message for all of them; returns their
        positions."""
        positions = torch.cat(list(call.chunks))
        replica, up, weight = self.replica, self.method.up, call.weights[positions].sum()
        sum_D: Tensor | None = None
        losses = []
        for chunk in call.chunks:
            g_D, loss_C = self._sum(call, chunk, weight, status)
            sum_D = g_D if sum_D is None else sum_D.add_(g_D)
            losses.append(loss_C)
        assert sum_D is not None
        if len(call.chunks) > 1 and not finite(sum_D):  # each was
            raise NumericalError(self._too_large(call))
        clients_C = call.clients[positions]
        ctx = Context(call.now, clients_C[:1], torch.ones(1, dtype=torch.int64), replica.shared())
        with phase("encode"):
            message, _ = up.compress(sum_D[None], {}, ctx)
        updates.check_fits_float32(message, {}, call.now.t)
        with phase("server"):
            replica.way.take(weight[None], message, {}, ctx)
        status.upload += self.ledger.upload_of(clients_C, message)
        for chunk, loss_C in zip(call.chunks, losses, strict=True):
            status.loss += int(to_fixed(loss_C * call.weights[chunk]).sum())
        return positions

    def _sum(self, call: Call, positions: Tensor, weight: Tensor, status: Status) -> tuple[Tensor, Tensor]:
        """Some clients' gradients, by their shares in ``weight``, and their losses."""
        clients_C, weights_C = call.clients[positions], call.weights[positions]
        if not (self.pools and len(positions) > 1):
            _, (g_CD, loss_C, _, _) = self._train(call, positions, status)
            return (weights_C / weight).float().to(g_CD.device) @ g_CD, loss_C
        theta_D, frozen_D = self.replica.parameters(), self.method.server.frozen(self.replica.state)
        g_D, loss_C = self.trainer.pool(
            theta_D, self._data, self._partition, clients_C, weights_C / weight, call.now.t, frozen_D
        )
        if not (finite(g_D) and bool((loss_C.abs() <= LARGEST).all())):
            for position in positions.split(1):
                self._train(call, position, status)  # names the client
            raise NumericalError(self._too_large(call))
        return g_D, loss_C

    def _too_large(self, call: Call) -> str:
        return (
            f"round {call.now.t}: the sum of the clients' gradients is not finite; try a smaller local.lr "
            f"than {self.config.local.lr:g}"
        )

    def _send(self, call: Call, update: Update, positions: Tensor, ctx: Context, status: Status) -> Tensor:
        """Compress some of this rank's clients' gradients and hand the messages over; returns the positions of those
        whose message counts."""
        if not len(positions):
            return positions
        way, codec, before = self.replica.way, self.replica.way.up, self._clients.get(ctx.clients_C)
        with phase("encode"):
            message, after = codec.compress(update.g_CD, before, ctx)
        if not self._rejects:
            updates.check_fits_float32(message, after, ctx.round.t)
        else:
            weights_C = call.weights[positions]
            fits_C = updates.fits(codec, message, before, after, ctx, way.largest() / weights_C)
            rows = fits_C.nonzero()[:, 0]
            if len(rows) < len(positions):
                message, update, positions = message.select(rows), update.select(rows), positions[rows]
                there = rows.to(update.g_CD.device)
                before, after = ({n: v[there] for n, v in state.items()} for state in (before, after))
                ctx = ctx.select(rows)
        if not len(positions):
            return positions
        if self.observe:
            self.observe(Sent(codec, update, before, message, ctx))
        with phase("server"):
            way.take(call.weights[positions], message, before, ctx)
        status.upload += self.ledger.uploads(ctx.clients_C, message)
        if codec is self.method.up:
            self._clients.put(ctx.clients_C, after)
            self._own.put(ctx.clients_C, self._kept(update, message, before, ctx))
            status.count(codec.count(message))
            status.loss += int(to_fixed(update.loss_C * call.weights[positions]).sum())
        return positions
