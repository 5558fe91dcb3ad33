"""What a person sees while it works: bars on a terminal, plain lines elsewhere, JSON lines for a launching process."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from parties.errors import ColonnadeError, LocalError

PLAIN_EVERY = 5.0  # seconds between two plain lines
EVENTS_EVERY = 0.2

out = Console(markup=False, emoji=False)  # texts of agreements, tables and peers are shown as they are
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


class Watcher:
    """A `progress(phase, done, total)` that shows what it is told, in the way that fits where it writes to."""

    def __init__(self, events: bool = False) -> None:
        self._events = events
        self._bars = Bars() if out.is_terminal and not events else None
        self._last = self._began = 0.0
        self._phase, self._before = "", 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._bars is not None:
            self._bars.show("", phase, done, total)
            return
        now, every = time.monotonic(), EVENTS_EVERY if self._events else PLAIN_EVERY
        if phase == self._phase and now - self._last < every and done < total:
            return
        if phase != self._phase or done < self._before:
            self._began, self._before = now, done
        self._phase, self._last = phase, now
        if self._events:
            sys.stdout.write(json.dumps({"phase": phase, "done": done, "total": total}) + "\n")
            sys.stdout.flush()
        elif total:
            out.print(f"{phase}: {done:,} of {total:,}{self._pace(now, done, total)}", highlight=False)

    def _pace(self, now: float, done: int, total: int) -> str:
        """Rate and time left, once there is something to go by."""
        elapsed, gained = now - self._began, done - self._before
        if elapsed < 1 or gained <= 0:
            return ""
        return f", {gained / elapsed:,.0f} a second, {elapsed * (total - done) / gained:,.0f} s left"

    def __enter__(self) -> Watcher:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class Bars:
    """One bar a party and phase."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=out,
        )
        self._tasks: dict[tuple[str, str], int] = {}

    def show(self, party: str, phase: str, done: int, total: int) -> None:
        key = party, phase
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(f"{party} {phase}".strip(), total=total)
        self._progress.update(self._tasks[key], completed=done, total=total)  # type: ignore[arg-type]

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()


class _Kept(logging.Handler):
    """Remembers texts."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def logging_to(path: Path) -> Iterator[tuple[logging.Logger, list[str]]]:
    """Warnings and milestones of one run: added to a file, and warnings to standard error too. Never an id, label or
    key. Yields the log, and the warnings so far."""
    log = logging.getLogger("colonnade")
    log.setLevel(logging.INFO)
    try:
        file: logging.Handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:
        raise LocalError(f"cannot write the log {path}: {error.strerror}") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.WARNING)
    screen.setFormatter(logging.Formatter("colonnade: %(message)s"))
    kept = _Kept(logging.WARNING)
    log.addHandler(file)
    log.addHandler(screen)
    log.addHandler(kept)
    try:
        yield log, kept.texts
    except ColonnadeError as error:
        log.removeHandler(screen)  # the command line says it once
        log.error("%s: %s", type(error).__name__, error)
        raise
    except KeyboardInterrupt:
        log.removeHandler(screen)
        log.error("interrupted")
        raise
    except Exception as error:
        log.removeHandler(screen)
        log.error("internal error %s at %s", type(error).__name__, " < ".join(frames(error)))
        raise
    finally:
        for handler in (file, screen, kept):
            log.removeHandler(handler)
        file.close()


def frames(error: BaseException) -> list[str]:
    """Where an exception came from, innermost first; never its text, which may quote data."""
    places, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places[::-1][:12]
