"""Start several parties as operating-system processes of this machine: the demo, the examples, the tests."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

GRACE = 30.0  # seconds for the others to end by themselves once one has failed

Line = Callable[[str, str], None]


def launch(
    commands: Mapping[str, Sequence[str]],
    *,
    timeout: float,
    on_output: Line = lambda name, line: None,
    on_error: Line = lambda name, line: None,
) -> dict[str, int]:
    """Run one command a party and wait for all; their exit codes (negative: ended by a signal).

    Every line of output goes to `on_output(name, line)`, of errors to `on_error`. Whatever happens, an interrupt
    included, nothing is left running. After `timeout` seconds, or GRACE after one failed, the rest is ended.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running: dict[str, subprocess.Popen[str]] = {}
    readers: list[threading.Thread] = []
    try:
        for name, command in commands.items():
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
            )
            running[name] = process
            for stream, sink in ((process.stdout, on_output), (process.stderr, on_error)):
                reader = threading.Thread(target=_read, args=(name, stream, sink), daemon=True)
                reader.start()
                readers.append(reader)
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
            if any(process.poll() for process in running.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
                _wait_all(running, deadline)
            time.sleep(0.05)
    finally:
        for process in running.values():
            with suppress(OSError):
                process.terminate()
        _wait_all(running, time.monotonic() + 5)
        for process in running.values():
            with suppress(OSError):
                process.kill()
            process.wait()
        for reader in readers:
            reader.join(timeout=5)
    return {name: process.returncode for name, process in running.items()}


def _read(name: str, stream: IO[str] | None, sink: Line) -> None:
    if stream is not None:
        for line in stream:
            sink(name, line.rstrip("\n"))


def _wait_all(running: Mapping[str, subprocess.Popen[str]], deadline: float) -> None:
    while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
