"""The round loop, the only one: every method, topology and number of ranks passes through it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, together
from fedmpi.comm.placement import own_cpus
from fedmpi.config import Config
from fedmpi.engine import updates
from fedmpi.engine.clients import cohort, place, survivors
from fedmpi.engine.fingerprint import fingerprint
from fedmpi.engine.ledger import Ledger
from fedmpi.engine.manifest import Lost
from fedmpi.engine.parts import load
from fedmpi.engine.replica import Kind, Replica, sums_of
from fedmpi.engine.status import SUMMED, Status
from fedmpi.engine.store import Kept, fits_here, make_store, nobody
from fedmpi.engine.timing import Clock
from fedmpi.engine.trainer import Trainer, Update
from fedmpi.errors import FedMPIError, NumericalError
from fedmpi.meet.sums import LARGEST
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Round, State
from fedmpi.ops.sums import finite, from_fixed, to_fixed
from fedmpi.phases import phase

_CHUNK_VALUES = 1 << 22  # gradients of so many numbers are held at a time
_MANY = 200  # steps of a run; fewer are done before clients' steps at once are ready
_WORTH = 0.8  # of one thread's time: on a busy machine several threads wait for each other


class _Call(NamedTuple):
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


class Simulation:
    """One rank's whole state between rounds.

    Attributes:
      observe: is shown everything that this rank's clients send.
      around: makes what each round is done inside of.
      chunk: so many clients' gradients are held at a time.
    """

    def __init__(self, config: Config, comm: Comm) -> None:
        self.config, self.comm = config, comm
        self.observe: Callable[[Sent], None] | None = None
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        parts = load(config)
        self.data, self.objective, self.partition = parts.data, parts.objective, parts.partition
        self.spec, self.method = parts.spec, parts.method
        self.fingerprint = fingerprint(self.data, self.partition)
        up = self.method.up
        self.stores = self.clients, peers = make_store(up.init, config), make_store(up.init_peer, config)
        self.memory = fits_here(config, comm, self.clients, peers)
        workers = config.mode == "data_parallel"
        self.rounds_per_epoch = self._passes_of_data() if workers else config.rounds_per_epoch
        kind: Kind = "data_parallel" if workers else config.topology
        self.replica = Replica(comm, self.method, parts.theta_D, sums_of(config, self.method), peers, kind)
        self.trainer = Trainer(parts.model, self.spec, self.objective, config.local, config.seed, workers)
        steps = config.rounds * int(self.trainer.steps(self.partition.sizes.max()))
        # Not where a client's row of a batched product may have other last bits, nor where tracing takes longer.
        self.trainer.together = not (config.reproducible or workers or steps < _MANY)
        self._fusable = self._can_fuse()
        self.ledger = Ledger(config.clients)
        self.clock = self._clock()
        self.rejects = config.on_bad_update == "reject"
        self.homes_K: Tensor | None = None  # each client's rank, where it does not follow from its number
        self.dropped: dict[int, Tensor] = {}  # by round, the clients that were lost with a rank
        self.lost: list[Lost] = []
        self.chunk = 1 if config.reproducible else max(1, _CHUNK_VALUES // self.spec.size)
        self.trained = self.participations = self.called = 0
        self.bytes = dict.fromkeys(SUMMED[1:], 0)
        self.counters = (*self.method.up.counters, *updates.counters(config, self.partition))
        self.counts: dict[str, int] = dict.fromkeys(self.counters, 0)
        self.simulated_seconds = 0.0
        self.accuracy = self.test_loss = float("nan")
        self.started = time.monotonic()
        self.asks: Callable[[], tuple[bool, bool]] = lambda: (False, False)  # to stop, to save, by this rank
        self.asked = (False, False)  # by any rank, as of the last round
        self.error: FedMPIError | None = None  # of this rank, not known to the others yet

    def kept(self) -> dict[str, Kept]:
        """What this rank keeps of clients, for a checkpoint."""
        rank = self.comm.rank

        def here(clients: Tensor) -> Tensor:
            home = self.home(clients)
            return nobody(clients) if home is None else (home == rank).nonzero()[:, 0]

        return {"clients": Kept(self.clients, here, here), **self.replica.kept()}

    def home(self, clients: Tensor) -> Tensor | None:
        """The rank that keeps the state of each; None where they keep nothing and can train anywhere."""
        if self.clients.empty and self.config.mode == "federated":
            return None
        workers = torch.tensor(self.replica.workers)
        return workers[clients % len(workers)] if self.homes_K is None else self.homes_K[clients]

    def set_threads(self) -> None:
        """Give torch the threads that the configuration (or OMP_NUM_THREADS) asks for; without a wish, this rank's
        share of the cores where they make a step clearly faster (small models are faster on one)."""
        config, share = self.config, own_cpus(self.comm)
        wish = config.threads or (torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None)
        if config.reproducible or wish or share < 2:
            torch.set_num_threads(1 if config.reproducible else wish or 1)
            return
        batch = config.local.batch or int(self.partition.sizes.double().mean())
        one, all_ = (self.trainer.time(self.data.train, batch, n) for n in (1, share))
        torch.set_num_threads(share if all_ < _WORTH * one else 1)

    def _can_fuse(self) -> bool:
        """The method is additive and keeps nothing, all messages have one size, and nothing asks for a single one."""
        up, config = self.method.up, self.config
        single = (
            config.on_bad_update == "reject"
            or config.clip
            or config.reproducible
            or len(self.method.passes) > 1
        )
        plain = up.additive and not up.counters and not up.init() and up.nbytes() is not None
        return self.replica.fuses and plain and not single

    def _passes_of_data(self) -> int:
        """Rounds in which a rank sees all its samples once."""
        largest = int(self.partition.sizes.max())
        return -(-largest // (self.config.local.batch or largest))

    def _clock(self) -> Clock | None:
        config = self.config
        if config.time is None:
            return None
        sizes = [codec.nbytes() for codec in self.method.passes]
        first = sum(4 * self.spec.size if size is None else size for size in sizes)
        work = self.trainer.work(self.partition.sizes)
        return Clock(config.time, config.seed, work, self.ledger, first)

    def round(self, t: int) -> dict[str, Any]:
        """One round; returns its line of metrics."""
        with self.around():
            return self._round(t)

    def _round(self, t: int) -> dict[str, Any]:
        started = time.monotonic()
        call, status = self.call(t), Status(self.counters, self.error)
        if t == 0 and self.method.server.samples:
            theta_D, samples = self.replica.parameters(), self.method.server.samples
            self.replica.prepare(self.trainer.servers_own(theta_D, self.data.train, samples, self.comm))
        if self.clock:
            self.clock.start(t, call.clients)
        with status.watch():
            status.download += self.ledger.downloads(
                call.called, self.replica.served(call.called), self.method.server, self.replica.state
            )
        call = self._in_time(call, status)
        before = self.replica.state
        sent_C = self._passes(call, status)
        if bool(sent_C.any()):
            self.replica.finish()
        else:
            self.replica.skip(before, call.now)
        line = self._account(call, status, sent_C)
        if (t + 1) % self.config.evaluate_every == 0 or t + 1 == self.config.rounds:
            self.accuracy, self.test_loss = self.trainer.evaluate(
                self.replica.parameters(), self.data.test, self.config.test_batch, self.comm
            )
            line |= {"accuracy": self.accuracy, "test_loss": self.test_loss}
        return line | {"seconds": time.monotonic() - started}

    def call(self, t: int) -> _Call:
        """Who takes part in round t, with what weight, and where."""
        config = self.config
        called = cohort(config, self.partition, t)
        full = called[self.partition.sizes_of(called) > 0]  # who has no sample has nothing to send
        clients = survivors(config, full, t)
        if t in self.dropped:
            clients = clients[~torch.isin(clients, self.dropped[t])]
        now = Round(config.seed, t, config.server_lr(t), self.rounds_per_epoch)
        return self._among(now, called, clients)

    def _among(self, now: Round, called: Tensor, clients: Tensor) -> _Call:
        config, samples = self.config, self.partition.sizes_of(clients)
        # A client that was drawn by its number of samples counts once; so do a vote and a rank.
        workers = config.mode == "data_parallel"
        by_samples = self.method.server.weighted and config.sampling != "weighted" and not workers
        weights = (samples if by_samples else torch.ones_like(samples)).double()
        placed = place(clients, samples, self.replica.workers, self.home(clients))
        mine = placed.get(self.comm.rank, clients[:0])
        chunk = len(clients) if self._pools else self.chunk
        chunks = mine.split(chunk) if len(mine) else ()
        return _Call(now, called, clients, weights / weights.sum(), placed, chunks)

    def _in_time(self, call: _Call, status: Status) -> _Call:
        """The call of those only whose message comes in time; the others have downloaded, and keep what they had."""
        if self.clock is None:
            return call
        expected = self.bytes["upload"] // self.participations if self.participations else self.clock.first
        arrived = self.clock.in_time(self.comm, expected)
        status.total["late"] = len(call.clients) - len(arrived)
        return self._among(call.now, call.called, call.clients[arrived])

    def _passes(self, call: _Call, status: Status) -> Tensor:
        """Train this rank's clients and send their messages, in one pass or more over the same gradients. Returns whose
        message counts, bool, by positions in ``call.clients``."""
        up, replica = self.method.up, self.replica
        kept: dict[int, tuple[Tensor, Update]] = {}  # from one pass to the next
        for codec in self.method.passes:
            way = replica.open(codec, call.clients, call.weights, call.placed, call.now)
            sent: list[Tensor] = []
            with status.watch():
                for chunk in call.chunks if self._fuses else ():
                    sent.append(self._send_sum(call, chunk, status))
                for i, chunk in enumerate(() if self._fuses else call.chunks):
                    positions, update = kept.pop(i) if i in kept else self._train(call, chunk, status)
                    if codec is not up:
                        kept[i] = positions, update
                    ctx = Context(call.now, call.clients[positions], update.steps_C, replica.shared())
                    sent.append(self._send(call, update, positions, ctx, status))
            self._exchange(status, call.now.t)
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
        if not self.rejects:
            return torch.ones(clients, dtype=torch.bool)
        sent_C = torch.zeros(clients, dtype=torch.int32)
        sent_C[torch.cat([*sent, torch.zeros(0, dtype=torch.int64)])] = 1
        self.comm.sum([sent_C])
        return sent_C.bool()

    def _account(self, call: _Call, status: Status, sent_C: Tensor) -> dict[str, Any]:
        """Add the round to the run's totals, and return its line of metrics."""
        total, sent = status.total, int(sent_C.sum())
        total["rejected"] = len(call.clients) - sent
        total["empty"] = int((self.partition.sizes_of(call.called) == 0).sum())
        self.trained += sum(map(len, call.chunks))
        self.participations += sent
        self.called += len(call.called)
        self.bytes = {name: n + total[name] for name, n in self.bytes.items()}
        self.counts = {name: n + total[name] for name, n in self.counts.items()}
        simulated = {} if self.clock is None else {"simulated_seconds": self.clock.stop(self.comm)}
        self.simulated_seconds += sum(simulated.values())
        return {
            "round": call.now.t,
            "loss": float(from_fixed(torch.tensor(total["loss"]))) / self.replica.way.share if sent else None,
            "accuracy": None,
            "test_loss": None,
            "clients": sent,
            "upload_bytes": total["upload"],
            "download_bytes": total["download"],
            **{name: total[name] for name in self.counts},
            **simulated,
        }

    def _exchange(self, status: Status, t: int) -> None:
        """Add up what the ranks counted; when one has failed, all fail with its error.

        Raises:
          FedMPIError: the same on every rank.
        """
        failed = status.collect(self.comm, self.asks())
        self.asked = status.asked
        if failed:
            with together(self.comm, f"round {t}"):
                if status.error is not None:
                    raise status.error

    def _train(self, call: _Call, positions: Tensor, status: Status) -> tuple[Tensor, Update]:
        """Train some of this rank's clients; returns those of their positions whose update is usable, and the updates.

        Raises:
          NumericalError: one is not, with ``on_bad_update: stop``.
        """
        replica, server, clients_C = self.replica, self.method.server, call.clients[positions]
        update = self.trainer.train(
            replica.parameters(),
            self.data.train,
            self.partition,
            clients_C,
            call.now.t,
            server.frozen(replica.state),
        )
        finite_C = updates.finite(update)
        if not (self.rejects or bool(finite_C.all())):
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
        return positions[rows], update

    @property
    def _fuses(self) -> bool:
        """A rank's clients' messages are made as one, for the sum of their gradients."""
        return self._fusable and self.observe is None

    @property
    def _pools(self) -> bool:
        """Even their gradients are made as one."""
        return self._fuses and self.trainer.pools

    def _send_sum(self, call: _Call, positions: Tensor, status: Status) -> Tensor:
        """Train some of this rank's clients and hand over one message for all of them; returns their positions."""
        replica, up, clients_C = self.replica, self.method.up, call.clients[positions]
        weight = (weights_C := call.weights[positions]).sum()
        if self._pools and len(positions) > 1:
            theta_D, frozen_D = replica.parameters(), self.method.server.frozen(replica.state)
            g_D, loss_C = self.trainer.pool(
                theta_D, self.data.train, self.partition, clients_C, weights_C / weight, call.now.t, frozen_D
            )
            if not (finite(g_D) and bool((loss_C.abs() <= LARGEST).all())):
                for position in positions.split(1):
                    self._train(call, position, status)  # names the client
                raise NumericalError(
                    f"round {call.now.t}: the sum of the clients' gradients is not finite; try a smaller local.lr "
                    f"than {self.config.local.lr:g}"
                )
        else:
            _, (g_CD, loss_C, _) = self._train(call, positions, status)
            g_D = (weights_C / weight).float() @ g_CD
        ctx = Context(call.now, clients_C[:1], torch.ones(1, dtype=torch.int64), replica.shared())
        with phase("encode"):
            message, _ = up.compress(g_D[None], {}, ctx)
        updates.check_fits_float32(message, {}, call.now.t)
        with phase("server"):
            replica.way.take(weight[None], message, {}, ctx)
        status.upload += self.ledger.upload_of(clients_C, message)
        status.loss += int(to_fixed(loss_C * weights_C).sum())
        return positions

    def _send(self, call: _Call, update: Update, positions: Tensor, ctx: Context, status: Status) -> Tensor:
        """Compress some of this rank's clients' gradients and hand the messages over; returns the positions of those
        whose message counts."""
        if not len(positions):
            return positions
        way, codec, before = self.replica.way, self.replica.way.up, self.clients.get(ctx.clients_C)
        with phase("encode"):
            message, after = codec.compress(update.g_CD, before, ctx)
        if not self.rejects:
            updates.check_fits_float32(message, after, ctx.round.t)
        else:
            weights_C = call.weights[positions]
            fits_C = updates.fits(codec, message, before, after, ctx, way.largest() / weights_C)
            rows = fits_C.nonzero()[:, 0]
            if len(rows) < len(positions):
                message, update, positions = message.select(rows), update.select(rows), positions[rows]
                before, after = ({n: v[rows] for n, v in state.items()} for state in (before, after))
                ctx = ctx.select(rows)
        if not len(positions):
            return positions
        if self.observe:
            self.observe(Sent(codec, update, before, message, ctx))
        with phase("server"):
            way.take(call.weights[positions], message, before, ctx)
        status.upload += self.ledger.uploads(ctx.clients_C, message)
        if codec is self.method.up:
            self.clients.put(ctx.clients_C, after)
            status.count(codec.count(message))
            status.loss += int(to_fixed(update.loss_C * call.weights[positions]).sum())
        return positions
