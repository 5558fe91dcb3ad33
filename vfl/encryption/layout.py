"""How rows and columns share polynomials of the lattice scheme, and how an exchange is cut up over keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vfl.encryption import ring
from vfl.encryption.ring import DEGREE, PRIMES

REPLY_PRIMES = 4
SEALED_BYTES = len(PRIMES) * DEGREE * ring.PRIME_BYTES
NUMBERS_PER_KEY = 32  # see vfl.encryption.lattice


@dataclass(frozen=True)
class Layout:
    """How rows and columns share polynomials; both ends derive it from what both know.

    `width` residual columns, `block` rows in a ciphertext, `together` residual columns in a ciphertext.
    """

    rows: int
    width: int
    block: int
    together: int

    @classmethod
    @cache
    def of(cls, rows: int, columns: tuple[int, ...], width: int = 1) -> Layout:
        """The layout that sends the fewest bytes over all feature holders, who have so many columns each."""
        choices = (
            cls(rows, width, min(rows, DEGREE // (together * products)), together)
            for together in range(1, min(width, DEGREE) + 1)
            for products in range(1, min(max(columns), DEGREE // together) + 1)
        )
        return min(choices, key=lambda c: sum(c.sealed * SEALED_BYTES + c.replies(d) * c.reply_bytes for d in columns))

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)

    @property
    def sheets(self) -> int:
        """Ciphertexts a block."""
        return -(-self.width // self.together)

    @property
    def sealed(self) -> int:
        """Ciphertexts of one exchange, the one of zero among them."""
        return 1 + self.blocks * self.sheets

    @property
    def products(self) -> int:
        """Columns of X in one product."""
        return DEGREE // (self.block * self.together)

    @property
    def reply_bytes(self) -> int:
        return REPLY_PRIMES * ring.PRIME_BYTES * (DEGREE + self.products * self.together)

    def groups(self, columns: int) -> int:
        return -(-columns // self.products)

    def replies(self, columns: int, parts: int = 1) -> int:
        """Ciphertexts that go back, when sums over the rows come in so many partial sums."""
        return parts * self.groups(columns) * self.sheets

    def wanted(self) -> NDArray[np.int64]:
        """The coefficients of a product that hold sums."""
        return np.arange(1, self.products * self.together + 1) * self.block - 1

    def held(self, columns: int) -> list[NDArray[np.int64]]:
        """For every reply to one part, group by group and sheet by sheet: which of `wanted` hold a sum."""
        out = []
        for group in range(self.groups(columns)):
            for sheet in range(self.sheets):
                column, residual = np.divmod(np.arange(self.products * self.together), self.together)
                used = (group * self.products + column < columns) & (sheet * self.together + residual < self.width)
                out.append(np.flatnonzero(used))
        return out


@cache
def passes(rows: int, columns: int, width: int, parts: int = 1, numbers: int = NUMBERS_PER_KEY) -> tuple[int, int]:
    """How many columns of X and of R go under one key, so that it opens at most `numbers` partial sums: the cut that
    sends the fewest bytes."""

    def cost(cut: tuple[int, int]) -> int:
        layout = Layout.of(rows, (cut[0],), cut[1])
        keys = -(-columns // cut[0]) * -(-width // cut[1])
        return keys * (layout.sealed * SEALED_BYTES + layout.replies(cut[0], parts) * layout.reply_bytes)

    most = max(numbers // parts, 1)
    cuts = [(c, min(width, most // c)) for c in range(1, min(columns, most) + 1)]
    return min(cuts, key=cost)
