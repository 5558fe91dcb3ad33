"""The conversation of the horizontal mode, in order. C is the coordinator, u and v are clients.

In a table row i belongs to the i-th client of u's neighbourhood (u is in it), in the order of the agreed names; a row
of zeros is an absent client. So there is no room for strangers, nor for one client twice. A table without rows, which
only C sends, says that the attempt ends here for u: it came too late, or too few clients are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from parties.message import Array, Message, kind


@dataclass(frozen=True, eq=False)
class Step(Message):
    """Base of the messages of secure aggregation: each names its round and attempt."""

    round: int
    attempt: int
    data: Array
    width: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.round < 2**31 and 0 <= self.attempt < 2**31):
            raise ValueError("not a round and attempt")
        if self.width and self.data.shape[-1] != self.width:
            raise ValueError(f"{type(self).__name__} has {self.width} bytes a row")


@kind(310, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class KeyOffer(Step):
    """u -> C: an X25519 key for sealing shares, one for pairwise masks, a commitment to the self mask; signed."""

    width = 160


@kind(311, "control", "|u1", 2)
@dataclass(frozen=True, eq=False)
class KeyList(Step):
    """C -> u: the offers of u's neighbourhood, u's own among them."""

    width = 160


@kind(312, "ciphertext", "|u1", 2)
@dataclass(frozen=True, eq=False)
class SealedShares(Step):
    """u -> C: for every neighbour v its share of u's mask key and of u's self mask, sealed from u to v."""

    width = 80


@kind(313, "ciphertext", "|u1", 2)
@dataclass(frozen=True, eq=False)
class ShareList(Step):
    """C -> v: what its neighbours have sealed to it; v's own row is not looked at."""

    width = 80


@kind(314, "masked", "<u8", 1)
@dataclass(frozen=True, eq=False)
class MaskedInput(Step):
    """u -> C: u's values in fixed point modulo 2^64, under its pairwise masks and its self mask."""


@kind(315, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Survivors(Step):
    """C -> u: for every agreed client in order, whether the sum has its input (1) or not (0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.size and self.data.max() > 1:
            raise ValueError("a client survives or it does not")


@kind(316, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class SurvivorSignature(Step):
    """u -> C: u's keys for the next sum, as in a KeyOffer; Ed25519 over the context, u, the survivors and these."""

    width = 160


@kind(317, "control", "|u1", 2)
@dataclass(frozen=True, eq=False)
class SignatureList(Step):
    """C -> u: what u's neighbourhood has signed, and the signatures."""

    width = 160


@kind(318, "aggregate", "|u1", 2)
@dataclass(frozen=True, eq=False)
class Unmasking(Step):
    """v -> C: for every neighbour one share: of its self mask if it survived, of its mask key if it dropped out, never
    both. Together they open the sum, and nothing else."""

    width = 32
