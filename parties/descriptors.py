"""What threads wait on instead of sockets: a ZeroMQ socket is not thread-safe, but its file descriptor may be watched
by any thread while another one uses the socket."""

from __future__ import annotations

import contextlib
import select
import socket as sockets
import threading
from collections.abc import Callable, Iterable

import zmq

from parties.curve import Socket


class Descriptors:
    """The descriptors of our sockets, each with what is to be done when its socket may have something; and a bell.

    A descriptor tells of a change only, and using the socket may take that sign away: look at the socket itself between
    its use and a wait, and at all of them every now and then.
    """

    def __init__(self) -> None:
        self._bell, self._hook = sockets.socketpair()
        self._bell.setblocking(False)
        self._hook.setblocking(False)
        self._rung = False  # whether a byte is under way already
        self._acts: dict[int, Callable[[], object]] = {self._hook.fileno(): self._hear}
        self._of_thread = threading.local()  # a poll object is for one thread

    def add(self, socket: Socket, act: Callable[[], object] = lambda: None) -> None:
        """Before anybody waits."""
        self._acts[int(socket.getsockopt(zmq.FD))] = act

    def wait(self, seconds: float, *, bell_only: bool = False) -> list[int]:
        """Which descriptors tell of something."""
        name = "bell" if bell_only else "all"
        if not hasattr(self._of_thread, name):
            poll = select.poll()
            for descriptor in [self._hook.fileno()] if bell_only else self._acts:
                poll.register(descriptor, select.POLLIN)
            setattr(self._of_thread, name, poll)
        return [descriptor for descriptor, _ in getattr(self._of_thread, name).poll(1000 * seconds)]

    def act(self, ready: Iterable[int] | None = None) -> None:
        """Do what is to be done for these, or for all."""
        for descriptor in self._acts if ready is None else ready:
            self._acts[descriptor]()

    def ring(self) -> None:
        """Whoever waits returns at once."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):  # it is awake anyway, or gone
                self._bell.send(b"\0")

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._hook.recv(4096)
            self._rung = False  # only then: a ring whose byte we had just read would silence all that follow

    def close(self) -> None:
        self._bell.close()
        self._hook.close()
