"""What clients keep between rounds (residuals, look-back gradients), in memory or in a file.

Shape suffix: C clients.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.config import Config
from fedmpi.engine.device import Place
from fedmpi.engine.progress import human
from fedmpi.errors import ConfigError
from fedmpi.machine import available_memory as _available_memory
from fedmpi.message import CPU
from fedmpi.method import State, placed
from fedmpi.ops import pages
from fedmpi.phases import phased

_SLAB = 1 << 18  # bytes of a slab, which holds at least one row
_LONG = 1 << 14  # bytes of a row that is copied by itself


class ClientStore:
    """Per-client state in memory, made when a client first comes.

    The rows of a state entry lie one after the other in slabs, which are added as clients come: next to them, a client
    takes :data:`INDEX` bytes.

    Args:
      device: where states come to when they are asked for.
      there: rows lie there, too; else on the host, and those that are asked for are copied.
    """

    INDEX = 8

    def __init__(self, init: Callable[[], State], device: torch.device = CPU, there: bool = True) -> None:
        self.device, self._home = device, device if there else CPU
        self._template = placed(init(), self._home)
        self._per_slab = max(1, _SLAB // max(1, self.row))
        self._slabs: list[State] = []  # (rows, …) of each entry
        self._slot_N = torch.empty(
            0, dtype=torch.int64
        )  # of the clients 0 … so far: whose row is where, -1: nowhere
        self._free: list[int] = []  # slots that were given back
        self._used = 0
        self._undo: list[
            dict[int, State | None]
        ] = []  # since the last two marks: what was there (None: nothing)

    @property
    def on_host(self) -> bool:
        """What is kept lies in the host's memory, or in a file."""
        return self._home == CPU

    @property
    def empty(self) -> bool:
        """True when clients keep nothing."""
        return not self._template

    @property
    def template(self) -> State:
        """The state of a client that never came, without the axis C."""
        return self._template

    @property
    def known(self) -> Tensor:
        """int64, increasing: the clients that have come."""
        return (self._slot_N >= 0).nonzero()[:, 0]

    def clear(self) -> None:
        """Forget all of them."""
        self._slabs, self._free, self._used = [], [], 0
        self._slot_N = self._slot_N[:0].clone()

    def mark(self) -> None:
        """What is put from here on can be taken back, as can what was put since the mark before."""
        self._undo = [*self._undo[-1:], {}]

    def rewind(self, marks: int) -> None:
        """Take back what was put since so many marks, which are gone with it."""
        for _ in range(marks):
            for client, state in self._undo.pop().items():
                self._set(client, state)

    def settle(self) -> None:
        """Nothing is taken back any more."""
        self._undo = []

    def forget(self, clients_C: Tensor) -> None:
        """As if ``clients_C`` had never come."""
        for client in clients_C.tolist():
            self._set(client, None)

    @property
    def row(self) -> int:
        """Bytes that one client keeps."""
        return sum(value.nbytes for value in self._template.values())

    def need(self, come: int, clients: int) -> int:
        """Bytes for so many that come, of so many clients."""
        return come * self.row + clients * self.INDEX if self.row else 0

    @phased("load")
    def get(self, clients_C: Tensor) -> State:
        """Their states with the leading axis C, a copy."""
        state = {
            name: pages.huge(value.new_empty(len(clients_C), *value.shape))
            for name, value in self._template.items()
        }
        new_C = torch.ones(len(clients_C), dtype=torch.bool)
        for slab, places, rows in self._where(clients_C):
            new_C[places.to(CPU)] = False
            for name, value in state.items():
                _copy(value, places, slab[name], rows)
        for place in new_C.nonzero()[:, 0].tolist():
            for name, value in state.items():
                value[place] = self._template[name]
        return placed(state, self.device)

    @phased("load")
    def put(self, clients_C: Tensor, state: State) -> None:
        """Keep the states of ``clients_C``."""
        if not self._template:
            return
        if self._undo:
            for client in clients_C.tolist():
                if client not in self._undo[-1]:
                    self._undo[-1][client] = self._find(client)
        self._write(clients_C, state)

    def _find(self, client: int) -> State | None:
        """A copy of what is kept of a client."""
        if client >= len(self._slot_N) or self._slot_N[client] < 0:
            return None
        return {name: value[0] for name, value in self.get(torch.tensor([client])).items()}

    def _set(self, client: int, state: State | None) -> None:
        if state is not None:
            self._write(torch.tensor([client]), {name: value[None] for name, value in state.items()})
        elif client < len(self._slot_N) and self._slot_N[client] >= 0:
            self._free.append(int(self._slot_N[client]))
            self._slot_N[client] = -1

    def _write(self, clients_C: Tensor, state: State) -> None:
        if len(clients_C):
            self._make_room(clients_C)
        state = placed(state, self._home)
        for slab, places, rows in self._where(clients_C):
            for name, value in state.items():
                _copy(slab[name], rows, value, places)

    def _make_room(self, clients_C: Tensor) -> None:
        """A slot for each that has none."""
        if (beyond := int(clients_C.max()) + 1 - len(self._slot_N)) > 0:
            more = max(beyond, len(self._slot_N) // 4)
            self._slot_N = torch.cat([self._slot_N, torch.full((more,), -1)])
        for client in clients_C[self._slot_N[clients_C] < 0].tolist():
            if self._free:
                self._slot_N[client] = self._free.pop()
                continue
            self._slot_N[client] = self._used
            self._used += 1
            if self._used > self._per_slab * len(self._slabs):
                new = {n: v.new_empty(self._per_slab, *v.shape) for n, v in self._template.items()}
                self._slabs.append({name: pages.huge(value) for name, value in new.items()})

    def _where(self, clients_C: Tensor) -> Iterator[tuple[State, Tensor, Tensor]]:
        """The slabs in which those that have come lie, their positions in ``clients_C`` and their rows there."""
        inside = clients_C.clamp(max=len(self._slot_N) - 1)
        slot_C = (
            self._slot_N[inside].where(clients_C < len(self._slot_N), -1)
            if len(self._slot_N)
            else clients_C[:0]
        )
        places = (slot_C >= 0).nonzero()[:, 0]
        number, row = slot_C[places] // self._per_slab, slot_C[places] % self._per_slab
        for n in sorted(set(number.tolist())):
            here = number == n
            yield self._slabs[n], places[here].to(self._home), row[here].to(self._home)


def _copy(to: Tensor, there: Tensor, of: Tensor, here: Tensor) -> None:
    """to[there] = of[here], row by row where a row is long: indexing would gather them first."""
    if of[:1].nbytes < _LONG:
        to[there] = of[here]
        return
    for i, j in zip(there.tolist(), here.tolist(), strict=True):
        to[i].copy_(of[j])


class MappedStore(ClientStore):
    """The same in a memory-mapped file a state entry: the machine keeps what fits of it in its page cache.

    The files are sparse and nameless (deleted as soon as they are open): they take what was written, and
    vanish with the process, however it ends.
    """

    def __init__(
        self, init: Callable[[], State], clients: int, folder: Path, device: torch.device = CPU
    ) -> None:
        super().__init__(init, device, there=False)
        self._known = torch.zeros(clients, dtype=torch.bool)
        self._rows: dict[str, np.memmap[tuple[int, ...], np.dtype[np.uint8]]] = {}
        for name, value in self._template.items():
            with tempfile.TemporaryFile(dir=folder, prefix="fedmpi-state-") as file:
                self._rows[name] = np.memmap(file, np.uint8, "w+", shape=(clients, max(1, value.nbytes)))

    @property
    def known(self) -> Tensor:
        return self._known.nonzero()[:, 0]

    def clear(self) -> None:
        self._known.zero_()

    def _find(self, client: int) -> State | None:
        if not self._known[client]:
            return None
        state = {name: torch.empty_like(value) for name, value in self._template.items()}
        for name, value in state.items():
            if value.nbytes:
                _raw(value)[:] = self._rows[name][client]
        return state

    @phased("load")
    def get(self, clients_C: Tensor) -> State:
        states = [self._find(client) or self._template for client in clients_C.tolist()]
        return placed({n: torch.stack([s[n] for s in states]) for n in self._template}, self.device)

    def need(self, come: int, clients: int) -> int:
        return come * self.row

    def _write(self, clients_C: Tensor, state: State) -> None:
        state = placed(state, CPU)
        for i, client in enumerate(clients_C.tolist()):
            self._set(client, {name: value[i].contiguous() for name, value in state.items()})

    def _set(self, client: int, state: State | None) -> None:
        self._known[client] = state is not None
        for name, value in (state or {}).items():
            if value.nbytes:
                self._rows[name][client] = _raw(value)


Choice = Callable[[Tensor], Tensor]
"""Of clients (int64, their ids) the positions of some."""


def everybody(clients: Tensor) -> Tensor:
    return torch.arange(len(clients))


def nobody(clients: Tensor) -> Tensor:
    return clients[:0]


class Kept(NamedTuple):
    """A store as a checkpoint sees it: of which clients this rank writes what it holds, and of which it must hold
    the states after a resume. (Of a store that several ranks hold in full, one writes.)"""

    store: ClientStore
    saves: Choice
    needs: Choice


def _raw(value: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a contiguous tensor, in place."""
    raw: np.ndarray[tuple[int], np.dtype[np.uint8]] = value.reshape(-1).view(torch.uint8).numpy()
    return raw


def make_store(
    init: Callable[[], State],
    config: Config,
    place: Place = Place(),  # noqa: B008 - a named tuple
    ranks: int = 1,
) -> ClientStore:
    """The store that a configuration asks for, whose states come to ``place``.

    One in memory lies there, too, where what all clients that may come keep leaves room for training: a rank with few
    large ones (data-parallel training) then copies none. The states of more go to the host, which has more memory, and
    those of a chunk of clients are copied there and back.

    Args:
      ranks: that share out the clients.

    Raises:
      ConfigError: the folder for its files cannot be used.
    """
    if config.store == "memory":
        row = sum(value.nbytes for value in init().values()) if place.device != CPU else 0
        return ClientStore(init, place.device, place.holds(-(-_come(config) // ranks) * row))
    folder = Path(config.store_folder or tempfile.gettempdir())
    try:
        return MappedStore(init, config.clients, folder, place.device)
    except OSError as error:
        raise ConfigError(f"store_folder: cannot use {folder}: {error.strerror or error}") from None


def _come(config: Config) -> int:
    """How many clients may come."""
    return min(config.clients, config.rounds * config.largest_cohort)


def fits_here(config: Config, comm: Comm, stores: Sequence[ClientStore], peers: ClientStore) -> str:
    """One sentence on what the state of all clients that may come needs on this machine and what there is; "" where
    they keep nothing there.

    Raises:
      ConfigError: it does not fit; names the figures and the ways out.
    """
    come, stores = _come(config), [store for store in stores if store.on_host]
    needs = (store.need(come, config.clients * comm.size) for store in stores)  # an index a rank
    need = sum(needs) * comm.local_size // comm.size
    if config.topology == "aggregator" and comm.rank < comm.local_size and peers.on_host:  # rank 0's machine
        need += peers.need(come, config.clients)
    if not need:
        return ""
    if config.store == "memory":
        there, what = _available_memory(), "memory"
    else:
        place = config.store_folder or tempfile.gettempdir()
        there, what = shutil.disk_usage(place).free, f"disk in {place}"
    said = f"client state needs up to {human(need)} of {what}, {human(there)} are free"
    if need > there:
        other = "mmap" if config.store == "memory" else "mmap with another store_folder"
        raise ConfigError(
            f"store: {said}; ways out: store: {other}, fewer clients or rounds, a method that keeps less "
            "(lookback with keep: message or half)"
        )
    return said
