"""Where a training stood, as a file: written whole, read without running anything, float64 exact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from parties.errors import LocalError
from parties.files import read_bytes, write_whole
from parties.message import Array

_NAME = b"colonnade/checkpoint/1"
F = TypeVar("F")


class _Numbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    dtype: Literal["<f8", "<i8", "|u1"]
    shape: tuple[Annotated[int, Meta(ge=0)], ...]
    data: bytes


class Bound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts that say whose they are: the agreement's digest, and the party."""

    agreement: bytes = b""
    party: str = ""


class Checkpoint(msgspec.Struct, Generic[F], frozen=True, forbid_unknown_fields=True):
    """job: the digest of what was agreed; facts: plain values; arrays: the state."""

    job: bytes
    facts: F
    numbers: dict[str, _Numbers]

    @property
    def arrays(self) -> dict[str, Array]:
        return {name: np.frombuffer(n.data, n.dtype).reshape(n.shape).copy() for name, n in self.numbers.items()}


def write_checkpoint(path: Path, job: bytes, facts: Mapping[str, Any] | Bound, arrays: Mapping[str, Array]) -> None:
    """Replace the file. Raises LocalError when it cannot be written."""
    numbers = {name: _Numbers(array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}  # type: ignore[arg-type]
    body = msgspec.msgpack.encode(Checkpoint(job, facts, numbers))
    write_whole(path, hashlib.sha256(_NAME + body).digest() + body, mode=0o600)


def read_checkpoint(
    path: Path, job: bytes | None, kind: Any = dict[str, Any], whose: Bound | None = None
) -> Checkpoint[Any] | None:
    """The file, with facts of this `kind`, or None where there is none.

    Raises LocalError: it is damaged, or of another agreement or party than `whose`, or of another job (None: any).
    """
    if not path.exists():
        return None
    raw = read_bytes(path, "the checkpoint")
    try:
        if hashlib.sha256(_NAME + raw[32:]).digest() != raw[:32]:
            raise ValueError
        found = msgspec.msgpack.decode(raw[32:], type=Checkpoint[kind])
        found.arrays  # noqa: B018  (shapes that do not fit their bytes)
    except (msgspec.MsgspecError, ValueError):
        raise LocalError(f"{path} is no checkpoint, or is damaged; remove it to begin anew") from None
    if whose is not None and found.facts.agreement != whose.agreement:
        raise LocalError(f"{path} is of another agreement; choose another folder, or run without --resume")
    if whose is not None and found.facts.party != whose.party:
        raise LocalError(f"{path} is of another party, {found.facts.party}; choose another folder")
    if job is not None and found.job != job:
        raise LocalError(f"{path} is of another job; choose another folder, or remove it to begin anew")
    return found
