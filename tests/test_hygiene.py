"""The survey of id columns: every count against plain Python and pandas, remarks for a nasty table, no value shown."""

from __future__ import annotations

import re
import time
import unicodedata

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.agreement import Identifiers
from parties.errors import LocalError
from psi import hygiene
from psi.hygiene import survey
from psi.identifiers import canonical
from psi.rules import rule

RULES = ["text/1", "email-gmail/1", "phone-DE/1", "date-dmy/1", "digits/1"]
one_cell = (
    st.none()
    | st.sampled_from(["", " ", "\u00a0", "\x1c", "a", "A ", "\ta", "7", "07", " 7", "7.0", "1.2E+10", "1.23e5", "e+9"])
    | st.sampled_from(
        ["A.b@gmail.com", "ab+x@googlemail.com", "030 1234567", "+49 30 1234567", "1.2.1990", "1990-02-01"]
    )
    | st.text(alphabet="aAé7٣. \u3000\u200b\n", max_size=4)
    | st.text(max_size=3)
)


def chunked(values, *, cut: int = 3) -> pa.ChunkedArray:
    """In several pieces, as tables are read."""
    values = [None if value is None else value.encode(errors="replace").decode() for value in values]
    return pa.chunked_array(
        [pa.array(values[i : i + cut], pa.string()) for i in range(0, len(values), cut)], pa.string()
    )


def expected(values, known) -> dict[str, int]:
    """The same counts, one value at a time."""
    written = pd.Series(["" if value is None else value for value in values], dtype=object)
    ids = written.map(rule(known)).astype(object) if len(written) else written
    ids = ids.where(ids.notna(), None)
    blank = written.map(lambda value: not value.strip()).astype(bool)
    missing = ids.isna()

    def count(test) -> int:
        return int(sum(bool(test(value)) for value in written))

    return {
        "rows": len(written),
        "empty": int(blank.sum()),
        "refused": int((missing & ~blank).sum()),
        "changed": int((~missing & (ids != written)).sum()),
        "distinct": int(ids.nunique(dropna=True)),
        "digits_only": count(lambda v: v.strip().isascii() and v.strip().isdigit()),
        "with_letters": count(lambda v: any(unicodedata.category(c)[0] == "L" for c in v)),
        "rounded": count(lambda v: re.fullmatch(r"[ \t\n\r\f]*\d+(\.\d+[eE]\+?|[eE]\+)\d+[ \t\n\r\f]*", v, re.ASCII)),
        "floats": count(lambda v: re.fullmatch(r"[ \t\n\r\f]*\d+\.0[ \t\n\r\f]*", v, re.ASCII)),
        "padded": count(lambda v: v.strip() and v != v.strip()),
        "longest": max((len(value) for value in written), default=0),
    }


@settings(max_examples=150)
@given(st.lists(one_cell, max_size=12), st.sampled_from(RULES), st.integers(1, 5), st.integers(1, 5))
def test_a_field_against_pandas(values, known, cut, rows_at_a_time):
    column = chunked(values, cut=cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hygiene, "CHUNK", rows_at_a_time)
        got = survey({"id": column}, Identifiers(fields={"id": known}), {"id": "Customer"})
    (one,) = got.fields
    assert (one.field, one.column, one.rule) == ("id", "Customer", known)
    counts = msgspec.to_builtins(one)
    assert {name: counts[name] for name in counts if name not in ("field", "column", "rule")} == expected(
        column.to_pylist(), known
    )
    assert one.accepted == got.keys[0].usable == got.rows - got.keyless


@settings(max_examples=150)
@given(st.data())
def test_keys_against_pandas(data):
    names = ["a", "b", "c"]
    cell = st.none() | st.sampled_from(["1", "1 ", "2", "x", "X", ""])
    rows = data.draw(st.lists(st.tuples(cell, cell, cell), max_size=25))
    keys = data.draw(
        st.sampled_from([(), (("a",), ("b", "c")), (("a", "b"), ("c", "a"), ("b",)), (("c", "a", "b"), ("a", "b"))])
    )
    agreed = Identifiers(fields=dict.fromkeys(names, "text/1"), keys=keys)
    columns = {name: chunked([row[place] for row in rows]) for place, name in enumerate(names)}
    got = survey(columns, agreed, {})
    ids = pd.DataFrame([[rule("text/1")(v or "") for v in row] for row in rows], columns=names, dtype=object)
    keyless = pd.Series(True, index=ids.index)
    for one, key in zip(got.keys, agreed.cascade, strict=True):
        usable = ids.dropna(subset=list(key))
        keyless &= ~ids.index.isin(usable.index)
        sizes = usable.groupby(list(key)).size()
        assert one.key == " + ".join(key)
        assert one.usable == len(usable)
        assert one.distinct == len(usable.drop_duplicates(list(key)))
        assert one.repeated == usable.duplicated(list(key)).sum()
        assert one.largest == (sizes.max() if len(sizes) else 0)
    assert got.keyless == keyless.sum()


