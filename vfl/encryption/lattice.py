"""Additive encryption on lattices (BFV, Fan and Vercauteren 2012): a product of polynomials weighs thousands of rows.

The ring is Z_q[X] / (X^N + 1) with N = 8192 and q of 184 bits, secrets uniform in {-1, 0, 1}, noise of standard
deviation 3.24: the standard of HomomorphicEncryption.org (2018, table 1) allows 218 bits for 128-bit security.
Plaintexts are integers modulo t = 2^64, one a coefficient; t need be no prime, since nothing is packed into slots.

    Enc_s(m) = (c0, c1) = (-c1 s + e + round(q m / t), c1)        c0 + c1 s = round(q m / t) + noise

c1 follows from the session, the exchange and a number by a hash: it does not travel, and its owner cannot choose it.

*Weighing.* A block has B rows. With r(X) = sum_l sum_i r_il X^(lB+i) sealed, w residual columns in one ciphertext, and
p(X) = sum_j sum_i x_ij X^(jwB+B-1-i), k columns in one product, the coefficient (jw+l)B+B-1 of r p is <x_j, r_l>, for
all j < k and l < w as long as k w B <= N. Blocks add up.

*What goes back* says nothing of X but the sums: to the product is added an encryption of zero (c1 becomes pseudo-random
by ring-LWE in a fresh secret u), to the wanted coefficients of c0 a mask uniform modulo t and noise uniform over 2^116
values, beside which the noise that the product carries (it depends on X) is lost. Only then the modulus is switched
down, for size. c1 and the wanted coefficients of c0 travel; of the plaintext only these are opened.

*Many keys.* Whoever chooses what is decrypted can read 40 coefficients of a ternary secret from one opened number. So
no key opens more than `NUMBERS_PER_KEY` numbers, of one feature holder, in one exchange: 32 * 40 coefficients known
leave a dimension of 6912, still 128 bits of security. `vfl.encryption.layout.passes` cuts an exchange up accordingly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.encryption import ring
from vfl.encryption.layout import REPLY_PRIMES, SEALED_BYTES, Layout
from vfl.encryption.ring import DEGREE, PRIMES, Entropy, Residues
from vfl.encryption.scheme import Exact, Fixed, Wire

PLAIN_BITS = 64
FLOOD_BITS = 116
STATISTICAL_BITS = 40  # the least distance to a reply that does not depend on X, over a whole training
CACHE_BYTES = 1 << 30
ERROR = ring.NOISE_BOUND + 0.5  # of a sealed coefficient: noise and rounding
TOO_LARGE = "sums of a column's values are too large for the lattice scheme; standardise the features"


class LatticeKey:
    """The label holder's key of one exchange. Whoever holds it reads the residuals; it never leaves its process."""

    def __init__(self, context: bytes, layout: Layout, entropy: Entropy = os.urandom) -> None:
        self._context, self._layout, self._entropy = context, layout, entropy
        self._secret = ring.forward(ring.residues(ring.ternary(entropy)))
        self._sealed = 0

    def __repr__(self) -> str:
        return "LatticeKey()"

    def __reduce__(self) -> str:
        raise TypeError("a secret key does not leave its process")

    @property
    def rows(self) -> int:
        return self._layout.block

    def replies(self, columns: int, parts: int = 1) -> int:
        return self._layout.replies(columns, parts)

    def public(self) -> Wire:
        """An encryption of zero, shape (1, SEALED_BYTES): all that re-randomising takes."""
        if self._sealed:
            raise RuntimeError("the encryption of zero comes first")
        return self._seal(np.zeros(DEGREE, np.int64))[np.newaxis]

    def encrypt(self, residual: Fixed) -> Wire:
        """Seal the next block of residuals (at most `block` rows, m), shape (sheets, SEALED_BYTES)."""
        layout = self._layout
        if not 0 < self._sealed < layout.sealed:
            raise RuntimeError("every block is sealed once, after the zero")
        out = []
        for start in range(0, layout.width, layout.together):
            some = residual[:, start : start + layout.together]
            plain = np.zeros((layout.together, layout.block), np.int64)
            plain[: some.shape[1], : len(some)] = some.T
            out.append(self._seal(np.pad(plain.ravel(), (0, DEGREE - plain.size))))
        return np.stack(out)

    def _seal(self, plain: NDArray[np.int64]) -> Wire:
        c1 = ring.uniform(_seed(self._context, self._sealed))
        self._sealed += 1
        c0 = ring.forward(ring.residues(ring.noise(self._entropy)) + _scaled(plain))
        c0 -= ring.reduce_all(c1 * self._secret)
        return ring.pack(ring.reduce_all(c0))

    def open(self, sealed: Wire, columns: int, parts: int = 1) -> Wire:
        """Decrypt a feature holder's masked sums, (parts * columns * m, 8): partial sums, column by column.

        Raises:
            ValueError: another shape than this holder's columns need, or noise that no honest reply has.
        """
        layout = self._layout
        shape = (layout.replies(columns, parts), layout.reply_bytes)
        if sealed.dtype != np.uint8 or sealed.shape != shape:
            raise ValueError(f"expected ciphertexts of shape {shape}, got {sealed.shape}")
        secret, wanted, q = self._secret[:REPLY_PRIMES], layout.wanted(), ring.modulus(REPLY_PRIMES)
        limit = ((1 << FLOOD_BITS - 1) * q << PLAIN_BITS) // ring.modulus() + (DEGREE << PLAIN_BITS)
        opened: list[int] = []
        for reply, held in zip(sealed, layout.held(columns) * parts, strict=True):
            values = ring.unpack(reply, REPLY_PRIMES)
            c1, c0 = values[:, :DEGREE], values[:, DEGREE:]
            if not c1.any():
                raise ValueError("a sum that is not encrypted")
            phase = ring.inverse(ring.reduce_all(ring.forward(c1) * secret))[:, wanted] + c0
            for value in ring.to_integers(phase[:, held]):
                plain = ((value << PLAIN_BITS) + q // 2) // q
                if abs((value << PLAIN_BITS) - plain * q) > limit:
                    raise ValueError("a sum with more noise than an honest one can have")
                opened.append(plain % (1 << PLAIN_BITS))
        return np.array(opened, "<u8").view(np.uint8).reshape(-1, 8)


class Columns:
    """A feature holder's X (n, d) in fixed point as polynomials, kept between exchanges up to `cache_bytes`.

    `parts` partial sums over consecutive rows, so that none overflows with residuals up to `residual_bound`.
    LocalError: so many are not enough.
    """

    def __init__(
        self, x: Fixed, layout: Layout, parts: int = 1, residual_bound: int = 1, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.x, self.layout, self.parts = x, layout, parts
        self._ranges = _cut(x, parts, residual_bound)
        self._kept: dict[tuple[int, int, int], NDArray[np.float32]] = {}
        self._room = cache_bytes
        self.absolute = [[int(v) for v in np.abs(x[low:high]).sum(axis=0)] for low, high in self._ranges]

    def tiles(self, part: int, group: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The blocks of a part, each with the transform of its rows and this group of columns."""
        first, last = self._ranges[part]
        size = self.layout.block
        for block in range(first // size, -(-last // size)):
            kept = self._kept.get((part, group, block))
            if kept is None:
                low, high = max(first, block * size), min(last, block * size + size)
                kept = ring.forward(ring.residues(self._polynomial(group, low, high))).astype(np.float32)
                if kept.nbytes <= self._room:
                    self._room -= kept.nbytes
                    self._kept[part, group, block] = kept
            yield block, kept

    def _polynomial(self, group: int, low: int, high: int) -> NDArray[np.int64]:
        layout = self.layout
        columns = self.x[low:high, group * layout.products : (group + 1) * layout.products]
        out = np.zeros((layout.products, layout.together * layout.block), np.int64)
        first = low % layout.block
        out[: columns.shape[1], layout.block - first - len(columns) : layout.block - first] = columns[::-1].T
        return np.pad(out.ravel(), (0, DEGREE - out.size))


class LatticeWeigher:
    """One exchange at a feature holder: `add` the sealed blocks as they arrive, `finish` once, `open` once.

    `sums` is how many the training may open for us in all; 0: those of this exchange.

    Reveals:
        To the label holder: sums uniform modulo 2^64, under noise that hides X up to a statistical distance of 2^-40
        over the training, if ring-LWE is hard and the label holder's key and noise are what the protocol says.
    """

    def __init__(
        self,
        columns: Columns,
        public: Wire,
        context: bytes,
        residual_bound: int,
        *,
        sums: int = 0,
        tick: Callable[[], None] = lambda: None,
        entropy: Entropy = os.urandom,
    ) -> None:
        self._columns, self._context, self._bound, self._tick, self._entropy = (
            columns,
            context,
            residual_bound,
            tick,
            entropy,
        )
        self._sealed: list[Residues] = []
        self._masks: NDArray[np.uint64] | None = None
        self._opened = False
        check(columns, residual_bound, sums)
        self._take(public, 1)

    @property
    def parts(self) -> int:
        return self._columns.layout.blocks

    def add(self, sealed: Wire) -> None:
        """The next block's ciphertexts. Raises ValueError on what is none."""
        if self._masks is not None or len(self._sealed) >= self._columns.layout.sealed:
            raise RuntimeError("more parts than there are rows; an exchange is used once")
        self._take(sealed, self._columns.layout.sheets)

    def _take(self, sealed: Wire, count: int) -> None:
        if sealed.dtype != np.uint8 or sealed.shape != (count, SEALED_BYTES):
            raise ValueError(f"expected ciphertexts of shape {(count, SEALED_BYTES)}, got {sealed.shape}")
        for row in sealed:
            c0 = ring.unpack(row, len(PRIMES))
            if not c0.any():
                raise ValueError("a ciphertext of zeros")
            c1 = ring.uniform(_seed(self._context, len(self._sealed)))
            self._sealed.append(np.stack([c0, c1]).astype(np.float32))

    def finish(self) -> Wire:
        """The sums, masked, re-randomised, flooded and switched down: shape (replies, reply_bytes)."""
        columns, layout = self._columns, self._columns.layout
        if len(self._sealed) != layout.sealed or self._masks is not None:
            raise RuntimeError("finish comes once, after all rows")
        count = columns.x.shape[1]
        sums = columns.parts * count * layout.width
        masks = np.frombuffer(self._entropy(8 * sums), "<u8")
        replies, start = [], 0
        held = iter(layout.held(count) * columns.parts)
        for part in range(columns.parts):
            for group in range(layout.groups(count)):
                totals = self.weigh(part, group)
                for total in totals:
                    used = next(held)
                    replies.append(self._cover(total, masks[start : start + len(used)], used))
                    start += len(used)
                self._tick()
        self._sealed, self._masks = [], masks
        return np.stack(replies)

    def weigh(self, part: int, group: int) -> Residues:
        """The sums of one group of columns, (sheets, 2, primes, N), transformed."""
        sheets = self._columns.layout.sheets
        total, product = np.zeros((sheets, 2, len(PRIMES), DEGREE)), np.empty((2, len(PRIMES), DEGREE))
        for number, (block, polynomial) in enumerate(self._columns.tiles(part, group), 1):
            for sheet in range(sheets):
                np.multiply(self._sealed[1 + block * sheets + sheet], polynomial, out=product, dtype=np.float64)
                total[sheet] += product
            if number % (ring.UNREDUCED - 1) == 0:
                ring.reduce_all(total)
        return ring.reduce_all(total)

    def _cover(self, total: Residues, masks: NDArray[np.uint64], used: NDArray[np.int64]) -> Wire:
        """One reply from one sum: zero, flood and mask added, the modulus switched, what is not wanted left out."""
        layout = self._columns.layout
        u = ring.forward(ring.residues(ring.ternary(self._entropy)))
        total = total + ring.reduce_all(self._sealed[0] * u)
        c0, c1 = ring.inverse(ring.reduce_all(total))
        c1 = ring.reduce_all(c1 + ring.residues(ring.noise(self._entropy)))
        drawn = (self._entropy(-(-FLOOD_BITS // 8)) for _ in used)
        flood = [(int.from_bytes(one, "little") >> -FLOOD_BITS % 8) - (1 << FLOOD_BITS - 1) for one in drawn]
        wanted = np.zeros((len(PRIMES), layout.products * layout.together))
        wanted[:, used] = c0[:, layout.wanted()[used]] + ring.from_integers(flood, len(PRIMES))
        wanted[:, used] += _scaled(masks.view(np.int64))
        reply = np.concatenate([c1, ring.reduce_all(wanted)], axis=1)
        return ring.pack(ring.switch(reply, REPLY_PRIMES))

    def open(self, opened: Wire) -> Exact:
        """X^T R (d, m): the mask goes first, modulo 2^64, then the partial sums add up.

        Raises:
            ValueError: not so many numbers, or sums larger than the data allow: the label holder sent something else.
        """
        if self._masks is None or self._opened:
            raise RuntimeError("nothing to open: finish first, and open once")
        masks, self._opened = self._masks, True
        if opened.dtype != np.uint8 or opened.shape != (len(masks), 8):
            raise ValueError(f"expected {len(masks)} plaintexts of 8 bytes, got {opened.shape}")
        values = (np.ascontiguousarray(opened).view("<u8").ravel() - masks).view(np.int64)
        layout, count = self._columns.layout, self._columns.x.shape[1]
        sums, strange, start = np.zeros((count, layout.width), dtype=object), 0, 0
        for part in range(self._columns.parts):
            for reply, used in enumerate(layout.held(count)):
                group, sheet = divmod(reply, layout.sheets)
                for place in used:
                    j, residual = divmod(int(place), layout.together)
                    column, value = group * layout.products + j, int(values[start])
                    strange += abs(value) > self._columns.absolute[part][column] * self._bound
                    sums[column, sheet * layout.together + residual] += value
                    start += 1
        if strange:
            raise ValueError(f"{strange} decrypted sums are out of their range")
        return sums


def check(columns: Columns, residual_bound: int, sums: int = 0) -> None:
    """Refuse what would overflow, or noise that the flood would not hide. Raises LocalError.

    The noise of a sum is at most ERROR times its columns' sum of |x|, plus that of the encryption of zero. Uniform
    noise over F values hides a shift by v up to a distance of v / F; distances add up over all that is ever sent.
    """
    layout, count = columns.layout, columns.x.shape[1]
    largest = max(map(max, columns.absolute))
    if largest * residual_bound >= 1 << PLAIN_BITS - 1:
        raise LocalError(TOO_LARGE)
    noise = ERROR * layout.products * largest + 2 * DEGREE * ring.NOISE_BOUND + 1
    sums = sums or columns.parts * count * layout.width
    if math.log2(noise * sums) > FLOOD_BITS - STATISTICAL_BITS:
        raise LocalError('too many sums for the noise that hides our columns; fewer exchanges, or scheme = "paillier"')


def _cut(x: Fixed, parts: int, residual_bound: int) -> list[tuple[int, int]]:
    """Ranges of rows whose sums do not overflow: each as long as it may be, empty ones at the end."""
    limit, cuts = ((1 << PLAIN_BITS - 1) - 1) // residual_bound, [0]
    sums = np.abs(x).cumsum(axis=0, dtype=np.float64) if parts > 1 else np.empty(0)  # off by less than 2^-20 of itself
    for _ in range(parts - 1):
        start = cuts[-1]
        before = sums[start - 1] if start else 0.0
        cuts.append(start + int(np.searchsorted((sums[start:] - before).max(axis=1), 0.99 * limit)))
    ranges = list(pairwise([*cuts, len(x)]))
    if parts > 1 and any(
        np.abs(x[low:high]).sum(axis=0, dtype=np.float64).max(initial=0) > limit for low, high in ranges
    ):
        raise LocalError(TOO_LARGE)
    return ranges


def _scaled(plain: NDArray[np.int64]) -> Residues:
    """round(q m / 2^64) for m modulo 2^64: with low = q m mod 2^64, centred, it is (q m - low) / 2^64, where q is 0."""
    low = plain * np.uint64(ring.modulus() % (1 << PLAIN_BITS)).astype(np.int64)
    out = []
    for p in PRIMES:
        rest = (low % p).astype(np.float64) * float(-pow(2, -PLAIN_BITS, p) % p)
        out.append(ring.reduce(rest, p))
    return np.stack(out)


def _seed(context: bytes, number: int) -> bytes:
    return b"colonnade/lattice/1" + len(context).to_bytes(8, "little") + context + number.to_bytes(8, "little")
