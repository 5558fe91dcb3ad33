"""The conversation of a scoring session. G is the label holder, k a feature holder.

What k answers are the embeddings of `vfl.messages`, whose `exchange` is the number of the request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parties.message import Array, Message, kind

ROWS = 1 << 16  # the most rows in one message


@kind(220, "control", "<u4", 1)
@dataclass(frozen=True, eq=False)
class ScoreRequest(Message):
    """G -> k: embed these rows, positions in the common order, increasing. Without rows, and not answered: nothing is
    to be scored yet, G is still there; or (`last`) scoring ends here. `number` counts all of them from 0."""

    number: int
    last: bool
    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.number < 2**31:
            raise ValueError("not the number of a request")
        if len(self.data) > ROWS or (self.last and len(self.data)):
            raise ValueError(f"a request has {ROWS} rows at most, the last none")
        if (self.data[1:] <= self.data[:-1]).any():
            raise ValueError("the rows of a request increase")


def request(number: int, rows: Array | None = None, *, last: bool = False) -> ScoreRequest:
    """What G sends: for `rows`, or without any for a word in between or the end."""
    return ScoreRequest(number, last, np.array([] if rows is None else rows, "<u4"))
