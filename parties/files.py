"""Files are written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parties.errors import LocalError


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to a temporary name beside `path`, sync it, rename it over `path`.

    Raises:
        LocalError: the folder is missing, not writable or full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from None


def write_json(path: Path, value: Any) -> None:
    """Plain values, indented, in the order given; whole or not at all."""
    write_whole(path, json.dumps(value, indent=2).encode() + b"\n")


def check_writable(path: Path) -> None:
    """Try before the work begins. Raises LocalError when `path` could not be written later."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_whole(probe, b"")
    probe.unlink()


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Make the folder ours while we write to it. Raises LocalError when another process has it."""
    make_folder(folder)
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise LocalError(f"cannot write to {folder}: {error.strerror}; choose another output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LocalError(f"another run writes to {folder}; wait for it or choose another output") from None
        yield


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Move what an earlier run left under these names into `earlier/N`, so that evidence is never overwritten."""
    left = [folder / name for name in names if (folder / name).exists()]
    if left:
        number = 1 + len(list((folder / "earlier").glob("*")))
        make_folder(folder / "earlier" / str(number))
        for path in left:
            path.replace(folder / "earlier" / str(number) / path.name)


def make_folder(path: Path) -> None:
    """Create `path` and its parents. Raises LocalError when that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(f"cannot create the folder {path}: {error.strerror}; choose another output") from None


def read_bytes(path: Path, what: str) -> bytes:
    """The whole file. Raises LocalError that says what the file was for."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise LocalError(f"cannot read {what} {path}: {error.strerror}") from None
