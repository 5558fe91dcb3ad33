"""Typed messages <-> two frames: a small msgpack header, then one raw little-endian buffer.

The wire never names a class: a kind is a number in a closed registry, and a receiver says which one it expects, or one
from which it is derived. Nothing is read from the buffer before the header has been checked against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from typing import Any, ClassVar, TypeVar, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

VERSION = 1
HEADER_LIMIT = 4096
PAYLOAD_LIMIT = 32 << 20
DTYPES = {"", "|u1", "<u4", "<u8", "<f8"}
CLASSES = ("control", "ciphertext", "masked", "aggregate", "plaintext")

Array = NDArray[Any]


class Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What stands before every buffer. `sender` and `receiver` are key ids, `number` counts per direction from 0."""

    version: int
    session: bytes
    sender: bytes
    receiver: bytes
    kind: int
    number: int
    dtype: str
    shape: tuple[int, ...]
    length: int
    digest: bytes
    fields: msgspec.Raw


@dataclass(frozen=True, eq=False)
class Message:
    """Base of all messages: scalar fields, and at most one array in a field named `data`.

    A message refuses bad values when it is built (ValueError), so an honest party cannot send one and a received one
    that exists is well formed.
    """

    kind: ClassVar[int]
    ledger_class: ClassVar[str]
    dtype: ClassVar[str] = ""
    ndim: ClassVar[int] = 0

    def __post_init__(self) -> None:
        data: Array | None = getattr(self, "data", None)
        if data is None:
            return
        if data.dtype.str != self.dtype or data.ndim != self.ndim:
            raise ValueError(f"{type(self).__name__} holds {self.dtype} with {self.ndim} dimensions")
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise ValueError(f"{type(self).__name__} holds a value that is not finite")


_REGISTRY: dict[int, type[Message]] = {}
M = TypeVar("M", bound=Message)


def kind(number: int, ledger_class: str, dtype: str = "", ndim: int = 0) -> Callable[[type[M]], type[M]]:
    """Class decorator: enter a message into the registry under `number`, with the class that the ledger records."""

    def enter(cls: type[M]) -> type[M]:
        if number in _REGISTRY or ledger_class not in CLASSES or dtype not in DTYPES:
            raise TypeError(f"{cls.__name__}: kind {number}, class {ledger_class!r} or dtype {dtype!r} is not free")
        cls.kind, cls.ledger_class, cls.dtype, cls.ndim = number, ledger_class, dtype, ndim
        _REGISTRY[number] = cls
        return cls

    return enter


@kind(1, "control")
@dataclass(frozen=True, eq=False)
class Abort(Message):
    """We stop; `reason` is the kind of the error, never its text; `relayed`: it is another party's, we heard of it."""

    reason: str
    relayed: bool = False

    def __post_init__(self) -> None:
        if self.reason not in ("local", "refused", "lost", "violation", "interrupted", "error"):
            raise ValueError("unknown reason")


@cache
def _scalars(number: int) -> tuple[str, ...]:
    """The scalar fields of a kind."""
    return tuple(field.name for field in fields(_REGISTRY[number]) if field.name != "data")


@cache  # to work the types out takes longer than all else in a small message
def _scalar_decoder(number: int) -> msgspec.msgpack.Decoder[Any]:
    hints = get_type_hints(_REGISTRY[number])
    return msgspec.msgpack.Decoder(tuple.__class_getitem__(tuple(hints[name] for name in _scalars(number))))


def encode(
    message: Message, session: bytes, sender: bytes, receiver: bytes, number: int
) -> tuple[bytes, bytes | memoryview]:
    """The two frames of a message. Raises ValueError when it is larger than a frame may be."""
    data: Array | None = getattr(message, "data", None)
    payload: bytes | memoryview = b"" if data is None else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    scalars = tuple(getattr(message, name) for name in _scalars(message.kind))
    header = Header(
        version=VERSION,
        session=session,
        sender=sender,
        receiver=receiver,
        kind=message.kind,
        number=number,
        dtype=message.dtype,
        shape=() if data is None else data.shape,
        length=len(payload),
        digest=hashlib.sha256(payload).digest(),
        fields=msgspec.Raw(msgspec.msgpack.encode(scalars)),
    )
    head = msgspec.msgpack.encode(header)
    if len(head) > HEADER_LIMIT or len(payload) > PAYLOAD_LIMIT:
        raise ValueError(f"{type(message).__name__} is larger than a frame may be; send it in parts")
    return head, payload


def parse_header(head: bytes) -> Header:
    """Check the header alone. Raises ValueError; its text is about the frame, never the data."""
    if len(head) > HEADER_LIMIT:
        raise ValueError("the header is too long")
    try:
        header = msgspec.msgpack.decode(head, type=Header)
    except (msgspec.MsgspecError, RecursionError):  # deep nesting is a peer's fault too
        raise ValueError("the header does not parse") from None
    if header.version != VERSION:
        raise ValueError(f"protocol version {header.version}, not {VERSION}")
    if header.kind not in _REGISTRY:
        raise ValueError(f"unknown message kind {header.kind}")
    if header.dtype not in DTYPES or len(header.shape) > 3 or any(not 0 <= size < 2**40 for size in header.shape):
        raise ValueError("the array's dtype or shape is not allowed")
    itemsize = np.dtype(header.dtype).itemsize if header.dtype else 0
    if header.length > PAYLOAD_LIMIT or prod(header.shape) * itemsize != header.length:
        raise ValueError("the array's length does not follow from its shape")
    return header


def name_of(kind_number: int) -> str:
    return _REGISTRY[kind_number].__name__


def class_of(name: str) -> str:
    """The ledger's class of the messages of that name. Raises KeyError."""
    return {known.__name__: known.ledger_class for known in _REGISTRY.values()}[name]


def decode(header: Header, payload: bytes, expected: type[M]) -> M:
    """Build the `expected` message, or one of a kind derived from it. Raises ValueError: another kind, a digest that
    differs, a value it refuses."""
    found = _REGISTRY[header.kind]
    if not issubclass(found, expected):
        raise ValueError(f"sent {found.__name__} where {expected.__name__} is due")
    if len(payload) != header.length or hashlib.sha256(payload).digest() != header.digest:
        raise ValueError(f"{found.__name__}: the buffer differs from its header")
    if header.dtype != found.dtype or len(header.shape) != found.ndim:
        raise ValueError(f"{found.__name__}: the array's dtype or dimensions differ")
    try:
        scalars = _scalar_decoder(found.kind).decode(header.fields)
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError(f"{found.__name__}: its fields do not parse") from None
    values: dict[str, Any] = dict(zip(_scalars(found.kind), scalars, strict=True))
    if found.dtype:
        values["data"] = np.frombuffer(payload, dtype=found.dtype).reshape(header.shape)
    return found(**values)
