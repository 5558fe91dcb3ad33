"""Hash to curve and masking: the only curve code.

An id becomes a point of curve25519, y^2 = g(x) = x^3 + J x^2 + x with J = 486662 over p = 2^255 - 19, through the suite
`curve25519_XMD:SHA-512_ELL2_RO_` of RFC 9380. A point travels as its x-coordinate alone, 32 bytes little-endian
(RFC 7748's u), and a list of n points is a uint8 array of shape (n, 32). X25519 multiplies: its clamped scalars are
multiples of 8, so that the first mask clears the cofactor too.

Hashing is not constant in time: the ids are ours, and so is the machine. No error text ever holds a point.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256, sha512
from secrets import SystemRandom
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from gmpy2 import invert, legendre, mpz, powmod  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

Field = Any  # gmpy2's mpz, reduced modulo P: the package carries no types
Affine = tuple[Field, Field]
Bytes = NDArray[np.uint8]

SUITE = "curve25519_XMD:SHA-512_ELL2_RO_"
DST = b"Colonnade-PSI-V01-CS01-with-" + SUITE.encode()
POINT_BYTES = 32

P = mpz(2) ** 255 - 19
J = mpz(486662)
ROOT_EXPONENT = (P + 3) // 8  # p = 5 modulo 8: g^((p+3)/8) is a root of g or of -g, when g is a square
SQRT_MINUS_ONE = powmod(2, (P - 1) // 4, P)
TWO_ROOTED = powmod(2, ROOT_EXPONENT, P)
# Every x-coordinate of order 1, 2, 4 or 8: the curve's (0, 1 and two of order 8) and its twist's (0 and -1).
SMALL_ORDER = tuple(
    bytes.fromhex(u)
    for u in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


def expand_message_xmd(message: bytes, dst: bytes, length: int, hash_name: str = "sha512") -> bytes:
    """`length` uniform bytes from a message and a domain separation tag (RFC 9380, 5.3.1 and 5.3.3).

    Raises:
        ValueError: a length that the RFC does not allow (1 .. 255 digests, at most 65535), an empty tag.
    """
    digest = {"sha256": sha256, "sha512": sha512}[hash_name]
    empty = digest()
    if not 0 < length <= min(255 * empty.digest_size, 65535) or not dst:
        raise ValueError(f"cannot expand to {length} bytes with {hash_name} and a tag of {len(dst)} bytes")
    if len(dst) > 255:
        dst = digest(b"H2C-OVERSIZE-DST-" + dst).digest()
    tag = dst + bytes([len(dst)])
    first = digest(bytes(empty.block_size) + message + length.to_bytes(2, "big") + b"\0" + tag).digest()
    block = digest(first + b"\1" + tag).digest()
    out, salt = block, int.from_bytes(first, "big")
    for i in range(2, -(-length // empty.digest_size) + 1):
        mixed = (salt ^ int.from_bytes(block, "big")).to_bytes(empty.digest_size, "big")
        block = digest(mixed + bytes([i]) + tag).digest()
        out += block
    return out[:length]


def hash_to_field(message: bytes, dst: bytes = DST, count: int = 2) -> list[Field]:
    """`count` field elements, each from 48 bytes: 128 bits more than p, hence no bias (RFC 9380, 5.2)."""
    uniform = expand_message_xmd(message, dst, 48 * count)
    return [mpz.from_bytes(uniform[i : i + 48], "big") % P for i in range(0, len(uniform), 48)]


def _inverses(values: Sequence[Field]) -> list[Field]:
    """1/v for every v at the price of one inversion (Montgomery's trick); 0 for 0, as RFC 9380's inv0."""
    before, product = [], mpz(1)
    for v in values:
        before.append(product)
        if v:
            product = product * v % P
    inverse, out = invert(product, P), [mpz(0)] * len(values)
    for i in range(len(values) - 1, -1, -1):
        if values[i]:
            out[i] = inverse * before[i] % P
            inverse = inverse * values[i] % P
    return out


def _elligator2(u: Field, inverse: Field) -> Affine:
    """Elligator 2 with Z = 2 (RFC 9380, 6.7.1), given 1/(1 + 2u^2), which exists for every u: -1/2 is no square.

    One exponentiation serves both candidates, as in appendix G.2.1: with r = g(x1)^((p+3)/8), a root of
    g(x2) = 2 u^2 g(x1) is r u 2^((p+3)/8), up to a square root of -1.
    """
    x = -J * inverse % P
    g = ((x + J) * x + 1) * x % P
    y, odd = powmod(g, ROOT_EXPONENT, P), 1
    if y * y % P not in (g, P - g):  # g(x1) is no square, so that g(x2) is one
        x, g, y, odd = (-x - J) % P, 2 * u * u * g % P, y * u * TWO_ROOTED % P, 0
    if y * y % P != g:
        y = y * SQRT_MINUS_ONE % P
    return x, y if y % 2 == odd else P - y


def map_to_curve(u: Field) -> Affine:
    """The point (x, y) of a field element, with the RFC's sign of y (RFC 9380, 6.7.1)."""
    return _elligator2(u, invert(1 + 2 * u * u, P))


def _add(left: Sequence[Affine], right: Sequence[Affine]) -> list[Affine]:
    """left[i] + right[i] for every i with one inversion in all. The identity, which no (x, y) names, becomes (0, 0)."""
    slopes = []
    for (x0, y0), (x1, y1) in zip(left, right, strict=True):
        if x0 != x1:
            slopes.append((y1 - y0, (x1 - x0) % P))
        else:  # the tangent of equal points; a zero below it for opposite ones
            slopes.append(((3 * x0 + 2 * J) * x0 + 1, (y0 + y1) % P))
    inverses, out = _inverses([run for _, run in slopes]), []
    for (x0, y0), (x1, _), (rise, run), inverse in zip(left, right, slopes, inverses, strict=True):
        slope = rise * inverse % P
        x = (slope * slope - J - x0 - x1) % P
        out.append((x, (slope * (x0 - x) - y0) % P) if run else (mpz(0), mpz(0)))
    return out


def hash_to_curve(messages: Sequence[bytes], dst: bytes = DST) -> list[Affine]:
    """The curve point (x, y) of each message, its cofactor not yet cleared: the first mask does that (RFC 9380, 3).

    The identity, met with probability 2^-252, is given as (0, 0): X25519 sends both to u = 0, which `mask` refuses.
    """
    fields = [u for message in messages for u in hash_to_field(message, dst)]
    inverses = _inverses([1 + 2 * u * u for u in fields])
    points = [_elligator2(u, inverse) for u, inverse in zip(fields, inverses, strict=True)]
    return _add(points[::2], points[1::2])


def _rows(raw: Sequence[bytes], width: int = POINT_BYTES) -> Bytes:
    return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(-1, width)


def hash_to_points(messages: Sequence[bytes]) -> Bytes:
    """The points of the messages as x-coordinates, (n, 32) uint8; never sent unmasked. Some thousands at a time."""
    return _rows([x.to_bytes(POINT_BYTES, "little") for x, _ in hash_to_curve(messages)])


def random_scalar() -> bytes:
    """A fresh X25519 key, 32 bytes from the operating system; X25519 clamps it."""
    return os.urandom(32)


def _split(points: Bytes) -> list[bytes]:
    _check_shape(points)
    raw = points.tobytes()
    return [raw[i : i + POINT_BYTES] for i in range(0, len(raw), POINT_BYTES)]


def mask(points: Bytes, scalar: bytes) -> Bytes:
    """Every point of (n, 32) multiplied by the scalar with X25519 (RFC 7748, 5).

    Raises:
        ValueError: a product is zero, because its point was of small order (RFC 7748, 6.1); not 32 bytes of scalar.
    """
    key, raw = X25519PrivateKey.from_private_bytes(scalar), _split(points)
    try:
        return _rows([key.exchange(X25519PublicKey.from_public_bytes(point)) for point in raw])
    except ValueError:
        raise ValueError("a point of small order: its masked point is zero") from None


def _check_shape(points: Bytes) -> None:
    if points.dtype != np.uint8 or points.ndim != 2 or points.shape[1] != POINT_BYTES:
        raise ValueError(f"points must be uint8 of shape (n, {POINT_BYTES}), not {points.dtype} of {points.shape}")


def _refuse(bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise ValueError(f"{int(bad.sum())} of {len(bad)} points {what}, the first at position {int(bad.argmax())}")


def check_points(points: Bytes, sample: int = 128) -> None:
    """Refuse points that no honest party sends; made for one chunk of a list, see `check_distinct` for the whole.

    Checked of all: shape (n, 32) uint8, canonical (below p, top bit clear), not of small order. Of `sample` at random,
    whom the sender cannot foresee: on the curve, not on its twist.

    Raises:
        ValueError: with the reason, how many and where, never a point.
    """
    _check_shape(points)
    top, low = points[:, 31], points[:, 0]
    _refuse((top > 0x7F) | ((top == 0x7F) & (low >= 0xED) & (points[:, 1:31] == 0xFF).all(axis=1)), "are not canonical")
    words = np.ascontiguousarray(points).view("<u8")
    small = [(words == np.frombuffer(u, dtype="<u8")).all(axis=1) for u in SMALL_ORDER]
    _refuse(np.logical_or.reduce(small), "are of small order")
    for position in SystemRandom().sample(range(len(points)), min(sample, len(points))):
        u = mpz.from_bytes(points[position].tobytes(), "little")
        if legendre(((u + J) * u + 1) * u, P) != 1:
            raise ValueError(f"the point at position {position} is on the twist, not on the curve")


def check_distinct(points: Bytes) -> None:
    """Refuse a whole list, (n, 32) uint8, in which a point comes twice: ValueError with the count and a position."""
    _check_shape(points)
    keys = np.ascontiguousarray(points).view("S32")[:, 0]  # one width for all: the zeros that S drops tell nothing
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(points), dtype=np.bool_)
    again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    _refuse(again, "are duplicates")


def token(points: Bytes, session: bytes, width: int) -> Bytes:
    """The first `width` bytes of SHA-256("colonnade/psi/token/1" || session || point) for every point: (n, width)."""
    if not 1 <= width <= 32:
        raise ValueError(f"a token has 1 to 32 bytes, not {width}")
    prefix = b"colonnade/psi/token/1" + session
    return _rows([sha256(prefix + point).digest()[:width] for point in _split(points)], width)


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
