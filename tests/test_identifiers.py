"""From columns to keys: policies, composite keys and the encoding of ids, against pandas and plain sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.agreement import Identifiers as Agreed
from parties.errors import LocalError
from psi import identifiers
from psi.identifiers import canonical, encode
from psi.rules import rule

TEXT, EMAIL = Agreed(fields={"customer": "text/1"}), Agreed(fields={"customer": "email/1"})
PERSON = Agreed(
    fields={"number": "digits/1", "surname": "text/1", "born": "date/1"}, keys=(("number",), ("surname", "born"))
)


def plain(value: bytes | None) -> str | None:
    """The text in a key of one field."""
    return None if value is None else value[4:].decode()


def values(got: identifiers.Identifiers) -> list[str | None]:
    return [plain(value) for value in got.keys[0].take(got.rows)]


@given(
    st.lists(st.none() | st.text(alphabet="abAB @", max_size=3), max_size=20),
    st.sampled_from([TEXT, EMAIL]),
    st.sampled_from(["first", "last", "aggregate"]),
    st.integers(1, 7),
)
def test_policies_against_pandas(raw: list[str | None], agreed: Agreed, keep: Any, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identifiers, "CHUNK", chunk)
        got = canonical({"customer": raw}, agreed, duplicates=keep, empty="drop")
    normal = rule(agreed.fields["customer"])
    column = pd.Series([None if v is None else normal(v) for v in raw], dtype=object)
    kept = column.dropna().drop_duplicates(keep="last" if keep == "last" else "first")
    assert values(got) == kept.tolist()
    assert got.rows.tolist() == kept.index.tolist()
    assert got.counts["kept"] == len(kept) == len(got)
    assert got.counts["duplicate"] == column.dropna().duplicated().sum()
    assert got.counts["empty"] == sum(v is None or not v.strip() for v in raw)
    assert got.counts["read"] == len(raw) == sum(got.counts.values()) - got.counts["read"]
    numbers = {text: number for number, text in enumerate(kept)}
    assert got.groups.tolist() == [-1 if text is None else numbers[text] for text in column]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "1", "2", "3"]),
            st.sampled_from(["", "Ng", "Li"]),
            st.sampled_from(["", "1990-01-02", "x"]),
        ),
        max_size=12,
    )
)
def test_a_cascade_against_pandas(rows: list[tuple[str, str, str]]) -> None:
    table = pd.DataFrame(rows, columns=list(PERSON.fields), dtype=object)
    got = canonical({name: table[name].tolist() for name in table}, PERSON, duplicates="first", empty="drop")
    first = table["number"].map(rule("digits/1"))
    second = table.apply(lambda row: None if not row["surname"] or row["born"] in ("", "x") else 1, axis=1)
    second = second if len(table) else first
    both = table["surname"] + "/" + table["born"]
    repeats = both.where(first.isna() & second.notna()).duplicated()
    takes_part = (first.notna() & ~first.duplicated()) | (first.isna() & second.notna() & ~repeats)
    assert got.rows.tolist() == np.flatnonzero(takes_part).tolist()
    assert got.keys[0].usable.tolist() == first.notna().tolist()
    assert got.keys[1].usable.tolist() == second.notna().tolist()
    lost = first.isna() & second.isna()
    assert got.counts["invalid"] == (lost & (table["born"] == "x")).sum()
    assert got.counts["empty"] == (lost & (table["born"] != "x")).sum()
    assert [key.name for key in got.keys] == ["number", "surname + born"]
    for key in got.keys:  # equal prints are equal values, and nothing else is
        prints = [tuple(row) for row in key.prints[key.usable].tolist()]
        written = [value for value in key.take(np.arange(len(table))) if value is not None]
        assert len(set(zip(prints, written, strict=True))) == len(set(prints)) == len(set(written))


def test_without_keys_all_fields_make_one_in_the_order_of_their_names() -> None:
    agreed = Agreed(fields={"surname": "text/1", "born": "date/1"})
    got = canonical({"surname": ["Ng"], "born": ["19900102"]}, agreed)
    assert got.keys[0].name == "born + surname"
    assert got.keys[0].take(got.rows) == [b"\0\0\0\x0a1990-01-02\0\0\0\x02ng"]


def test_keys_of_other_fields_or_rules_have_another_type() -> None:
    kinds = [
        Agreed(fields={"a": "text/1"}),
        Agreed(fields={"b": "text/1"}),
        Agreed(fields={"a": "digits/1"}),
        Agreed(fields={"a": "text/1", "b": "text/1"}),
        Agreed(fields={"a": "text/1", "b": "text/1"}, keys=(("b", "a"),)),
    ]
    types = {canonical({name: ["1"] for name in agreed.fields}, agreed).keys[0].type for agreed in kinds}
    assert len(types) == len(kinds)


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=3), unique=True, max_size=8))
def test_clean_columns_pass_the_strict_policies(raw: list[str]) -> None:
    got = canonical({"customer": raw}, TEXT)
    assert values(got) == raw
    assert got.rows.tolist() == list(range(len(raw)))


def refusal(raw: list[Any], agreed: Agreed = TEXT, **policies: str) -> str:
    with pytest.raises(LocalError) as caught:
        canonical({"customer": raw}, agreed, names={"customer": "kunde"}, source="bank.csv", **policies)
    text = str(caught.value)
    assert "\n" not in text
    assert not any(str(v).strip() in text for v in raw if v and str(v).strip())
    return text


def test_refusals_name_source_column_count_and_remedy() -> None:
    start = "bank.csv, column 'kunde': "
    remedy = 'remove them, or set duplicates = "first", "last" or "aggregate" in [table]'
    assert refusal(["q7", "Q7", "q7 ", "q8"]) == f"{start}2 duplicate ids; {remedy}"
    assert refusal(["q7", None, " "]).startswith(f"{start}2 empty and 0 invalid ids; correct them, or set empty")
    found = refusal(["q7", "q@z"], EMAIL)
    assert found.startswith(f"{start}0 empty and 1 invalid ids (1 'kunde' not under email/1); correct them")
    assert "duplicate" in refusal(["q7", "q7", None], empty="drop")
    assert "empty" in refusal(["q7", "q7", None], duplicates="last")
    assert "text/9" in refusal(["q7"], Agreed(fields={"customer": "text/9"}))


@pytest.mark.parametrize("value", ["9.87E+11", "1.5e+7", "4E+12", "7.0E10", " 9.87E+11 "])
def test_ids_rounded_by_a_spreadsheet_are_refused(value: str) -> None:
    text = refusal(["q7", value, value], duplicates="first")
    assert "2 ids look like" in text
    assert "a spreadsheet has rounded them; export the column as text" in text


def test_ids_read_as_floats_are_refused() -> None:
    assert "all 2 ids end in .0" in refusal(["17.0", None, "18.0"], empty="drop")
    assert "ids are not text" in refusal(["q7", 17.0])


@pytest.mark.parametrize(
    ("known", "good", "bad"), [("phone/1", "+49 30 123456", "030 123456"), ("date/1", "1990-02-28", "1990-02-30")]
)
def test_invalid_phones_and_dates_are_counted_and_fail_or_drop(known: str, good: str, bad: str) -> None:
    agreed = Agreed(fields={"customer": known})
    assert f"0 empty and 2 invalid ids (2 'kunde' not under {known})" in refusal([good, bad, bad], agreed)
    got = canonical({"customer": [bad, good, bad]}, agreed, empty="drop")
    assert got.rows.tolist() == [1]
    assert got.counts == {"read": 3, "empty": 0, "invalid": 2, "duplicate": 0, "kept": 1}


def test_ids_that_only_resemble_numbers_pass() -> None:
    raw = ["17.0", "18", "1234e5", "00e17", "e+10", "1.2e+x"]
    assert values(canonical({"customer": raw}, TEXT)) == raw


def test_an_empty_column() -> None:
    got = canonical({"customer": []}, EMAIL)
    assert got.rows.shape == (0,)
    assert set(got.counts.values()) == {0}


def test_an_id_of_a_megabyte_is_an_id() -> None:
    got = canonical({"customer": ["x" * 2**20, "y"]}, TEXT)
    assert len(got.keys[0].take(got.rows)[0]) == 2**20 + 4


def test_ids_do_not_show() -> None:
    assert "anna" not in repr(canonical({"customer": ["anna"]}, TEXT))


parts = st.tuples(st.binary(max_size=6), st.binary(max_size=4), st.binary(max_size=4))


@given(parts, parts)
def test_encode_is_injective(a: tuple[bytes, bytes, bytes], b: tuple[bytes, bytes, bytes]) -> None:
    assert (encode(*a) == encode(*b)) == (a == b)


def test_encode_is_pinned() -> None:
    assert encode(b"\xaa\xbb", b"id", b"x") == bytes.fromhex("00000002aabb 000000026964 0000000178")


three = st.text(alphabet="ab\0", max_size=3).filter(lambda text: rule("text/1")(text) == text)


@given(st.tuples(three, three), st.tuples(three, three))
def test_no_two_composite_keys_are_written_alike(a: tuple[str, str], b: tuple[str, str]) -> None:
    agreed = Agreed(fields={"p": "text/1", "q": "text/1"})
    got = canonical({"p": [a[0], b[0]], "q": [a[1], b[1]]}, agreed, empty="drop", duplicates="first")
    assert len(got) == len({a, b})
    assert len(set(got.keys[0].take(np.arange(2)))) == len({a, b})
