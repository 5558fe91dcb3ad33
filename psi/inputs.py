"""What one party puts into one step of the intersection: its ids, the canaries that all share, and private decoys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from psi.identifiers import Key, encode, encoding

CANARIES = 64


def decoys_for(ids: int, least: int, bucket: int) -> int:
    """How many decoys a set of `ids` ids takes: at least `least`, and up to the next multiple of `bucket` in all."""
    return least + -(ids + CANARIES + least) % bucket


@dataclass(frozen=True, eq=False)
class InputSet:
    """Entry i is the id of row `rows[i]` under `key`; then come 64 canaries, the same at every party of the session,
    and decoys that follow from `secret`, 32 bytes, and that nobody else can have. Each kind has an id type of its own,
    so that none can collide with another."""

    session: bytes
    step: int
    key: Key
    rows: NDArray[np.int64] = field(repr=False)
    decoys: int
    secret: bytes = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows) + CANARIES + self.decoys

    def take(self, entries: NDArray[np.uint32] | NDArray[np.int64]) -> list[bytes]:
        """The entries at some positions, encoded as they are hashed to the curve."""
        real, head = entries < len(self.rows), encoding(self.session, self.key.type)
        ids = (head + len(one).to_bytes(4, "big") + one for one in self.key.take(self.rows[entries[real]]))
        return [
            next(ids) if is_real else self._extra(entry - len(self.rows))
            for is_real, entry in zip(real.tolist(), entries.tolist(), strict=True)
        ]

    def _extra(self, number: int) -> bytes:
        if number < CANARIES:
            return encode(self.session, b"canary", self.step.to_bytes(4, "big") + number.to_bytes(4, "big"))
        secret = hashlib.sha256(b"colonnade/psi/decoy/1" + self.secret + number.to_bytes(4, "big")).digest()
        return encode(self.session, b"decoy", secret)
