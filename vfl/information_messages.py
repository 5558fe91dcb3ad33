"""What a feature holder tells of its columns' information values, where the agreement says that it does."""

from __future__ import annotations

from dataclasses import dataclass

from parties.message import Array, Message, kind

LONGEST = 200  # of a column's name


@kind(260, "aggregate", "<f8", 1)
@dataclass(frozen=True, eq=False)
class ColumnValue(Message):
    """k -> G: a column's name, cut to 200 characters, and its information value, of every class against the rest;
    `left` columns more follow."""

    name: str
    left: int
    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.name) > LONGEST or not 0 <= self.left < 2**20:
            raise ValueError("a column has a short name, and fewer than 2^20 follow")
        if not len(self.data) or (self.data < 0).any():
            raise ValueError("an information value is not negative, and there is one at least")
