"""A session in a star: the coordinator relays, and cannot show one client another session than the next."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import numpy as np
import pytest

import parties.handshake
from parties.agreement import Agreement, flatten
from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, Refused
from parties.handshake import Hello, Joining, Roll, Roster
from parties.identity import Identity, PublicIdentity
from parties.ledger import Ledger
from parties.memory import MemoryLink, links, make_agreement, outcomes, play
from parties.message import CLASSES, decode, encode, parse_header
from parties.session import Closing, Session, allowed_classes, open_session
from tests.conftest import IDENTITIES, NAMES, Stream, changed
from tests.world import free_ports

HORIZONTAL: dict[str, Any] = {
    "horizontal": {"classes": [0, 1], "clients": {"deadline": 0.4}},
    "columns": {"features": ["a", "b"], "label": "y"},
    "expires": "2999-12-31",
    "deadlines": {"connect": 1.0, "stall": 2.0, "message": 10.0},
}


def star(**tables: Any) -> Agreement:
    """The bank coordinates; grocer, mill and press are its clients."""
    return make_agreement(IDENTITIES, **(HORIZONTAL | tables))


def openly(**tables: Any) -> Agreement:
    """Without secure aggregation, which never sums two: a majority of two of the three clients is enough."""
    return star(horizontal=HORIZONTAL["horizontal"] | {"secure_aggregation": "none"}, **tables)


def facts(session: Session) -> tuple[bytes, list[str], list[str]]:
    return session.id, list(session.channels), sorted(session.approvals)


# ---- the agreement


def refusal(**tables: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        star(**tables)
    return str(caught.value)


def test_clients_need_no_endpoint_and_talk_to_the_coordinator_alone() -> None:
    plain = msgspec.to_builtins(star())
    for party in plain["parties"][1:]:
        party["endpoint"] = ""
    agreement = msgspec.convert(plain, Agreement)
    assert [one.name for one in agreement.peers("mill")] == ["bank"]
    assert [one.name for one in agreement.peers("bank")] == ["grocer", "mill", "press"]
    assert agreement.clients == ("grocer", "mill", "press")
    assert agreement.listens("bank", "mill") and not agreement.listens("mill", "bank")
    plain["parties"][0]["endpoint"] = ""
    with pytest.raises(msgspec.ValidationError, match="coordinator bank needs an endpoint"):
        msgspec.convert(plain, Agreement)


def test_the_coordinator_stands_first_wherever_it_is_written() -> None:
    plain = msgspec.to_builtins(
        star(
            horizontal={"classes": [0, 1], "clients": {"deadline": 0.4}},
            job={"mode": "horizontal", "coordinator_trains": True},
        )
    )
    plain["parties"] = plain["parties"][1:] + plain["parties"][:1]
    agreement = msgspec.convert(plain, Agreement)
    assert [one.name for one in agreement.ring] == ["bank", "grocer", "mill", "press"]
    assert agreement.clients == ("grocer", "mill", "press", "bank")
    assert agreement.listens("bank", "grocer")


def test_what_does_not_go_together_is_refused_with_the_reason() -> None:
    assert "[model]" in refusal(model={"C": 2.0})
    assert "values of the label" in refusal(horizontal={})
    assert "[horizontal] and [columns]" in refusal(columns=None)
    assert "comes twice" in refusal(columns={"features": ["a", "y"], "label": "y"})
    assert "neither feature nor label" in refusal(columns={"features": ["a"], "label": "y", "units": {"c": "mm"}})
    assert "more than 8 seconds" in refusal(deadlines={"message": 8.0})
    assert "stall of" in refusal(deadlines={"message": 9.0, "stall": 0.4})
    few = HORIZONTAL["horizontal"] | {"clients": {"deadline": 0.4, "quorum": 2}}
    assert "secure aggregation needs 3" in refusal(horizontal=few)
    assert "is the label holder" in refusal(job={"mode": "vertical"})  # clients are none of its parties
    two = {name: IDENTITIES[name] for name in NAMES[:2]}
    with pytest.raises(msgspec.ValidationError, match="two clients or more"):
        make_agreement(two, **HORIZONTAL)
    with pytest.raises(msgspec.ValidationError, match="protects nothing with 2 clients"):
        make_agreement(two, **(HORIZONTAL | {"job": {"mode": "horizontal", "coordinator_trains": True}}))
    with pytest.raises(msgspec.ValidationError, match="need mode"):
        make_agreement(two, columns=HORIZONTAL["columns"])


@pytest.mark.parametrize(("secure", "needed"), [("on", 3), ("none", 2)])
def test_the_quorum_is_what_a_sum_needs(secure: str, needed: int) -> None:
    agreement = star(horizontal=HORIZONTAL["horizontal"] | {"secure_aggregation": secure})
    assert agreement.quorum == needed


def test_fifty_parties_may_agree_and_not_more() -> None:
    plain = msgspec.to_builtins(star())
    curve = Stream("curve")

    def crowd(count: int) -> dict[str, Any]:
        more = [IDENTITIES["press"]._from_secrets(f"p{n}", curve(32), curve(32)) for n in range(count - 4)]
        new = [{"name": one.name, "role": "client", "public_key": str(one.public)} for one in more]
        return plain | {"parties": [*plain["parties"], *new]}

    agreement = msgspec.convert(crowd(50), Agreement)
    assert len(agreement.clients) == 49
    assert len(agreement.canonical) < 1 << 16  # so that a difference can be shown
    with pytest.raises(msgspec.ValidationError, match="length <= 50"):
        msgspec.convert(crowd(51), Agreement)


def test_single_updates_leave_in_clear_only_without_secure_aggregation() -> None:
    assert "plaintext" not in allowed_classes(star())
    assert "plaintext" in allowed_classes(openly())
    assert ("horizontal.secure_aggregation", "on") in flatten(star()).items()


# ---- the handshake


def test_all_end_up_in_one_session() -> None:
    results = play(dict.fromkeys(NAMES, facts), star(), identities=IDENTITIES)
    assert len({session for session, _, _ in results.values()}) == 1
    assert results["bank"][1:] == (["grocer", "mill", "press"], sorted(NAMES))
    assert results["mill"][1:] == (["bank"], sorted(NAMES))


def test_another_nonce_of_any_party_is_another_session() -> None:
    def run(*others: str) -> bytes:
        nonces = {name: Stream(name + "x" * (name in others))(32) for name in NAMES}
        return play(dict.fromkeys(NAMES, facts), star(), identities=IDENTITIES, nonces=nonces)["bank"][0]

    assert run() == run()
    assert len({run(), *(run(name) for name in NAMES)}) == 5


def test_who_does_not_come_is_left_out_and_is_in_nobodys_session() -> None:
    there = [name for name in NAMES if name != "mill"]
    ledgers: dict[str, Ledger] = {}
    results = play(dict.fromkeys(there, facts), openly(), identities=IDENTITIES, ledgers=ledgers)
    assert len({session for session, _, _ in results.values()}) == 1
    assert results["bank"][1] == ["grocer", "press"]
    assert results["press"][2] == ["bank", "grocer", "press"]


def test_without_the_quorum_nobody_begins_and_the_missing_are_named() -> None:
    results = outcomes(dict.fromkeys(("bank", "press"), facts), star(), IDENTITIES)
    assert isinstance(results["bank"], PeerLost)
    assert "1 of 3 clients" in str(results["bank"]) and "missing: grocer, mill" in str(results["bank"])
    assert isinstance(results["press"], PeerAborted) and results["press"].exit_code == 4


def test_another_agreement_is_refused_by_both_field_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = star()
    theirs = changed(ours, purpose="something else")
    real = parties.handshake.open_by_handshake

    def meet(me: Any, agreement: Agreement, approval: bytes, *rest: Any) -> Any:
        own = theirs if me.name == "mill" else agreement
        return real(me, own, own.approve(me), *rest)

    monkeypatch.setattr("parties.session.open_by_handshake", meet)
    results = outcomes(dict.fromkeys(NAMES, facts), ours, IDENTITIES)
    for name in ("bank", "mill"):
        assert isinstance(results[name], Refused)
        assert "purpose: ours" in str(results[name])
    assert isinstance(results["press"], PeerAborted) and results["press"].exit_code == 3


# ---- a coordinator that cheats, played by altering what it sends


def altered(kind: type[Any], receiver: str, change: Any) -> Any:
    """A tamper that changes the array of one message of the coordinator to one client, under a fitting header."""

    def tamper(sender: str, to: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        parsed = parse_header(header)
        if (sender, to) != ("bank", receiver) or parsed.kind != kind.kind:
            return header, payload
        data = change(decode(parsed, payload, kind).data.copy())
        head, body = encode(kind(data), parsed.session, parsed.sender, parsed.receiver, parsed.number)
        return head, bytes(body)

    return tamper


def without(row: int) -> Any:
    def change(data: Any) -> Any:
        data[row] = 0
        return data

    return change


def other_nonce(row: int) -> Any:
    def change(data: Any) -> Any:
        data[row, :32] ^= 1
        return data

    return change


CHEATS = {
    "hides a client from one": (Roster, without(3), "has not joined the session"),
    "gives another nonce of a client": (Roster, other_nonce(3), "has not joined the session"),
    "gives another nonce of ours": (Roster, other_nonce(2), "another nonce or approval of mill"),
    "gives another nonce of its own": (Roster, other_nonce(0), "another nonce or approval of bank"),
    "forges an approval": (
        Roster,
        lambda data: np.where(np.arange(len(data))[:, None] == 3, 7, data),
        "no approval of",
    ),
    "names more parties": (Roster, lambda data: np.vstack([data, data[:1]]), "another number of parties"),
    "forges a signature": (Roll, other_nonce(3), "press has not joined"),
    "leaves itself out": (Roll, without(0), "lacks us or itself"),
    "leaves us out": (Roll, without(2), "lacks us or itself"),
    "shows fewer than the quorum": (
        Roll,
        lambda data: np.where(np.isin(np.arange(len(data)), [1])[:, None], 0, data).astype(np.uint8),
        "fewer clients than the quorum",
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_coordinator_that_cheats_is_caught_by_the_client(cheat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, change, said = CHEATS[cheat]
    honest = PublicIdentity.signed

    def signed(self: PublicIdentity, *rest: Any) -> bool:
        return threading.current_thread().name == "bank" or honest(self, *rest)  # it knows that mill signs another

    monkeypatch.setattr(PublicIdentity, "signed", signed)
    as_bytes = altered(kind, "mill", lambda data: np.ascontiguousarray(change(data), np.uint8))
    result = outcomes(dict.fromkeys(NAMES, facts), star(), IDENTITIES, tamper=as_bytes)["mill"]
    assert isinstance(result, ProtocolViolation) and result.peer == "bank"
    assert said in str(result)


def test_a_client_that_signs_another_session_is_left_out() -> None:
    tamper = altered(Roster, "mill", other_nonce(3))  # mill is made to compute another id, and says so in vain
    results = outcomes(dict.fromkeys(NAMES, facts), openly(), IDENTITIES, tamper=tamper)
    assert results["bank"][1] == ["grocer", "press"]
    assert results["press"][2] == ["bank", "grocer", "press"]
    assert isinstance(results["mill"], (PeerAborted, ProtocolViolation))


def test_a_recorded_session_cannot_be_played_again() -> None:
    """A coordinator that answers with what it recorded earlier does not have the client's fresh nonce in it."""
    recorded: dict[str, dict[str, MemoryLink]] = {}
    play(dict.fromkeys(NAMES, facts), star(), identities=IDENTITIES, recorded=recorded)
    kinds = (Roster.kind, Roll.kind)
    old = {
        parse_header(head).kind: (head, body)
        for head, body in recorded["bank"]["mill"].sent
        if parse_header(head).kind in kinds
    }

    def tamper(sender: str, to: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        replaced = old.get(parse_header(header).kind) if (sender, to) == ("bank", "mill") else None
        return replaced or (header, payload)

    result = outcomes(dict.fromkeys(NAMES, facts), star(), IDENTITIES, tamper=tamper)["mill"]
    assert isinstance(result, ProtocolViolation) and "another nonce or approval of mill" in str(result)


# ---- a client that was killed comes back


def killed(session: Session) -> None:
    raise KeyboardInterrupt


def awaiting(name: str) -> Any:
    """The coordinator's role: until that client is back, for a while."""

    def role(session: Session) -> tuple[bytes, list[str]]:
        until, back = time.monotonic() + 1, []
        while name not in back and time.monotonic() < until:
            back += session.rejoined(2.0)
            time.sleep(0.01)
        return session.id, back

    return role


def rejoin(tamper: Any = None, **options: Any) -> dict[str, Any]:
    roles = dict.fromkeys(NAMES, facts) | {"bank": awaiting("mill"), "mill": killed}
    return outcomes(roles, star(), IDENTITIES, tamper=tamper, again={"mill": facts}, **options)


def test_a_killed_client_comes_back_into_the_session_that_goes_on() -> None:
    results = rejoin()
    assert results["bank"][1] == ["mill"]
    assert results["mill"] == results["press"] == (results["bank"][0], ["bank"], sorted(NAMES))


def replaying(kind: type[Any]) -> Any:
    """A tamper that plays mill's first message of a kind once more in place of the second."""
    first: list[tuple[bytes, bytes]] = []

    def tamper(sender: str, to: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if (sender, to) != ("mill", "bank") or parse_header(header).kind != kind.kind:
            return header, payload
        first.append((header, payload))
        return first[0]

    return tamper


@pytest.mark.parametrize("kind", [Hello, Joining])
def test_a_greeting_that_is_played_again_is_refused(kind: type[Any]) -> None:
    results = rejoin(replaying(kind))
    assert results["bank"][1] == [] and isinstance(results["mill"], ColonnadeError)
    assert results["press"][0] == results["bank"][0]  # the others go on


def test_a_message_of_the_former_conversation_is_refused() -> None:
    """The session is the same, but every conversation has an id of its own."""

    def says(session: Session) -> None:
        session.channels["bank"].send(Closing(bytes(32), bytes(32), bytes(64)))

    def hears(session: Session) -> str:
        awaiting("mill")(session)
        try:
            session.channels["mill"].receive(Closing, 2.0)
        except ProtocolViolation as error:
            return str(error)
        return "nothing wrong"

    def dies(session: Session) -> None:
        says(session)
        raise KeyboardInterrupt

    for tamper, said in ((None, "nothing wrong"), (replaying(Closing), "mill: Closing belongs to another session")):
        roles = dict.fromkeys(NAMES, facts) | {"bank": hears, "mill": dies}
        assert outcomes(roles, star(), IDENTITIES, tamper=tamper, again={"mill": says})["bank"] == said


def test_a_stranger_gets_no_clients_place() -> None:
    """It knows all that is public, mill's approval too, and lacks only mill's key."""
    stranger = Identity.generate("mill")
    agreement = star()
    kept: dict[str, Any] = {}

    def coordinate(session: Session) -> Any:
        ends = links(["bank", "mill"])
        thread = threading.Thread(target=impostor, args=(ends["mill"]["bank"], session.approvals["mill"]))
        thread.start()
        session.returned = lambda: {"mill": ends["bank"]["mill"]}
        kept["back"] = session.rejoined(2.0)
        thread.join()
        return facts(session)

    def impostor(link: MemoryLink, approval: bytes) -> None:
        ids = {"our_id": IDENTITIES["mill"].public.key_id, "peer_id": IDENTITIES["bank"].public.key_id}
        channel = Channel(link, peer="bank", ledger=Ledger(stranger, None, frozenset(CLASSES)), timeout=5.0, **ids)
        channel.send(Hello(agreement.digest, approval, "train", bytes(32)))
        channel.receive(Hello)
        channel.receive(Roster)
        channel.send(Joining(np.frombuffer(stranger.sign("rejoin", bytes(32)), np.uint8)))
        with pytest.raises(PeerAborted) as caught:
            channel.receive(Roll)
        kept["told"] = caught.value.reason

    results = outcomes(dict.fromkeys(NAMES, facts) | {"bank": coordinate}, agreement, IDENTITIES)
    assert kept == {"back": {}, "told": "violation"}
    assert results["mill"][0] == results["bank"][0]  # whose place it is, is not disturbed


def test_who_was_not_in_the_session_does_not_come_into_it() -> None:
    def coordinate(session: Session) -> Any:
        ends = links(["bank", "mill"])
        session.returned = lambda: {"mill": ends["bank"]["mill"]}
        return session.rejoined(0.1)

    there = [name for name in NAMES if name != "mill"]
    results = outcomes(dict.fromkeys(there, facts) | {"bank": coordinate}, openly(), IDENTITIES)
    assert results["bank"] == {}


def test_a_client_comes_back_into_no_other_session_than_the_one_it_remembers() -> None:
    """A coordinator that shows it an older one, in which its other nonce stands."""
    rosters: list[np.ndarray] = []

    def older(data: np.ndarray) -> np.ndarray:
        rosters.append(data)
        return other_nonce(0)(data.copy()) if len(rosters) > 1 else data

    results = rejoin(altered(Roster, "mill", older))
    assert len(rosters) == 2 and results["bank"][1] == []
    assert isinstance(results["mill"], ProtocolViolation) and "another nonce or approval" in str(results["mill"])


# ---- the close


def test_the_coordinator_closes_without_a_client_that_dropped_out(tmp_path: Any) -> None:
    def leave(session: Session) -> None:
        raise KeyboardInterrupt

    ledgers: dict[str, Ledger] = {}
    roles = dict.fromkeys(NAMES, facts) | {"mill": leave}
    results = outcomes(roles, star(), IDENTITIES, ledgers=ledgers)
    assert isinstance(results["mill"], KeyboardInterrupt)
    assert results["bank"][0] == results["press"][0] == results["grocer"][0]


def test_a_client_insists_on_the_coordinators_countersignature() -> None:
    def leave(session: Session) -> None:
        raise KeyboardInterrupt

    results = outcomes(dict.fromkeys(NAMES, facts) | {"bank": leave}, star(), IDENTITIES)
    assert all(isinstance(results[name], PeerAborted) for name in NAMES[1:])


# ---- over sockets


def test_over_sockets_the_run_begins_without_the_late_who_are_told_in_time() -> None:
    plain = msgspec.to_builtins(openly(deadlines={"connect": 3.0, "silence": 2.0, "stall": 5.0, "message": 10.0}))
    for party in plain["parties"]:
        party["endpoint"] = f"tcp://127.0.0.1:{free_ports(1)[0]}" if party["name"] == "bank" else ""
    agreement = msgspec.convert(plain, Agreement)
    begun, over = threading.Event(), threading.Event()
    ended: dict[str, Any] = {}

    def party(name: str) -> None:
        try:
            with open_session(IDENTITIES[name], agreement) as session:
                begun.set()
                while not over.wait(0.1):
                    session.tick()
                ended[name] = facts(session)
        except ColonnadeError as error:
            ended[name] = error

    threads = {name: threading.Thread(target=party, args=(name,)) for name in NAMES}
    for name in ("bank", "grocer", "press"):
        threads[name].start()
    assert begun.wait(10)
    threads["mill"].start()
    threads["mill"].join(10)
    over.set()
    for thread in threads.values():
        thread.join(10)
    assert ended["bank"] == (ended["press"][0], ["grocer", "press"], ["bank", "grocer", "press"])
    assert isinstance(ended["mill"], PeerLost) and "may have begun without us" in str(ended["mill"])
