"""What the id columns of a table are like, before anything is agreed to be sent: counts only, never a value.

`psi.identifiers.canonical` refuses bad ids one reason at a time; this counts all of them first and refuses nothing.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from parties import agreement
from parties.errors import LocalError
from psi.identifiers import CHUNK, FLOAT, ROUNDED, keyed_prints, sorted_groups
from psi.rules import rule

DIGITS_ONLY = r"^[0-9]+$"
LETTER = r"\pL"
MANY_EMPTY = 0.01  # of the rows
MOSTLY = 0.9  # of the values; the others are then suspicious
REMEDIES = {
    "email/1": "write one address a cell",
    "email-untagged/1": "write one address a cell",
    "email-gmail/1": "write one address a cell",
    "phone/1": "give the country code (+49 ...), or agree on phone-XX/1",
    "date/1": "write YYYY-MM-DD, or agree on date-dmy/1 or date-mdy/1",
    "date-dmy/1": "write day, month, year, or YYYY-MM-DD",
    "date-mdy/1": "write month, day, year, or YYYY-MM-DD",
    "digits/1": "write digits only, or agree on text/1",
    "sha256/1": "write 64 hexadecimal digits",
}
REMEDY_PHONE = "write national numbers of that region, or others with + and the country code"
REMEDY = "correct them"


class FieldSurvey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One id column under its rule: numbers of rows, but for `distinct` (canonical values) and `longest` (characters).

    `empty` is null or white space; `refused` is not empty and refused by the rule; `changed` is accepted, and written
    differently from its canonical form. `digits_only` and `with_letters` tell mixed types; `rounded` looks like
    1.23E+10, `floats` end in .0, `padded` have white space at an end.
    """

    field: str
    column: str
    rule: str
    rows: int
    empty: int
    refused: int
    changed: int
    distinct: int
    digits_only: int
    with_letters: int
    rounded: int
    floats: int
    padded: int
    longest: int

    @property
    def accepted(self) -> int:
        """Rows with a canonical value."""
        return self.rows - self.empty - self.refused

    @property
    def remarks(self) -> Iterator[str]:
        """What deserves attention, in plain words."""
        here, filled = f"column {self.column!r}:", self.rows - self.empty
        if self.refused:
            remedy = REMEDY_PHONE if self.rule.startswith("phone-") else REMEDIES.get(self.rule, REMEDY)
            yield f"{here} {self.refused:,} of {self.rows:,} values are refused by {self.rule}: {remedy}"
        if self.rounded:
            yield f"{here} {self.rounded:,} values look like 1.23E+10, rounded by a spreadsheet: export it as text"
        if self.floats:
            what = "all" if self.floats == filled else "some of the"
            yield f"{here} {self.floats:,} values end in .0, {what} ids were read as floats: export it as text"
        fewer, rest = self.with_letters, f"digits only, {self.with_letters:,} values have letters"
        if self.with_letters > self.digits_only:
            fewer, rest = self.digits_only, f"with letters, {self.digits_only:,} values are digits only"
        more = max(self.digits_only, self.with_letters)
        if fewer and more >= MOSTLY * filled:
            yield f"{here} {_percent(more, filled)} {rest}: mixed types, see that all are of one kind"
        if self.distinct == 1 < self.accepted:
            yield f"{here} the same value in all {self.accepted:,} rows that have one: it tells no customers apart"
        if self.empty > MANY_EMPTY * self.rows:
            yield f"{here} {self.empty:,} of {self.rows:,} rows are empty ({_percent(self.empty, self.rows)})"
        if self.padded:
            yield f"{here} {self.padded:,} values have white space at an end"
        if self.changed:
            yield f"{here} {self.rule} rewrites {self.changed:,} of {self.rows:,} values; the file stays as it is"


class KeySurvey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One key of the cascade: `usable` rows have all its fields; `repeated` ones come after the first of an equal key;
    `largest` rows share the most frequent key (1: every key is unique, 0: no row has one)."""

    key: str
    usable: int
    distinct: int
    repeated: int
    largest: int


class Survey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table's id columns, and the keys made of them in the order of the cascade; `keyless` rows have no key."""

    rows: int
    fields: tuple[FieldSurvey, ...]
    keys: tuple[KeySurvey, ...]
    keyless: int

    @property
    def remarks(self) -> list[str]:
        """What deserves attention, one line each, in plain words and with its remedy."""
        if not self.rows:
            return ["the table has no rows"]
        return [*(remark for one in self.fields for remark in one.remarks), *self._key_remarks()]

    def _key_remarks(self) -> Iterator[str]:
        for number, one in enumerate(self.keys):
            if not one.repeated:
                continue
            what = f"key {one.key!r}: {one.repeated:,} of {one.usable:,} rows repeat an earlier one"
            remedy = "two rows of one key cannot be told apart, those still unmatched take no part under it"
            if not number:
                remedy = 'remove them, or set duplicates = "first", "last" or "aggregate" in [table]'
            yield f"{what} (up to {one.largest:,} rows are alike): {remedy}"
        if self.keyless:
            remedy = 'correct them, or set empty = "drop" in [table]'
            yield f"{self.keyless:,} of {self.rows:,} rows have no usable key: {remedy}"


