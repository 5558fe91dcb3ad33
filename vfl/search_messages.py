"""What the label holder decides from rows that are held out: who won a search, and when training stops early."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from parties.message import Message, kind
from parties.search import MOST_CANDIDATES


@kind(250, "aggregate")
@dataclass(frozen=True, eq=False)
class Choice(Message):
    """G -> k: the number, from 0, of the candidate that all train on all rows. Of its figures nothing is sent."""

    index: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.index < MOST_CANDIDATES:
            raise ValueError("not the number of a candidate")


@dataclass
class Patience:
    """When to stop early: after `patience` losses in a row of which none was below the least so far by more than
    `minimum_improvement`. Of a figure that is better when larger, give its negative.

    `improved`: whether the last loss was; then its weights are the ones to keep.
    """

    patience: int
    minimum_improvement: float = 0.0
    improved: bool = field(default=False, init=False)
    _least: float = field(default=math.inf, init=False)
    _stale: int = field(default=0, init=False)

    def should_stop(self, loss: float) -> bool:
        """To be called once for each loss, in order."""
        self.improved = loss < self._least - self.minimum_improvement
        self._stale = 0 if self.improved else self._stale + 1
        self._least = min(self._least, loss)
        return self._stale >= self.patience
