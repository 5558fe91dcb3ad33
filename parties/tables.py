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
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
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
        raise LocalError(f"{path} does not exist; correct the path of the table")
    if path.suffix.lower() in (".parquet", ".pq"):
        frame = _read_parquet(path, columns)
    else:
        frame = _read_csv(path, columns, separator)
    if not len(frame):
        raise LocalError(f"{path} has no rows")
    return Table(
        source=path.name,
        ids=_text(path, frame, id_column).tolist(),
        features=_numbers(path, frame, features),
        label=_label(path, _text(path, frame, label, label=True), label, positive) if label else None,
    )


def _read_csv(path: Path, columns: list[str], separator: str) -> pa.Table:
    """Every declared column as text: an id may well be "NA" or "007"."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((row for row in csv.reader(file, delimiter=separator) if row), [])
        _check_header(path, header, columns)
        return pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )
    except UnicodeDecodeError:
        raise LocalError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except (pa.ArrowInvalid, csv.Error) as error:
        if "UTF8" in str(error):
            raise LocalError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        raise LocalError(
            f"{path} is not a table of rows as long as its header, separated by {separator!r}; check quotes and lines"
        ) from None
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror}") from None


def _read_parquet(path: Path, columns: list[str]) -> pa.Table:
    try:
        _check_header(path, pq.read_schema(path).names, columns)
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError):
        raise LocalError(f"{path} is not a readable Parquet file") from None


def _check_header(path: Path, header: list[str], columns: list[str]) -> None:
    if not header:
        raise LocalError(f"{path} is empty")
    unnamed = sum(not name.strip() for name in header)
    if unnamed:
        raise LocalError(f"{path} has {unnamed} columns without a name; name them or leave them out")
    missing = [name for name in columns if name not in header]
    other = next((mark for mark in ";\t|," if len(header) == 1 and mark in header[0]), "")
    if missing and other:
        raise LocalError(f"{path}: the header is one field with {other!r} in it; set separator = {other!r} in [table]")
    if missing:
        raise LocalError(f"{path} lacks the columns {', '.join(map(repr, missing))}; it has {len(header)} others")
    double = [name for name in columns if header.count(name) > 1]
    if double:
        raise LocalError(f"{path} has {header.count(double[0])} columns named {double[0]!r}; rename all but one")


def _text(path: Path, frame: pa.Table, name: str, *, label: bool = False) -> pd.Series:
    """An id or label column as text, "" where it is empty; whole numbers as they are."""
    column = frame.column(name).combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_boolean(column.type):
        column = pc.if_else(column, "True", "False")
    if label and pa.types.is_floating(column.type):  # 0.0 and 1.0 are what many tools make of 0 and 1
        column = pc.if_else(pc.is_finite(column), column, None)
        whole = pc.all(pc.equal(pc.round(column), column)).as_py()
        column = column.cast(pa.int64()) if whole else column
    elif pa.types.is_floating(column.type):
        raise LocalError(f"{path}, column {name!r}: ids are stored as floats; store them as text")
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type) or pa.types.is_nested(column.type):
        raise LocalError(f"{path}, column {name!r}: {len(column)} values are stored as {column.type}; store text")
    return pd.Series(pc.fill_null(column.cast(pa.string()), "").to_pylist(), dtype=object)


def _numbers(path: Path, frame: pa.Table, features: Sequence[str]) -> pd.DataFrame:
    out, faults = {}, []
    for name in features:
        arrow = frame.column(name)
        column = arrow.to_pandas()
        if pa.types.is_string(arrow.type) or pa.types.is_large_string(arrow.type):
            column = column.astype(object).map(lambda text: np.nan if text is None or text in _MISSING else text)
        values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        if pa.types.is_temporal(arrow.type):  # pandas would count microseconds
            values = np.full(len(column), np.nan)
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