@settings(max_examples=50)
@given(st.lists(one_cell, max_size=12), st.sampled_from(RULES))
def test_it_foretells_what_takes_part(values, known):
    agreed, columns = Identifiers(fields={"id": known}), {"id": chunked(values)}
    got = survey(columns, agreed, {})
    one, key = got.fields[0], got.keys[0]
    try:
        counts = canonical(columns, agreed, duplicates="first", empty="drop").counts
    except LocalError:  # what canonical refuses whatever the policy says
        assert one.rounded or one.floats == one.rows - one.empty
        assert any("export it as text" in remark for remark in got.remarks)
    else:
        assert counts == {
            "read": got.rows,
            "empty": one.empty,
            "invalid": one.refused,
            "duplicate": key.repeated,
            "kept": key.distinct,
        }


NASTY = {
    "phone": ["030 7654321", "+49 30 7654321", *[f"+49 30 76543{i:02}" for i in range(96)], "", "call Zaphod"],
    "customer": [f"{4711000 + i}" for i in range(97)] + ["Q4711-Zaphod", "4711000", "4711000"],
    "account": ["8.1415E+11"] * 2 + [f" {8141500 + i}.0" for i in range(98)],
    "country": ["Atlantis"] * 100,
    "born": ["31.02.1977", *[f"{1 + i % 28}.7.1977" for i in range(97)], None, " "],
}


def nasty() -> hygiene.Survey:
    rules = {"phone": "phone/1", "customer": "text/1", "account": "text/1", "country": "text/1", "born": "date-dmy/1"}
    keys = (("customer",), ("phone", "born"), ("country", "born"), ("account",))
    columns = {name: chunked(values, cut=41) for name, values in NASTY.items()}
    return survey(columns, Identifiers(fields=rules, keys=keys), {"phone": "Tel\nNo"})


def test_a_nasty_table_gets_these_remarks():
    assert nasty().remarks == [
        "column 'Tel\\nNo': 2 of 100 values are refused by phone/1: give the country code (+49 ...), or agree on "
        "phone-XX/1",
        "column 'Tel\\nNo': phone/1 rewrites 97 of 100 values; the file stays as it is",
        "column 'customer': 99.0 % digits only, 1 values have letters: mixed types, see that all are of one kind",
        "column 'customer': text/1 rewrites 1 of 100 values; the file stays as it is",
        "column 'account': 2 values look like 1.23E+10, rounded by a spreadsheet: export it as text",
        "column 'account': 98 values end in .0, some of the ids were read as floats: export it as text",
        "column 'account': 98 values have white space at an end",
        "column 'account': text/1 rewrites 100 of 100 values; the file stays as it is",
        "column 'country': the same value in all 100 rows that have one: it tells no customers apart",
        "column 'country': text/1 rewrites 100 of 100 values; the file stays as it is",
        "column 'born': 1 of 100 values are refused by date-dmy/1: write day, month, year, or YYYY-MM-DD",
        "column 'born': 2 of 100 rows are empty (2.0 %)",
        "column 'born': date-dmy/1 rewrites 97 of 100 values; the file stays as it is",
        "key 'customer': 2 of 100 rows repeat an earlier one (up to 3 rows are alike): remove them, or set "
        'duplicates = "first", "last" or "aggregate" in [table]',
        "key 'country + born': 69 of 97 rows repeat an earlier one (up to 4 rows are alike): two rows of one key "
        "cannot be told apart, those still unmatched take no part under it",
        "key 'account': 1 of 100 rows repeat an earlier one (up to 2 rows are alike): two rows of one key cannot be "
        "told apart, those still unmatched take no part under it",
    ]


