"""Made-up ids: the rules accept them in every spelling, and a plain join of the rehearsal's tables is as foretold."""

from __future__ import annotations

import hashlib

import pandas as pd
import phonenumbers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.agreement import Identifiers
from psi.identifiers import canonical
from psi.rules import KNOWN, rule
from psi.specimen import SPELLINGS, _scattered, capacity, rehearsal_steps, rehearsal_tables, specimen

NAMES = [*(name for name in KNOWN if "XX" not in name), "phone-DE/1", "phone-US/1", "phone-IT/1", "phone-TA/1"]
DATES = ["date/1", "date-dmy/1", "date-mdy/1"]
SEED = b"rehearsal"


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_reads_every_spelling_as_one_id(name):
    normal, ids = rule(name), set()
    for number in [*range(300), capacity(name) - 1]:
        read = {normal(specimen(name, number, SEED, spelling)) for spelling in range(SPELLINGS)}
        assert len(read) == 1
        ids |= read
    assert None not in ids
    assert len(ids) == 301


@pytest.mark.parametrize("name", NAMES)
def test_spellings_differ_as_written(name):
    for number in range(50):
        assert len({specimen(name, number, SEED, spelling) for spelling in range(SPELLINGS)}) == SPELLINGS
    assert specimen(name, 7, SEED, SPELLINGS) == specimen(name, 7, SEED, 0) == specimen(name, 7, SEED)


@pytest.mark.parametrize("name", NAMES)
def test_fifty_thousand_are_distinct(name):
    count = 50_000
    assert capacity(name) >= count
    written = [specimen(name, number, SEED) for number in range(count)]
    assert len(set(written)) == count
    sample = range(0, count, 100 if name.startswith("phone") else 1)  # spelling 0 is canonical, or text/1's own case
    if name.startswith("text"):
        assert len({rule(name)(one) for one in written}) == count
    else:
        assert [rule(name)(written[i]) for i in sample] == [written[i] for i in sample]


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_others(name):
    ours, theirs = ([rule(name)(specimen(name, number, seed)) for number in range(200)] for seed in (b"a", b"b"))
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) <= 2
    if not name.startswith(("date", "phone")):  # their domains are small enough for two seeds to meet
        assert not set(ours) & set(theirs)


def test_every_region_has_numbers():
    for region in sorted(phonenumbers.SUPPORTED_REGIONS):
        name = f"phone-{region}/1"
        assert capacity(name) >= 50_000
        for number in (0, 1, 2, capacity(name) - 1):
            plain = specimen(name, number, SEED)
            assert {rule(name)(specimen(name, number, SEED, spelling)) for spelling in range(SPELLINGS)} == {plain}
            assert plain.startswith(f"+{phonenumbers.country_code_for_region(region)}")


def test_some_numbers_are_written_as_dialled_at_home():
    written = [specimen("phone-DE/1", number, SEED, 3) for number in range(20)]
    assert all(one.startswith("0") for one in written)


def test_dates_use_two_centuries_to_the_last_day():
    days = {specimen("date/1", number, SEED) for number in range(capacity("date/1"))}
    assert (min(days), max(days), len(days)) == ("1900-01-01", "2099-12-31", 73_049)


@given(st.binary(max_size=4), st.integers(1, 120))
def test_scattering_loses_no_number(seed, size):
    assert sorted(_scattered(seed, number, size) for number in range(size)) == list(range(size))


@pytest.mark.parametrize("name", [*DATES, "phone-TA/1", "text/1"])
def test_beyond_the_range(name):
    with pytest.raises(ValueError, match=f"{name} has the specimens 0 to"):
        specimen(name, capacity(name), SEED)
    with pytest.raises(ValueError, match="specimens"):
        specimen(name, -1, SEED)


def test_unknown_rules():
    with pytest.raises(ValueError, match="unknown rule"):
        specimen("text/9", 0, SEED)
    with pytest.raises(ValueError, match="unknown rule"):
        specimen("phone-ZZ/1", 0, SEED)


def test_specimens_are_pinned():
    """Two sites make the same ones: whoever changes this breaks rehearsals between releases."""
    written = [specimen(name, number, SEED, number) for name in NAMES if "phone" not in name for number in range(4)]
    digest = hashlib.sha256("\n".join(written).encode()).hexdigest()
    assert digest == "10f1215721f18439bd784948b848be1cc248ccbca9bc2acd34f97522f3e84352"


# ---- the tables

Tables = list[dict[str, list[str]]]


def join(agreed: Identifiers, tables: Tables) -> list[int]:
    """Rows common to all tables under each key of the cascade, by plain pandas merges on the canonical values."""
    rest = [
        pd.DataFrame({name: [rule(known)(value) for value in table[name]] for name, known in agreed.fields.items()})
        for table in tables
    ]
    rest = [frame.assign(row=range(len(frame))) for frame in rest]
    found = []
    for key in agreed.cascade:
        joined = None
        for place, frame in enumerate(rest):
            usable = frame.dropna(subset=list(key))
            usable = usable[~usable.duplicated(list(key), keep=False)][[*key, "row"]]
            usable = usable.rename(columns={"row": f"row{place}"})
            joined = usable if joined is None else joined.merge(usable, on=list(key))
        found.append(len(joined))
        rest = [frame[~frame["row"].isin(joined[f"row{place}"])] for place, frame in enumerate(rest)]
    return found


