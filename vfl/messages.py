"""The conversation of training and scoring, in order. G is the label holder, k a feature holder.

`exchange` counts from 0 within one fit or one scoring and ties every message to its step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parties.message import Array, Message, kind

REPLIES_PER_PART = 64
VALUES_PER_PART = 1 << 20
LARGEST = 2.0**46  # of any number in clear: what follows cannot overflow


def _bounded(data: Array) -> None:
    if data.size and not np.abs(data).max() < LARGEST:
        raise ValueError("a number beyond any that training can need")


@dataclass(frozen=True, eq=False)
class _Step(Message):
    exchange: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.exchange < 2**31:
            raise ValueError("not an exchange number")


@kind(200, "control")
@dataclass(frozen=True, eq=False)
class Plan(Message):
    """All to all: digest of model and hyper-parameters, our rows and columns; digests and rows must agree. A feature
    holder adds its columns' rank and the bits that the largest of their sums of |x| takes; the label holder how many
    outputs the model has, and the bits of its largest residual before the point. What is not said is 0."""

    digest: bytes
    rows: int
    columns: int
    rank: int = 0
    magnitude: int = 0
    outputs: int = 0
    range_bits: int = 0

    def __post_init__(self) -> None:
        if len(self.digest) != 32 or not 0 <= self.rows < 2**40 or not 0 <= self.rank <= self.columns <= 2**20:
            raise ValueError("a plan is a digest, rows, columns and their rank")
        if not (0 <= self.magnitude < 64 and 0 <= self.outputs <= 4096 and 0 <= self.range_bits <= 30):
            raise ValueError("sums of columns take 0 to 63 bits, a model has 0 to 4096 outputs, residuals 0 to 30 bits")


@kind(201, "control", "|u1", 2)
@dataclass(frozen=True, eq=False)
class SchemeKey(Message):
    """G -> k. Paillier, once: row 0 is the public modulus, the others the roots that prove it sound (little-endian).
    Lattice, every exchange: an encryption of zero under a fresh key."""

    data: Array


@kind(202, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class MaskKey(Message):
    """k -> every other feature holder: a fresh X25519 key for the pairwise masks of this fit or scoring."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape != (32,):
            raise ValueError("an X25519 key has 32 bytes")


@kind(203, "plaintext", "<f8", 1)
@dataclass(frozen=True, eq=False)
class PartialEmbedding(_Step):
    """k -> G, one feature holder only: X_k W_k row by row (or X_k P_k along search directions), in clear."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self.data)


@kind(204, "masked", "<u8", 1)
@dataclass(frozen=True, eq=False)
class MaskedEmbedding(_Step):
    """k -> G: the same in fixed point modulo 2^64 under pairwise masks that cancel in the sum over k."""

    data: Array


@kind(205, "ciphertext", "|u1", 2)
@dataclass(frozen=True, eq=False)
class SealedResidual(_Step):
    """G -> k: Enc_G(R) for some rows, in order: Paillier, a ciphertext each; lattice, one for a block of rows."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.data):
            raise ValueError("a part holds at least one residual")


@kind(206, "ciphertext", "|u1", 2)
@dataclass(frozen=True, eq=False)
class SealedGradient(_Step):
    """k -> G: X_k^T Enc_G(R) under uniform masks, re-randomised; lattice: in up to 64 ciphertexts a message."""

    data: Array


@kind(207, "masked", "|u1", 2)
@dataclass(frozen=True, eq=False)
class OpenedGradient(_Step):
    """G -> k: its decryption, still masked."""

    data: Array


@kind(208, "aggregate", "<f8", 1)
@dataclass(frozen=True, eq=False)
class PartialScalars(_Step):
    """k -> G, one feature holder only: scalar products of its slices of the solver's history."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self.data)


@kind(209, "masked", "|u1", 2)
@dataclass(frozen=True, eq=False)
class MaskedScalars(_Step):
    """k -> G: the same in fixed point modulo 2^128 under pairwise masks."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape[1] != 16:
            raise ValueError("a masked scalar has 16 bytes")


@kind(210, "aggregate", "<f8", 1)
@dataclass(frozen=True, eq=False)
class Direction(_Step):
    """G -> k: the next direction as coefficients over the history, the gradient last; empty: training ends here,
    at the optimum (`converged`), at the last exchange that is allowed, or where fixed point gives nothing new."""

    converged: bool
    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self.data)


@kind(211, "aggregate")
@dataclass(frozen=True, eq=False)
class Step(_Step):
    """G -> k, proximal: with a length, try a step of 1 / length; without, take the step tried last (`taken`) or leave
    it, go on with this momentum, or stop (`last`), at the optimum (`converged`) or not."""

    length: float
    momentum: float
    taken: bool
    last: bool
    converged: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.length < LARGEST or not 0 <= self.momentum < 1:
            raise ValueError("a length is finite and not negative, a momentum below 1")


@kind(212, "aggregate", "<f8", 1)
@dataclass(frozen=True, eq=False)
class Weights(_Step):
    """G -> k, subspace: the weights as coefficients over the directions so far."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self.data)