def test_no_value_is_shown():
    got = nasty()
    shown = repr(got) + msgspec.json.encode(got).decode() + "\n".join(got.remarks)
    for text in ("Zaphod", "zaphod", "7654", "4711", "8.14", "8141", "Atlantis", "atlantis", "1977"):
        assert text not in shown
    assert all("\n" not in remark for remark in got.remarks)


def test_a_clean_table_gets_no_remark():
    columns = {"id": chunked([f"c{i}" for i in range(500)]), "born": chunked(["1990-01-02", "1991-01-02"] * 250)}
    agreed = Identifiers(fields={"id": "text/1", "born": "date/1"}, keys=(("id",), ("id", "born")))
    assert survey(columns, agreed, {}).remarks == []


def test_remarks_at_their_limits():
    def remarks(values, known="text/1") -> list[str]:
        return survey({"id": chunked(values, cut=50)}, Identifiers(fields={"id": known}), {}).remarks

    some = [f"c{i}" for i in range(99)]
    assert not any("are empty" in one for one in remarks([*some, ""]))  # 1 % is not over 1 %
    assert any("2 of 101 rows are empty (1.9 %)" in one for one in remarks([*some, "", ""]))
    assert any("2 of 101 rows have no usable key" in one for one in remarks([*some, "", ""]))
    assert remarks(["x"]) == []  # one row is not a constant column
    assert any("98 values end in .0, all ids were read" in one for one in remarks([f"{i}.0" for i in range(98)]))
    assert any("99.0 % with letters, 1 values are digits only" in one for one in remarks([*some, "17"]))
    assert not any("mixed" in one for one in remarks([*some, *map(str, range(50))]))
    assert remarks([]) == ["the table has no rows"]
    assert any("phone-DE/1: write national numbers" in one for one in remarks(["x1", "x2"], "phone-DE/1"))


@pytest.mark.parametrize(
    ("column", "counts"),
    [
        (pa.chunked_array([], pa.string()), (0, 0, 0, 0)),
        (pa.chunked_array([pa.nulls(3)]), (3, 3, 0, 0)),
        (pa.chunked_array([pa.nulls(2, pa.string()), pa.array([], pa.string())]), (2, 2, 0, 0)),
        (pa.chunked_array([pa.array([1, 2, None])]), (3, 1, 0, 2)),
        (pa.chunked_array([pa.array([1.5, float("nan")])]), (2, 0, 0, 2)),
        (pa.chunked_array([pa.array(["a", "b", "A"]).dictionary_encode()]), (3, 0, 0, 2)),
        (pa.chunked_array([pa.array(["a", "b"], pa.large_string())]), (2, 0, 0, 2)),
        (pa.chunked_array([pa.array(["x" * 1_000_000, "\0", "\ufffd"])]), (3, 0, 0, 3)),
    ],
)
def test_odd_columns_do_not_stop_it(column, counts):
    one = survey({"id": column}, Identifiers(fields={"id": "text/1"}), {}).fields[0]
    assert (one.rows, one.empty, one.refused, one.distinct) == counts


@pytest.mark.parametrize("known", RULES)
def test_bytes_that_are_no_text_are_refused_and_the_rest_is_counted(known):
    offsets = pa.array([0, 2, 4, 4, 10], pa.int32()).buffers()[1]
    spoilt = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"\xffa\xc3\xa9abcde\xff"))
    with pytest.raises(pa.ArrowInvalid):
        spoilt.validate(full=True)
    one = survey({"id": pa.chunked_array([spoilt])}, Identifiers(fields={"id": known}), {}).fields[0]
    assert (one.rows, one.empty, one.longest) == (4, 1, 6)
    assert (one.refused, one.distinct) == ((2, 1) if known == "text/1" else (3, 0))


def test_an_unknown_rule_is_the_agreements_fault():
    with pytest.raises(LocalError, match="the agreement, identifiers: unknown rule 'text/9'"):
        survey({"id": chunked(["a"])}, Identifiers(fields={"id": "text/9"}), {})


def test_a_million_rows_in_seconds():
    ids = pa.array(np.char.add("Customer ", np.arange(1_000_000).astype(str)).tolist())
    begun = time.process_time()
    got = survey({"customer": pa.chunked_array([ids])}, Identifiers())
    assert got.keys[0].distinct == 1_000_000
    assert time.process_time() - begun < 15
