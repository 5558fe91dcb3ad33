"""Read the declared columns of a CSV or Parquet table; nothing else is ever loaded.

Every complaint names file, column and count, never a value.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from parties.errors import LocalError

_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]


@dataclass(frozen=True)
class Table:
    """`ids` as text, as written; `features` float64, finite; `label` 0.0 or 1.0, or None. One row order for all."""

    source: str
    ids: list[str] = field(repr=False)
    features: pd.DataFrame = field(repr=False)
    label: np.ndarray | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)


def read_table(
    path: Path,
    id_column: str,
    features: Sequence[str],
    label: str = "",
    positive: str = "",
    separator: str = ",",
) -> Table:
    """Read ids, features and (label holder only) the label; `positive` is the label's value that counts as 1.

    Raises:
        LocalError: the file is missing, empty, not UTF-8; a column is missing, not numeric, has gaps or infinities, or
            is an id column of floats; the label is not two-valued.
    """
    columns = [id_column, *features, *([label] if label else [])]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise LocalError(f"column {twice[0]!r} is declared more than once; id, features and label must differ")
    if not path.exists():
        raise LocalError(f"{path} does not exist; correct [table] path in the party's file")
    as_text = [id_column, *([label] if label else [])]
    if path.suffix.lower() in (".parquet", ".pq"):
        frame = _read_parquet(path, columns, id_column)
    else:
        frame = _read_csv(path, columns, as_text, separator)
    if not len(frame):
        raise LocalError(f"{path} has no rows")
    return Table(
        source=path.name,
        ids=_text(frame[id_column]).tolist(),
        features=_numbers(path, frame, features),
        label=_label(path, _text(frame[label]), label, positive) if label else None,
    )


def _read_csv(path: Path, columns: list[str], as_text: list[str], separator: str) -> pd.DataFrame:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=separator), [])
        _check_header(path, header, columns)
        return pd.read_csv(
            path,
            usecols=columns,
            dtype=dict.fromkeys(as_text, str),
            sep=separator,
            encoding="utf-8-sig",
            keep_default_na=False,  # an id may well be "NA"
            na_values={name: _MISSING for name in columns if name not in as_text},
            low_memory=False,
        )
    except UnicodeDecodeError:
        raise LocalError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error):
        raise LocalError(f"{path} is not a table of equal rows separated by {separator!r}; check quotes") from None
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror}") from None


def _read_parquet(path: Path, columns: list[str], id_column: str) -> pd.DataFrame:
    try:
        schema = pq.read_schema(path)
        _check_header(path, schema.names, columns)
        if pa.types.is_floating(schema.field(id_column).type):
            raise LocalError(f"{path}, column {id_column!r}: ids are stored as floats; store them as text")
        frame: pd.DataFrame = pq.read_table(path, columns=columns).to_pandas()
        return frame
    except (pa.ArrowException, OSError):
        raise LocalError(f"{path} is not a readable Parquet file") from None


def _check_header(path: Path, header: list[str], columns: list[str]) -> None:
    if not header:
        raise LocalError(f"{path} is empty")
    unnamed = sum(not name.strip() for name in header)
    if unnamed:
        raise LocalError(f"{path} has {unnamed} columns without a name; name them or leave them out")
    missing = [name for name in columns if name not in header]
    if missing:
        raise LocalError(f"{path} lacks the columns {', '.join(map(repr, missing))}; it has {len(header)} others")
    double = [name for name in columns if header.count(name) > 1]
    if double:
        raise LocalError(f"{path} has {header.count(double[0])} columns named {double[0]!r}; rename all but one")


def _text(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), "").map(str)


def _numbers(path: Path, frame: pd.DataFrame, features: Sequence[str]) -> pd.DataFrame:
    out, faults = {}, []
    for name in features:
        column = frame[name]
        values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        missing = int(column.isna().sum())
        strange = int(np.isnan(values).sum()) - missing
        infinite = int(np.isinf(values).sum())
        for count, what in ((missing, "missing"), (strange, "not numbers"), (infinite, "infinite")):
            if count:
                faults.append(f"{name!r} {count} {what}")
        out[name] = values
    if faults:
        raise LocalError(f"{path}: features with unusable values: {'; '.join(faults)}; fill, encode or drop them")
    return pd.DataFrame(out)


def _label(path: Path, column: pd.Series, name: str, positive: str) -> np.ndarray:
    empty = int((column.str.strip() == "").sum())
    if empty:
        raise LocalError(f"{path}, column {name!r}: {empty} labels are missing; drop these rows")
    values = sorted(column.unique())
    if len(values) != 2:
        what = "constant" if len(values) == 1 else f"one of {len(values)} values"
        raise LocalError(f"{path}, column {name!r}: the label is {what}; it must have exactly two values")
    if not positive:
        numbers = pd.to_numeric(pd.Series(values), errors="coerce")
        if sorted(numbers) != [0.0, 1.0]:
            raise LocalError(f"{path}, column {name!r}: the label is not 0 and 1; say which value is positive")
        return pd.to_numeric(column).to_numpy(np.float64)
    if positive not in values:
        raise LocalError(f"{path}, column {name!r}: no label equals the value declared as positive")
    return (column == positive).to_numpy(np.float64)
