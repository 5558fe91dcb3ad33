"""What a party's workers do with one part of a list. Light imports: every worker process carries them."""

from __future__ import annotations

from collections.abc import Sequence

from psi.group import Bytes, suite, token


def hash_and_mask(name: str, scalar: bytes, inputs: Sequence[bytes]) -> Bytes:
    """Our own encoded ids (see `psi.identifiers.encode`) as masked points, (n, 32) uint8."""
    chosen = suite(name)
    return chosen.mask(chosen.hash_to_points(inputs), scalar)


def check_and_mask(name: str, scalar: bytes, points: Bytes, sample: int | None = None) -> Bytes:
    """Points of another party, (n, 32) uint8, checked and masked. Raises ValueError, which never holds a point.

    All are checked to lie on the curve, since we pass them on and must not be blamed for them; or a random `sample`.
    """
    chosen = suite(name)
    chosen.check_points(points, len(points) if sample is None else sample)
    return chosen.mask(points, scalar)


def check_mask_and_hide(name: str, scalar: bytes, session: bytes, width: int, points: Bytes) -> Bytes:
    """The same, and then as tokens, (n, width) uint8: we are the last to mask them, and check a sample of 128."""
    return token(check_and_mask(name, scalar, points, 128), session, width)
