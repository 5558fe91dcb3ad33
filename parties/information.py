"""`[information]` of the agreement: what each column tells of the label, counted by bin before training."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class InformationValue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Weight of evidence and information value of every party's columns, on the training rows.

    allowed_counts: the most numbers about the label that a feature holder may get: its bins times the classes less one.
    bins: quantile bins of a column of numbers, unless its owner's [prepare] says otherwise; none of fewer rows than
        minimum_rows_off_mode of [model].
    smoothing: rows added to both counts of every bin, so that a bin of one class has finite evidence.
    values_to_label_holder: a feature holder tells the label holder its columns' names and information values.
    """

    allowed_counts: Annotated[int, Meta(ge=1, le=1 << 20)]
    bins: Annotated[int, Meta(ge=2, le=1000)] = 5
    smoothing: Annotated[float, Meta(gt=0)] = 0.5
    values_to_label_holder: bool = False

    def check(self, model: str) -> None:
        """Raises ValueError when this kind of model, as [model] calls it, has no classes."""
        if model not in ("logistic regression", "network classifier"):
            raise ValueError(
                f"[information] is about classes, and a {model} has none; take it out, or agree on a logistic "
                "regression or a network classifier of the label in classes"
            )
