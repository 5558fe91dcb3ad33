"""What each column tells of the label: bins, weight of evidence (WOE) and information value (IV), from counts alone.

    woe_j = ln(p_j / q_j)        IV = sum_j (p_j - q_j) woe_j

p_j and q_j are the shares of a column's bin j in the positives and in the negatives (Good 1950, ch. 6; IV is Jeffreys'
divergence: Kullback and Leibler 1951; in scoring: Siddiqi 2006, ch. 6). Of several classes, each in turn is positive,
against the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from parties.preparation import Preparation
from vfl import preparation
from vfl.losses import Matrix, Vector
from vfl.preparation import FittedNumber

SMOOTHING = 0.5  # of a row, in every bin and class: a bin of one class has finite evidence


@dataclass(frozen=True)
class Information:
    """A line a bin and class: feature, bin, rows, class, positives (rows of this class), woe, iv (its term of the sum).
    Of two classes only the second, the positive one, has lines."""

    bins: pd.DataFrame

    @property
    def by_class(self) -> pd.DataFrame:
        """IV by feature and class against the rest, (features, classes), in the order of the columns."""
        return self.bins.pivot_table(index="feature", columns="class", values="iv", aggfunc="sum", sort=False)

    @property
    def values(self) -> pd.Series[Any]:
        """IV by feature, in the order of the columns; of several classes the sum over them."""
        return self.bins.groupby("feature", sort=False)["iv"].sum()

    def above(self, threshold: float = 0.02) -> list[str]:
        """The features whose IV, of any class, is larger. Below 0.02 a column is usually taken to predict nothing
        (Siddiqi 2006)."""
        best = self.by_class.max(axis=1)
        return list(best.index[best > threshold])


def bin_columns(frame: pd.DataFrame, plan: Preparation, *, bins: int = 5, minimum: int = 1) -> pd.DataFrame:
    """Our columns (n, d), each a categorical: every row's bin, by name.

    Text: the levels that `plan` declares, of at least `minimum` rows. Numbers: quantile bins, `bins` or what `plan`
    says for the column; equal values go together, by their mean rank, so that two values make two bins however many
    rows one has; neighbours of fewer than `minimum` rows are merged. A missing number is in a bin of its own if `plan`
    sets an indicator, else where its fill is.

    Raises:
        LocalError: as `preparation.fit`.
    """
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    numbers = {name: msgspec.structs.replace(one, bins=None) for name, one in plan.numbers.items()}
    unbinned = msgspec.structs.replace(plan, numbers=numbers)
    binned: dict[str, pd.Series[Any]] = {}
    for name, fitted in preparation.fit(frame, unbinned, standardise=False, minimum=minimum).columns.items():
        column = fitted.read(frame[name])
        if isinstance(fitted, FittedNumber):
            wanted = plan.numbers[name].bins if name in plan.numbers else None
            binned[name] = _quantile_bins(name, fitted, column, wanted or bins, minimum)
        else:
            levels = pd.Series(pd.Categorical(column, categories=fitted.levels), index=frame.index)
            binned[name] = levels.cat.rename_categories(
                {level: f"{name}={level}" if level else f"{name} other" for level in fitted.levels}
            )
    return pd.DataFrame(binned, index=frame.index)


def _quantile_bins(name: str, fitted: FittedNumber, numbers: pd.Series[Any], bins: int, minimum: int) -> pd.Series[Any]:
    if fitted.fill is not None and not fitted.indicator:
        numbers = numbers.fillna(fitted.fill)
    known = numbers.dropna().sort_values()
    halves = (2 * known.rank()).astype(np.int64)  # mean ranks are multiples of 1/2
    lowest = known.groupby((halves * bins - 1) // (2 * len(known))).min()
    edges, start = [-np.inf], 0
    for edge, at in zip(lowest, known.searchsorted(lowest).tolist(), strict=True):
        if min(at - start, len(known) - at) >= max(minimum, 1):
            edges.append(edge)
            start = at
    binned: pd.Series[Any] = pd.cut(numbers, [*edges, np.inf], right=False)
    binned = binned.cat.rename_categories(lambda interval: f"{name} in {interval}")
    if fitted.indicator:
        binned = binned.cat.add_categories(f"{name} missing").fillna(f"{name} missing")
    return binned


def evidence(
    bins: pd.DataFrame, positives: Matrix | Vector, smoothing: float = SMOOTHING, classes: Sequence[Any] = (1,)
) -> Information:
    """WOE and IV from counts: `bins` has feature, bin and rows of each bin, `positives` (bins,) or (bins, classes) how
    many are of each class; one class, of two, or all of several.

    `smoothing` is added to both counts of every bin, so that the shares still add up to 1 and no IV is negative. With 0
    a bin of one class has infinite evidence.
    """
    lines = []
    for one, counts in zip(classes, positives.reshape(len(bins), len(classes)).T, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            p, q = (
                (count + smoothing) / (count + smoothing).groupby(bins["feature"]).transform("sum")
                for count in (pd.Series(counts, index=bins.index), bins["rows"] - counts)
            )
            woe = np.log(p / q)
            told = {"class": one, "positives": counts.astype(np.int64), "woe": woe, "iv": (p - q) * woe}
        lines.append(bins.assign(**told))
    return Information(pd.concat(lines).sort_index(kind="stable", ignore_index=True))
