"""Files are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

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
