"""What an additive scheme offers, so that Paillier and the lattice scheme stand side by side.

The label holder seals fixed-point residuals R (b, m), the feature holder weighs them with its X (b, d), and the label
holder opens what comes back, masked, without learning it:

    label holder                    feature holder
    encrypt(R)      -- sealed -->   add(sealed), once a part of the rows
                    <-- masked --   finish()
    open(masked)    -- opened -->   open(opened) = X^T R, exact integers of shape (d, m)

All that crosses the wire is a uint8 array (count, width): little-endian numbers, `count` ciphertexts or plaintexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Wire = NDArray[np.uint8]
Fixed = NDArray[np.int64]  # what fixedpoint.quantise returns
Exact = NDArray[np.object_]  # Python integers of any size
Randomness = Callable[[int], int]  # uniform below its argument: secrets.randbelow, or a replay in tests


class Opener(Protocol):
    """The label holder's side of one exchange: it alone can decrypt."""

    @property
    def rows(self) -> int:
        """Rows of R in one part; the last part may have fewer."""

    def encrypt(self, residual: Fixed, /) -> Wire:
        """Seal the next part of R (b, m)."""

    def replies(self, columns: int, parts: int, /) -> int:
        """How many ciphertexts a feature holder's sums take; any other number is refused."""

    def open(self, sealed: Wire, columns: int, parts: int, /) -> Wire:
        """Decrypt masked sums. Raises ValueError on anything a follower of the protocol cannot have sent."""


class Weigher(Protocol):
    """The feature holder's side of one exchange: used once, in the order add.., finish, open."""

    @property
    def parts(self) -> int:
        """How often `add` is due."""

    def add(self, sealed: Wire, /) -> None:
        """Check the sealed residuals of the next rows, and take them. ValueError: a bad ciphertext."""

    def finish(self) -> Wire:
        """The sums: masked, re-randomised, ready for the label holder. LocalError: they do not fit."""

    def open(self, opened: Wire, /) -> Exact:
        """Take the mask off: X^T R, shape (d, m). ValueError: not what an honest label holder can have sent."""


def to_wire(numbers: Iterable[Any], width: int) -> Wire:
    """Integers in [0, 256^width) as rows of bytes, little-endian."""
    return np.frombuffer(b"".join(int(v).to_bytes(width, "little") for v in numbers), np.uint8).reshape(-1, width)


def from_wire(rows: Wire) -> list[int]:
    """The integers behind rows of bytes."""
    return [int.from_bytes(row.tobytes(), "little") for row in rows]
