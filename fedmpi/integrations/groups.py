"""Parameters whose gradients are averaged together, compressed or as they are.

Shape suffixes: D parameters of a group, S summed numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from fedmpi import methods, random
from fedmpi.comm.base import Comm
from fedmpi.integrations.settings import Settings, Shapes
from fedmpi.meet import ways
from fedmpi.meet.base import End, Held, Roster, Way
from fedmpi.meet.ways import GatherWay, OwnerWay
from fedmpi.message import CPU, Message, concat, from_bytes, to_bytes
from fedmpi.method import Compressor, Round, State, believed, placed
from fedmpi.methods.base import Options, Setup
from fedmpi.ops import fast, flags
from fedmpi.ops.flags import Doubt, Flag
from fedmpi.ops.sums import are_finite
from fedmpi.spec import Spec

_Result = tuple[Tensor | None, tuple[State, State], Flag]


class Group:
    """Parameters whose gradients are averaged as one vector.

    Attributes:
      names: of the parameters, in the vector's order.
      flat_D: their gradients before :meth:`start`, and their mean after :meth:`finish`.
      views: the same by name, in their own shapes.
      state, memory: what this rank keeps between steps as a sender, and what the decoder of each rank does.
      options: of the method.
      seconds, payload: spent and sent so far, in seconds and bytes; sent: in so many steps.
    """

    def __init__(
        self,
        shapes: Shapes,
        options: Options,
        comm: Comm,
        settings: Settings,
        owner: int | None = None,
        room: float = ways.GATHER_BYTES,
        device: torch.device = CPU,
    ) -> None:
        """Args:
          options: of the method; dense for those that are averaged as they are.
          owner, room: as :func:`fedmpi.meet.ways.build` takes them.
          device: where gradients are gathered and compressed, and state is kept.

        Raises:
          ConfigError: the method changes parameters itself, or does not fit.
        """
        self.comm, self.settings, self.device, self.options = comm, settings, device, options
        self.spec = Spec(tuple(shapes), tuple(shapes.values()))
        self.names = self.spec.names
        # A key of its own: equal groups must not draw equal numbers.
        self.seed = random.key(settings.seed, stream=f"group {self.names[0]}")
        setup = Setup(self.seed, comm.size)
        self.method = methods.build(options, self.spec, setup)
        self.plain = methods.build("dense", self.spec, setup)
        self.decoder, up = self.method.directions(), self.method.up
        self.ways = {codec: ways.build(comm, codec, device=device) for codec in self.method.passes[:-1]}
        self.ways[up] = ways.build(
            comm, up, settings.exchange, owner=owner, room=room, packed=True, device=device
        )
        self.ways[self.plain.up] = ways.build(comm, self.plain.up, "sum", device=device)
        for way in self.ways.values():
            way.reuse = True  # a mean is copied, or decoded, before the next step
            way.later = True  # the host waits once, for all that a step has to ask
        self.place(self.memory_D())
        self._borrowed = False
        self.doubts: list[Doubt] = []
        self._nothing = torch.full((), math.nan, device=device)
        self.begin_span()
        self.reset()

    def begin_span(self) -> None:
        """Seconds and bytes count from here."""
        self.seconds = dict.fromkeys(("encode", "wire", "decode"), 0.0)
        self.payload = self.sent = 0

    def reset(self) -> None:
        """Forget all that was kept between steps."""
        fresh = {name: value[None].clone() for name, value in self.method.up.init().items()}
        self.state: State = placed(fresh, self.device)
        self.memory = placed(self.decoder.memory(), self.device)
        way = self.ways[self.method.up]
        way.peers = Held(placed(way.init(), self.device))
        self._after = self.state, self.memory

    @property
    def peers(self) -> Held:
        """What this rank keeps of all ranks as a receiver."""
        peers = self.ways[self.method.up].peers
        assert isinstance(peers, Held)
        return peers

    def memory_D(self) -> Tensor:
        """Where gradients are gathered."""
        return torch.zeros(self.spec.size, device=self.device)

    def place(self, flat_D: Tensor) -> None:
        """Gradients are in ``flat_D`` from now on."""
        self.flat_D, self.views = flat_D, self.spec.views(flat_D)

    def fill(self, name: str, gradient: Tensor, scale: float) -> None:
        """Take a gradient, over ``scale``. One that is all of the group stays where it lies."""
        if self._whole(gradient):
            self.place(gradient.view(-1))
            self._borrowed = True
        else:
            if self._borrowed:  # the last step's gradient is somebody else's
                self.place(self.memory_D())
                self._borrowed = False
            self.views[name].copy_(gradient)
        if scale != 1:
            self.views[name].div_(scale)

    def answer(self, name: str, gradient: Tensor, scale: float) -> None:
        """Set ``gradient``, which :meth:`fill` was given, to the mean, times ``scale``."""
        view = self.views[name]
        if view.data_ptr() != gradient.data_ptr():
            gradient.copy_(view if scale == 1 else view * scale)
        elif scale != 1:
            gradient.mul_(scale)

    def _whole(self, gradient: Tensor) -> bool:
        alike = gradient.dtype == self.flat_D.dtype and gradient.device == self.flat_D.device
        return alike and gradient.numel() == self.spec.size and gradient.is_contiguous()

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps between steps."""
        return sum(v.nbytes for part in (self.state, self.memory, self.peers.state) for v in part.values())

    def start(self, step: int, exact: bool) -> None:
        """Send this rank's gradients; other groups may follow before :meth:`finish`.

        Args:
          step: of the job.
          exact: they go as they are.
        """
        now = Round(self.seed, step, 1.0, self.settings.steps_per_epoch)
        self.sent += 1
        self._end: Callable[[], _Result] | None
        self.doubts = []
        with flags.later(self.doubts):
            self._end = self._exactly(now) if exact else self._compressed(now)

    def finish(self) -> Flag:
        """Wait for what :meth:`start` sent, and for the others': the views hold the mean then.

        Returns:
          False when a rank's gradient is not finite, or what comes of it overflows: the mean is NaN then, on every
          rank. A device that would make the host wait is not asked, nor for :attr:`doubts`, which count if it is true.
        """
        end, self._end = self._end, None  # with the messages and the state before, which it holds
        assert end is not None
        with flags.later(self.doubts):
            mean_D, self._after, good = end()
        # What messages decode to and what servers keep may overflow too. Both are the same on every rank.
        if mean_D is not None and good is not False:
            good = good & are_finite(mean_D, *self._after[1].values())
        if mean_D is None or good is False:
            self.flat_D.fill_(math.nan)
            return False
        if isinstance(good, Tensor):
            torch.where(good, mean_D, self._nothing, out=self.flat_D)
        elif mean_D.data_ptr() != self.flat_D.data_ptr():
            self.flat_D.copy_(mean_D)
        return good

    def _exactly(self, now: Round) -> Callable[[], _Result]:
        kept = self.state, self.memory
        end, _ = self._send(self.plain.up, {}, Roster.of_ranks(self.comm, now, {}))
        return lambda: (end(), kept, self.ways[self.plain.up].good)

    def _compressed(self, now: Round) -> Callable[[], _Result]:
        decoder, (*early, up) = self.decoder, self.method.passes
        state, memory, before = self.state, self.memory, (self.state, self.memory)
        sound: Flag = True
        for index, codec in enumerate(early):
            roster = Roster.of_ranks(self.comm, now, decoder.shared(memory))
            end, state = self._send(codec, state, roster, checked=index > 0)
            mean_S = end()
            if mean_S is not None:
                sound = sound & self.ways[codec].good & are_finite(mean_S)
            if mean_S is None or sound is False:
                return lambda: (None, before, False)
            if isinstance(sound, Tensor):
                mean_S = torch.where(sound, mean_S, 0.0)
            memory = decoder.between(memory, index, mean_S, now)
        roster = Roster.of_ranks(self.comm, now, decoder.shared(memory))
        end, after = self._send(up, state, roster, checked=bool(early))

        def decoded() -> _Result:
            mean_S = end()
            if mean_S is None:
                return None, before, False
            started = perf_counter()
            g_D, kept = decoder.direction(memory, mean_S, now, self.flat_D)
            self.seconds["decode"] += perf_counter() - started
            return g_D, (after, kept), sound & self.ways[up].good

        return decoded

    def _send(
        self, codec: Compressor, state: State, roster: Roster, checked: bool = False
    ) -> tuple[End, State]:
        """Compress and send; what waits for the mean, and the state afterwards.

        Args:
          checked: all ranks' gradients are finite.
        """
        way, g_1D, here = self.ways[codec], self.flat_D[None], torch.tensor([self.comm.rank])
        ctx = roster.ctx(here)
        started, wired = perf_counter(), way.wire
        usable: Flag = True if checked or codec.tells else are_finite(self.flat_D)
        if isinstance(usable, Tensor):  # the mean will stand there
            self.flat_D.masked_fill_(~usable, 0)
        message, after = codec.compress(torch.zeros_like(g_1D) if usable is False else g_1D, state, ctx)
        if codec.tells and not checked:
            assert message.finite is not None
            usable = message.finite
        # Finite gradients may make a message, or leave a residual, that overflows.
        if codec is not self.plain.up and usable is not False:
            usable = usable & are_finite(*message.arrays.values(), *after.values())
        way.open(roster)
        way.take(roster.weights[here], message, state, ctx, usable)
        end = way.send()
        self._spent("encode", way, started, wired)
        self.payload += int(message.nbytes()[0])

        def ended() -> Tensor | None:
            started, wired = perf_counter(), way.wire
            mean = end()
            self._spent("decode", way, started, wired)
            return mean

        return ended, after

    def _spent(self, what: str, way: Way, started: float, wired: float) -> None:
        wire = way.wire - wired
        self.seconds["wire"] += wire
        self.seconds[what] += perf_counter() - started - wire

    def commit(self) -> None:
        """The step counts."""
        old = self.state.get("residual")
        self.state, self.memory = self._after
        self.peers.commit()
        if old is not None and old is not self.state["residual"]:
            fast.give_back(old)  # for the next step's: fresh memory costs more than all that is done with it

    def rollback(self) -> None:
        """The step does not count."""
        self._after = self.state, self.memory
        self.peers.rollback()

    def believe(self) -> None:
        """Make the peers' state from what the ranks' own states say of it. Called by all ranks."""
        way, up = self.ways[self.method.up], self.method.up
        if not up.init_peer() or not isinstance(way, (GatherWay, OwnerWay)):
            return
        frames = self.comm.allgather(to_bytes(Message(believed(up, self.state))))
        if way.init():
            way.peers = Held(concat([from_bytes(frame, device=self.device) for frame in frames]).arrays)
        self.rollback()
