"""What a column's values mean, one chunk at a time: ids, labels and categories as text, the rest as numbers. Knows no
file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from parties.errors import LocalError

Use = Literal["ids", "numbers", "categories", "labels"]  # what a table's column is declared as
_MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_INFINITE = r"(?i)^[+-]?inf(inity)?$"


def check_header(place: str, header: Sequence[str], columns: Sequence[str]) -> None:
    """Raises LocalError when a declared column is not there, or there twice, or columns have no name."""
    if not header:
        raise LocalError(f"{place} is empty")
    unnamed = sum(not name.strip() for name in header)
    if unnamed:
        raise LocalError(f"{place} has {unnamed} columns without a name; name them or leave them out")
    missing = [name for name in columns if name not in header]
    other = next((mark for mark in ";\t|," if len(header) == 1 and mark in header[0]), "")
    if missing and other:
        raise LocalError(f"{place}: the header is one field with {other!r} in it; set separator = {other!r} in [table]")
    if missing:
        raise LocalError(f"{place} lacks the columns {', '.join(map(repr, missing))}; it has {len(header)} others")
    double = [name for name in columns if header.count(name) > 1]
    if double:
        raise LocalError(f"{place} has {header.count(double[0])} columns named {double[0]!r}; rename all but one")


def kind(stored: pa.DataType) -> str:
    """The class of an Arrow type: all that one column may mix, as one word."""
    if pa.types.is_dictionary(stored):
        return kind(stored.value_type)
    if pa.types.is_integer(stored) or (pa.types.is_decimal(stored) and stored.scale == 0):
        return "whole number"
    if getattr(stored, "extension_name", "") == "arrow.uuid":
        return "uuid"
    if pa.types.is_timestamp(stored):
        return "timestamp with zone" if stored.tz else "timestamp"
    tests = {
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "truth value": (pa.types.is_boolean,),
        "float": (pa.types.is_floating,),
        "decimal": (pa.types.is_decimal,),
        "date": (pa.types.is_date,),
        "nothing": (pa.types.is_null,),
    }
    return next((word for word, some in tests.items() if any(test(stored) for test in some)), str(stored))


NUMBERS = ("whole number", "float", "decimal", "truth value")
_TEXTUAL = ("text", "whole number", "truth value", "date", "timestamp", "timestamp with zone", "uuid", "nothing")


def check_text(place: str, name: str, stored: pa.DataType, what: Use) -> None:
    """Raises LocalError when a column of this type cannot be ids or categories, or labels, which may also be floats."""
    word = kind(stored)
    if word == "float" and what == "ids":
        raise LocalError(f"{place}, column {name!r}: ids are stored as floats; store them as text")
    if word not in _TEXTUAL and not (what == "labels" and word in NUMBERS):
        raise LocalError(f"{place}, column {name!r}: {what} are stored as {stored}; store them as text")


def as_text(place: str, name: str, column: pa.Array) -> pa.Array:
    """Text as written, whole numbers in digits, dates and timestamps in ISO 8601; "" where it is empty.

    A fraction of a second loses its trailing zeros; a timestamp with a zone becomes UTC and ends in Z. Raises
    LocalError for text that is not UTF-8: Parquet promises it, but not every writer keeps that.
    """
    column, word = _plain(column), kind(column.type)
    if word == "truth value":
        column = pc.if_else(column, "True", "False")
    elif word == "float":  # -0.0 + 0.0 is 0.0
        column = pc.add(pc.if_else(pc.is_finite(column), column, None), pa.scalar(0.0, column.type))
    elif word == "date":
        column = column.cast(pa.date32())
    elif word == "timestamp":
        column = _iso(column)
    elif word == "timestamp with zone":
        column = pc.binary_join_element_wise(_iso(column.cast(pa.timestamp(column.type.unit, "UTC"))), "Z", "")
    elif word == "uuid":
        column = _uuid(column.storage)
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowInvalid:
        raise LocalError(f"{place}, column {name!r}: the text is not UTF-8; write it as UTF-8") from None
    return pc.fill_null(text, "") if text.null_count else text


def _plain(column: pa.Array) -> pa.Array:
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column


def _iso(column: pa.Array) -> pa.Array:
    text = pc.strftime(column, format="%Y-%m-%dT%H:%M:%S")  # %S has the fraction that the unit has
    return text if column.type.unit == "s" else pc.replace_substring_regex(text, r"\.?0+$", "")


def _uuid(storage: pa.Array) -> pa.Array:
    """16 bytes as 8-4-4-4-12 hexadecimal digits."""
    raw = np.frombuffer(pc.fill_null(storage, bytes(16)).cast(pa.binary()).buffers()[2] or b"", np.uint8)
    digits = np.frombuffer(raw.tobytes().hex().encode(), np.uint8).reshape(-1, 32)
    groups = np.insert(digits, [8, 12, 16, 20], ord("-"), axis=1).tobytes()
    text = pa.FixedSizeBinaryArray.from_buffers(pa.binary(36), len(storage), [None, pa.py_buffer(groups)])
    return pc.if_else(storage.is_valid(), text.cast(pa.binary()).cast(pa.string()), None)


class Faults:
    """Counts, per feature and over all chunks, the values that no model can use."""

    def __init__(self, names: Iterable[str]) -> None:
        self._counts = {name: [0, 0, 0] for name in names}

    def numbers(self, name: str, column: pa.Array) -> pa.Array:
        """The chunk as float64; what is missing, not a number or infinite is counted and of no further use."""
        column = _plain(column)
        values, missing = _floats(column)
        empty = column.null_count if missing is None else missing
        plain = pc.fill_null(values, np.nan)
        array = plain.to_numpy(zero_copy_only=False)
        counts = self._counts[name]
        counts[0] += empty
        counts[1] += int(np.isnan(array).sum()) - empty
        counts[2] += int(np.isinf(array).sum())
        return plain

    def check(self, place: str, remedy: str, gaps: Collection[str] = ()) -> None:
        """Raises LocalError that lists every column with its counts; in those of `gaps` values may be missing."""
        words = ("missing", "not numbers", "infinite")
        found = [
            f"{name!r} {count} {word}"
            for name, counts in self._counts.items()
            for count, word in zip(counts, words, strict=True)
            if count and not (word == "missing" and name in gaps)
        ]
        if found:
            raise LocalError(f"{place}: features with unusable values: {'; '.join(found)}; {remedy}")


def _floats(column: pa.Array) -> tuple[pa.Array, int | None]:
    """As float64, null where there is no number, and how many are missing if that is not the number of nulls."""
    word = kind(column.type)
    if word == "text":
        return _parse(column.cast(pa.string()))
    if word == "float":
        return column.cast(pa.float64()), column.null_count + int(pc.sum(pc.is_nan(column)).as_py() or 0)
    if pa.types.is_decimal(column.type):  # through text, which rounds correctly
        return column.cast(pa.string()).cast(pa.float64()), None
    if word in NUMBERS:
        return column.cast(pa.float64(), safe=False), None
    return pa.nulls(len(column), pa.float64()), None


def _parse(text: pa.Array) -> tuple[pa.Array, int]:
    try:
        values = text.cast(pa.float64())
        if pc.all(pc.is_finite(values), min_count=0).as_py():
            return values, text.null_count
    except pa.ArrowInvalid:  # its text shows the value
        pass
    text = pc.if_else(pc.is_in(text, pa.array(_MISSING)), None, text)
    trimmed = pc.ascii_trim(text, " \t\n\v\f\r")
    number = pc.or_(pc.match_substring_regex(trimmed, _NUMBER), pc.match_substring_regex(text, _INFINITE))
    return pc.if_else(number, trimmed, None).cast(pa.float64()), text.null_count


def check_label(place: str, name: str, column: pa.ChunkedArray, positive: str) -> str:
    """The one of the label's two values that counts as 1.

    Raises:
        LocalError: labels are missing, there are not two values, or nothing says which is positive.
    """
    here = f"{place}, column {name!r}"
    empty = pc.sum(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py() or 0
    if empty:
        raise LocalError(f"{here}: {empty} labels are missing; drop these rows")
    values = pc.unique(column)
    if len(values) != 2:
        what = "constant" if len(values) == 1 else f"one of {len(values)} values"
        raise LocalError(f"{here}: the label is {what}; it must have exactly two values")
    if positive:
        if positive not in values.to_pylist():
            raise LocalError(f"{here}: no label equals positive in [table]; set it to one of the two values")
        return positive
    numbers = dict(zip(_parse(values)[0].to_pylist(), values.to_pylist(), strict=True))
    if set(numbers) != {0.0, 1.0}:
        raise LocalError(f"{here}: the label is not 0 and 1; say which value is positive")
    return str(numbers[1.0])


def words(column: pa.ChunkedArray) -> NDArray[np.object_]:
    """The column's text, shape (rows,); within a chunk, equal words are one Python object."""
    out, start = np.empty(len(column), dtype=object), 0
    for chunk in column.chunks:
        coded = chunk.dictionary_encode()
        distinct = np.array(coded.dictionary.to_pylist(), dtype=object)
        out[start : start + len(chunk)] = distinct[coded.indices.to_numpy()]
        start += len(chunk)
    return out


def filled(out: NDArray[np.float64], column: pa.ChunkedArray) -> NDArray[np.float64]:
    """The column's chunks, numbers or truth values, written into `out`."""
    start = 0
    for chunk in column.chunks:
        out[start : start + len(chunk)] = chunk.to_numpy(zero_copy_only=False)
        start += len(chunk)
    return out
