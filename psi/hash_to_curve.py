"""What the suites share: RFC 9380's steps that know no curve, arithmetic over a whole batch, points as rows of bytes.

Arithmetic is not constant in time: the ids are ours, and so is the machine. No error text ever holds a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256, sha512
from itertools import accumulate
from secrets import SystemRandom
from typing import Any, Literal

import numpy as np
from gmpy2 import invert, mpz  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

Field = Any  # gmpy2's mpz, reduced modulo p: the package carries no types
Affine = tuple[Field, Field]
Bytes = NDArray[np.uint8]

POINT_BYTES = 32
BATCH = 256  # messages that share inversions: many more leave the processor's cache
TAG = b"Colonnade-PSI-V01-CS01-with-"  # the domain separation tag of a suite is this and its name (RFC 9380, 3.1)
_HASHES = {"sha256": (sha256, 32, 64), "sha512": (sha512, 64, 128)}  # bytes of a digest, of an input block


@lru_cache(maxsize=16)
def _expander(dst: bytes, length: int, hash_name: str) -> Callable[[bytes], bytes]:
    """`expand_message_xmd` for one tag and length: what does not depend on the message is computed once."""
    digest, size, block_size = _HASHES[hash_name]
    if not 0 < length <= min(255 * size, 65535) or not dst:
        raise ValueError(f"cannot expand to {length} bytes with {hash_name} and a tag of {len(dst)} bytes")
    if len(dst) > 255:
        dst = digest(b"H2C-OVERSIZE-DST-" + dst).digest()
    tag = dst + bytes([len(dst)])
    pad, end = bytes(block_size), length.to_bytes(2, "big") + b"\0" + tag
    first_end, *ends = [bytes([i]) + tag for i in range(1, -(-length // size) + 1)]

    def expand(message: bytes) -> bytes:
        first = digest(pad + message + end).digest()
        out = block = digest(first + first_end).digest()
        salt = int.from_bytes(first, "big")
        for block_end in ends:
            block = digest((salt ^ int.from_bytes(block, "big")).to_bytes(size, "big") + block_end).digest()
            out += block
        return out[:length]

    return expand


def expand_message_xmd(message: bytes, dst: bytes, length: int, hash_name: str) -> bytes:
    """`length` uniform bytes from a message and a domain separation tag (RFC 9380, 5.3.1 and 5.3.3).

    Raises:
        ValueError: a length that the RFC does not allow (1 .. 255 digests, at most 65535), an empty tag.
    """
    return _expander(dst, length, hash_name)(message)


def hash_to_field(message: bytes, dst: bytes, p: Field, length: int, hash_name: str, count: int = 2) -> list[Field]:
    """`count` elements of the field of p, each from `length` bytes, 128 bits more than p: no bias (RFC 9380, 5.2)."""
    uniform = _expander(dst, length * count, hash_name)(message)
    if count == 2:
        return [mpz.from_bytes(uniform[:length], "big") % p, mpz.from_bytes(uniform[length:], "big") % p]
    return [mpz.from_bytes(uniform[i : i + length], "big") % p for i in range(0, length * count, length)]


def inverses(values: Sequence[Field], p: Field) -> list[Field]:
    """1/v for every v at the price of one inversion (Montgomery's trick); 0 for 0, as RFC 9380's inv0."""
    factors = [v or mpz(1) for v in values]
    before = list(accumulate(factors, lambda product, v: product * v % p, initial=mpz(1)))
    inverse, out = invert(before.pop(), p), []
    for v, product in zip(reversed(factors), reversed(before), strict=True):
        out.append(inverse * product % p)
        inverse = inverse * v % p
    return [inverse if v else mpz(0) for v, inverse in zip(values, reversed(out), strict=True)]


def add(left: Sequence[Affine], right: Sequence[Affine], p: Field, a: Field, b: Field) -> list[Affine]:
    """left[i] + right[i] on y^2 = x^3 + a x^2 + b x + c, with one inversion in all.

    The identity, which no (x, y) names, becomes (0, 0).
    """
    slopes = []
    for (x0, y0), (x1, y1) in zip(left, right, strict=True):
        if x0 != x1:
            slopes.append((y1 - y0, x1 - x0))
        else:  # the tangent of equal points; a zero below it for opposite ones
            slopes.append(((3 * x0 + 2 * a) * x0 + b, (y0 + y1) % p))
    shared, out = inverses([run for _, run in slopes], p), []
    for (x0, y0), (x1, _), (rise, run), inverse in zip(left, right, slopes, shared, strict=True):
        slope = rise * inverse % p
        x = (slope * slope - a - x0 - x1) % p
        out.append((x, (slope * (x0 - x) - y0) % p) if run else (mpz(0), mpz(0)))
    return out


def rows(raw: Sequence[bytes]) -> Bytes:
    """Points of 32 bytes each as an array (n, 32) uint8."""
    return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(-1, POINT_BYTES)


def split(points: Bytes) -> list[bytes]:
    """The points of an array (n, 32) uint8, one by one."""
    check_shape(points)
    raw = points.tobytes()
    return [raw[i : i + POINT_BYTES] for i in range(0, len(raw), POINT_BYTES)]


def check_shape(points: Bytes) -> None:
    """ValueError unless this is an array (n, 32) uint8."""
    if points.dtype != np.uint8 or points.ndim != 2 or points.shape[1] != POINT_BYTES:
        raise ValueError(f"points must be uint8 of shape (n, {POINT_BYTES}), not {points.dtype} of {points.shape}")


def refuse(bad: NDArray[np.bool_], what: str) -> None:
    """ValueError with how many are bad and where the first is, if any is."""
    if bad.any():
        raise ValueError(f"{int(bad.sum())} of {len(bad)} {what}, the first at position {int(bad.argmax())}")


def not_below(points: Bytes, p: Field, byteorder: Literal["little", "big"]) -> NDArray[np.bool_]:
    """Which x-coordinates, read as "little" or "big" endian, are not below p: every point has one canonical form."""
    whole = np.ascontiguousarray(points)
    words = whole.view(">u8") if byteorder == "big" else whole.view("<u8")[:, ::-1]  # the most significant first
    above, equal = np.zeros(len(points), dtype=np.bool_), np.ones(len(points), dtype=np.bool_)
    for i in range(4):
        limit = np.uint64(int(p >> (192 - 64 * i)) % 2**64)
        above |= equal & (words[:, i] > limit)
        equal &= words[:, i] == limit
    return above | equal


def sampled(points: Bytes, sample: int) -> Iterator[tuple[int, bytes]]:
    """At most `sample` positions with their points, drawn at random: whoever sent them cannot foresee which."""
    for position in SystemRandom().sample(range(len(points)), min(sample, len(points))):
        yield position, points[position].tobytes()
