"""The conversation around a sum, in order. C is the coordinator, u a client; secure aggregation fits in after a Turn.

    0  u -> C   Table              C -> u   Admission        columns, units, classes: the same at all
    1  C -> u   Task               u -> C   Ready            once the client has computed what the sum needs of it
    2  C -> u   Turn "add"         u -> C   Update, Packed, or the five steps of secure aggregation
    3  C -> u   Turn "kept"                                  the sum has it; or "left out", or "add" for another attempt

With secure aggregation "kept" is only for who signed the sum too late to unmask it: the others know. When just those
who signed the former sum are asked again (Task: again), they have each other's keys: shares go with ReadyWithShares,
those of the others come with TurnWithShares, and of the five steps the first two are done.

A Task that asks for no sum: "score" is answered by Scores; "finish" by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from parties.message import Array, Message, kind
from vfl.horizontal.messages import SealedShares, ShareList, Step
from vfl.horizontal.models import Score

STAGES = ("rows", "means", "scales", "train", "score", "finish")
LEVELS = (2.0**24, 2.0**32, 2.0**40)  # bounds on the numbers of a message: the least that holds is a client's answer
NOT_FINITE, TOO_LARGE, DECLINED, OVER_BUDGET, SIGNED = 255, 254, 253, 252, 251
REASONS = {
    NOT_FINITE: "its numbers are not finite",
    TOO_LARGE: "its numbers exceed 2^40",
    DECLINED: "it could not train; its own message says why",
    OVER_BUDGET: "its privacy budget is used up",
    SIGNED: "it was killed after it had agreed to open this sum, and opens no second one",
}


@kind(330, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Table(Message):
    """u -> C: what u's table looks like, never what is in it; JSON."""

    data: Array


@kind(331, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Admission(Message):
    """C -> u: what all tables must look like, and where training goes on after a restart; JSON."""

    data: Array


@kind(332, "aggregate", "<f8", 1)
@dataclass(frozen=True, eq=False)
class Task(Message):
    """C -> u: what to compute. `number` counts the sums of a session, `round` those of training; clients and rows are
    of all together, once known; data: the scaler's means and variances, if any, then the strategy's vectors. again:
    just those are asked who signed the former secure sum, and all of them have unmasked it."""

    number: int
    round: int
    stage: str
    clients: int
    rows: int
    data: Array
    again: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError("not a stage of training")
        if not (0 <= self.number < 2**31 and 0 <= self.round < 2**31 and self.clients >= 1 and 0 <= self.rows < 2**53):
            raise ValueError("not a task of this job")


@kind(333, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Ready(Step):
    """u -> C: one byte: which of LEVELS holds for u's numbers, or why it has none."""

    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if int(self.data[0]) not in (*range(len(LEVELS)), *REASONS):
            raise ValueError("neither ready nor a known reason")

    @property
    def code(self) -> int:
        return int(self.data[0])


@kind(338, "ciphertext", "|u1", 1)
@dataclass(frozen=True, eq=False)
class ReadyWithShares(Ready):
    """u -> C, where keys came with the former sum: the byte, then rows as in SealedShares."""

    width = 0

    def __post_init__(self) -> None:
        if len(self.data) % SealedShares.width != 1:
            raise ValueError(f"a byte and rows of {SealedShares.width}")
        super().__post_init__()
        if self.code >= len(LEVELS):
            raise ValueError("shares for a sum that it takes no part in")

    @property
    def shares(self) -> Array:
        """(clients, 80)."""
        return self.data[1:].reshape(-1, SealedShares.width)


Names = Annotated[tuple[str, ...], Meta(max_length=1 << 16)]  # more would only fill the memory of who reads it


@kind(334, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Turn(Step):
    """C -> u: "add": send your numbers, within the bound; data: for a secure sum who does, in order, msgpack. "kept":
    the sum has them. "left out": it has not."""

    what: str
    bound: float

    @classmethod
    def of(cls, number: int, attempt: int, what: str, bound: float = 1.0, names: tuple[str, ...] = ()) -> Turn:
        return cls(number, attempt, np.frombuffer(msgspec.msgpack.encode(names), np.uint8), what, bound)

    @property
    def names(self) -> tuple[str, ...]:
        """Raises ValueError."""
        try:
            return msgspec.msgpack.decode(self.data.tobytes(), type=Names)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ValueError("the names of its turn do not parse") from None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("add", "kept", "left out") or not 0 < self.bound < 2.0**62:
            raise ValueError("neither a turn nor a bound")


@kind(339, "ciphertext", "|u1", 2)
@dataclass(frozen=True, eq=False)
class TurnWithShares(Turn):
    """C -> u: "add" at a first attempt for which u has dealt its shares; data: those for u, as in a ShareList."""

    width = ShareList.width

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what != "add" or self.attempt:
            raise ValueError("shares where none are due")


@kind(335, "plaintext", "<f8", 1)
@dataclass(frozen=True, eq=False)
class Update(Step):
    """u -> C, without secure aggregation: u's numbers."""


@kind(336, "plaintext", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Packed(Step):
    """u -> C, without secure aggregation: weight and score as float64, then the update, compressed."""


@kind(337, "aggregate", "<f8", 1)
@dataclass(frozen=True, eq=False)
class Scores(Step):
    """u -> C: of the model on u's rows: how many, whether there is a loss, which, whether an accuracy, which."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape != (5,) or not 0 <= self.data[0] < 2.0**53:
            raise ValueError("not a score")

    @classmethod
    def of(cls, number: int, score: Score) -> Scores:
        known = [(float(value == value), float(np.nan_to_num(value))) for value in (score.loss, score.accuracy)]
        return cls(number, 0, np.array([score.rows, *known[0], *known[1]], np.float64))

    @property
    def score(self) -> Score:
        rows, has_loss, loss, has_accuracy, accuracy = self.data.tolist()
        return Score(int(rows), loss if has_loss else np.nan, accuracy if has_accuracy else np.nan)
