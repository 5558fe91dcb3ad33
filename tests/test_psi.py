"""What the intersection promises to parties that follow the protocol, whatever their tables look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.errors import ColonnadeError, LocalError, PeerAborted, ProtocolViolation, Refused
from parties.memory import MemoryLink, outcomes, play
from parties.message import Header, decode, parse_header
from parties.message import name_of as kind_name
from psi.align import Alignment, align
from psi.group import suite
from psi.identifiers import canonical, encode
from psi.messages import IntersectionSize
from psi.rules import rule
from tests.conftest import NAMES, Stream, agree, nonces, parties

Sets = Mapping[str, list[str]]
spelt = st.text(max_size=6).map(rule("text/1")).filter(bool)


def roles(sets: Sets, seed: str | None = None, minimum: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Everybody follows the protocol with its own ids; `seed` makes the randomness replay."""

    def role(name: str) -> Callable[[Any], Alignment]:
        options: dict[str, Any] = {"minimum": (minimum or {}).get(name)}
        if seed is not None:
            options["randomness"] = Stream(f"{seed}/{name}")
        return lambda session: align(session, sets[name], **options)

    return {name: role(name) for name in sets}


def aligned(sets: Sets, **tables: Any) -> dict[str, list[str]]:
    """The ids that every party ends with, in its order."""
    found = play(roles(sets), agree(len(sets), **tables), identities=parties(len(sets)))
    return {name: [sets[name][row] for row in found[name].rows] for name in sets}


def plain_join(sets: Sets) -> set[str]:
    tables = [pd.DataFrame({"id": ids}, dtype=str) for ids in sets.values()]
    joined = tables[0]
    for table in tables[1:]:
        joined = joined.merge(table, on="id", how="inner", validate="one_to_one")
    return set(joined["id"])


def same_as_plain_join(sets: Sets) -> None:
    found = aligned(sets)
    orders = list(found.values())
    assert all(order == orders[0] for order in orders)
    assert sorted(orders[0]) == sorted(plain_join(sets))


def ids(*numbers: int) -> list[str]:
    """Customers start .. stop - 1, in an order that says nothing."""
    order = np.random.default_rng(sum(numbers)).permutation(np.arange(*numbers))
    return [f"customer {number}" for number in order]


SHAPES = {
    "1 row": [(0, 30), (29, 60), (29, 40), (20, 30)],
    "50 percent": [(0, 40), (20, 60), (20, 50), (10, 40)],
    "100 percent": [(0, 30)] * 4,
    "one much larger": [(0, 8), (0, 900), (2, 9), (0, 20)],
    "much larger hub": [(0, 900), (5, 12), (0, 8), (0, 20)],
}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_rows_as_a_plain_join_in_one_order(shape: str, count: int) -> None:
    same_as_plain_join({name: ids(*span) for name, span in zip(NAMES[:count], SHAPES[shape], strict=False)})


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("empty", [False, True], ids=["0 percent", "one side empty"])
def test_nothing_in_common_is_refused_and_names_no_size(empty: bool, count: int) -> None:
    sets = {
        name: [] if empty and place == 1 else ids(100 * place, 100 * place + 20)
        for place, name in enumerate(NAMES[:count])
    }
    found = outcomes(roles(sets), agree(count), parties(count))
    assert plain_join(sets) == set()
    assert {type(result) for result in found.values()} == {Refused}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("empty", [False, True], ids=["0 percent", "one side empty"])
def test_where_the_agreement_has_no_minimum_nothing_in_common_is_an_empty_join(empty: bool, count: int) -> None:
    sets = {
        name: [] if empty and place == 1 else ids(100 * place, 100 * place + 20)
        for place, name in enumerate(NAMES[:count])
    }
    found = play(roles(sets), agree(count, intersection={"minimum": 0}), identities=parties(count))
    assert [result.rows.tolist() for result in found.values()] == [[]] * count


