"""The conversation of the private set intersection, in order. Arrays are split into parts of at most PART rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parties.message import Array, Message, kind
from psi.group import POINT_BYTES

PART = 8192


@kind(108, "control")
@dataclass(frozen=True, eq=False)
class InputCommitment(Message):
    """0. The root of a Merkle tree over our salted ids, and a commitment to our share of the auditors' seed."""

    root: bytes
    seed: bytes

    def __post_init__(self) -> None:
        if len(self.root) != 32 or len(self.seed) != 32:
            raise ValueError("two hashes of 32 bytes")


@kind(100, "control")
@dataclass(frozen=True, eq=False)
class SetSize(Message):
    """1. How many points our set has, canaries and decoys included."""

    points: int

    def __post_init__(self) -> None:
        if not 128 <= self.points < 2**32:
            raise ValueError("a set holds at least its canaries and decoys")


@kind(112, "control")
@dataclass(frozen=True, eq=False)
class Seen(Message):
    """1. Digest of the commitments and sizes that we were told: everybody must have been told the same."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != 32:
            raise ValueError("a digest of 32 bytes")


@kind(101, "masked", "|u1", 2)
@dataclass(frozen=True, eq=False)
class MaskedPoints(Message):
    """2. Part of the set of party `owner` (its place in the ring), masked by everyone it has passed."""

    owner: int
    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape[1] != POINT_BYTES or not 1 <= len(self.data) <= PART:
            raise ValueError("a part holds 1 to 8192 points of 32 bytes")


@kind(102, "masked", "|u1", 2)
@dataclass(frozen=True, eq=False)
class Tokens(Message):
    """3. Part of a fully masked set, hashed and cut, from its holder to the hub."""

    owner: int
    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.data) <= PART:
            raise ValueError("a part holds 1 to 8192 tokens")


@kind(103, "aggregate")
@dataclass(frozen=True, eq=False)
class IntersectionSize(Message):
    """4. The hub's answer: rows in common, canaries taken off; -1 says only that it is below the agreed minimum."""

    rows: int

    def __post_init__(self) -> None:
        if not -1 <= self.rows < 2**32:
            raise ValueError("not a size")


@kind(104, "control")
@dataclass(frozen=True, eq=False)
class Gate(Message):
    """4. Whether our policy lets the rows be revealed, and the size we were told. 5. That our checks have passed."""

    open: bool
    rows: int

    def __post_init__(self) -> None:
        if not 0 <= self.rows < 2**32:
            raise ValueError("not a size")


@kind(105, "masked", "<u4", 1)
@dataclass(frozen=True, eq=False)
class Positions(Message):
    """5. Part of the positions of the intersection in the set of `owner`, as it stood before the sender shuffled it."""

    owner: int
    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.data) <= PART * 8:
            raise ValueError("a part holds 1 to 65536 positions")


@kind(106, "masked", "|u1", 1)
@dataclass(frozen=True, eq=False)
class OrderPoint(Message):
    """6. The hash of our row order as a curve point under a fresh scalar: it tells nothing to who lacks the order."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape != (POINT_BYTES,):
            raise ValueError("one point of 32 bytes")


@kind(107, "masked", "|u1", 1)
@dataclass(frozen=True, eq=False)
class OrderTag(Message):
    """6. Proof that our order gave the same shared point."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape != (32,):
            raise ValueError("a tag of 32 bytes")


@kind(109, "control")
@dataclass(frozen=True, eq=False)
class SeedReveal(Message):
    """7. Our share of the auditors' seed, once the inputs can no longer change."""

    share: bytes

    def __post_init__(self) -> None:
        if len(self.share) != 32:
            raise ValueError("a share of 32 bytes")


@kind(110, "control")
@dataclass(frozen=True, eq=False)
class ReportDigest(Message):
    """8. The digest of our report, for the others to sign."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != 32:
            raise ValueError("a digest of 32 bytes")


@kind(111, "control")
@dataclass(frozen=True, eq=False)
class Countersignature(Message):
    """8. Our signature under the receiver's digest: this is the report that it committed to at the end of the run."""

    signature: bytes

    def __post_init__(self) -> None:
        if len(self.signature) != 64:
            raise ValueError("a signature of 64 bytes")


def parts(rows: Array, size: int = PART) -> Iterator[Array]:
    """Slices of at most `size` rows."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def part_count(rows: int, size: int = PART) -> int:
    return -(-rows // size)
