"""The round loop, the only one: every method, topology and number of ranks passes through it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedmpi.comm.agree import agree
from fedmpi.comm.base import Comm, together
from fedmpi.comm.placement import own_cpus
from fedmpi.config import Config
from fedmpi.engine import updates
from fedmpi.engine.batches import local_steps, work
from fedmpi.engine.by_client import Tested, by_client, of_clients
from fedmpi.engine.clients import check_sampling, cohort, place, survivors
from fedmpi.engine.device import Place, explained, repeatable
from fedmpi.engine.fingerprint import fingerprint
from fedmpi.engine.goals import Goals
from fedmpi.engine.ledger import Ledger
from fedmpi.engine.manifest import Lost, Peak
from fedmpi.engine.parts import load
from fedmpi.engine.passes import Call, Passes
from fedmpi.engine.replica import Kind, Replica, sums_of
from fedmpi.engine.servers_own import servers_own
from fedmpi.engine.status import SUMMED, Status
from fedmpi.engine.store import Kept, fits_here, make_store, nobody
from fedmpi.engine.timing import Clock
from fedmpi.engine.trainer import Trainer
from fedmpi.errors import FedMPIError
from fedmpi.message import CPU
from fedmpi.method import Round
from fedmpi.ops.sums import from_fixed
from fedmpi.tasks.metrics import TEST_LOSS

_CHUNK_VALUES = 1 << 22  # gradients of so many numbers are held at a time
_MANY = 200  # steps of a run; fewer are done before clients' steps at once are ready
_WORTH = 0.8  # of one thread's time: on a busy machine several threads wait for each other


class Simulation:
    """One rank's whole state between rounds.

    Attributes:
      passes: what it does within a round.
      around: makes what each round is done inside of.
      chunk: so many clients' gradients are held at a time.
    """

    def __init__(self, config: Config, comm: Comm, place: Place | None = None) -> None:
        """Args:
        place: where this rank computes; None: where the configuration says, alone there.
        """
        self.config, self.comm = config, comm
        self.place = place = place or Place.of(config.device, comm)
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        parts = load(config)
        self.data, self.measured, self.partition = parts.data, parts.measured, parts.partition
        check_sampling(config, self.partition)
        self.plan, self.spec, self.method = parts.plan, parts.plan.spec, parts.plan.method
        of_file = config.model.options.get("init") is not None
        self.fingerprint = fingerprint(self.data, self.partition, parts.start_X if of_file else None)
        place.check(self.spec.size)
        up, workers = self.method.up, config.mode == "data_parallel"
        self.trainer = Trainer(
            parts.model,
            self.plan,
            self.measured.objective,
            config.local,
            config.seed,
            workers,
            parts.traits,
            config.rounds,
            place,
        )
        crew = comm.size if config.topology == "allreduce" else max(1, comm.size - 1)
        self.clients, peers = (
            make_store(up.init, config, place, crew),
            make_store(up.init_peer, config, place),
        )
        self.own = make_store(self.trainer.keeps, config, place, crew)
        self.stores = self.clients, self.own, peers
        self.memory = fits_here(config, comm, (self.clients, self.own), peers)
        self.rounds_per_epoch = self._passes_of_data() if workers else config.rounds_per_epoch
        kind: Kind = "data_parallel" if workers else config.topology
        start_X, sums = parts.start_X.to(place.device), sums_of(config, self.method, place.device)
        self.replica = Replica(comm, self.method, start_X, sums, peers, kind)
        steps = config.rounds * int(local_steps(config.local, self.partition.sizes.max()))
        # Not where a client's row of a batched product may have other last bits, nor where tracing takes longer.
        self.trainer.together = not (config.reproducible or workers or steps < _MANY)
        self.ledger = Ledger(config.clients)
        self.passes = Passes(
            config,
            comm,
            self.method,
            self.trainer,
            self.replica,
            self.ledger,
            self.partition,
            self.clients,
            self.own,
        )
        self.clock = self._clock()
        self.homes_K: Tensor | None = None  # each client's rank, where it does not follow from its number
        self.dropped: dict[int, Tensor] = {}  # by round, the clients that were lost with a rank
        self.lost: list[Lost] = []
        self.chunk = 1 if config.reproducible else max(1, _CHUNK_VALUES // self.spec.size)
        self.trained = self.participations = self.called = 0
        self.bytes = dict.fromkeys(SUMMED[1:], 0)
        self.counters = (*self.method.up.counters, *updates.counters(config, self.partition))
        self.counts: dict[str, int] = dict.fromkeys(self.counters, 0)
        self.simulated_seconds = 0.0
        self.held = parts.held
        of_held = of_clients(self.measured, config.client_test.after) if self.held else ()
        self.measures: dict[str, float | None] = dict.fromkeys([*self.measured.metrics, TEST_LOSS, *of_held])
        self.tested: Tested | None = None  # as of the last evaluation in this process
        self.goals = Goals.of(config, self.measured, self.measures)
        self.peaks: dict[str, Peak] = {}
        self.best_X: Tensor | None = None  # the model of config.best's peak
        self.ended = ""  # why the run is over before its last round
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

        own = {} if self.own.empty else {"own": Kept(self.own, here, here)}
        return {"clients": Kept(self.clients, here, here), **own, **self.replica.kept()}

    def home(self, clients: Tensor) -> Tensor | None:
        """The rank that keeps the state of each; None where they keep nothing and can train anywhere."""
        if self.clients.empty and self.own.empty and self.config.mode == "federated":
            return None
        workers = torch.tensor(self.replica.workers)
        return workers[clients % len(workers)] if self.homes_K is None else self.homes_K[clients]

    def set_threads(self) -> None:
        """Give torch the threads that the configuration (or OMP_NUM_THREADS) asks for; without a wish, this rank's
        share of the cores where they make a step clearly faster (small models are faster on one)."""
        config, share = self.config, own_cpus(self.comm)
        wish = config.threads or (torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None)
        if config.reproducible or wish or share < 2 or self.place.device != CPU:
            torch.set_num_threads(1 if config.reproducible else wish or 1)
            return
        batch = config.local.batch or int(self.partition.sizes.double().mean())
        one, all_ = (self.trainer.time(self.data.train, batch, n) for n in (1, share))
        torch.set_num_threads(share if all_ < _WORTH * one else 1)

    def _passes_of_data(self) -> int:
        """Rounds in which a rank sees all its samples once."""
        largest = int(self.partition.sizes.max())
        return -(-largest // ((self.config.local.batch or largest) * (self.config.local.steps or 1)))

    def _clock(self) -> Clock | None:
        config = self.config
        if config.time is None:
            return None
        sizes = [codec.nbytes() for codec in self.method.passes]
        first = sum(4 * self.spec.size if size is None else size for size in sizes)
        samples = work(config.local, self.partition.sizes)
        return Clock(config.time, config.seed, samples, self.ledger, first)

    def round(self, t: int) -> dict[str, Any]:
        """One round; returns its line of metrics."""
        device, reproducible = self.place.device, self.config.reproducible
        with self.around(), repeatable(device, reproducible), explained(device, f"doing round {t}"):
            return self._round(t)

    def _round(self, t: int) -> dict[str, Any]:
        started = time.monotonic()
        call, status = self._called(t), Status(self.counters, self.error)
        if t == 0 and self.method.server.samples:
            theta_D, samples = self.replica.parameters(), self.method.server.samples
            self.replica.prepare(servers_own(self.trainer, theta_D, self.data.train, samples, self.comm))
        if self.clock:
            self.clock.start(t, call.clients)
        with status.watch():
            status.download += self.ledger.downloads(
                call.called, self.replica.served(call.called), self.method.server, self.replica.state
            )
        call = self._in_time(call, status)
        before = self.replica.state
        sent_C = self.passes.run(call, self.data.train, status, lambda: self._exchange(status, t))
        if bool(sent_C.any()):
            self.replica.finish()
        else:
            self.replica.skip(before, call.now)
        line = self._account(call, status, sent_C)
        if (t + 1) % self.config.evaluate_every == 0 or t + 1 == self.config.rounds:
            self._evaluate(t)
            line |= self.measures
        return line | {"seconds": time.monotonic() - started}

    def _evaluate(self, t: int) -> None:
        """On the test set; where clients keep parts of the model, on what they hold out themselves."""
        x_X = self.replica.parameters()
        clients: dict[str, float | None] = {}
        if self.held is not None:
            self.tested = self.test_clients(t)
            clients, found = self.tested.measures, self.tested.whole
        if self.held is None or not self.plan.local.names:
            test, batch = self.data.test, self.config.test_batch
            found = self.trainer.evaluate(self.measured, x_X, test, batch, self.comm)
        self.measures = found | clients
        self.peaks, self.ended = self.goals.after(t, self.measures, self.peaks)
        if (best := self.config.best) in self.peaks and self.peaks[str(best)].round == t:
            self.best_X = x_X.clone()

    def test_clients(self, t: int) -> Tested:
        """Each client's model on what it is tested on, as of the end of round ``t``."""
        assert self.held is not None
        x_X, asked, train = self.replica.parameters(), self.config.client_test, self.data.train
        frozen_X = self.method.server.frozen(self.replica.state)
        tuned = partial(self.trainer.after, x_X, train, self.partition, t, frozen_X) if asked.after else None
        split = self.data.test if asked.of == "groups" else train
        of = self.trainer, self.measured, x_X, split, self.held
        return by_client(*of, self.own, self.home, self.comm, tuned)

    def _called(self, t: int) -> Call:
        """The round's call. A user's own sampling may fail, or do otherwise, on one rank alone.

        Raises:
          ConfigError: it failed.
          CommError: ranks have different cohorts.
        """
        if self.config.own_sampling is None:
            return self.call(t)
        with together(self.comm, "sampling clients"):
            call = self.call(t)
        digest = hashlib.blake2b(call.called.numpy().tobytes(), digest_size=6).hexdigest()
        agree(
            self.comm,
            {f"the clients of round {t}": f"{call.called[:8].tolist()} of {len(call.called)}, {digest}"},
        )
        return call

    def call(self, t: int) -> Call:
        """Who takes part in round t, with what weight, and where."""
        config = self.config
        called = cohort(config, self.partition, t)
        full = called[self.partition.sizes_of(called) > 0]  # who has no sample has nothing to send
        clients = survivors(config, full, t)
        if t in self.dropped:
            clients = clients[~torch.isin(clients, self.dropped[t])]
        now = Round(config.seed, t, config.server_lr(t), self.rounds_per_epoch)
        return self._among(now, called, clients)

    def _among(self, now: Round, called: Tensor, clients: Tensor) -> Call:
        config, samples = self.config, self.partition.sizes_of(clients)
        # A client that was drawn by its number of samples counts once; so do a vote and a rank.
        workers = config.mode == "data_parallel"
        by_samples = self.method.server.weighted and config.sampling != "weighted" and not workers
        weights = (samples if by_samples else torch.ones_like(samples)).double()
        placed = place(clients, samples, self.replica.workers, self.home(clients))
        mine = placed.get(self.comm.rank, clients[:0])
        chunk = len(clients) if self.passes.pools else self.chunk
        chunks = mine.split(chunk) if len(mine) else ()
        weights = weights / weights.sum()
        if config.local.fednova and len(clients):  # τ_eff
            rate = config.local.lr * config.local.schedule.factor(now.t, config.rounds)
            weight = self.trainer.rule.weight(local_steps(config.local, samples), rate)
            now = now._replace(lr=config.server_lr(now.t) * float(weights @ weight))
        return Call(now, called, clients, weights, placed, chunks)

    def _in_time(self, call: Call, status: Status) -> Call:
        """The call of those only whose message comes in time; the others have downloaded, and keep what they had."""
        if self.clock is None:
            return call
        expected = self.bytes["upload"] // self.participations if self.participations else self.clock.first
        arrived = self.clock.in_time(self.comm, expected)
        status.total["late"] = len(call.clients) - len(arrived)
        return self._among(call.now, call.called, call.clients[arrived])

    def _account(self, call: Call, status: Status, sent_C: Tensor) -> dict[str, Any]:
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
            **dict.fromkeys(self.measures),
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