@settings(max_examples=12)
@given(st.integers(2, 4).flatmap(lambda k: st.lists(st.lists(spelt, unique=True, max_size=12), min_size=k, max_size=k)))
def test_any_text_is_an_id(lists: list[list[str]]) -> None:
    shared = ["shared", "é" * 3]  # so that the intersection is never below the minimum
    sets = {name: list(dict.fromkeys(shared + values)) for name, values in zip(NAMES, lists, strict=False)}
    same_as_plain_join(sets)


def test_more_points_than_fit_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psi.messages.parts.__defaults__", (50,))
    monkeypatch.setattr("psi.messages.part_count.__defaults__", (50,))
    monkeypatch.setattr("psi.reveal.POSITIONS", 40)
    mesh: dict[str, dict[str, MemoryLink]] = {}
    sets = {"bank": ids(0, 70), "grocer": ids(20, 400), "mill": ids(0, 60)}
    found = play(roles(sets), agree(3), identities=parties(3), recorded=mesh)
    orders = [[sets[name][row] for row in found[name].rows] for name in sets]
    assert orders[0] == orders[1] == orders[2]
    assert set(orders[0]) == plain_join(sets)
    sent = [kind for kind, _, _ in frames(mesh, "grocer", "mill")]
    assert sent.count("MaskedPoints") == 11 + 4  # its own 508 points, then the bank's 198
    assert [kind for kind, _, _ in frames(mesh, "mill", "grocer")].count("Positions") == 2 * 3  # of two sets, 94 each


# ---- orders, tokens and replay


def frames(mesh: Mapping[str, Mapping[str, MemoryLink]], sender: str, receiver: str) -> list[tuple[str, Header, bytes]]:
    """What one party sent to another: kind, header, payload."""
    return [
        (kind_name(header.kind), header, payload)
        for header, payload in ((parse_header(head), payload) for head, payload in mesh[sender][receiver].sent)
    ]


SETS = {"bank": ids(0, 40), "grocer": ids(10, 60), "mill": ids(5, 45)}


def record(seed: str | None = "replay", nonce: str | None = "nonce", count: int = 3) -> tuple[dict[str, Any], Any]:
    mesh: dict[str, dict[str, MemoryLink]] = {}
    sets = {name: SETS[name] for name in NAMES[:count]}
    given = None if nonce is None else nonces(count, nonce)
    return outcomes(roles(sets, seed), agree(count), parties(count), nonces=given, recorded=mesh), mesh


def wire(mesh: Mapping[str, Mapping[str, MemoryLink]]) -> dict[tuple[str, str], list[tuple[bytes, bytes]]]:
    return {(me, peer): link.sent for me, links in mesh.items() for peer, link in links.items()}


@pytest.fixture(scope="module")
def honest() -> tuple[dict[str, Any], Any]:
    return record()


def test_same_nonces_and_randomness_replay_byte_for_byte(honest: tuple[dict[str, Any], Any]) -> None:
    again = record()
    assert wire(again[1]) == wire(honest[1])
    assert all(np.array_equal(again[0][name].rows, honest[0][name].rows) for name in SETS)


def payloads(mesh: Any, kind: str) -> set[bytes]:
    return {
        payload[start : start + 32]
        for sender, links in mesh.items()
        for receiver in links
        for name, _, payload in frames(mesh, sender, receiver)
        if name == kind
        for start in range(0, len(payload), 32)
    }


@pytest.mark.parametrize(("seed", "nonce"), [("replay", "another"), ("another", "nonce")])
def test_a_fresh_nonce_or_fresh_randomness_gives_other_points_and_another_order(
    seed: str, nonce: str, honest: tuple[dict[str, Any], Any]
) -> None:
    other = record(seed, nonce)
    assert not payloads(other[1], "MaskedPoints") & payloads(honest[1], "MaskedPoints")
    assert not payloads(other[1], "Tokens") & payloads(honest[1], "Tokens")
    ours, theirs = (run[0]["bank"].rows.tolist() for run in (other, honest))
    assert sorted(ours) == sorted(theirs)
    assert ours != theirs


def test_row_order_does_not_follow_anybodys_input_order() -> None:
    values = [f"{number:04}" for number in range(300)]
    found = play(roles({"bank": values, "grocer": values[::-1]}), agree(2), identities=parties(2))
    place = found["bank"].rows.astype(float)
    assert abs(np.corrcoef(place, np.arange(300))[0, 1]) < 0.3  # 5 standard deviations
    assert (np.diff(place) == 1).sum() < 15


