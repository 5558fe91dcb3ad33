"""Files are written whole or not at all; what is too large for memory lives in files without a name."""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import secrets
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

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
        earlier = [int(one.name) for one in (folder / "earlier").glob("*") if one.name.isdecimal()]
        number = 1 + max(earlier, default=0)  # also where somebody has deleted some
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


class Scratch:
    """Room for arrays that are too large for memory: files of the party's own folder that have no name and vanish with
    the process.

    Args:
        folder: where the files are; None keeps everything in memory.
        memory: an array or table of more bytes goes to disk.
    """

    def __init__(self, folder: Path | None = None, memory: int = 64 << 20) -> None:
        self.folder, self.memory = folder, memory
        self._tables: list[weakref.ref[mmap.mmap]] = []

    def array(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Zeros. Raises LocalError when the disk has no room for them."""
        size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
        if self.folder is None or size <= self.memory:
            return np.zeros(shape, dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _allocate(file.fileno(), size)
                return np.ndarray(shape, dtype, buffer=mmap.mmap(file.fileno(), size))
        except OSError as error:
            raise self._full(size, error) from None

    def table(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
        """The batches as one table: in memory or, when they are larger, an Arrow file mapped into memory.

        Raises:
            LocalError: the disk has no room for it.
        """
        kept: list[pa.RecordBatch] = []
        size, rest = 0, iter(batches)
        for batch in rest:
            kept.append(batch)
            size += batch.nbytes
            if self.folder is not None and size > self.memory:
                return self._mapped(kept, rest, schema)
        return pa.Table.from_batches(kept, schema)

    def _mapped(self, kept: list[pa.RecordBatch], rest: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
        size = 0
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                with pa.ipc.new_file(file, schema) as writer:
                    while (batch := kept.pop(0) if kept else next(rest, None)) is not None:  # lets go of each
                        size += batch.nbytes
                        writer.write_batch(batch)
                file.flush()
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._full(size, error) from None
        self._tables.append(weakref.ref(mapping))
        return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapping))).read_all()

    def release(self, data: NDArray[Any] | pa.ChunkedArray) -> None:
        """Pages of a mapped array need not stay resident; for a column, those of all tables. In memory: nothing.

        The mappings are shared with their files, which keep what the pages held: nothing is lost, or waited for.
        """
        if isinstance(data, np.ndarray):
            base: Any = data
            while isinstance(base, np.ndarray):
                base = base.base
            mappings = [base]
        else:
            mappings = [reference() for reference in self._tables]
        for mapping in mappings:
            if isinstance(mapping, mmap.mmap):
                mapping.madvise(mmap.MADV_DONTNEED)

    def _full(self, size: int, error: OSError) -> LocalError:
        why = f"{error.strerror}; make room there or choose another output"
        return LocalError(f"cannot keep {size} bytes in {self.folder}: {why}")


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the blocks now: a full disk is an error here, and not a SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1 << 20)  # macOS has no posix_fallocate
    for start in range(0, size, len(zeros)):
        os.pwrite(descriptor, zeros[: size - start], start)
