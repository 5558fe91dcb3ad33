"""Ctrl-C at a point of our choosing: what must not be torn apart is done first.

Python raises KeyboardInterrupt between any two steps of the main thread, also between the two halves of a message.
While that thread sends or receives, it is only noted, whoever waits is woken, and it is raised once all is in order.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_entered: list[Interrupts] = []  # by the main thread
_open: set[Interrupts] = set()


class Interrupts:
    """To be entered for what must not be torn apart. Changes signal handlers only where they are Python's own, which
    raise KeyboardInterrupt, and puts these back at the end."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake, self._noted = wake, False
        if threading.current_thread() is threading.main_thread():
            _open.add(self)
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.default_int_handler:
                    signal.signal(number, _note)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            _entered.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            _entered.remove(self)
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt when one was noted."""
        if self._noted:
            self._noted = False
            raise KeyboardInterrupt

    def note(self) -> None:
        self._noted = True
        self._wake()

    def close(self) -> None:
        _open.discard(self)
        if not _open and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is _note:
                    signal.signal(number, signal.default_int_handler)


def _note(number: int, frame: FrameType | None) -> None:
    if _entered:
        _entered[-1].note()
    else:
        signal.default_int_handler(number, frame)
