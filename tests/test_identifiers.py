"""Rules, policies and the encoding of ids, against pandas and plain sentences."""

from __future__ import annotations

import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parties.errors import LocalError
from psi.identifiers import RULES, canonical, encode

anything = st.text(max_size=12) | st.text(alphabet="aA ß\u0130\u0345\u0301\u00b4ﬁ@.\u3000\t\u200b", max_size=8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("  Anna   MARIA\t\u00a0Meier\n", "anna maria meier"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("Ａ１２", "a12"),
        ("ﬁn", "fin"),
        ("Zu\u0308rich", "z\u00fcrich"),
        ("\u3000x", "x"),
        ("00123", "00123"),
        ("", None),
        (" \t\u00a0", None),
        ("half \ud800", None),
    ],
)
def test_text(value, expected):
    assert RULES["text/1"](value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" Anna.Meier+tag@Example.ORG ", "anna.meier+tag@example.org"),
        ("anna＠example.org", "anna@example.org"),
        ("a@b", "a@b"),
        ("anna", None),
        ("@b", None),
        ("a@", None),
        ("a@b@c", None),
        ("a b@c", None),
        ("a@b\nc", None),
        ("", None),
    ],
)
def test_email(value, expected):
    assert RULES["email/1"](value) == expected


@given(anything, st.sampled_from(sorted(RULES)))
def test_rules_are_idempotent_and_leave_nothing_to_normalise(value, rule):
    once = RULES[rule](value)
    if once is not None:
        assert RULES[rule](once) == once
        assert once == unicodedata.normalize("NFKC", once) == " ".join(once.split())
        assert RULES[rule](f"  {value}\t") == once
        once.encode()


@given(
    st.lists(st.none() | st.text(alphabet="abAB @", max_size=3), max_size=20),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(["first", "last"]),
)
def test_policies_against_pandas(values, rule, keep):
    got = canonical(values, rule, duplicates=keep, empty="drop")
    column = pd.Series([None if v is None else RULES[rule](v) for v in values], dtype=object)
    kept = column.dropna().drop_duplicates(keep=keep)
    assert got.values == kept.tolist()
    assert got.rows.tolist() == kept.index.tolist()
    assert got.rows.dtype == np.int64
    assert got.counts["kept"] == len(kept)
    assert got.counts["duplicate"] == column.dropna().duplicated().sum()
    assert got.counts["empty"] == sum(v is None or not v.strip() for v in values)
    assert got.counts["read"] == len(values) == sum(got.counts.values()) - got.counts["read"]


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=3), unique=True, max_size=8))
def test_clean_columns_pass_the_strict_policies(values):
    got = canonical(values, "text/1")
    assert got.values == values
    assert got.rows.tolist() == list(range(len(values)))


def refusal(values, rule="text/1", **policies) -> str:
    with pytest.raises(LocalError) as caught:
        canonical(values, rule, column="customer", source="bank.csv", **policies)
    text = str(caught.value)
    assert text.startswith("bank.csv, column 'customer': ")
    assert "\n" not in text
    assert not any(str(v).strip() in text for v in values if v and str(v).strip())
    return text


def test_refusals_name_source_column_count_and_remedy():
    assert '2 duplicate ids under text/1; remove them, or agree on duplicates = "first"' in refusal(
        ["q7", "Q7", "q7 ", "q8"]
    )
    assert '2 empty and 0 invalid ids under text/1; correct them, or agree on empty = "drop"' in refusal(
        ["q7", None, " "]
    )
    assert "0 empty and 1 invalid ids under email/1" in refusal(["q7", "q@z"], "email/1")
    assert "duplicate" in refusal(["q7", "q7", None], empty="drop")
    assert "empty" in refusal(["q7", "q7", None], duplicates="last")
    assert "unknown rule 'text/9'; known: text/1, email/1" in refusal(["q7"], "text/9")
    assert "unknown duplicates policy 'any'; known: fail, first, last" in refusal(["q7"], duplicates="any")
    assert "unknown empty policy 'keep'; known: fail, drop" in refusal(["q7"], empty="keep")


@pytest.mark.parametrize("value", ["9.87E+11", "1.5e+7", "4E+12", "7.0E10", " 9.87E+11 "])
def test_ids_rounded_by_a_spreadsheet_are_refused(value):
    text = refusal(["q7", value, value], duplicates="first")
    assert "2 ids look like" in text
    assert "a spreadsheet has rounded them; export the column as text" in text


def test_ids_read_as_floats_are_refused():
    assert "all 2 ids end in .0" in refusal(["17.0", None, "18.0"], empty="drop")
    assert "1 ids were read as numbers" in refusal(["q7", 17.0])


def test_ids_that_only_resemble_numbers_pass():
    values = ["17.0", "18", "1234e5", "00e17", "e+10", "1.2e+x"]
    assert canonical(values, "text/1").values == values


def test_an_empty_column():
    got = canonical([], "email/1")
    assert got.values == []
    assert got.rows.shape == (0,)
    assert set(got.counts.values()) == {0}


def test_ids_do_not_show():
    assert "anna" not in repr(canonical(["anna"], "text/1"))


parts = st.tuples(
    st.binary(max_size=6), st.text(alphabet="ab\0/1é", max_size=4), st.text(alphabet="ab\0/1é", max_size=4)
)


@given(parts, parts)
def test_encode_is_injective(a, b):
    assert (encode(*a) == encode(*b)) == (a == b)


@given(parts)
def test_encode_can_be_read_back(triple):
    raw, read = encode(*triple), []
    while raw:
        length = int.from_bytes(raw[:4], "big")
        read, raw = [*read, raw[4 : 4 + length]], raw[4 + length :]
    assert (read[0], *(part.decode() for part in read[1:])) == triple


def test_encode_is_pinned():
    assert encode(b"\xaa\xbb", "id", "é") == bytes.fromhex("00000002aabb 000000026964 00000002c3a9")
