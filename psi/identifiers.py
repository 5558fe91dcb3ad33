"""Canonical ids: named, versioned rules, so that both sides of a join write the same customer the same way.

A rule never changes once it is released; a better one gets the next number. No error text ever holds an id.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError

# What software writes for a large number, 1.23E+10 or 1.23E10; an id such as 1234E5 has neither point nor plus.
ROUNDED = re.compile(r"\d+(\.\d+[eE]\+?|[eE]\+)\d+")
FLOAT = re.compile(r"\d+\.0")
SURROGATE = re.compile("[\ud800-\udfff]")


def _text(value: str) -> str | None:
    """text/1: NFKC, case folded, NFKC again (folding can undo it), white space trimmed and collapsed to one space."""
    if SURROGATE.search(value):  # half a character: it has no UTF-8
        return None
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", value).casefold())
    return " ".join(folded.split()) or None


def _email(value: str) -> str | None:
    """email/1: text/1 with one "@" between two parts and no white space. Dots and "+tags" stay: providers differ."""
    text = _text(value)
    return text if text and re.fullmatch(r"[^@\s]+@[^@\s]+", text) else None


RULES: dict[str, Callable[[str], str | None]] = {"text/1": _text, "email/1": _email}


@dataclass(frozen=True, eq=False)
class Identifiers:
    """The ids that take part, in the table's order.

    `values[i]` is the canonical id of row `rows[i]` of what was read; `counts` holds read, empty, invalid, duplicate
    (rows set aside) and kept: read is the sum of the others.
    """

    values: list[str] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    counts: dict[str, int]


def canonical(
    values: Sequence[str | None],
    rule: str,
    *,
    duplicates: str = "fail",
    empty: str = "fail",
    column: str = "id",
    source: str = "table",
) -> Identifiers:
    """The canonical ids of a column under a rule, each once.

    `duplicates` is fail, first or last (which row of an id stays); `empty` is fail or drop, for empty and invalid ids.

    Raises:
        LocalError: an unknown rule or policy; a column that a spreadsheet or a float type has spoilt; what the
            policies do not allow. Names source, column and count.
    """

    def fail(text: str) -> LocalError:
        return LocalError(f"{source}, column {column!r}: {text}")

    for what, name, known in (
        ("rule", rule, list(RULES)),
        ("duplicates policy", duplicates, ["fail", "first", "last"]),
        ("empty policy", empty, ["fail", "drop"]),
    ):
        if name not in known:
            raise fail(f"unknown {what} {name!r}; known: {', '.join(known)}")
    present = [value for value in values if value is not None]
    if other := sum(not isinstance(value, str) for value in present):
        raise fail(f"{other} ids were read as numbers; read the column as text")
    present = [text for value in present if (text := value.strip())]
    if rounded := sum(ROUNDED.fullmatch(text) is not None for text in present):
        raise fail(f"{rounded} ids look like 1.23E+10: a spreadsheet has rounded them; export the column as text")
    if present and all(map(FLOAT.fullmatch, present)):
        raise fail(f"all {len(present)} ids end in .0: they were read as floats; export the column as text")

    found = [None if value is None else RULES[rule](value) for value in values]
    blank, lost = len(values) - len(present), found.count(None)
    if lost and empty == "fail":
        raise fail(
            f'{blank} empty and {lost - blank} invalid ids under {rule}; correct them, or agree on empty = "drop"'
        )
    pairs = [(text, row) for row, text in enumerate(found) if text is not None]
    chosen: dict[str, int] = {}
    for text, row in reversed(pairs) if duplicates == "last" else pairs:
        chosen.setdefault(text, row)
    again = len(pairs) - len(chosen)
    if again and duplicates == "fail":
        raise fail(f'{again} duplicate ids under {rule}; remove them, or agree on duplicates = "first" or "last"')
    kept = sorted(chosen.items(), key=itemgetter(1))
    counts = {"read": len(values), "empty": blank, "invalid": lost - blank, "duplicate": again, "kept": len(kept)}
    return Identifiers([text for text, _ in kept], np.array([row for _, row in kept], dtype=np.int64), counts)


def encode(session: bytes, id_type: str, value: str) -> bytes:
    """What is hashed to the curve: len||session||len||id type||len||id, lengths in 4 bytes, so that no two collide.

    The session keeps points of one session from meaning anything in another; the type keeps kinds of ids apart.
    """
    parts = (session, id_type.encode(), value.encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
