"""Columns of words: every client declares its categories, all use their union, a column of zeros and ones for each.

What a client declares is what may occur, not what does: its list tells nothing of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.losses import Matrix

Categories = Mapping[str, Sequence[str]]  # by column


def union(declared: Iterable[Categories]) -> dict[str, tuple[str, ...]]:
    """Every column's categories, sorted, that any client declares."""
    found: dict[str, set[str]] = {}
    for one in declared:
        for column, values in one.items():
            found.setdefault(column, set()).update(values)
    return {column: tuple(sorted(values)) for column, values in found.items()}


def expanded(columns: Sequence[str], categories: Categories) -> tuple[str, ...]:
    """The names of the columns that the model sees, in order."""
    parts = ([f"{name}={value}" for value in categories[name]] if name in categories else [name] for name in columns)
    return tuple(name for part in parts for name in part)


def codes(texts: NDArray[Any], declared: Sequence[str], what: str) -> NDArray[np.float64]:
    """Positions in the declared list, (n,). Raises LocalError that counts what is not in it."""
    known = {value: place for place, value in enumerate(declared)}
    places = np.array([known.get(text.strip(), -1) for text in texts], np.float64)
    if strange := int(np.count_nonzero(places < 0)):
        raise LocalError(
            f"{what}: {strange} of {len(places)} values are none of the {len(known)} declared categories; "
            "declare them, or correct the values"
        )
    return places


def encode(x: Matrix, columns: Sequence[str], ours: Categories, wanted: Categories) -> Matrix:
    """x (n, d) with codes of our categories as the model sees it, (n, columns of `expanded`).

    Raises LocalError: a code is no position in our list.
    """
    if not wanted:
        return x
    parts = []
    for place, name in enumerate(columns):
        values = x[:, place]
        if name not in wanted:
            parts.append(values[:, None])
            continue
        if strange := int(np.count_nonzero(~np.isin(values, np.arange(len(ours[name]))))):
            raise LocalError(f"column {name!r}: {strange} values are none of the {len(ours[name])} declared categories")
        order = {value: position for position, value in enumerate(wanted[name])}
        places = np.array([order[value] for value in ours[name]], np.intp)
        ones = np.zeros((len(x), len(order)))
        ones[np.arange(len(x)), places[values.astype(np.intp)]] = 1
        parts.append(ones)
    return np.hstack(parts)


def encoder(columns: Sequence[str], categories: Categories) -> Any:
    """The same for scikit-learn: a fitted transformer of a table with these columns; an unknown category is none."""
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OneHotEncoder

    def part(name: str) -> Any:
        if name not in categories:
            return "passthrough"
        values = np.array(categories[name], object)
        return OneHotEncoder(categories=[values], handle_unknown="ignore", sparse_output=False)

    row = pd.DataFrame({name: [categories[name][0] if name in categories else 0.0] for name in columns})
    return ColumnTransformer([(name, part(name), [name]) for name in columns]).fit(row)


def from_frame(frame: Any) -> tuple[Matrix, tuple[str, ...], dict[str, tuple[str, ...]]]:
    """x (n, d), names and categories of a pandas table: a column of dtype "category" has declared its own."""
    categories = {
        str(name): tuple(map(str, column.cat.categories))
        for name, column in frame.items()
        if column.dtype == "category"
    }
    columns = [column.cat.codes if str(name) in categories else column for name, column in frame.items()]
    return np.column_stack([np.asarray(one, np.float64) for one in columns]), tuple(map(str, frame.columns)), categories
