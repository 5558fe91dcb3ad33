"""How a party prepares its own columns before a model sees them: what its own file declares under [prepare]."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Scale = Literal["agreed", "standard", "none"]
Unseen = Literal["refuse", "other", "baseline"]


class NumberColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A column of numbers.

    `missing`: what takes the place of a missing value: the training rows' mean or median, or the constant `fill`;
    `indicator` adds a 0/1 column that says where. `bins`: so many quantile bins instead of the number, a 0/1 column for
    each but the first. `scale`: standardised as the agreement says, always, or never.
    """

    missing: Literal["refuse", "mean", "median", "constant"] = "refuse"
    fill: float | None = None
    indicator: bool = False
    bins: Annotated[int, Meta(ge=2, le=1000)] | None = None
    scale: Scale = "agreed"

    def __post_init__(self) -> None:
        if (self.missing == "constant") != (self.fill is not None):
            raise ValueError('missing = "constant" goes with fill = a number')
        if self.fill is not None and not math.isfinite(self.fill):
            raise ValueError("fill must be finite")
        if self.indicator and self.missing == "refuse":
            raise ValueError('indicator goes with missing = "mean", "median" or "constant"')


class CategoryColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A column of text, a 0/1 column for each of its declared `values` but the first, the baseline.

    `unseen`: a value that is not declared stops the job; or shares one column, "other", with declared values that are
    rare among the training rows; or counts as the baseline. `fill`: the declared value that a missing one becomes.
    """

    values: Annotated[tuple[Text, ...], Meta(min_length=2)]
    unseen: Unseen = "refuse"
    fill: Text | None = None
    scale: Scale = "agreed"

    def __post_init__(self) -> None:
        if len(set(self.values)) < len(self.values):
            raise ValueError("values must differ")
        if self.fill is not None and self.fill not in self.values:
            raise ValueError("fill must be one of values")


class Preparation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[prepare.numbers.COLUMN] and [prepare.categories.COLUMN]; a feature in neither is a number with no option set."""

    numbers: dict[str, NumberColumn] = {}
    categories: dict[str, CategoryColumn] = {}

    def __post_init__(self) -> None:
        if both := self.numbers.keys() & self.categories.keys():
            raise ValueError(f"{min(both)!r} is declared under numbers and under categories")
