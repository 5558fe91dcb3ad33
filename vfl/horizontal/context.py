"""What everybody agrees on before a secure sum: who takes part, how many must stay, in which fixed point."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError, Refused
from parties.message import PAYLOAD_LIMIT
from vfl.encryption.fixedpoint import quantise

SIZE_LIMIT = PAYLOAD_LIMIT // 8  # values in one sum


@dataclass(frozen=True)
class Quantisation:
    """Fixed point modulo 2^64: v becomes v * 2^fraction_bits, rounded half to even; |v| <= bound, or it is refused."""

    bound: float
    fraction_bits: int

    @classmethod
    def finest(cls, bound: float, clients: int) -> Quantisation:
        """The finest in which no sum of `clients` values within the bound wraps around, with a bit to spare."""
        if not (0 < bound < math.inf and clients > 0):
            raise LocalError("the bound on a client's values is a positive number; agree on the largest that is needed")
        return cls(bound, 62 - math.frexp(clients * bound)[1])

    def headroom(self, clients: int) -> float:
        """log2 of how many times the largest sum fits below 2^63; negative: it could wrap around."""
        return 63 - self.fraction_bits - math.log2(clients * (self.bound + math.ldexp(0.5, -self.fraction_bits)))

    def words(self, values: NDArray[np.float64]) -> NDArray[np.uint64]:
        """Values (size,) modulo 2^64. Raises LocalError: NaN or infinite, beyond the bound, too many for a message."""
        if values.ndim != 1 or values.size > SIZE_LIMIT:
            raise LocalError(f"a secure sum takes one vector of at most {SIZE_LIMIT} values; sum it in parts")
        fixed = quantise(values, self.fraction_bits, bound_bits=62, what="the update")
        beyond = int(np.count_nonzero(np.abs(values) > self.bound))
        if beyond:
            raise LocalError(
                f"the update: {beyond} of {values.size} values exceed the agreed bound {self.bound:g}; "
                "clip or rescale them, or agree on a larger bound"
            )
        return fixed.astype("<u8")

    def restore(self, words: NDArray[np.uint64]) -> NDArray[np.float64]:
        """The float64 nearest to each sum."""
        return np.ldexp(words.astype(np.int64).astype(np.float64), -self.fraction_bits)


@dataclass(frozen=True)
class Company:
    """Who takes part in one attempt at one secure sum, the same at all who do.

    names: the clients in agreed order; threshold: the least number of clients in a sum that is opened; subject: what
    the values answer, 32 bytes: clients that were asked different things have no sum.
    degree: None for the complete graph, in which every client shares with every other (Bonawitz et al. 2017); else an
    even k: every client shares and masks with k others only (Bell et al. 2020), the k/2 on either side of it on a ring,
    in an order that follows from the whole company, of which a coordinator can try many. Take several times log2 of the
    number of clients: a client is exposed when more than k/2 of its neighbours collude, and the attempt fails when as
    many drop out.
    former: the full digest of the sum with whose signatures the keys for this one came; empty: they come in this one.

    Raises:
        Refused: fewer than three clients, a threshold below three or no majority, a degree that is odd or too large.
        ValueError: no session id, round, attempt or digest, or a name twice.
    """

    session: bytes
    round: int
    attempt: int
    names: tuple[str, ...]
    threshold: int
    degree: int | None = None
    subject: bytes = bytes(32)
    former: bytes = b""

    def __post_init__(self) -> None:
        n = len(self.names)
        if (
            len(self.session) != 32
            or len(self.subject) != 32
            or len(self.former) not in (0, 32)
            or not (0 <= self.round < 2**31 and 0 <= self.attempt < 2**31)
        ):
            raise ValueError("a company has a session id, a subject and digests of 32 bytes, a round and an attempt")
        if len(set(self.names)) < n:
            raise ValueError("a client is named twice")
        if n < 3:
            raise Refused(
                f"secure aggregation needs 3 clients, not {n}: each of two subtracts its own part; turn it off"
            )
        if self.threshold < 3:
            raise Refused(f"a threshold of {self.threshold}: each of two subtracts its own part; agree on 3 or more")
        if not n < 2 * self.threshold <= 2 * n:
            raise Refused(
                f"a threshold of {self.threshold} is no majority of {n} clients; agree on more than half of them"
            )
        if self.degree is not None and not (0 < self.degree < n - 1 and self.degree % 2 == 0):
            raise Refused(f"{self.degree} is no degree for {n} clients; agree on an even one below {n - 1}, or on none")

    @cached_property
    def digest(self) -> bytes:
        """What shares are sealed for."""
        plain = [
            self.session.hex(),
            self.round,
            self.attempt,
            self.names,
            self.threshold,
            self.degree,
            self.subject.hex(),
            self.former.hex(),
        ]
        return hashlib.sha256(b"colonnade/aggregation company/1" + msgspec.json.encode(plain)).digest()

    @property
    def origin(self) -> bytes:
        """What commitments are bound to, and so the keys that go with them; 32 bytes."""
        return self.former or self.digest

    def within(self, bound: float) -> Context:
        """With the finest fixed point for values within the bound, once that is known. Raises as `Context` does."""
        own = {field.name: getattr(self, field.name) for field in fields(Company)}
        return Context(**own, quantisation=Quantisation.finest(bound, len(self.names)))

    @property
    def quorum(self) -> int:
        """Shares that open a secret: a majority of its holders; each gives one of two, so never enough for both."""
        return self.threshold if self.degree is None else self.degree // 2 + 1

    def neighbourhood(self, client: int) -> tuple[int, ...]:
        """Positions of those who hold shares of a client's secrets, itself among them, ascending."""
        n = len(self.names)
        if self.degree is None:
            return tuple(range(n))
        order, place = self._ring
        reach = range(-(self.degree // 2), self.degree // 2 + 1)
        return tuple(sorted(order[(place[client] + step) % n] for step in reach))

    def connected(self, survivors: Iterable[int]) -> bool:
        """Whether masks hold them all together: two arcs of the ring, out of each other's reach, have a sum each."""
        if self.degree is None:
            return True
        place = self._ring[1]
        at = sorted(place[client] for client in survivors)
        gaps = [(after - before) % len(self.names) for before, after in zip(at, at[1:] + at[:1], strict=True)]
        return sum(gap > self.degree // 2 for gap in gaps) <= 1

    @cached_property
    def _ring(self) -> tuple[list[int], list[int]]:
        """The clients in the order of a hash, and where each stands in it."""
        order = sorted(
            range(len(self.names)), key=lambda i: hashlib.sha256(self.digest + i.to_bytes(4, "little")).digest()
        )
        return order, [int(place) for place in np.argsort(order)]


@dataclass(frozen=True)
class Context(Company):
    """All that is agreed on before anybody masks: the company, and the fixed point of the sum.

    Raises Refused: a quantisation in which the sum could wrap around; and what `Company` raises.
    """

    quantisation: Quantisation = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantisation.headroom(n := len(self.names)) <= 0:
            raise Refused(f"sums of {n} clients could overflow; agree on a smaller bound or fewer fraction bits")

    @cached_property
    def full_digest(self) -> bytes:
        """What masks and signatures are made for."""
        q = msgspec.json.encode([self.quantisation.bound, self.quantisation.fraction_bits])
        return hashlib.sha256(b"colonnade/aggregation/1" + self.digest + q).digest()
