"""Run one command; say what it and every process that it leaves behind used. Linux only.

    python benchmarks/measured.py RESULT.json COMMAND [ARGUMENT ...]

Orphans come to this process (it is their subreaper), so that the CPU seconds that the kernel hands over at each wait
are those of all descendants, whoever started them and whether or not their own parent waited for them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
SAMPLE = 0.2  # seconds between two looks at memory
PSS_EVERY = 5  # looks; the kernel walks every page for it


class Memory(threading.Thread):
    """The most memory that all descendants had at one time, in bytes. `rss` counts shared pages once a process, `pss`
    once in all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rss = self.pss = self.processes = 0

    def run(self) -> None:
        looks = 0
        while True:
            rss = pss = alive = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    rss += process.memory_info().rss
                    alive += 1
                    if looks % PSS_EVERY == 0:
                        pss += process.memory_full_info().pss
            self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)
            self.processes = max(self.processes, alive)
            looks += 1
            time.sleep(SAMPLE)


def measure(command: list[str]) -> dict[str, float]:
    """Run the command to its end and wait for whatever it leaves behind."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot become the subreaper")
    memory, user, system, code, end = Memory(), 0.0, 0.0, 1, 0.0
    start = time.time()
    child = os.posix_spawnp(command[0], command, os.environ)
    memory.start()
    while True:
        try:
            pid, status, used = os.wait4(-1, 0)
        except ChildProcessError:
            break
        user, system = user + used.ru_utime, system + used.ru_stime
        if pid == child:
            code, end = os.waitstatus_to_exitcode(status), time.time()
    return {
        "exit_code": code,
        "start": start,
        "end": end,
        "cpu": user + system,
        "cpu_user": user,
        "cpu_system": system,
        "rss": memory.rss,
        "pss": memory.pss,
        "processes": memory.processes,
    }


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us means the command
    try:
        found = measure(sys.argv[2:])
        Path(sys.argv[1]).write_text(json.dumps(found))
        sys.exit(int(found["exit_code"]) and 1)
    finally:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


if __name__ == "__main__":
    main()
