"""What an estimator is given, checked before anything is sent. No complaint holds a value."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.losses import Matrix, Vector

log = logging.getLogger("colonnade")
MOST_CLASSES = 1000
LEVERAGE_REFUSED = 0.9
LEVERAGE_WARNED = 0.5
RANK_TOLERANCE = 1e-4  # relative; what lies below is fixed-point noise, or too little to hide behind


def matrix(X: pd.DataFrame | Matrix, *, may_be_empty: bool = False) -> tuple[Matrix, list[str]]:
    """Float64 values and column names. Raises LocalError that names columns and counts, never values."""
    frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(np.asarray(X))
    names = [str(name) for name in frame.columns]
    if not names and may_be_empty:
        return np.empty((len(frame), 0)), []
    if not names:
        raise LocalError("a feature holder needs at least one feature column")
    numbers = frame.apply(pd.to_numeric, errors="coerce")
    text = numbers.isna() & frame.notna()
    if text.any(axis=None):
        named = ", ".join(f"{name} ({count})" for name, count in text.sum().items() if count)
        raise LocalError(f"features that are not numbers: {named}; encode text columns first")
    x = numbers.to_numpy(np.float64, na_value=np.nan)
    bad = [f"{name} ({count})" for name, count in zip(names, (~np.isfinite(x)).sum(axis=0), strict=True) if count]
    if bad:
        raise LocalError(f"features with missing or infinite values: {', '.join(bad)}; fill or drop them")
    return x, names


def class_labels(y: Any, rows: int) -> tuple[Any, NDArray[np.int64]]:
    """The classes, sorted, and each row's number among them. Raises LocalError."""
    values = np.asarray(y)
    if values.shape != (rows,):
        raise LocalError(f"{rows} rows of features but labels of shape {values.shape}")
    missing = int(pd.isna(values).sum())
    if missing:
        raise LocalError(f"{missing} labels are missing; drop these rows")
    if len({type(value) for value in values.tolist()}) > 1:
        raise LocalError("the labels are of several types; make them all numbers or all text")
    classes, coded = np.unique(values, return_inverse=True)
    if len(classes) == 1:
        raise LocalError("the label is constant among these rows; it must have two values or more")
    if len(classes) > MOST_CLASSES or 2 * len(classes) > rows:
        raise LocalError(
            f"the label is one of {len(classes)} values in {rows} rows; is it a number to be regressed on?"
        )
    return classes, coded


def numeric_targets(y: Any, rows: int, least: float = -np.inf) -> Vector:
    """Finite numbers, none below `least`. Raises LocalError."""
    numbers = pd.to_numeric(pd.Series(np.asarray(y).ravel()), errors="coerce").to_numpy(np.float64)
    if np.shape(y) != (rows,):
        raise LocalError(f"{rows} rows of features but targets of shape {np.shape(y)}")
    bad = int((~np.isfinite(numbers)).sum())
    if bad:
        raise LocalError(f"{bad} targets are missing, infinite or no numbers; drop these rows")
    low = int((numbers < least).sum())
    if low:
        raise LocalError(f"{low} targets are below {least:g}; counts are not negative")
    if np.ptp(numbers) == 0:
        raise LocalError("the target is constant among these rows")
    return numbers


def row_weights(weights: Any, rows: int) -> Vector:
    """Sample weights, 1 without any. Raises LocalError."""
    if weights is None:
        return np.ones(rows)
    numbers = np.asarray(weights, np.float64)
    if numbers.shape != (rows,) or not np.isfinite(numbers).all() or (numbers < 0).any() or not numbers.any():
        raise LocalError(f"sample weights are {rows} finite numbers, none negative, not all zero")
    return numbers


def check_columns(x: Matrix, names: list[str], minimum: int, where: str = "the table") -> None:
    """Refuse a feature holder's columns whose gradients would give it labels.

    Raises:
        LocalError: no more rows in a batch than columns (the gradient determines every residual), or a column with
            fewer than `minimum` rows off its most frequent value (its gradient is theirs alone).
    """
    if len(x) <= x.shape[1] + 1:  # with an intercept the residuals add up to zero: one more equation
        raise LocalError(
            f"{where} has {len(x)} rows for {x.shape[1]} columns: the gradient would determine every row's residual, "
            "hence labels; use more rows or fewer columns"
        )
    rare = []
    for name, column in zip(names, x.T, strict=True):
        off = len(column) - int(np.unique(column, return_counts=True)[1].max())
        if off < minimum:
            rare.append(f"{name} ({off})")
    if rare:
        raise LocalError(
            f"columns with fewer than {minimum} rows in {where} off their most frequent value: {', '.join(rare)}; "
            "their gradient would reveal single labels: drop or merge them"
        )
    top = float(leverage(x).max())
    if top >= LEVERAGE_REFUSED:
        raise LocalError(
            f"one row of {where} decides a combination of columns almost alone (leverage {top:.2f}): the gradient "
            "would reveal its label; clip or log-transform long-tailed columns, drop columns that differ in few rows"
        )
    if top >= LEVERAGE_WARNED:
        log.warning(
            "one row of %s weighs much in a combination of columns (leverage %.2f): the gradient may tell its label; "
            "clip or log-transform long-tailed columns",
            where,
            top,
        )


def _principal(x: Matrix) -> tuple[Matrix, Matrix]:
    """Centred x and its principal axes scaled to unit variance, without those below RANK_TOLERANCE of the largest."""
    centred = x - x.mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    centred = centred / np.where(norms > 0, norms, 1.0)  # leverage and rank do not depend on units
    values, axes = np.linalg.eigh(centred.T @ centred)
    kept = values > max(values.max(initial=0.0), 0.0) * RANK_TOLERANCE**2
    return centred, axes[:, kept] / np.sqrt(values[kept])


def leverage(x: Matrix) -> Vector:
    """Per row, the diagonal of the projection on [1, X]: 1 means that some combination of columns is that row alone."""
    centred, axes = _principal(x)
    out: Vector = 1 / len(x) + np.square(centred @ axes).sum(axis=1)
    return out


def rank(x: Matrix) -> int:
    """How many independent directions the centred columns have: so many embeddings span them all."""
    return int(_principal(x)[1].shape[1])
