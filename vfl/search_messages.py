"""What the label holder decides from rows that are held out: who won a search, and when training stops early."""

from __future__ import annotations

from dataclasses import dataclass

from parties.message import Message, kind
from parties.search import MOST_CANDIDATES
from vfl.messages import _Step


@kind(232, "control")
@dataclass(frozen=True, eq=False)
class EpochEnd(_Step):
    """G -> k: whether the validation loss is the best so far (keep these weights), and whether training ends here."""

    better: bool
    stop: bool


@kind(250, "aggregate")
@dataclass(frozen=True, eq=False)
class Choice(Message):
    """G -> k: the number, from 0, of the candidate that all train on all rows. Of its figures nothing is sent."""

    index: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.index < MOST_CANDIDATES:
            raise ValueError("not the number of a candidate")
