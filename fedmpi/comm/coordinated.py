"""A rank's connection to a coordinator's store (:mod:`fedmpi.comm.elastic`): calls that end, and a heartbeat."""

from __future__ import annotations

import math
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fedmpi.comm.base import Comm
from fedmpi.comm.rendezvous import brief
from fedmpi.comm.torch import TorchComm
from fedmpi.errors import CommError

T = TypeVar("T")
ANSWER = 5.0  # seconds that one call to the store may take


class Gone(Exception):
    """The coordinator does not answer."""


class RosterComm(TorchComm):
    """A Gloo group of a roster's members, unknown to torch.distributed."""

    def _missing(self) -> list[str]:
        return []  # heartbeats tell

    def _said(self) -> str:
        return ""

    def fail(self, why: str) -> None:
        """The others find the connections closed."""
        self._lost = self._lost or f"gloo: rank {self.rank} of {self.size} has failed before: {why}"
        self.close()


class Client:
    """A connection to the store, whose calls end: a store that was stopped would keep one waiting for ever."""

    def __init__(self, host: str, port: int) -> None:
        """
        Raises:
          Gone: nobody answers there.
        """
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._broken, self._made = "", None
        self._thread = threading.Thread(target=self._run, name="fedmpi store", daemon=True)
        self._thread.start()
        try:
            with socket.create_connection((host, port), ANSWER):  # TCPStore prints a trace where this fails
                pass
        except OSError as error:
            self.close()
            raise Gone(str(error)) from None

        def connect() -> None:
            self._made = TCPStore(host, port, None, False, timedelta(seconds=ANSWER), wait_for_workers=False)

        self.call(connect)

    @property
    def _store(self) -> TCPStore:
        assert self._made is not None
        return self._made

    def _run(self) -> None:
        while (todo := self._calls.get()) is not None:
            task, answer = todo
            try:
                answer.put((task(), None))
            except Exception as error:
                answer.put((None, error))
            del todo, task, answer
        self._made = None  # its connection ends in the thread that made it

    def call(self, task: Callable[[], T], seconds: float = ANSWER) -> T:
        """
        Raises:
          Gone: no answer in time, or none at all; nor to any further call.
        """
        if self._broken:
            raise Gone(self._broken)
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((task, answer))
        try:
            result, error = answer.get(timeout=seconds + 1)
        except queue.Empty:
            self._broken = f"no answer within {seconds + 1:g} s"
            raise Gone(self._broken) from None
        if error is not None:
            if not isinstance(error, RuntimeError):
                raise error
            self._broken = brief(error)
            raise Gone(self._broken) from None
        found: T = result
        return found

    def get(self, key: str) -> str | None:
        def look() -> str | None:
            return self._store.get(key).decode() if self._store.check([key]) else None

        return self.call(look)

    def set(self, key: str, value: str) -> None:
        self.call(lambda: self._store.set(key, value))

    def swap(self, key: str, old: str, new: str) -> str:
        """Compare and swap ("": nothing there yet); what is there then."""
        return str(self.call(lambda: self._store.compare_set(key, old, new).decode()))

    def delete(self, keys: Callable[[str], bool]) -> None:
        """Those that fit."""

        def drop() -> None:
            for key in filter(keys, self._store.list_keys()):
                self._store.delete_key(key)

        self.call(drop)

    def look(self, key: str, prefix: str = "") -> tuple[str | None, list[str]]:
        """What is there of this key, and of all that begin with a prefix, in one call."""

        def read() -> tuple[str | None, list[str]]:
            store, found = self._store, list[str]()
            value = store.get(key).decode() if store.check([key]) else None
            keys = [k[k.index(prefix) :] for k in store.list_keys() if prefix in k] if prefix else []
            if keys and store.check(keys):
                found = [each.decode() for each in store.multi_get(keys)]
            return value, found

        return self.call(read)

    def form(self, prefix: str, rank: int, size: int, seconds: float) -> Comm:
        """A group of the ranks that call this.

        Raises:
          LostError: one did not come.
        """

        def start() -> Comm:
            store = PrefixStore(prefix, self._store)
            return RosterComm.among(store, rank, size, seconds)

        return self.call(start, 2 * seconds)

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join(2)


class Heart(threading.Thread):
    """Counts up this rank's number, and looks at the others'."""

    def __init__(self, client: Client, me: str, lease: float) -> None:
        super().__init__(name="fedmpi heartbeat", daemon=True)
        self._client, self._me, self._lease = client, me, lease
        self._moved: dict[str, tuple[str, float]] = {}
        self._looked = 0.0
        self.ended = threading.Event()
        client.set(f"beat/{me}", "0")
        self.start()

    def run(self) -> None:
        count = 0
        with suppress(Gone):  # the main thread finds out, too
            while not self.ended.wait(self._lease / 5):
                count += 1
                self._client.set(f"beat/{self._me}", str(count))
                for rank, (before, _) in list(self._moved.items()):
                    now = self._client.get(f"beat/{rank}") or ""
                    if not now:
                        self._moved[rank] = now, -math.inf
                    elif now != before:
                        self._moved[rank] = now, time.monotonic()
                self._looked = time.monotonic()

    def alive(self, rank: str) -> bool:
        """Within the lease before the last look: not now, for a look may take long where the store does."""
        if rank == self._me:
            return True
        if rank not in self._moved:
            self._moved[rank] = "?", time.monotonic()
        return self._looked - self._moved[rank][1] < self._lease

    def stop(self) -> None:
        """Joined, for a thread in torch's code when Python ends aborts the process."""
        self.ended.set()
        self.join(2 * ANSWER)

    def end(self) -> None:
        self.stop()
        self._client.close()


def serve(host: str, port: int, ready: Callable[[int], None]) -> None:
    """Be the coordinator, until a signal ends the process.

    Args:
      ready: called with the port, which the system chooses for 0.

    Raises:
      CommError: the port is taken, or the address is not this machine's.
    """
    try:
        listener = socket.create_server((host, port), backlog=512)
    except (OSError, OverflowError) as error:
        raise CommError(
            f"coordinator: cannot listen on {host}:{port} ({error}); --port takes another"
        ) from None
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        None,
        True,
        timedelta(seconds=ANSWER),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    ready(port)
    while store:
        time.sleep(3600)
