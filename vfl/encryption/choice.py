"""What the encrypted exchanges of a training cost under each scheme, and which is cheaper.

Operations are counted; what one takes is in `Units`. `REFERENCE` decides, so that all parties come to the same decision
from what all know; `measured` are this machine's, for estimates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np

from vfl.encryption.lattice import Columns, LatticeKey, LatticeWeigher
from vfl.encryption.layout import NUMBERS_PER_KEY, SEALED_BYTES, Layout, passes
from vfl.encryption.paillier import generate
from vfl.encryption.ring import DEGREE, modulus
from vfl.encryption.scheme import Fixed
from vfl.encryption.weigh import PaillierOpener, PaillierWeigher, cheapest_window

T = TypeVar("T")
Scheme = Literal["paillier", "lattice"]
BANDWIDTH = 12.5e6  # bytes a second that a party is taken to have: 100 Mbit/s
FEATURE_BITS = 25  # of a standardised feature in fixed point, with its sign
SLOT_BITS = 80
SAMPLE = 64


@dataclass(frozen=True)
class Units:
    """Seconds an operation takes on one core.

    Paillier: to seal a residual, to take one (check, inverse), a multiplication, to cover a pack, to open one. Lattice:
    to seal a ciphertext, to take one, to encode columns of a block, to weigh a block, to cover a reply, to open one.
    """

    key_bits: int
    seal: float
    take: float
    multiply: float
    cover: float
    open: float
    lattice_seal: float
    lattice_take: float
    encode: float
    weigh: float
    lattice_cover: float
    lattice_open: float


_LATTICE = (3.2e-3, 1.3e-3, 1.1e-3, 0.4e-3, 6.8e-3, 1.3e-3)
REFERENCE = {  # one core of an AMD EPYC with AVX-512, as `measured` gives them
    2048: Units(2048, 0.53e-3, 24e-6, 4.5e-6, 10e-3, 4.1e-3, *_LATTICE),
    3072: Units(3072, 1.5e-3, 38e-6, 7.9e-6, 30e-3, 12.5e-3, *_LATTICE),
    4096: Units(4096, 3.7e-3, 60e-6, 13e-6, 54e-3, 28e-3, *_LATTICE),
}


def strength(scheme: Scheme, key_bits: int) -> str:
    """The scheme with its key length or security level, as every figure about it is shown."""
    if scheme == "paillier":
        return f"paillier, {key_bits} bit"
    return f"lattice, 128-bit security (N = {DEGREE}, q of {modulus().bit_length()} bits)"


@dataclass(frozen=True)
class Cost:
    """Of all exchanges: seconds of computing, one core a party; bytes on the wire."""

    seconds: float
    bytes: int

    @property
    def elapsed(self) -> float:
        """Seconds at the usual bandwidth: what "auto" goes by."""
        return self.seconds + self.bytes / BANDWIDTH


def predict(
    units: Units,
    rows: int,
    columns: tuple[int, ...],
    width: int = 1,
    exchanges: int = 1,
    *,
    cached: bool = True,
    numbers: int = NUMBERS_PER_KEY,
) -> dict[Scheme, Cost]:
    """`columns` of every feature holder; they work at the same time, the label holder serves them one after another.

    `cached`: the batches are the same in every exchange, so that the lattice scheme encodes columns once.
    """
    ciphertext, packs = units.key_bits // 4, [-(-d * width // (units.key_bits // SLOT_BITS)) for d in columns]
    paillier = (
        rows * width * (units.seal + units.take)
        + max(columns) * width * cheapest_window(rows, FEATURE_BITS)[0] * units.multiply
        + max(packs) * units.cover
        + sum(packs) * units.open
    )
    paillier_bytes = sum(rows * width * ciphertext + count * ciphertext * 3 // 2 for count in packs)

    lattice = encoding = slowest = 0.0
    lattice_bytes = 0
    for d in columns:
        step = passes(rows, d, width, 1, numbers)
        layout, repeats = Layout.of(rows, (step[0],), step[1]), -(-width // step[1])
        keys = -(-d // step[0]) * repeats  # the last may have fewer columns
        replies, tiles = keys * layout.replies(step[0]), keys * layout.blocks * layout.groups(step[0])
        lattice += keys * layout.sealed * units.lattice_seal + replies * units.lattice_open
        weighing = tiles * layout.sheets * units.weigh + replies * units.lattice_cover
        slowest = max(slowest, keys * layout.sealed * units.lattice_take + weighing)
        encoding = max(encoding, tiles / repeats * units.encode)
        lattice_bytes += keys * layout.sealed * SEALED_BYTES + replies * layout.reply_bytes + 8 * width * d
    lattice += slowest
    encodings = encoding * (1 if cached else exchanges)
    return {
        "paillier": Cost(exchanges * paillier, exchanges * paillier_bytes),
        "lattice": Cost(exchanges * lattice + encodings, exchanges * lattice_bytes),
    }


def choose(agreed: Literal["auto", "paillier", "lattice"], costs: dict[Scheme, Cost]) -> Scheme:
    """What was agreed; "auto" is the scheme that takes less time at the usual bandwidth."""
    return min(costs, key=lambda scheme: costs[scheme].elapsed) if agreed == "auto" else agreed


@cache
def measured(key_bits: int) -> Units:
    """The units of this machine, from a few operations of each kind: a second or two."""
    _lattice_units()  # builds its tables
    return Units(key_bits, *_paillier_units(key_bits), *_lattice_units())


def _paillier_units(key_bits: int) -> tuple[float, ...]:
    x = _features(SAMPLE, 1)
    secret, residual = generate(key_bits), np.full((SAMPLE, 1), 1 << 29)
    opener = PaillierOpener(secret, SLOT_BITS)
    opener.encrypt(residual[:1])  # the tables are built once
    sealed, seal = timed(lambda: opener.encrypt(residual))
    idle = PaillierWeigher(secret.public, 0 * x, 1 << 30, slot_bits=SLOT_BITS)
    busy = PaillierWeigher(secret.public, np.tile(x, 4), 1 << 30, slot_bits=SLOT_BITS)
    take, weigh = timed(lambda: idle.add(sealed))[1], timed(lambda: busy.add(sealed))[1]
    packs, cover = timed(idle.finish)
    opening = timed(lambda: opener.open(packs, 1))[1]
    multiply = max(weigh - take, 0.0) / 4 / cheapest_window(SAMPLE, FEATURE_BITS)[0]
    return seal / SAMPLE, take / SAMPLE, multiply, cover, opening


def _features(rows: int, columns: int) -> Fixed:
    """Numbers of the usual size, of both signs and all digits (Knuth's multiplicative hash)."""
    return np.arange(rows * columns).reshape(rows, columns) * 2654435761 % (1 << 22) - (1 << 21)


def _lattice_units() -> tuple[float, ...]:
    blocks, groups = 4, 2
    x = _features(blocks * DEGREE, groups)
    layout = Layout(len(x), 1, DEGREE, 1)
    columns, key = Columns(x, layout), LatticeKey(b"", layout)
    public, parts = key.public(), [x[start : start + DEGREE, :1] >> 6 for start in range(0, len(x), DEGREE)]
    sealed, seal = timed(lambda: [key.encrypt(part) for part in parts])
    weigher = LatticeWeigher(columns, public, b"", 1 << 25)
    take = timed(lambda: [weigher.add(part) for part in sealed])[1]  # type: ignore[func-returns-value]
    encode = timed(lambda: [list(columns.tiles(0, group)) for group in range(groups)])[1]
    weigh = timed(lambda: [weigher.weigh(0, group) for group in range(groups)])[1]
    replies, finish = timed(weigher.finish)
    opening = timed(lambda: key.open(replies, groups))[1]
    tiles = blocks * groups
    return (
        seal / blocks,
        take / blocks,
        encode / tiles,
        weigh / tiles,
        max(finish - weigh, 0.0) / groups,
        opening / groups,
    )


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the seconds it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
