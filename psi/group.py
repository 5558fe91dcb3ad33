"""Hash to curve and masking: a choice of two suites behind one interface, and the lists of points and tokens.

A list of n points is a uint8 array of shape (n, 32) of x-coordinates, a list of tokens one of shape (n, width).
Their order is that of their bytes. No error text ever holds a point or a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from psi.curve25519 import Curve25519
from psi.hash_to_curve import POINT_BYTES, Bytes, refuse, split
from psi.p256 import P256

__all__ = [
    "POINT_BYTES",
    "SUITES",
    "Bytes",
    "Suite",
    "check_distinct",
    "match",
    "shuffle_order",
    "suite",
    "token",
    "token_width",
]

_BLOCK = 1 << 16  # rows worked on at a time, where a list of Python objects or a wide copy would be large


class Suite(Protocol):
    """A hash to a group in which the discrete logarithm is hard, and the multiplication there (RFC 9380, 8)."""

    @property
    def name(self) -> str:
        """The RFC's name of the suite; the domain separation tag ends with it."""

    def scalar(self, randomness: Callable[[int], bytes] = os.urandom) -> bytes:
        """A fresh secret for `mask`, 32 bytes, from a source of so many random bytes."""

    def hash_to_points(self, messages: Sequence[bytes]) -> Bytes:
        """The points of the messages, (n, 32) uint8; never sent unmasked."""

    def mask(self, points: Bytes, scalar: bytes) -> Bytes:
        """Every point of (n, 32) multiplied by the scalar, (n, 32). ValueError for a point that has no product."""

    def check_points(self, points: Bytes, sample: int = 128) -> None:
        """Refuse points that no honest party sends: ValueError with the reason, how many and where. Made for one chunk
        of a list, see `check_distinct` for the whole; `sample` of them, at random, must lie on the curve."""


SUITES: Final[dict[str, Suite]] = {known.name: known for known in (Curve25519(), P256())}


def suite(name: str) -> Suite:
    """The suite of that name; ValueError, with the names there are, for any other."""
    if name not in SUITES:
        raise ValueError(f"no such suite; there are {' and '.join(SUITES)}")
    return SUITES[name]


def _heads(rows: Bytes) -> NDArray[np.uint64]:
    """The first eight bytes of each row as one integer, whose order is theirs."""
    width = min(rows.shape[1], 8)
    heads = np.zeros((len(rows), 8), dtype=np.uint8)
    heads[:, :width] = rows[:, :width]
    return heads.view(">u8")[:, 0].astype(np.uint64)


def _strings(rows: Bytes) -> NDArray[np.bytes_]:
    """Each row as one byte string; all have one width, so that the trailing zeros that S drops tell nothing."""
    return np.ascontiguousarray(rows).view(f"S{rows.shape[1]}")[:, 0]


def _ascending(rows: Bytes, what: str) -> tuple[NDArray[np.uint32], NDArray[np.uint64], bool]:
    """The order of distinct rows, their heads in that order, and whether heads tie. ValueError if a row comes twice.

    Heads of honest rows hardly ever tie: only those that do are compared as a whole, however many a cheater makes.
    """
    if rows.dtype != np.uint8 or rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"{what} must be uint8 of shape (n, width), not {rows.dtype} of {rows.shape}")
    heads = _heads(rows)
    order = np.argsort(heads).astype(np.uint32)
    heads = heads[order]
    same = heads[1:] == heads[:-1]
    if not same.any():
        return order, heads, False
    tied = np.zeros(len(rows), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    among = np.sort(order[tied])
    whole = _strings(rows[among])
    ranked = np.argsort(whole, kind="stable")
    again = np.zeros(len(rows), dtype=np.bool_)
    again[among[ranked[1:]]] = whole[ranked[1:]] == whole[ranked[:-1]]
    refuse(again, f"{what} are duplicates")
    order[tied] = among[ranked]  # a head is part of its string: the groups stay where they were
    return order, heads, True


def check_distinct(rows: Bytes, what: str = "points") -> None:
    """Refuse a whole list, (n, width) uint8, in which a row comes twice: ValueError with the count and a position."""
    _ascending(rows, what)


def match(lists: Sequence[Bytes]) -> list[NDArray[np.uint32]]:
    """Where the tokens that all lists share stand in each list, in ascending token order.

    Lists are (n_i, width) uint8, of one width, their tokens distinct; the positions are uint32, as many for each list.
    Exact: integers of eight bytes find candidates, whole tokens decide.

    Raises:
        ValueError: lists of several widths, or a token that comes twice in its list.
    """
    if len({tokens.shape[1:] for tokens in lists}) != 1:
        raise ValueError("the lists to match must hold tokens of one width")
    first = lists[0]
    found = [_ascending(first, "tokens")[0]]
    for tokens in lists[1:]:
        order, heads, tie = _ascending(tokens, "tokens")
        keys = _strings(tokens[order]) if tie else heads
        kept = [np.empty((len(found) + 1, 0), dtype=np.uint32)]
        for start in range(0, len(found[0]) if len(tokens) else 0, _BLOCK):
            block = [positions[start : start + _BLOCK] for positions in found]
            wanted = first[block[0]]
            at = np.searchsorted(keys, _strings(wanted) if tie else _heads(wanted))
            candidates = order[np.minimum(at, len(order) - 1)]
            equal = (tokens[candidates] == wanted).all(axis=1)
            kept.append(np.stack([positions[equal] for positions in (*block, candidates)]))
        found = list(np.concatenate(kept, axis=1))
    return found


def token(points: Bytes, session: bytes, width: int) -> Bytes:
    """The first `width` bytes of SHA-256("colonnade/psi/token/1" || session || point) for every point: (n, width)."""
    if not 1 <= width <= 32:
        raise ValueError(f"a token has 1 to 32 bytes, not {width}")
    prefix = b"colonnade/psi/token/1" + session
    out = np.empty((len(points), width), dtype=np.uint8)
    for start in range(0, max(len(points), 1), _BLOCK):
        digests = b"".join([sha256(prefix + point).digest() for point in split(points[start : start + _BLOCK])])
        out[start : start + _BLOCK] = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)[:, :width]
    return out


def token_width(total: int) -> int:
    """ceil((2 log2 N + 40) / 8) bytes, exactly, for N points in all lists: a false match has odds below 2^-40."""
    return -(-((max(total, 1) ** 2 - 1).bit_length() + 40) // 8)


def shuffle_order(n: int, key: bytes | None = None) -> NDArray[np.int64]:
    """A uniformly random permutation of 0 .. n-1, int64: the order of n distinct 64-bit words of a ChaCha20 stream.

    `key`, 32 bytes, replays a permutation; it serves for one shuffle only. Without it, fresh from the system.
    """
    stream = Cipher(algorithms.ChaCha20(os.urandom(32) if key is None else key, bytes(16)), mode=None).encryptor()
    while True:  # words that tie would bias the order: then draw all again
        words = np.frombuffer(stream.update(bytes(8 * n)), dtype="<u8")
        order = np.argsort(words)
        ranked = words[order]
        if not (ranked[1:] == ranked[:-1]).any():
            return order.astype(np.int64, copy=False)