def rehearse(agreed: Identifiers, parties: int, common: int, own: int, seed: bytes = SEED) -> Tables:
    return [rehearsal_tables(agreed, seed, party, parties, common, own) for party in range(parties)]


AGREEMENTS = {
    "composite": Identifiers(fields={"surname": "text/1", "born": "date-dmy/1"}),
    "cascade": Identifiers(
        fields={"soc": "digits/1", "surname": "text/1", "given": "text/1", "born": "date/1", "postcode": "digits/1"},
        keys=(("soc",), ("surname", "born"), ("given", "born"), ("born", "postcode")),
    ),
    "singles": Identifiers(
        fields={"mail": "email-gmail/1", "phone": "phone-DE/1"},
        keys=(("mail",), ("phone",)),
    ),
    "nested": Identifiers(
        fields={"a": "text/1", "b": "sha256/1", "c": "digits/1"}, keys=(("a",), ("a", "b"), ("b", "c"), ("c",))
    ),
    **{name: Identifiers(fields={"id": name}) for name in NAMES},
}


@pytest.mark.parametrize("parties", [2, 3])
@pytest.mark.parametrize("name", AGREEMENTS)
def test_a_plain_join_finds_the_common_rows(name, parties):
    agreed, common, own = AGREEMENTS[name], 61, 37
    tables = rehearse(agreed, parties, common, own)
    found = join(agreed, tables)
    assert sum(found) == common
    assert found == rehearsal_steps(agreed, common)
    assert all(len(column) == common + own for table in tables for column in table.values())
    for table in tables:  # and the strictest policies take every row
        assert len(canonical(table, agreed)) == common + own


@settings(max_examples=30)
@given(st.data())
def test_random_agreements(data):
    names = data.draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True))
    fields = {name: data.draw(st.sampled_from([one for one in NAMES if "phone" not in one])) for name in names}
    some = st.lists(st.sampled_from(names), min_size=1, unique=True)
    keys = data.draw(st.lists(some, max_size=5, unique_by=frozenset))
    fields = {name: known for name, known in fields.items() if not keys or any(name in key for key in keys)}
    agreed = Identifiers(fields=fields, keys=tuple(map(tuple, keys)))
    parties, common, own = data.draw(st.tuples(st.integers(2, 4), st.integers(0, 40), st.integers(0, 20)))
    tables = rehearse(agreed, parties, common, own, data.draw(st.binary(max_size=4)))
    assert join(agreed, tables) == rehearsal_steps(agreed, common)
    assert sum(rehearsal_steps(agreed, common)) == common


def test_the_cascade_is_needed_and_each_key_gets_its_share():
    agreed = AGREEMENTS["cascade"]
    assert rehearsal_steps(agreed, 100) == [25, 25, 25, 25]
    assert rehearsal_steps(AGREEMENTS["nested"], 99) == [33, 0, 33, 33]  # ("a", "b") agrees only where "a" has
    tables = rehearse(agreed, 2, 100, 10)
    missing = sum(value == "" for table in tables for value in table["soc"])
    assert 0 < missing < 75  # of the 75 rows whose number disagrees, some lack it and some have another
    first = Identifiers(fields={"soc": "digits/1"})
    assert join(first, tables) == [25]


def test_the_rules_are_needed():
    for name in NAMES:
        ours, theirs = (set(table["id"]) for table in rehearse(AGREEMENTS[name], 2, 60, 5))
        assert not ours & theirs


def test_a_part_of_a_composite_key_matches_too_much():
    agreed = AGREEMENTS["composite"]
    ours, theirs = rehearse(agreed, 2, 60, 30)
    for name in agreed.fields:
        common = {rule(agreed.fields[name])(value) for value in ours[name]}
        assert sum(rule(agreed.fields[name])(value) in common for value in theirs[name]) > 60


def test_orders_differ_and_tables_replay():
    agreed = AGREEMENTS["date/1"]
    ours, theirs = ([rule("date/1")(v) for v in table["id"]] for table in rehearse(agreed, 2, 50, 0))
    assert sorted(ours) == sorted(theirs)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) < 10
    assert rehearse(agreed, 2, 50, 5) == rehearse(agreed, 2, 50, 5) != rehearse(agreed, 2, 50, 5, b"other")


def test_fields_of_one_rule_hold_different_values():
    agreed = Identifiers(fields={"born": "date/1", "joined": "date/1"})
    table = rehearsal_tables(agreed, SEED, 0, 2, 50, 0)
    assert [rule("date/1")(v) for v in table["born"]] != [rule("date/1")(v) for v in table["joined"]]


def test_too_many_rows_fail_at_every_party_alike():
    agreed = Identifiers(fields={"name": "text/1", "born": "date/1"})
    for party in range(2):
        with pytest.raises(ValueError, match=r"date/1 has 73,049 specimens, this rehearsal needs 74,000"):
            rehearsal_tables(agreed, SEED, party, 2, 30_000, 7_000)
    for wrong in ((2, 2, 1, 1), (-1, 2, 1, 1), (0, 2, -1, 1), (0, 2, 1, -1)):
        with pytest.raises(ValueError, match="party's number"):
            rehearsal_tables(agreed, SEED, *wrong)
