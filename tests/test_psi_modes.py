"""Every mode of the intersection against a plain pandas join: results, rules, duplicates, composite keys, cascades,
suites, padding."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.agreement import Identifiers as Agreed
from parties.errors import LocalError, PeerAborted, ProtocolViolation, Refused
from parties.files import Scratch
from parties.memory import MemoryLink, outcomes, play
from parties.message import name_of, parse_header
from parties.session import Session
from psi.align import Alignment, align
from psi.identifiers import canonical
from psi.inputs import decoys_for
from psi.messages import SetSize
from psi.specimen import specimen
from tests.conftest import NAMES, Stream, agree, parties

FEBRL = Path(__file__).parents[2] / "shared" / "data" / "febrl"
RULES = ("text/1", "email/1", "email-untagged/1", "email-gmail/1", "phone/1", "phone-DE/1", "date/1", "date-dmy/1",
         "date-mdy/1", "digits/1", "sha256/1")  # fmt: skip
RESULTS = ("rows", "rows to the label holder", "size")
SUITES = ("curve25519_XMD:SHA-512_ELL2_RO_", "P256_XMD:SHA-256_SSWU_RO_")
Columns = Mapping[str, Sequence[str | None]]


def role(columns: Columns, agreed: Agreed, **policies: Any) -> Callable[[Session], tuple[Alignment, Any]]:
    def run(session: Session) -> tuple[Alignment, Any]:
        ids = canonical(columns, agreed, **policies)
        found = align(session, ids)
        return found, None if found.rows is None else ids.rows[found.rows]

    return run


def ran(tables: Sequence[Columns], agreed: Agreed, policies: Sequence[dict[str, Any]], **terms: Any) -> list[Any]:
    """What every party ends with: the alignment, and the rows of its table."""
    names = NAMES[: len(tables)]
    fields = {"fields": dict(agreed.fields), "keys": agreed.keys}
    agreement = agree(len(tables), identifiers=fields, intersection={"minimum": 0} | terms)
    roles = {name: role(table, agreed, **policy) for name, table, policy in zip(names, tables, policies, strict=True)}
    return list(play(roles, agreement, identities=parties(len(tables))).values())


@settings(max_examples=40)
@given(st.data())
def test_any_mode_finds_the_plain_join(data: st.DataObject) -> None:
    """Customers are numbers, written in as many ways as their rule knows; repeated ones follow each party's policy."""
    count, known = data.draw(st.integers(2, 3)), data.draw(st.sampled_from(RULES))
    result, suite = data.draw(st.sampled_from(RESULTS)), data.draw(st.sampled_from(SUITES))
    policies = [data.draw(st.sampled_from(("fail", "first", "last", "aggregate"))) for _ in range(count)]
    numbers = [
        data.draw(st.lists(st.integers(0, 15), max_size=20, unique=policy == "fail"), label=policy)
        for policy in policies
    ]
    spelt = [
        {"customer": [specimen(known, number, b"seed", place + at) for at, number in enumerate(column)]}
        for place, column in enumerate(numbers)
    ]
    bucket = data.draw(st.sampled_from((1, 150)))
    own = [{"duplicates": policy} for policy in policies]
    agreed = Agreed(fields={"customer": known})
    found = ran(spelt, agreed, own, result=result, suite=suite, bucket=bucket)

    frames = [
        pd.DataFrame({"customer": column, f"row {place}": range(len(column))}).drop_duplicates(
            "customer", keep="last" if policy == "last" else "first"
        )
        for place, (column, policy) in enumerate(zip(numbers, policies, strict=True))
    ]
    joined = frames[0]
    for frame in frames[1:]:
        joined = joined.merge(frame, on="customer", validate="one_to_one")
    for place, (alignment, rows) in enumerate(found):
        assert alignment.size == len(joined)
        sees = result == "rows" or (result == "rows to the label holder" and place == 0)
        assert (rows is not None) == sees
        if sees:
            assert sorted(rows.tolist()) == sorted(joined[f"row {place}"])
        assert all(size % bucket == 0 for size in alignment.steps[0].set_sizes.values())
    if result == "rows":
        orders = [[numbers[place][row] for row in rows] for place, (_, rows) in enumerate(found)]
        assert all(order == orders[0] for order in orders)


