"""The feature holder's arithmetic under Paillier: X^T Enc(R) by buckets, packed, masked, re-randomised.

Enc(r)^x multiplies r by x, a product of ciphertexts adds. So a column's sum is the multi-exponentiation
prod_i c_i^(x_i) mod n^2, which Pippenger's buckets do in little more than one multiplication a digit of x_i.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gmpy2
import numpy as np
from gmpy2 import mpz

from parties.errors import LocalError
from parties.workers import Workers
from vfl.encryption.fixedpoint import sum_bits
from vfl.encryption.paillier import PublicKey, SecretKey, check_ciphertexts
from vfl.encryption.scheme import Exact, Fixed, Randomness, Wire, from_wire, to_wire

BLOCK = 32  # columns weighed between two ticks
ROWS_PER_PART = 2048


class PaillierOpener:
    """One exchange at the label holder: residual (i, l) of R (b, m) is ciphertext i * m + l, packs come back."""

    def __init__(self, secret: SecretKey, slot_bits: int, width: int = 1) -> None:
        self._secret, self._slot, self._width = secret, slot_bits, width
        self.rows = max(ROWS_PER_PART // width, 1)

    def encrypt(self, residual: Fixed) -> Wire:
        return self._secret.encrypt(residual)

    def replies(self, columns: int, parts: int = 1) -> int:
        return -(-columns * self._width // slots(self._secret.public, self._slot))

    def open(self, sealed: Wire, columns: int, parts: int = 1) -> Wire:
        """Raises ValueError on another number of packs, or what is no ciphertext under our key."""
        check_ciphertexts(self._secret.public, sealed, self.replies(columns))
        return self._secret.open(sealed)


class PaillierWeigher:
    """One exchange: `add` rows as they arrive, `finish` once, `open` once. X (b, d), m residuals a row.

    Reveals:
        To the label holder: packs of numbers uniform in Z_n, and how many. The count depends on the slot width: with
        slot_bits None it follows from the largest column sum of |x|; an agreed slot_bits makes it public knowledge.
    """

    def __init__(
        self,
        public: PublicKey,
        x: Fixed,
        residual_bound: int,
        *,
        width: int = 1,
        slot_bits: int | None = None,
        workers: Workers | None = None,
        tick: Callable[[], None] = lambda: None,
        randomness: Randomness = secrets.randbelow,
    ) -> None:
        self._tick = tick  # called every few seconds of work
        if x.ndim != 2 or (np.abs(x) >> 62).any():  # abs(-2^63) is negative: caught too
            raise LocalError("X is a table of integers below 2^62; check the fixed-point scale")
        columns = x.shape[1]
        self._x, self._row = x, 0
        self._public, self._columns, self._width = public, columns, width
        self._bound, self._slot, self._randomness = residual_bound, slot_bits, randomness
        self._workers = workers or Workers()
        self._sums: list[Any] | None = [mpz(1)] * (columns * width)  # Enc(0), column by column
        self._absolute = [0] * columns  # sum_i |x_ij|, exact
        self._masks: list[int] | None = None

    @property
    def parts(self) -> int:
        return -(-len(self._x) // self._rows)

    @property
    def _rows(self) -> int:
        return max(ROWS_PER_PART // self._width, 1)

    def add(self, sealed: Wire) -> None:
        """Weigh the next rows' residuals (m ciphertexts a row, row by row). ValueError: a bad ciphertext."""
        if self._sums is None:
            raise RuntimeError("these sums are finished; an exchange is used once")
        x = self._x[self._row : self._row + self._rows]
        self._row += len(x)
        ciphertexts = check_ciphertexts(self._public, sealed, len(x) * self._width)
        modulus = self._public.modulus
        inverses = _invert_all(ciphertexts, modulus)  # for negative digits, which positive x have too
        signed = [ciphertexts[k :: self._width] + inverses[k :: self._width] for k in range(self._width)]
        blocks = np.array_split(x, min(max(self._workers.count, -(-self._columns // BLOCK)), self._columns), axis=1)
        products = []
        for block in self._workers.map(partial(_weigh, signed, modulus), blocks):
            products += block
            self._tick()
        self._sums = [a * b % modulus for a, b in zip(self._sums, products, strict=True)]
        self._absolute = [a + int(b) for a, b in zip(self._absolute, np.abs(x).astype(object).sum(axis=0), strict=True)]

    def finish(self) -> Wire:
        """Pack v_k + 2^(s-1) into slots of s bits, add one mask uniform in Z_n a pack and re-randomise, all in one."""
        if self._sums is None or self._row < len(self._x):
            raise RuntimeError("finish comes once, after all rows")
        needed = sum_bits(max(self._absolute), self._bound) + 2
        slot = self._slot or needed
        per_pack = slots(self._public, slot)
        if needed > slot or not per_pack:
            raise LocalError(
                f"sums of {needed} bits do not fit slots of {min(slot, self._public.bits - 1)} bits; "
                "use fewer rows a batch, fewer fraction bits or a longer key"
            )
        modulus, shift = self._public.modulus, mpz(1) << slot
        packs, self._masks = [], []
        for start in range(0, len(self._sums), per_pack):
            chunk, packed = self._sums[start : start + per_pack], mpz(1)
            for value in reversed(chunk):
                packed = gmpy2.powmod(packed, shift, modulus) * value % modulus
            mask = self._randomness(self._public.n)
            cover = self._public.encrypt(mask + _offset(len(chunk), slot), self._public.unit(self._randomness))
            packs.append(packed * cover % modulus)
            self._masks.append(mask)
        self._sums, self._slot = None, slot
        return to_wire(packs, 2 * self._public.n_bytes)

    def open(self, opened: Wire) -> Exact:
        """X^T R (d, m) from the decrypted packs: the mask goes first, modulo n, and only then are slots read.

        ValueError when a sum is larger than the data allow: the label holder sent something else. That it stopped is
        one bit about our sums which a lying label holder gets, once.
        """
        if self._masks is None or self._slot is None:
            raise RuntimeError("nothing to open: finish first, and open once")
        masks, self._masks = self._masks, None
        n, count, per_pack = self._public.n, self._columns * self._width, slots(self._public, self._slot)
        if opened.dtype != np.uint8 or opened.shape != (len(masks), self._public.n_bytes):
            raise ValueError(f"expected {len(masks)} plaintexts of {self._public.n_bytes} bytes, got {opened.shape}")
        sums: list[int] = []
        strange = 0
        for value, mask in zip(from_wire(opened), masks, strict=True):
            held = min(per_pack, count - len(sums))
            packed = (value - mask) % n
            strange += value >= n or packed >> held * self._slot > 0
            low, half = (1 << self._slot) - 1, 1 << self._slot - 1
            sums += [(packed >> k * self._slot & low) - half for k in range(held)]
        worst = [a * self._bound for a in self._absolute for _ in range(self._width)]
        strange += sum(abs(v) > w for v, w in zip(sums, worst, strict=True))
        if strange:
            raise ValueError(f"{strange} decrypted sums are out of their range")
        return np.array(sums, dtype=object).reshape(self._columns, self._width)


def slots(public: PublicKey, slot_bits: int) -> int:
    """How many slots one plaintext holds: the label holder expects ceil(d * m / slots) packs."""
    return (public.bits - 1) // slot_bits


def _offset(count: int, slot_bits: int) -> int:
    """2^(s-1) in each of `count` slots of s bits: makes every slot positive."""
    return sum(1 << k * slot_bits + slot_bits - 1 for k in range(count))


def _weigh(signed: list[list[Any]], modulus: Any, x: Fixed) -> list[Any]:
    """prod_i c_i^(x_ij) mod n^2 for every column j and residual column; signed[k] is the c_i, then their inverses."""
    products = []
    for column in x.T:
        window = _window(column)
        digits = [_buckets(digit) for digit in _signed_digits(column, window)]
        for powers in signed:
            product = mpz(1)
            for rows, sizes, top in reversed(digits):
                buckets = [mpz(1)] * (top + 1)
                for row, size in zip(rows, sizes, strict=True):
                    buckets[size] = buckets[size] * powers[row] % modulus
                run = total = mpz(1)
                for bucket in buckets[:0:-1]:  # prod_d bucket_d^d, as a running product of running products
                    run = run * bucket % modulus
                    total = total * run % modulus
                product = gmpy2.powmod(product, 1 << window, modulus) * total % modulus
            products.append(product)
    return products


def _window(column: Fixed) -> int:
    """The digit width that costs the fewest multiplications for this column's length, zeros and size."""
    bits = int(np.abs(column).max(initial=0)).bit_length() + 1
    return cheapest_window(int(np.count_nonzero(column)), bits)[1]


def cheapest_window(filled: int, bits: int) -> tuple[int, int]:
    """About how many multiplications a column takes with so many numbers of so many bits, and its digit width."""
    return min((-(-bits // w) * (filled + (1 << w)), w) for w in range(2, 13))


def _signed_digits(column: Fixed, window: int) -> Iterator[Fixed]:
    """Digits in [-2^(w-1), 2^(w-1)), w > 1, lowest first: half the buckets, and small or zero values cost little."""
    while column.any():
        higher = (column + (1 << window - 1)) >> window
        yield column - (higher << window)
        column = higher


def _buckets(digit: Fixed) -> tuple[list[int], list[int], int]:
    """For the rows with a digit: where their power stands in c_1 .. c_b, 1/c_1 .. 1/c_b, their bucket; the last one."""
    rows = np.flatnonzero(digit)
    sizes = np.abs(digit[rows])
    return (rows + len(digit) * (digit[rows] < 0)).tolist(), sizes.tolist(), int(sizes.max(initial=0))


def _invert_all(values: list[Any], modulus: Any) -> list[Any]:
    """All inverses for one inversion (Montgomery's trick); the values are known to be units."""
    prefix = [mpz(1)]
    for value in values:
        prefix.append(prefix[-1] * value % modulus)
    inverse, inverses = gmpy2.invert(prefix[-1], modulus), []
    for value, before in zip(reversed(values), reversed(prefix[:-1]), strict=True):
        inverses.append(inverse * before % modulus)
        inverse = inverse * value % modulus
    return inverses[::-1]
