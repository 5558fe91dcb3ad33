"""The suite `curve25519_XMD:SHA-512_ELL2_RO_` of RFC 9380, multiplied with X25519.

y^2 = g(x) = x^3 + J x^2 + x with J = 486662 over p = 2^255 - 19. A point travels as its x-coordinate alone, 32 bytes
little-endian (RFC 7748's u). X25519's clamped scalars are multiples of 8, so that the first mask clears the cofactor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gmpy2 import legendre, mpz, powmod, powmod_base_list  # type: ignore[import-untyped, unused-ignore]
from nacl.bindings import crypto_scalarmult

from psi.hash_to_curve import (
    BATCH,
    POINT_BYTES,
    TAG,
    Affine,
    Bytes,
    Field,
    add,
    check_shape,
    hash_to_field,
    inverses,
    not_below,
    refuse,
    rows,
    sampled,
    split,
)

NAME = "curve25519_XMD:SHA-512_ELL2_RO_"
DST = TAG + NAME.encode()

P = mpz(2) ** 255 - 19
J = mpz(486662)
MINUS_J = -J
ROOT_EXPONENT = (P + 3) // 8  # p = 5 modulo 8: g^((p+3)/8) is a root of g or of -g, when g is a square
SQRT_MINUS_ONE = powmod(2, (P - 1) // 4, P)
SQRT_2I = powmod(2, ROOT_EXPONENT, P)  # i is SQRT_MINUS_ONE
SQRT_MINUS_2I = SQRT_2I * SQRT_MINUS_ONE % P
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


def fields(message: bytes, dst: bytes = DST, count: int = 2) -> list[Field]:
    """The suite's hash to the field: SHA-512, L = 48 (RFC 9380, 8.5)."""
    return hash_to_field(message, dst, P, 48, "sha512", count)


def map_to_curve(us: Sequence[Field]) -> list[Affine]:
    """The point of each field element, with the RFC's sign of y: Elligator 2 with Z = 2 (RFC 9380, 6.7.1).

    1 + 2u^2 has an inverse for every u: -1/2 is no square. One exponentiation serves both candidates, as in appendix
    G.2.1: r = g(x1)^((p+3)/8) has r^2 = g(x1) or -g(x1) if that is a square. Otherwise r^2 = i g(x1) or -i g(x1) with
    i^2 = -1, and a root of g(x2) = 2 u^2 g(x1) is r u (-2i)^(1/2) or r u (2i)^(1/2).
    """
    firsts = [MINUS_J * inverse % P for inverse in inverses([2 * u * u + 1 for u in us], P)]
    squares = [((x + J) * x + 1) * x % P for x in firsts]
    out = []
    # All exponentiations, most of the work, in one call that lets go of the interpreter.
    for u, x, g, y in zip(us, firsts, squares, powmod_base_list(squares, ROOT_EXPONENT, P), strict=True):
        square, odd = y * y % P, True
        if square + g == P:
            y = y * SQRT_MINUS_ONE % P
        elif square != g:
            root = SQRT_MINUS_2I if square == SQRT_MINUS_ONE * g % P else SQRT_2I
            x, y, odd = (MINUS_J - x) % P, y * u * root % P, False
        out.append((x, y if y.is_odd() == odd else P - y))
    return out


def hash_to_curve(messages: Sequence[bytes], dst: bytes = DST) -> list[Affine]:
    """The curve point (x, y) of each message, its cofactor not yet cleared: the first mask does that (RFC 9380, 3).

    The identity, met with probability 2^-252, is given as (0, 0): X25519 sends both to u = 0, which `mask` refuses.
    """
    points = map_to_curve([u for message in messages for u in fields(message, dst)])
    return add(points[::2], points[1::2], P, J, mpz(1))


@dataclass(frozen=True)
class Curve25519:
    """See `psi.group.Suite`."""

    name: str = NAME

    def scalar(self, randomness: Callable[[int], bytes] = os.urandom) -> bytes:
        """A fresh X25519 key, 32 bytes; X25519 clamps it."""
        return randomness(32)

    def hash_to_points(self, messages: Sequence[bytes]) -> Bytes:
        """The points of the messages, (n, 32) uint8; never sent unmasked."""
        batches = (hash_to_curve(messages[start : start + BATCH]) for start in range(0, len(messages), BATCH))
        return rows([x.to_bytes(POINT_BYTES, "little") for batch in batches for x, _ in batch])

    def mask(self, points: Bytes, scalar: bytes) -> Bytes:
        """Every point of (n, 32) multiplied by the scalar with X25519 (RFC 7748, 5).

        Raises:
            ValueError: a product is zero, because its point was of small order (RFC 7748, 6.1); a scalar that has not
                32 bytes.
        """
        if len(scalar) != 32:  # libsodium reads as many without asking
            raise ValueError(f"a scalar has 32 bytes, not {len(scalar)}")
        raw, masked = split(points), list[bytes]()
        try:
            for point in raw:
                masked.append(crypto_scalarmult(scalar, point))
        except RuntimeError:
            raise ValueError(f"the point at position {len(masked)} of {len(raw)} is of small order") from None
        return rows(masked)

    def check_points(self, points: Bytes, sample: int = 128) -> None:
        """Refuse points that no honest party sends; made for one chunk of a list.

        Checked of all: shape (n, 32) uint8, canonical (below p, top bit clear), not of small order. Of `sample` at
        random: on the curve, not on its twist.

        Raises:
            ValueError: with the reason, how many and where, never a point.
        """
        check_shape(points)
        refuse(not_below(points, P, "little"), "points are not canonical")
        words = np.ascontiguousarray(points).view("<u8")
        small = [(words == np.frombuffer(u, dtype="<u8")).all(axis=1) for u in SMALL_ORDER]
        refuse(np.logical_or.reduce(small), "points are of small order")
        for position, point in sampled(points, sample):
            x = mpz.from_bytes(point, "little")
            if legendre(((x + J) * x + 1) * x, P) != 1:
                raise ValueError(f"the point at position {position} is on the twist, not on the curve")
