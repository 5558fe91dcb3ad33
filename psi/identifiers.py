"""From the id columns of a table to the keys that take part: canonical, each once, as Arrow columns.

What a key looks like to the others is decided in `encode`. No error text ever holds an id.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from parties import agreement
from parties.errors import LocalError
from psi.rules import Rule, rule

CHUNK = 65536  # rows that are Python objects at one time
# What software writes for a large number, 1.23E+10 or 1.23E10; an id such as 1234E5 has neither point nor plus.
ROUNDED = r"^\s*\d+(\.\d+[eE]\+?|[eE]\+)\d+\s*$"
FLOAT = r"^\s*\d+\.0\s*$"
COUNTS = ("read", "empty", "invalid", "duplicate", "kept")


@dataclass(frozen=True, eq=False)
class Key:
    """One key of a cascade. `values[row]` is what identifies a row of the table under it, None where it has none, as
    `usable` tells; `prints` (rows, 2) uint64 are keyed hashes of these values, by which equal ones are found."""

    name: str
    type: bytes
    values: pa.ChunkedArray = field(repr=False)
    usable: NDArray[np.bool_] = field(repr=False)
    prints: NDArray[np.uint64] = field(repr=False)

    def take(self, rows: NDArray[np.int64]) -> list[bytes]:
        """The values of some rows."""
        places = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])
        taken: list[bytes] = self.values.take(places).to_pylist()
        return taken


@dataclass(frozen=True, eq=False)
class Identifiers:
    """The rows that take part, in the table's order, and their keys.

    `rows[i]` is the row of the table (from 0) that stands for the i-th; `groups[row]` is the i of which a row of the
    table is a repetition or itself, -1 where it takes no part. `counts` holds rows: read, empty, invalid, duplicate
    (set aside) and kept; read is the sum of the others. `empty` and `duplicates` are the policies that made them.
    """

    keys: tuple[Key, ...]
    rows: NDArray[np.int64] = field(repr=False)
    groups: NDArray[np.int64] = field(repr=False)
    counts: dict[str, int]
    empty: str = "fail"
    duplicates: str = "fail"

    def __len__(self) -> int:
        return len(self.rows)

    def leaf_values(self, entries: NDArray[np.int64]) -> list[bytes]:
        """What a commitment to some entries covers: all their keys, in a form that no two inputs share."""
        columns = [key.take(self.rows[entries]) for key in self.keys]
        return [b"".join(b"\0" if value is None else b"\1" + _prefixed(value) for value in row)
                for row in zip(*columns, strict=True)]  # fmt: skip


def canonical(
    columns: Mapping[str, pa.ChunkedArray | Sequence[str | None]],
    agreed: agreement.Identifiers,
    *,
    duplicates: str = "fail",
    empty: str = "fail",
    names: Mapping[str, str] | None = None,
    source: str = "table",
) -> Identifiers:
    """The canonical keys of a table's id columns, given by the agreement's field names, each key once.

    `duplicates` is fail, first, last or aggregate (which row stands for several with an equal key, the first that they
    have: the first row, but for "last"); `empty` is fail or drop, for empty and invalid ids. `names` are our columns,
    for error texts.

    Raises:
        LocalError: an unknown rule; a column that a spreadsheet or a float type has spoilt; what the policies do not
            allow. Names source, column and count.
    """
    arrays = {name: _as_text(column) for name, column in columns.items()}
    where = {name: f"{source}, column {(names or {}).get(name, name)!r}" for name in agreed.fields}
    for name, column in arrays.items():
        _refuse_spoilt(column, where[name])
    rules = rules_of(agreed)

    total = len(next(iter(arrays.values())))
    secret = os.urandom(32)
    pieces: list[list[pa.Array]] = [[] for _ in agreed.cascade]
    prints = [np.zeros((total, 2), np.uint64) for _ in agreed.cascade]
    usable = [np.zeros(total, np.bool_) for _ in agreed.cascade]
    refused, dropped = dict.fromkeys(agreed.fields, 0), {"empty": 0, "invalid": 0}
    for start in range(0, total, CHUNK):
        fields: dict[str, list[bytes | None]] = {}
        spoilt: set[int] = set()
        for name, column in arrays.items():
            written = column.slice(start, CHUNK).to_pylist()
            found = [None if value is None else rules[name](value) for value in written]
            bad = [i for i, one in enumerate(found) if one is None and written[i] and not written[i].isspace()]
            refused[name] += len(bad)
            spoilt.update(bad)
            fields[name] = [None if one is None else _prefixed(one.encode()) for one in found]
        lacking = np.ones(min(CHUNK, total - start), np.bool_)
        for number, key in enumerate(agreed.cascade):
            values = _joined([fields[name] for name in key])
            have = np.array([value is not None for value in values])
            pieces[number].append(_column(values, have))
            prints[number][start : start + CHUNK] = keyed_prints(values, secret)
            usable[number][start : start + CHUNK] = have
            lacking &= ~have
        invalid = sum(bool(lacking[i]) for i in spoilt)
        dropped["invalid"] += invalid
        dropped["empty"] += int(lacking.sum()) - invalid
    if empty == "fail" and (dropped["empty"] or any(refused.values())):
        told = ", ".join(f"{count} {(names or {}).get(name, name)!r} not under {agreed.fields[name]}"
                         for name, count in refused.items() if count)  # fmt: skip
        ours = ", ".join(repr((names or {}).get(name, name)) for name in agreed.fields)
        raise LocalError(
            f"{source}, column {ours}: {dropped['empty']} empty and {sum(refused.values())} invalid ids"
            f'{f" ({told})" if told else ""}; correct them, or set empty = "drop" in [table]'
        )
    keys = tuple(
        Key(" + ".join(key), _type(key, agreed), pa.chunked_array(values, pa.large_binary()), have, marks)
        for key, values, have, marks in zip(agreed.cascade, pieces, usable, prints, strict=True)
    )
    rows, groups = _each_once(keys, total, duplicates)
    again = total - sum(dropped.values()) - len(rows)
    if again and duplicates == "fail":
        raise LocalError(
            f"{source}, column {', '.join(repr((names or {}).get(name, name)) for name in agreed.cascade[0])}: {again} "
            'duplicate ids; remove them, or set duplicates = "first", "last" or "aggregate" in [table]'
        )
    counts = dict(zip(COUNTS, (total, dropped["empty"], dropped["invalid"], again, len(rows)), strict=True))
    return Identifiers(keys, rows, groups, counts, empty, duplicates)


def rules_of(agreed: agreement.Identifiers) -> dict[str, Rule]:
    """The rule of every field. Raises LocalError for one that this version does not know."""
    try:
        return {name: rule(known) for name, known in agreed.fields.items()}
    except ValueError as error:
        raise LocalError(f"the agreement, identifiers: {error}") from None


def _as_text(column: pa.ChunkedArray | Sequence[str | None]) -> pa.ChunkedArray:
    if isinstance(column, pa.ChunkedArray):
        return column
    try:
        return pa.chunked_array([pa.array(column, pa.string())])
    except (pa.ArrowTypeError, pa.ArrowInvalid, UnicodeEncodeError):
        raise LocalError("ids are not text; read the column as text") from None


def _refuse_spoilt(column: pa.ChunkedArray, where: str) -> None:
    rounded = pc.sum(pc.match_substring_regex(column, ROUNDED)).as_py() or 0
    if rounded:
        raise LocalError(
            f"{where}: {rounded} ids look like 1.23E+10: a spreadsheet has rounded them; export the column as text"
        )
    present = pc.sum(pc.match_substring_regex(column, r"\S")).as_py() or 0
    if present and present == (pc.sum(pc.match_substring_regex(column, FLOAT)).as_py() or 0):
        raise LocalError(f"{where}: all {present} ids end in .0: they were read as floats; export the column as text")


def _prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _joined(fields: list[list[bytes | None]]) -> list[bytes | None]:
    """The values of a key, one of a row: its fields' one after another; None where one lacks."""
    if len(fields) == 1:
        return fields[0]
    return [None if None in row else b"".join(row) for row in zip(*fields, strict=True)]


