"""Fewer bytes for an update, with error feedback: what one message leaves out is added to the next.

    topk:0.01     the 1 % of coordinates that are largest: position and value (Stich, Cordonnier and Jaggi 2018)
    8bit, 4bit    every coordinate as a small whole number of steps, one scale per block, rounded at random without
                  bias (QSGD: Alistarh et al. 2017)

Error feedback (Karimireddy et al. 2019): send C(update + memory), keep what C lost as the memory. A message is one
array of bytes, so its length is what the wire carries. With positions or scales of their own, no sum of messages means
anything: compression excludes secure aggregation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.losses import Vector

Bytes = NDArray[np.uint8]
BLOCK = 1024  # coordinates that share a scale


class Compressor(Protocol):
    """`encode` and `decode` are each other's inverse, up to what is lost on purpose."""

    def encode(self, update: Vector, generator: np.random.Generator) -> Bytes:
        """The bytes of a finite `update`, (size,)."""

    def decode(self, data: Bytes, size: int) -> Vector:
        """The update, (size,). Raises ValueError for bytes that `encode` cannot have made."""


@dataclass(frozen=True)
class TopK:
    """ceil(fraction * size) coordinates: positions <i4 ascending, then values <f4: 8 bytes each."""

    fraction: float

    def encode(self, update: Vector, generator: np.random.Generator) -> Bytes:
        count = self._count(len(update))
        places = np.sort(np.argpartition(np.abs(update), len(update) - count)[len(update) - count :])
        return np.concatenate([places.astype("<i4").view(np.uint8), update[places].astype("<f4").view(np.uint8)])

    def decode(self, data: Bytes, size: int) -> Vector:
        count = self._count(size)
        if len(data) != 8 * count:
            raise ValueError("a sparse update of another length than is due")
        places, values = np.frombuffer(data[: 4 * count], "<i4"), np.frombuffer(data[4 * count :], "<f4")
        if count and not (places[0] >= 0 and places[-1] < size and (np.diff(places) > 0).all()):
            raise ValueError("positions that do not ascend within the update")
        if not np.isfinite(values).all():
            raise ValueError("a value that is not finite")
        update = np.zeros(size)
        update[places] = values
        return update

    def _count(self, size: int) -> int:
        return int(np.ceil(self.fraction * size))


@dataclass(frozen=True)
class Quantised:
    """`bits` 8 or 4: a scale <f4 for each block of 1024, then the codes, two in a byte when of 4 bits.

    A code is the number of steps plus the largest number of steps: 0 .. 254, or 0 .. 14.
    """

    bits: int

    @property
    def steps(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def encode(self, update: Vector, generator: np.random.Generator) -> Bytes:
        blocks = _blocks(update)
        largest = np.abs(blocks).max(axis=1, initial=0.0)
        scales = np.nextafter(largest.astype("<f4"), np.float32(np.inf))  # never below the largest
        exact = blocks / scales[:, None].astype(np.float64) * self.steps
        codes = np.floor(exact + generator.random(blocks.shape)) + self.steps
        packed = codes.astype(np.uint8).reshape(-1)[: len(update)]
        if self.bits == 4:
            packed = np.append(packed, np.full(len(packed) % 2, self.steps, np.uint8))
            packed = packed[::2] | packed[1::2] << 4
        return np.concatenate([scales.view(np.uint8), packed])

    def decode(self, data: Bytes, size: int) -> Vector:
        count = -(-size // BLOCK)
        if len(data) != 4 * count + -(-size * self.bits // 8):
            raise ValueError("a quantised update of another length than is due")
        scales, codes = np.frombuffer(data[: 4 * count], "<f4").astype(np.float64), data[4 * count :]
        if self.bits == 4:
            codes = np.column_stack([codes & 15, codes >> 4]).reshape(-1)
        if not (np.isfinite(scales).all() and (scales >= 0).all()) or (codes > 2 * self.steps).any():
            raise ValueError("a scale or a code that cannot be")
        steps = codes[:size].astype(np.float64) - self.steps
        return np.asarray(_blocks(steps) * (scales[:, None] / self.steps), np.float64).reshape(-1)[:size]


def _blocks(values: Vector) -> NDArray[np.float64]:
    """(blocks, 1024), the last filled with zeros."""
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


def unpacked(kind: str, data: Bytes, size: int, exact: int) -> Vector:
    """A message, (size,), of which the last `exact` numbers come first, as float64, and then the rest, compressed.

    Raises ValueError for bytes that cannot be one.
    """
    numbers = np.frombuffer(data[: 8 * exact].tobytes(), "<f8")
    if len(numbers) != exact or not np.isfinite(numbers).all():
        raise ValueError("no weight and score before its update")
    return np.concatenate([compressor(kind).decode(data[8 * exact :], size - exact), numbers])


def compressor(text: str) -> Compressor:
    """From `topk:0.01`, `8bit` or `4bit`. Raises LocalError for any other text."""
    kind, _, number = text.partition(":")
    if text in ("8bit", "4bit"):
        return Quantised(int(text[0]))
    try:
        fraction = float(number)
    except ValueError:
        fraction = 0.0
    if kind != "topk" or not 0 < fraction <= 1:
        raise LocalError(f"unknown compression {text!r}; write topk:0.01 (a fraction up to 1), 8bit or 4bit")
    return TopK(fraction)


def compress(how: Compressor, update: Vector, memory: Vector, generator: np.random.Generator) -> tuple[Bytes, Vector]:
    """The message for `update` (size,) and the next memory (size,), both with error feedback; memory starts at zero.

    The next memory counts once the message has arrived; otherwise the old one stays and the update with it.
    """
    wanted = update + memory
    data = how.encode(wanted, generator)
    return data, wanted - how.decode(data, len(update))
