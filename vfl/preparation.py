"""A party prepares its own columns: fitted on its training rows, saved as numbers and words, the same when scoring.

Means, medians, quantiles and scales are estimated by scikit-learn. Only they are saved, and one ColumnTransformer,
built from nothing else, applies them to training rows and new rows alike: equal to one that learns by itself.

The first level of a one-hot column has no column of its own: all levels together add up to the intercept. Its rows are
still told by the others' gradients, so that it needs as many rows as any other level.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeVar

import msgspec
import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, OneHotEncoder, StandardScaler

from parties.errors import LocalError
from parties.preparation import CategoryColumn, NumberColumn, Preparation, Text, Unseen
from vfl.losses import Matrix, Vector

log = logging.getLogger("colonnade")
T = TypeVar("T")
LARGEST = 1e150  # squares of larger numbers, hence variances, overflow
_OTHER = ""  # stands for every value of a category that has no level; a declared value is never empty


class FittedNumber(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="number"):
    """A column of numbers: what a missing value becomes (None: refused), and all edges of its bins, if any."""

    fill: float | None = None
    indicator: bool = False
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = self.edges if self.fill is None else (*self.edges, self.fill)
        if not all(map(math.isfinite, numbers)) or any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("fill and edges must be finite, edges increasing")
        if len(self.edges) in (1, 2) or (self.indicator and self.fill is None):
            raise ValueError("edges must bound two bins at least, and an indicator goes with a fill")

    def names(self, name: str) -> list[str]:
        """Of the prepared columns."""
        value = [f"{name} bin {number}" for number in range(2, len(self.edges))] if self.edges else [name]
        return [*value, f"{name} missing"] if self.indicator else value

    def read(self, column: pd.Series[Any]) -> pd.Series[Any]:
        """Float64, NaN where one is missing and will be filled."""
        numbers = _numbers(column)
        _check_missing(int(numbers.isna().sum()) if self.fill is None else 0)
        return numbers

    def transformer(self) -> Any:
        """From `read` (n, 1) to the prepared columns. Nothing is left for it to learn."""
        value = [SimpleImputer(strategy="constant", fill_value=self.fill or 0.0, keep_empty_features=True)]
        if self.edges:
            bins = FunctionTransformer(np.digitize, kw_args={"bins": self.edges[1:-1]})
            value += [bins, _one_hot(range(len(self.edges) - 1))]
        return make_union(make_pipeline(*value), *([MissingIndicator(features="all")] if self.indicator else []))


class FittedCategory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="category"):
    """A column of text: its levels, the baseline first, and what becomes of other values and of missing ones."""

    values: tuple[Text, ...]
    unseen: Unseen = "refuse"
    fill: Text | None = None

    def __post_init__(self) -> None:
        if len(set(self.values)) < len(self.values) or len(self.levels) < 2:
            raise ValueError("values must differ and be two at least, with the others' level")
        if self.fill is not None and self.unseen == "refuse" and self.fill not in self.values:
            raise ValueError("fill must be one of values")

    @property
    def levels(self) -> tuple[str, ...]:
        return (*self.values, _OTHER) if self.unseen == "other" else self.values

    def names(self, name: str) -> list[str]:
        """Of the prepared columns."""
        return [f"{name}={level}" if level != _OTHER else f"{name} other" for level in self.levels[1:]]

    def read(self, column: pd.Series[Any]) -> pd.Series[Any]:
        """One of our levels in every row."""
        text = _text(column)
        _check_missing(int((text == "").sum()) if self.fill is None else 0)
        text = text.where(text != "", self.fill or "")
        known = text.isin(self.values)
        strange = int((~known).sum())
        if self.unseen == "refuse" and strange:
            raise LocalError(f'{strange} values that are not declared; declare them, or set unseen = "other" and train')
        return text.where(known, _OTHER if self.unseen == "other" else self.values[0])

    def transformer(self) -> Any:
        """From `read` (n, 1) to the prepared columns. Nothing is left for it to learn."""
        return _one_hot(self.levels)


class FittedColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a party's preparation has learnt, in the order of its columns; part of its model share (JSON).

    `mean` and `scale` have an entry for each prepared column, 0 and 1 where it is not standardised. Building one, also
    from JSON, raises ValueError (msgspec.ValidationError) for what `fit` cannot have made.
    """

    columns: dict[str, FittedNumber | FittedCategory]
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        origin: dict[str, str] = {}
        for column, fitted in self.columns.items():
            for name in fitted.names(column):
                if name in origin:
                    raise ValueError(f"the columns {origin[name]!r} and {column!r} prepare to one name; rename one")
                origin[name] = column
        if not len(self.mean) == len(self.scale) == len(origin):
            raise ValueError("mean and scale do not fit the columns")
        if not all(map(math.isfinite, (*self.mean, *self.scale))) or any(s < np.finfo(float).tiny for s in self.scale):
            raise ValueError("mean and scale must be finite, scale positive")

    @property
    def names(self) -> list[str]:
        """Of the prepared columns: `age`, `age missing`, `balance bin 2`, `job=clerk`, `job other`."""
        return [name for column, fitted in self.columns.items() for name in fitted.names(column)]

    def transform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The prepared columns, float64 and finite, of rows of our table; its columns are found by name.

        Raises:
            LocalError: columns that are not there or there twice, values missing where that is refused, not declared,
                infinite, beyond 1e150 or of the wrong kind; columns and counts, never a value.
        """
        frame = _with_columns(frame, self.columns)
        read = _for_all(self.columns, lambda name: self.columns[name].read(frame[name]))
        prepared = np.empty((len(frame), len(self.names)))
        with np.errstate(over="ignore", invalid="ignore"):
            if prepared.size:
                parts = [(fitted.transformer(), [at]) for at, fitted in enumerate(self.columns.values())]
                prepared = make_column_transformer(*parts, sparse_threshold=0).fit_transform(pd.DataFrame(read))
            prepared = (prepared - np.array(self.mean)) / np.array(self.scale)
        _check_range(prepared, self.names)
        return pd.DataFrame(prepared, columns=self.names, index=frame.index)


def fit(frame: pd.DataFrame, plan: Preparation, *, standardise: bool, minimum: int = 1) -> FittedColumns:
    """Learn the preparation of our columns, numbers or text, from the training rows of `frame` (n, columns).

    A feature that `plan` does not name is a number, standardised if the agreement says so (`standardise`), and refused
    when values are missing. `minimum` is the least number of rows of every level, the baseline included: a feature
    holder gives the agreement's minimum_rows_off_mode.

    Raises:
        LocalError: as `transform`; a column that `plan` names and the table lacks, that is constant or all missing,
            more bins than values, a level with fewer than `minimum` rows, two prepared columns of one name. All
            columns with a fault are named at once.
    """
    names = [str(name) for name in frame.columns]
    lacking = sorted((plan.numbers.keys() | plan.categories.keys()) - set(names))
    if lacking:
        raise LocalError(f"[prepare] names {', '.join(map(repr, lacking))}, no features of ours; correct it")
    if not len(frame):
        raise LocalError("there are no training rows to prepare")
    frame = _with_columns(frame, names)
    plans = {name: plan.categories.get(name) or plan.numbers.get(name, NumberColumn()) for name in names}
    least = max(minimum, 1)
    columns = _for_all(names, lambda name: _fitted(frame[name], plans[name], least))
    width = sum(len(fitted.names(name)) for name, fitted in columns.items())
    try:
        plain = FittedColumns(columns=columns, mean=(0.0,) * width, scale=(1.0,) * width)
    except ValueError as error:
        raise LocalError(str(error)) from None
    choices = [plans[name].scale for name, fitted in columns.items() for _ in fitted.names(name)]
    scaled = [choice == "standard" or (choice == "agreed" and standardise) for choice in choices]
    if not any(scaled):
        return plain
    with np.errstate(over="ignore", invalid="ignore"):
        scaler = StandardScaler().fit(plain.transform(frame).to_numpy())
    mean, scale = np.where(scaled, scaler.mean_, 0.0), np.where(scaled, scaler.scale_, 1.0)
    _check_range(np.stack([mean, scale]), plain.names)
    return FittedColumns(columns=columns, mean=tuple(mean.tolist()), scale=tuple(scale.tolist()))


def _fitted(column: pd.Series[Any], plan: NumberColumn | CategoryColumn, minimum: int) -> FittedNumber | FittedCategory:
    if isinstance(plan, CategoryColumn):
        return _category(column, plan, minimum)
    return _number(column, plan, minimum)


def _category(column: pd.Series[Any], plan: CategoryColumn, minimum: int) -> FittedCategory:
    declared = FittedCategory(values=plan.values, unseen=plan.unseen, fill=plan.fill)
    rows = declared.read(column).value_counts().reindex(list(plan.values), fill_value=0)
    kept = tuple(value for value in plan.values if rows[value] >= minimum)
    if plan.unseen == "other":
        others = len(column) - int(rows[list(kept)].sum())
        if others < minimum or not kept:
            raise LocalError(
                f"{others} of {len(column)} training rows are other, with {len(kept)} levels of {minimum} rows beside; "
                'declare fewer values, or set unseen = "baseline"'
            )
        return FittedCategory(values=kept, unseen="other", fill=plan.fill)
    if len(kept) < len(plan.values):
        raise LocalError(
            f"{len(plan.values) - len(kept)} of {len(plan.values)} declared values have fewer than {minimum} training "
            'rows; merge them, or set unseen = "other"'
        )
    return declared


def _number(column: pd.Series[Any], plan: NumberColumn, minimum: int) -> FittedNumber:
    numbers = _numbers(column)
    missing = int(numbers.isna().sum())
    if missing == len(numbers):
        raise LocalError("no value among the training rows; drop the column")
    _check_missing(missing if plan.missing == "refuse" else 0)
    fill = plan.fill
    if plan.missing in ("mean", "median"):
        fill = float(SimpleImputer(strategy=plan.missing).fit(numbers.to_frame()).statistics_[0])
    if plan.indicator and min(missing, len(numbers) - missing) < minimum:
        raise LocalError(
            f"{missing} of {len(numbers)} training values are missing and an indicator needs {minimum} of either kind; "
            "set indicator = false"
        )
    values: Vector = numbers.fillna(fill or 0.0).to_numpy(np.float64)
    if values.min() == values.max():
        raise LocalError("constant among the training rows; drop the column")
    edges = _edges(str(column.name), values, plan.bins, minimum) if plan.bins else ()
    return FittedNumber(fill=fill, indicator=plan.indicator, edges=edges)


def _edges(name: str, values: Vector, bins: int, minimum: int) -> tuple[float, ...]:
    distinct = len(np.unique(values))
    if distinct < bins:
        raise LocalError(f"{bins} bins for {distinct} distinct training values; set fewer bins")
    binning = KBinsDiscretizer(bins, encode="ordinal", quantile_method="averaged_inverted_cdf", subsample=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that bins of no width are left out: we say it below, by name
        edges = binning.fit(values[:, np.newaxis]).bin_edges_[0]
    rows = np.bincount(np.digitize(values, edges[1:-1]), minlength=len(edges) - 1)
    if len(rows) < 2:
        raise LocalError("its values leave a single quantile bin; leave bins out")
    if rows.min() < minimum:
        few = int((rows < minimum).sum())
        raise LocalError(f"{len(rows)} quantile bins, {few} with fewer than {minimum} training rows; set fewer bins")
    if len(rows) < bins:
        log.warning("column %r: many equal values leave %d of %d quantile bins", name, len(rows), bins)
    return tuple(edges.tolist())


def _one_hot(levels: Iterable[Any]) -> OneHotEncoder:
    return OneHotEncoder(categories=[list(levels)], drop="first", sparse_output=False)


def _numbers(column: pd.Series[Any]) -> pd.Series[Any]:
    """Float64, NaN where one is missing."""
    numbers = pd.to_numeric(column.astype(object), errors="coerce").astype(np.float64)
    text = int((numbers.isna() & column.notna()).sum())
    if text:
        raise LocalError(f"{text} values that are not numbers; correct them, or declare it under [prepare.categories]")
    large = int((numbers.abs() > LARGEST).sum())
    if large:
        raise LocalError(f"{large} values infinite or beyond {LARGEST:g}; correct them or leave them empty")
    return numbers


def _text(column: pd.Series[Any]) -> pd.Series[Any]:
    """Python strings, "" where one is missing."""
    text = column.astype(object).where(column.notna(), "")
    other = sum(not isinstance(value, str) for value in text)
    if other:
        raise LocalError(f"{other} values that are not text; store them as text, or declare it under [prepare.numbers]")
    return text


def _check_missing(count: int) -> None:
    if count:
        raise LocalError(f"{count} missing values; fill them, or say under [prepare] what takes their place")


def _check_range(prepared: Matrix, names: list[str]) -> None:
    wild = [names[at] for at in np.flatnonzero(~np.isfinite(prepared).all(axis=0))]
    if wild:
        raise LocalError(f"values too large to standardise in {', '.join(map(repr, wild))}; clip or rescale them")


def _with_columns(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """The frame with its columns' names as text. LocalError when one of `names` is not there, or there twice."""
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    lacking = [name for name in names if name not in frame]
    if lacking:
        raise LocalError(f"the table lacks the columns {', '.join(map(repr, lacking))}")
    double = sorted(set(frame.columns[frame.columns.duplicated()]) & set(names))
    if double:
        raise LocalError(f"the table has several columns named {', '.join(map(repr, double))}; rename all but one")
    return frame


def _for_all(names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """What `make` gives for each column; the complaints about all of them in one line."""
    made, faults = {}, []
    for name in names:
        try:
            made[name] = make(name)
        except LocalError as fault:
            faults.append(f"column {name!r}: {fault}")
    if faults:
        raise LocalError("; ".join(faults))
    return made