def _column(values: list[bytes | None], have: NDArray[np.bool_]) -> pa.Array:
    """`pa.array(values)`, which would load pandas where it is installed: 40 MB that an intersection does not need."""
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([0 if value is None else len(value) for value in values], out=offsets[1:])
    buffers = np.packbits(have, bitorder="little"), offsets, b"".join(value for value in values if value is not None)
    return pa.Array.from_buffers(pa.large_binary(), len(values), [pa.py_buffer(buffer) for buffer in buffers])


def keyed_prints(values: list[bytes | None], secret: bytes) -> NDArray[np.uint64]:
    """A keyed hash of every value, (n, 2) uint64, to find equal ones by; `secret` is of one run of one process."""
    keyed = hashlib.blake2b(digest_size=16, key=secret)
    out = []
    for value in values:
        one = keyed.copy()
        one.update(value or b"")
        out.append(one.digest())
    return np.frombuffer(b"".join(out), np.uint64).reshape(-1, 2)


def _each_once(keys: tuple[Key, ...], total: int, duplicates: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that stand for themselves and for those that repeat them, and which of them each row goes with. A row
    repeats another when the first key that it has is equal; under "fail", only the first key of all counts."""
    stands = np.full(total, -1, np.int64)
    for place, key in enumerate(keys):
        having = np.flatnonzero(key.usable & (stands < 0))
        if place and duplicates == "fail":
            stands[having] = having
            continue
        order, begins = sorted_groups(key.prints[having])
        number = np.cumsum(begins) - 1
        ends = np.append(begins[1:], True) if len(begins) else begins
        stands[having[order]] = having[order[ends if duplicates == "last" else begins]][number]
    rows = np.unique(stands[stands >= 0])
    groups = np.where(stands >= 0, np.searchsorted(rows, stands), -1)
    return rows, groups


def sorted_groups(prints: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """An order in which equal prints, (n, 2), stand together, stable; and where each group of equal ones begins."""
    order = np.lexsort((prints[:, 1], prints[:, 0]))
    ranked = prints[order]
    begins = np.ones(len(prints), np.bool_)
    begins[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    return order, begins


def _type(key: tuple[str, ...], agreed: agreement.Identifiers) -> bytes:
    return b"id" + b"".join(_prefixed(part.encode()) for name in key for part in (name, agreed.fields[name]))


def encode(session: bytes, type: bytes, value: bytes) -> bytes:
    """What is hashed to the curve: len||session||len||type||len||value, lengths in 4 bytes, so that no two collide.

    The session keeps points of one session from meaning anything in another; the type keeps kinds of ids apart.
    """
    return encoding(session, type) + _prefixed(value)


def encoding(session: bytes, type: bytes) -> bytes:
    """What all encoded values of one type begin with."""
    return _prefixed(session) + _prefixed(type)