def test_no_id_is_on_the_wire_plain_hashed_or_as_an_unmasked_point(honest: tuple[dict[str, Any], Any]) -> None:
    session = frames(honest[1], "bank", "grocer")[-1][1].session
    key = canonical({"customer": SETS["bank"][:10]}, agree(3).identifiers).keys[0]
    inputs = [encode(session, key.type, value) for value in key.take(np.arange(10))]
    curve = suite("curve25519_XMD:SHA-512_ELL2_RO_")
    unmasked = {point.tobytes() for point in curve.hash_to_points(inputs)}
    sent = b"".join(head + payload for links in wire(honest[1]).values() for head, payload in links)
    assert not any(needle in sent for needle in [*unmasked, *inputs, b"customer"])


# ---- one altered byte


def alter(sender: str, receiver: str, number: int, where: str) -> Any:
    """Change one bit of one message: in its payload, in whom its header names, or in the header's last field."""
    left = [number]

    def tamper(me: str, peer: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if (me, peer) != (sender, receiver):
            return head, payload
        left[0] -= 1
        if left[0] != -1:
            return head, payload
        if where == "payload":
            return head, flipped(payload, len(payload) // 2)
        return flipped(head, {"names": 40, "field": len(head) - 1, "open": len(head) - 2}[where]), payload

    return tamper


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def every_message(*unless: str) -> list[Any]:
    """Of a three-party run, what passes between hub and holder and down the ring, altered in every way it can be."""
    mesh, cases = record()[1], []
    for sender, receiver in (("bank", "grocer"), ("grocer", "bank"), ("mill", "bank")):
        for number, (kind, _, payload) in enumerate(frames(mesh, sender, receiver)):
            for way in ["names", "field"] + ["payload"] * bool(payload):
                if kind not in unless and f"{kind} {way}" not in unless:
                    name = f"{sender}-{receiver}-{number}-{kind}-{way}"
                    cases.append(pytest.param(sender, receiver, number, way, id=name))
    return cases


def run_altered(sender: str, receiver: str, number: int, where: str) -> dict[str, Any]:
    tamper = alter(sender, receiver, number, where)
    return outcomes(roles(SETS, "replay"), agree(3), parties(3), nonces=nonces(3), tamper=tamper)


@pytest.mark.parametrize(("sender", "receiver", "number", "where"), every_message("Closing"))
def test_one_altered_byte_stops_everybody(sender: str, receiver: str, number: int, where: str) -> None:
    found = run_altered(sender, receiver, number, where)
    assert any(isinstance(result, ProtocolViolation) for result in found.values())
    assert all(isinstance(result, (ProtocolViolation, PeerAborted)) for result in found.values())


def test_a_gate_altered_to_no_stops_everybody_too() -> None:
    found = run_altered("grocer", "bank", 5, "open")
    assert isinstance(found["bank"], Refused)
    assert found["bank"].peer == "grocer"
    assert all(isinstance(result, ColonnadeError) for result in found.values())


@pytest.mark.parametrize("where", ["names", "field"])
def test_whoever_gets_an_altered_last_message_releases_nothing(where: str, honest: tuple[dict[str, Any], Any]) -> None:
    """Nothing follows the last message, so its sender cannot learn that it was altered."""
    last = len(honest[1]["bank"]["grocer"].sent) - 1
    assert isinstance(run_altered("bank", "grocer", last, where)["grocer"], ProtocolViolation)


# ---- minimum, caps, evidence


def sizes_on_the_wire(mesh: Any, count: int) -> list[int]:
    return [
        decode(header, payload, IntersectionSize).rows
        for peer in NAMES[1:count]
        for kind, header, payload in frames(mesh, "bank", peer)
        if kind == "IntersectionSize"
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_below_the_minimum_the_others_are_told_only_that(count: int) -> None:
    mesh: dict[str, dict[str, MemoryLink]] = {}
    sets = {name: SETS[name] for name in NAMES[:count]}
    agreement = agree(count, intersection={"minimum": 100})
    found = outcomes(roles(sets), agreement, parties(count), recorded=mesh)
    assert {type(result) for result in found.values()} == {Refused}
    assert sizes_on_the_wire(mesh, count) == [-1] * (count - 1)
    kinds = {kind for me, links in mesh.items() for peer in links for kind, _, _ in frames(mesh, me, peer)}
    assert not kinds & {"Gate", "Positions", "OrderPoint"}
    assert not any("30" in str(result) for result in found.values())


def test_the_minimum_itself_is_enough() -> None:
    size = len(plain_join(SETS))
    assert len(aligned(SETS, intersection={"minimum": size})["mill"]) == size
    found = outcomes(roles(SETS), agree(3, intersection={"minimum": size + 1}), parties(3))
    assert {type(result) for result in found.values()} == {Refused}


@pytest.mark.parametrize("strict", NAMES[:3])
def test_one_partys_stricter_minimum_closes_the_gate_for_all(strict: str) -> None:
    mesh: dict[str, dict[str, MemoryLink]] = {}
    found = outcomes(roles(SETS, minimum={strict: 500}), agree(3), parties(3), recorded=mesh)
    assert {type(result) for result in found.values()} <= {Refused, PeerAborted}
    assert {result.exit_code for result in found.values()} == {3}
    assert "our own minimum of 500" in str(found[strict])
    kinds = {kind for me, links in mesh.items() for peer in links for kind, _, _ in frames(mesh, me, peer)}
    assert "Positions" not in kinds


def test_a_partys_laxer_minimum_changes_nothing() -> None:
    agreement = agree(3, intersection={"minimum": 100})
    found = outcomes(roles(SETS, minimum=dict.fromkeys(SETS, 1)), agreement, parties(3))
    assert {type(result) for result in found.values()} == {Refused}


def test_scoring_has_a_minimum_of_its_own() -> None:
    agreement = agree(2, intersection={"minimum": 100, "minimum_to_score": 5})
    sets = {name: SETS[name] for name in NAMES[:2]}
    found = outcomes(roles(sets), agreement, parties(2), task="score")
    assert {len(result.rows) for result in found.values()} == {30}


def test_a_set_above_the_cap_is_never_sent() -> None:
    mesh: dict[str, dict[str, MemoryLink]] = {}
    agreement = agree(3, intersection={"maximum_rows": 45})
    found = outcomes(roles(SETS), agreement, parties(3), recorded=mesh)
    assert isinstance(found["grocer"], LocalError)
    assert all(isinstance(result, ColonnadeError) for result in found.values())
    assert "SetSize" not in [kind for kind, _, _ in frames(mesh, "grocer", "bank")]


def test_evidence_agrees_between_the_parties(honest: tuple[dict[str, Any], Any]) -> None:
    found = honest[0]
    assert {name: len(values) + 128 for name, values in SETS.items()} == found["bank"].steps[0].set_sizes
    assert found["bank"].steps == found["grocer"].steps == found["mill"].steps

    def flows(owner: str, direction: str, peer: str) -> list[tuple[Any, ...]]:
        return sorted(
            (flow.what, flow.owner, flow.count, flow.digest)
            for flow in found[owner].flows
            if (flow.direction, flow.peer) == (direction, peer)
        )

    seen = 0
    for sender in SETS:
        for receiver in set(SETS) - {sender}:
            sent = flows(sender, "sent", receiver)
            assert sent == flows(receiver, "received", sender)
            seen += len(sent)
    assert seen == sum(len(result.flows) for result in found.values()) / 2 == 6 + 2 + 2 + 6


def test_more_decoys_when_agreed() -> None:
    found = play(roles(SETS), agree(3, intersection={"decoys": 200}), identities=parties(3))
    assert found["mill"].steps[0].set_sizes["bank"] == 40 + 64 + 200


def test_neither_errors_nor_evidence_show_an_id_or_a_row() -> None:
    found = play(roles(SETS), agree(3), identities=parties(3))
    assert all("customer " not in repr(result) and "array" not in repr(result) for result in found.values())