# ---- several fields, several keys


def cascade_by_pandas(tables: Sequence[pd.DataFrame], keys: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """The rows that match, key after key: each over rows unmatched so far that have the key, and have it alone."""
    kept = []
    for table in tables:  # of rows that are equal under the first key that they have, the first stays
        left, stay = table, []
        for key in keys:
            having = left.dropna(subset=list(key))
            stay += having.drop_duplicates(list(key)).index.tolist()
            left = left.drop(index=having.index)
        kept.append(table.loc[sorted(stay)])
    found: list[tuple[int, ...]] = []
    for key in keys:
        left = []
        for n, table in enumerate(kept):
            alone = table.dropna(subset=list(key)).drop_duplicates(list(key), keep=False)[list(key)]
            left.append(alone.assign(**{f"r{n}": alone.index}))
        joined = left[0]
        for other in left[1:]:
            joined = joined.merge(other, on=list(key))
        rows = [joined[f"r{n}"].tolist() for n in range(len(tables))]
        found += list(zip(*rows, strict=True))
        kept = [table.drop(index=matched) for table, matched in zip(kept, rows, strict=True)]
    return found


value = st.sampled_from([None, "a", "b", "c", "d"])


@settings(max_examples=25)
@given(
    st.integers(2, 3).flatmap(
        lambda k: st.lists(st.lists(st.tuples(value, value, value), max_size=9), min_size=k, max_size=k)
    ),
    st.sampled_from([(("x",),), (("x", "y"),), (("x",), ("y", "z")), (("x", "y"), ("z",), ("x",)), (("z", "x", "y"),)]),
)
def test_keys_and_cascades_find_what_pandas_finds(tables: Any, keys: Any) -> None:
    used = {name for key in keys for name in key}
    frames = [pd.DataFrame(table, columns=["x", "y", "z"], dtype=object) for table in tables]
    agreed = Agreed(fields=dict.fromkeys(sorted(used), "text/1"), keys=keys)
    columns = [{name: frame[name].tolist() for name in used} for frame in frames]
    found = ran(columns, agreed, [{"duplicates": "first", "empty": "drop"}] * len(tables))
    matched = list(zip(*(rows.tolist() for _, rows in found), strict=True))
    assert sorted(matched) == sorted(cascade_by_pandas(frames, keys))
    assert [alignment.size for alignment, _ in found] == [len(matched)] * len(tables)
    assert [step.key for step in found[0][0].steps] == [" + ".join(key) for key in keys]


def test_the_cascade_over_febrl_finds_99_percent_and_nothing_wrong() -> None:
    if not FEBRL.exists():
        pytest.skip("the Febrl tables are not part of the repository")
    keys = (("soc_sec_id",), ("surname", "date_of_birth"), ("given_name", "date_of_birth"),
            ("date_of_birth", "postcode"))  # fmt: skip
    fields = {"soc_sec_id": "digits/1", "surname": "text/1", "given_name": "text/1", "date_of_birth": "digits/1",
              "postcode": "digits/1"}  # fmt: skip
    frames = [pd.read_csv(FEBRL / f"dataset4{side}.csv", dtype=str, skipinitialspace=True) for side in "ab"]
    columns = [{name: [one if isinstance(one, str) else None for one in frame[name]] for name in fields}
               for frame in frames]  # fmt: skip
    found = ran(columns, Agreed(fields=fields, keys=keys), [{"empty": "drop"}] * 2)
    truth = [frame["rec_id"].str.extract(r"rec-(\d+)-")[0] for frame in frames]
    pairs = [truth[side].iloc[rows].tolist() for side, (_, rows) in enumerate(found)]
    right = sum(a == b for a, b in zip(*pairs, strict=True))
    assert right == len(pairs[0])  # precision 1.0
    assert right / 5000 == pytest.approx(0.9906)
    assert [step.size for step in found[0][0].steps] == [4561, 280, 66, 46]


def test_the_minimum_holds_for_all_rows_so_far_and_the_first_key_must_meet_it() -> None:
    agreed = Agreed(fields={"a": "text/1", "b": "text/1"}, keys=(("a",), ("b",)))
    left = {"a": ["1", "2", "3", "4"], "b": ["p", "q", "r", "s"]}
    right = {"a": ["1", "2", "3", "9"], "b": ["x", "y", "z", "s"]}
    found = ran([left, right], agreed, [{}, {}], minimum=3)
    assert [step.size for step in found[0][0].steps] == [3, 1]
    with pytest.raises(Refused, match="below the agreed minimum of 4"):
        ran([left, right], agreed, [{}, {}], minimum=4)


def test_several_keys_need_rows_for_all() -> None:
    agreed = Agreed(fields={"a": "text/1", "b": "text/1"}, keys=(("a",), ("b",)))
    with pytest.raises(Exception, match="several keys need"):
        ran([{"a": ["1"], "b": ["1"]}] * 2, agreed, [{}, {}], result="size")


# ---- what travels


def kinds(mesh: Mapping[str, Mapping[str, MemoryLink]]) -> set[tuple[str, str, str]]:
    return {
        (sender, receiver, name_of(parse_header(head).kind))
        for sender, links in mesh.items()
        for receiver, link in links.items()
        for head, _ in link.sent
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("result", RESULTS)
def test_rows_travel_only_to_those_who_may_have_them(result: str, count: int) -> None:
    mesh: dict[str, dict[str, MemoryLink]] = {}
    roles = {name: (lambda session: align(session, ["a", "b", session.name])) for name in NAMES[:count]}
    agreement = agree(count, intersection={"result": result})
    found = play(roles, agreement, identities=parties(count), recorded=mesh)
    assert {one.size for one in found.values()} == {2}
    positions = {(sender, receiver) for sender, receiver, kind in kinds(mesh) if kind == "Positions"}
    back = [(NAMES[n], NAMES[n - 1]) for n in range(1, count)]  # the last party intersects
    expected = {"size": set(), "rows to the label holder": set(back)}
    if result in expected:
        assert positions == expected[result]
        assert "OrderPoint" not in {kind for *_, kind in kinds(mesh)}
    statuses = {name: dict(one.checks) for name, one in found.items()}
    for name, checks in statuses.items():
        sees = result == "rows" or (result == "rows to the label holder" and name == "bank")
        assert checks["all 64 canaries are in the intersection"] is (True if sees else None)


def test_a_policy_may_reveal_less_never_more(tmp_path: Path) -> None:
    from parties.party_file import Party
    from tests.world import build, customers

    tables = {name: table for name, table in customers(60).items() if name != "telco"}
    paths = build(tmp_path, tables)
    own = paths["grocer"]
    own.write_text(own.read_text() + '[policy]\nmost_revealed = "size"\n')
    with pytest.raises(Refused, match="our policy reveals 'size' at most; the agreement says 'rows'"):
        Party(own)
    common = tmp_path / "agreement.toml"
    common.write_text(common.read_text().replace("[intersection]", '[intersection]\nresult = "size"'))
    assert Party(own).agreement.intersection.result == "size"


# ---- padding, sizes


@given(st.integers(0, 5000), st.integers(64, 300), st.integers(1, 1000))
def test_padding_fills_the_bucket_and_no_more(ids: int, least: int, bucket: int) -> None:
    decoys = decoys_for(ids, least, bucket)
    assert least <= decoys < least + bucket
    assert (ids + 64 + decoys) % bucket == 0


def test_padded_sets_tell_their_size_no_closer_than_the_bucket() -> None:
    sets = {"bank": 70, "grocer": 3}
    roles = {name: (lambda session: align(session, [f"c{n}" for n in range(sets[session.name])])) for name in sets}
    found = play(roles, agree(2, intersection={"bucket": 1000}), identities=parties(2))
    assert found["bank"].steps[0].set_sizes == {"bank": 1000, "grocer": 1000}
    assert found["bank"].size == 3


def test_a_set_that_does_not_fill_its_bucket_is_a_violation() -> None:
    def cheat(session: Session) -> Any:
        channel = session.channels["bank"]
        plain = channel.send

        def send(message: Any, timeout: float | None = None) -> None:
            plain(SetSize(message.points - 1) if isinstance(message, SetSize) else message, timeout)

        channel.send = send  # type: ignore[method-assign]
        return align(session, ["a"])

    agreement = agree(2, intersection={"bucket": 1000})
    found = outcomes({"bank": lambda session: align(session, ["a"]), "grocer": cheat}, agreement, parties(2))
    assert isinstance(found["bank"], ProtocolViolation)
    assert "a set of 999 points, no multiple of the bucket" in str(found["bank"])
    assert isinstance(found["grocer"], PeerAborted)


@pytest.mark.parametrize("large", ["bank", "grocer"])
def test_one_side_a_thousand_times_larger(large: str) -> None:
    sets = {name: range(5_000) if name == large else range(7, 12) for name in ("bank", "grocer")}
    roles = {
        name: (lambda session: align(session, [f"c{n}" for n in sets[session.name]], randomness=Stream(session.name)))
        for name in sets
    }
    found = play(roles, agree(2), identities=parties(2))
    rows = {name: [sets[name][row] for row in one.rows] for name, one in found.items()}
    assert rows["bank"] == rows["grocer"]
    assert set(rows["bank"]) == set(range(7, 12))


def test_one_row_each() -> None:
    found = ran([{"a": ["x"]}, {"a": ["X "]}], Agreed(fields={"a": "text/1"}), [{}, {}])
    assert [rows.tolist() for _, rows in found] == [[0], [0]]


def test_more_ids_than_agreed_are_refused_before_anything_is_said() -> None:
    mesh: dict[str, dict[str, MemoryLink]] = {}
    roles = {name: (lambda session: align(session, ["a", "b", "c"])) for name in NAMES[:2]}
    found = outcomes(roles, agree(2, intersection={"maximum_rows": 2}), parties(2), recorded=mesh)
    assert all(isinstance(one, (LocalError, PeerAborted)) for one in found.values())
    assert {kind for *_, kind in kinds(mesh)} == {"Hello", "Abort"}
    assert np.all([len(link.sent) == 2 for links in mesh.values() for link in links.values()])


# ---- disk


def spilling(folder: Path) -> dict[str, Any]:
    """Both parties keep every list in files of their own."""

    def run(session: Session) -> Any:
        session.scratch = Scratch(folder, memory=1)
        numbers = range(300) if session.name == "bank" else range(150, 500)
        return align(session, [f"c{n}" for n in numbers], randomness=Stream(session.name))

    return outcomes({"bank": run, "grocer": run, "mill": run}, agree(3), parties(3))


def test_lists_that_go_to_disk_give_the_same_rows_and_leave_nothing(tmp_path: Path) -> None:
    found = spilling(tmp_path)
    assert sorted(found["bank"].rows) == list(range(150, 300))
    assert sorted(found["mill"].rows) == list(range(150))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_run_with_a_remedy_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    found = spilling(tmp_path)
    assert all(isinstance(one, (LocalError, PeerAborted)) for one in found.values())
    texts = [str(one) for one in found.values() if isinstance(one, LocalError)]
    assert texts and all(str(tmp_path) in text for text in texts)
    assert list(tmp_path.iterdir()) == []
