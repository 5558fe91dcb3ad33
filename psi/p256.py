"""The suite `P256_XMD:SHA-256_SSWU_RO_` of RFC 9380, for those who must use a NIST curve, multiplied with ECDH.

y^2 = g(x) = x^3 + A x + B with A = -3 over p = 2^256 - 2^224 + 2^192 + 2^96 - 1, of prime order n: no cofactor, no
point of small order. A point travels as its x-coordinate alone, 32 bytes big-endian, which is also what ECDH gives
(SEC 1, 3.3.1): (x, y) and (x, -y) have products with one x.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec
from gmpy2 import invert, legendre, mpz, powmod, powmod_base_list  # type: ignore[import-untyped, unused-ignore]

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

NAME = "P256_XMD:SHA-256_SSWU_RO_"
DST = TAG + NAME.encode()

P = mpz(2) ** 256 - 2**224 + 2**192 + 2**96 - 1
N = mpz("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
A = mpz(-3)
B = mpz("5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b", 16)
Z = mpz(-10)
ROOT_EXPONENT = (P + 1) // 4  # p = 3 modulo 4: g^((p+1)/4) is a root of g or of -g, whichever is a square
MINUS_B_OVER_A = -B * invert(A, P) % P
EXCEPTIONAL = B * invert(Z * A, P) % P
SECOND_ROOT = powmod(-(Z**3), ROOT_EXPONENT, P)  # -Z^3 is a square, because neither -1 nor Z is one


def fields(message: bytes, dst: bytes = DST, count: int = 2) -> list[Field]:
    """The suite's hash to the field: SHA-256, L = 48 (RFC 9380, 8.2)."""
    return hash_to_field(message, dst, P, 48, "sha256", count)


def map_to_curve(us: Sequence[Field]) -> list[Affine]:
    """The point of each field element, y as even or odd as u: simplified SWU (RFC 9380, 6.6.2).

    One exponentiation serves both candidates: with r = g(x1)^((p+1)/4), either r^2 = g(x1), or r^2 = -g(x1) and the
    root of g(x2) = Z^3 u^6 g(x1) is u^3 r (-Z^3)^(1/2).
    """
    zus = [Z * u * u % P for u in us]
    shared = inverses([(zu + 1) * zu % P for zu in zus], P)
    firsts = [MINUS_B_OVER_A * (1 + inverse) % P if inverse else EXCEPTIONAL for inverse in shared]
    squares = [((x * x + A) * x + B) % P for x in firsts]
    out = []
    # All exponentiations, most of the work, in one call that lets go of the interpreter.
    for u, zu, x, g, y in zip(us, zus, firsts, squares, powmod_base_list(squares, ROOT_EXPONENT, P), strict=True):
        if y * y % P != g:
            x, y = zu * x % P, u * u * u * y * SECOND_ROOT % P
        out.append((x, y if y.is_odd() == u.is_odd() else P - y))
    return out


def hash_to_curve(messages: Sequence[bytes], dst: bytes = DST) -> list[Affine]:
    """The curve point (x, y) of each message (RFC 9380, 3). The identity, with odds of 2^-256, is given as (0, 0),
    which is not on the curve."""
    points = map_to_curve([u for message in messages for u in fields(message, dst)])
    return add(points[::2], points[1::2], P, mpz(0), A)


@dataclass(frozen=True)
class P256:
    """See `psi.group.Suite`."""

    name: str = NAME

    def scalar(self, randomness: Callable[[int], bytes] = os.urandom) -> bytes:
        """A fresh scalar, uniform in 1 .. n-1 up to 2^-128, 32 bytes big-endian."""
        return int(mpz.from_bytes(randomness(48), "big") % (N - 1) + 1).to_bytes(32, "big")

    def hash_to_points(self, messages: Sequence[bytes]) -> Bytes:
        """The points of the messages, (n, 32) uint8; never sent unmasked.

        Raises:
            ValueError: a message hashes to the identity, which has no x-coordinate.
        """
        out = []
        for start in range(0, len(messages), BATCH):
            for x, y in hash_to_curve(messages[start : start + BATCH]):
                if not y:  # no point has y = 0: the order is odd
                    raise ValueError("a message hashes to the point at infinity")
                out.append(x.to_bytes(POINT_BYTES, "big"))
        return rows(out)

    def mask(self, points: Bytes, scalar: bytes) -> Bytes:
        """Every point of (n, 32) multiplied by the scalar with ECDH (SEC 1, 3.3.1); never the identity.

        Raises:
            ValueError: an x-coordinate of no point (2.3.4); a scalar that has not 32 bytes or is not in 1 .. n-1.
        """
        raw, secret = split(points), int.from_bytes(scalar, "big")
        if len(scalar) != 32 or not 0 < secret < N:
            raise ValueError("a scalar of P-256 has 32 bytes and lies between 1 and n-1")
        curve, ecdh = ec.SECP256R1(), ec.ECDH()
        key, masked = ec.derive_private_key(secret, curve), list[bytes]()
        try:
            for point in raw:  # either y serves: 2 says the even one
                public = ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\2" + point)
                masked.append(key.exchange(ecdh, public))
        except ValueError:
            raise ValueError(f"the point at position {len(masked)} of {len(raw)} is not on the curve") from None
        return rows(masked)

    def check_points(self, points: Bytes, sample: int = 128) -> None:
        """Refuse points that no honest party sends; made for one chunk of a list.

        Checked of all: shape (n, 32) uint8, canonical (below p). Of `sample` at random: on the curve; `mask` refuses
        all that are not.

        Raises:
            ValueError: with the reason, how many and where, never a point.
        """
        check_shape(points)
        refuse(not_below(points, P, "big"), "points are not canonical")
        for position, point in sampled(points, sample):
            x = mpz.from_bytes(point, "big")
            if legendre((x * x + A) * x + B, P) != 1:
                raise ValueError(f"the point at position {position} is not on the curve")