def survey(
    columns: Mapping[str, pa.ChunkedArray], agreed: agreement.Identifiers, names: Mapping[str, str] | None = None
) -> Survey:
    """Count what is in the id columns, given by the agreement's field names; `names` are our columns' names.

    Raises:
        LocalError: the agreement names an unknown rule. Never for what the columns hold.
    """
    rows = len(columns[next(iter(agreed.fields))])
    secret = os.urandom(32)
    fields, groups = [], {}
    for name, known in agreed.fields.items():
        counts, groups[name] = _survey_field(columns[name], known, secret)
        column = (names or {}).get(name, name)
        fields.append(FieldSurvey(field=name, column=column, rule=known, rows=rows, **counts))
    keys, keyless = [], np.ones(rows, np.bool_)
    for key in agreed.cascade:
        one, usable = _survey_key(" + ".join(key), [groups[name] for name in key])
        keys.append(one)
        keyless &= ~usable
    return Survey(rows=rows, fields=tuple(fields), keys=tuple(keys), keyless=int(keyless.sum()))


def _survey_field(column: pa.ChunkedArray, known: str, secret: bytes) -> tuple[dict[str, int], NDArray[np.int32]]:
    """The counts of a column; for every row the number of its canonical value's group, -1 where it has none."""
    try:
        normalised = rule(known)
    except ValueError as error:
        raise LocalError(f"the agreement, identifiers: {error}") from None
    counts: Counter[str] = Counter()
    longest, usable = 0, np.zeros(len(column), np.bool_)
    prints = [np.zeros((0, 2), np.uint64)]
    for start in range(0, len(column), CHUNK):
        text, written = _readable(column.slice(start, CHUNK))
        found = [normalised(value) for value in written]
        lacking = [value for value, one in zip(written, found, strict=True) if one is None]
        blank = sum(not value or value.isspace() for value in lacking)
        trimmed = pc.utf8_trim_whitespace(text)
        counts["empty"] += blank
        counts["refused"] += len(lacking) - blank
        counts["changed"] += sum(one is not None and one != value for value, one in zip(written, found, strict=True))
        counts["digits_only"] += _count(pc.match_substring_regex(trimmed, DIGITS_ONLY))
        counts["with_letters"] += _count(pc.match_substring_regex(text, LETTER))
        counts["rounded"] += _count(pc.match_substring_regex(text, ROUNDED))
        counts["floats"] += _count(pc.match_substring_regex(text, FLOAT))
        counts["padded"] += _count(pc.and_(pc.not_equal(trimmed, text), pc.not_equal(trimmed, "")))
        longest = max(longest, pc.max(pc.utf8_length(text)).as_py())
        usable[start : start + CHUNK] = [one is not None for one in found]
        prints.append(keyed_prints([one.encode() for one in found if one is not None], secret))
    group, distinct = _groups(np.concatenate(prints), usable)
    names = ("empty", "refused", "changed", "digits_only", "with_letters", "rounded", "floats", "padded")
    return {name: counts[name] for name in names} | {"distinct": distinct, "longest": longest}, group


def _readable(piece: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str]]:
    """Text with "" for null, for Arrow and for Python. Bytes that are no UTF-8 become U+FFFD for the one and a
    surrogate, which every rule refuses, for the other."""
    text = pc.fill_null(piece.cast(pa.string()), "")
    try:
        text.validate(full=True)
        return text, text.to_pylist()
    except pa.ArrowInvalid:
        raw = [value.as_buffer().to_pybytes() for value in text]
        fixed = pa.chunked_array([pa.array([value.decode(errors="replace") for value in raw], pa.string())])
        return fixed, [value.decode(errors="surrogateescape") for value in raw]


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _groups(prints: NDArray[np.uint64], usable: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Number the distinct prints, of which there is one for every usable row; -1 for the other rows."""
    order, begins = sorted_groups(prints)
    numbers = np.empty(len(prints), np.int32)
    numbers[order] = np.cumsum(begins, dtype=np.int32) - 1
    group = np.full(len(usable), -1, np.int32)
    group[usable] = numbers
    return group, int(begins.sum())


def _survey_key(name: str, groups: list[NDArray[np.int32]]) -> tuple[KeySurvey, NDArray[np.bool_]]:
    usable: NDArray[np.bool_] = np.logical_and.reduce([group >= 0 for group in groups])
    alike = groups[0][usable].astype(np.int64)
    for group in groups[1:]:  # pairs of numbers below the rows' number: their product fits
        _, alike = np.unique(alike * len(usable) + group[usable], return_inverse=True)
    sizes = np.unique(alike, return_counts=True)[1]
    rows, distinct = len(alike), len(sizes)
    largest = int(sizes.max(initial=0))
    return KeySurvey(key=name, usable=rows, distinct=distinct, repeated=rows - distinct, largest=largest), usable


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that only all is 100 %."""
    return f"{math.floor(1000 * part / whole) / 10:.1f} %"
