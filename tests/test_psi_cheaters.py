"""The test plays the cheater: who deviates in a listed way is caught by an honest party, and nobody gets rows.

A cheater is an honest role whose outgoing messages pass through a rule of its own, so that its transcripts are true
and only the protocol's own checks can stop it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

from parties.channel import Channel
from parties.errors import PeerAborted, ProtocolViolation, Refused
from parties.memory import MemoryLink, outcomes, play
from parties.message import Array, Message, parse_header
from parties.message import name_of as kind_name
from parties.session import Session
from psi import align as align_module
from psi import exchange as exchange_module
from psi.align import align
from psi.curve25519 import P
from psi.exchange import Ring
from psi.group import suite, token, token_width
from psi.messages import (
    Gate,
    InputCommitment,
    IntersectionSize,
    MaskedPoints,
    OrderPoint,
    OrderTag,
    Positions,
    SeedReveal,
    Seen,
    SetSize,
    Tokens,
)
from tests.conftest import NAMES, Stream, agree, nonces, parties

CURVE = suite("curve25519_XMD:SHA-512_ELL2_RO_")
SETS = {"bank": range(40), "grocer": range(10, 60), "mill": range(5, 45), "press": range(8, 50)}
Rule = Callable[[Session, str, Message], Iterable[Message]]


def ids(name: str) -> list[str]:
    return [f"customer {number}" for number in SETS[name]]


def honest(name: str) -> Callable[[Session], Any]:
    return lambda session: align(session, ids(name), randomness=Stream(name))


def deviating(name: str, rule: Rule, values: list[str] | None = None) -> Callable[[Session], Any]:
    """An honest role, but `rule` says what goes out instead of each message."""

    def role(session: Session) -> Any:
        for channel in session.channels.values():
            bend(session, channel, rule)
        return align(session, ids(name) if values is None else values, randomness=Stream(name))

    return role


def bend(session: Session, channel: Channel, rule: Rule) -> None:
    plain = channel.send

    def send(message: Message, timeout: float | None = None) -> None:
        for instead in rule(session, channel.peer, message):
            plain(instead, timeout)

    channel.send = send  # type: ignore[method-assign]


def run(count: int, cheater: str, role: Callable[[Session], Any], **options: Any) -> dict[str, Any]:
    roles = {name: role if name == cheater else honest(name) for name in NAMES[:count]}
    return outcomes(roles, agree(count, **options), parties(count), nonces=nonces(count))


def caught(found: Mapping[str, Any], cheater: str, by: str = "") -> list[str]:
    """An honest party saw the violation itself (`by` is in its text), all honest ones stop: the texts."""
    others = {name: result for name, result in found.items() if name != cheater}
    assert all(isinstance(result, (ProtocolViolation, PeerAborted)) for result in others.values()), others
    texts = [str(result) for result in others.values() if isinstance(result, ProtocolViolation)]
    assert texts
    assert any(by in text for text in texts), texts
    return texts


def one_kind(kind: type[Message], change: Callable[[Any], Message | Iterable[Message]]) -> Rule:
    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        if not isinstance(message, kind):
            return [message]
        instead = change(message)
        return [instead] if isinstance(instead, Message) else instead

    return rule


def rows(*points: bytes) -> Array:
    return np.frombuffer(b"".join(points), np.uint8).reshape(len(points), -1)


def with_first(data: Array, first: bytes) -> Array:
    return np.concatenate([rows(first), data[1:]])


# ---- somebody else's points, random tokens, false sizes


def test_a_peer_that_mirrors_our_points_is_caught() -> None:
    def mirror(session: Session) -> None:
        hub = session.channels["bank"]
        hub.send(hub.receive(InputCommitment))
        size = hub.receive(SetSize).points
        hub.send(SetSize(size))
        hub.send(hub.receive(Seen))
        theirs = hub.receive(MaskedPoints).data
        hub.send(MaskedPoints(1, theirs))
        hub.send(Tokens(0, token(theirs, session.id, token_width(2 * size))))
        hub.receive(IntersectionSize)

    caught(run(2, "grocer", mirror), "grocer", "canaries")


def test_a_hub_that_mirrors_our_points_is_caught() -> None:
    """It sends the grocer's points back as its own, then claims that it has all of the grocer's rows."""

    def mirror(session: Session) -> None:
        peer = session.channels["grocer"]
        peer.send(peer.receive(InputCommitment))
        size = peer.receive(SetSize).points
        peer.send(SetSize(size))
        peer.send(peer.receive(Seen))
        theirs = peer.receive(MaskedPoints).data
        peer.send(MaskedPoints(0, theirs))
        peer.receive(Tokens)
        peer.send(IntersectionSize(size - 128))
        peer.send(peer.receive(Gate))
        peer.send(Positions(1, np.arange(size - 64, dtype="<u4")))
        peer.receive(Gate)

    caught(run(2, "bank", mirror), "bank", "canaries")


@pytest.mark.parametrize(("count", "cheater"), [(2, "grocer"), (3, "grocer"), (3, "mill")])
def test_random_tokens_are_caught(count: int, cheater: str) -> None:
    invented = Stream("invented")
    rule = one_kind(Tokens, lambda sent: Tokens(sent.owner, rows(*(invented(sent.data.shape[1]) for _ in sent.data))))
    caught(run(count, cheater, deviating(cheater, rule)), cheater, "canaries")


@pytest.mark.parametrize("more", [1, -1, 50])
@pytest.mark.parametrize(("count", "cheater"), [(2, "bank"), (2, "grocer"), (3, "mill")])
def test_a_false_size_is_caught(count: int, cheater: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells everybody the same false size, and then sends the set that it has."""
    plain = exchange_module._announce

    def announce(ring: Ring, points: int) -> None:
        plain(ring, points + (more if ring.session.name == cheater else 0))

    monkeypatch.setattr(exchange_module, "_announce", announce)
    caught(run(count, cheater, honest(cheater)), cheater, "announced")


def test_different_sizes_for_different_parties_are_caught() -> None:
    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        return [SetSize(message.points + 3) if isinstance(message, SetSize) and peer == "bank" else message]

    caught(run(3, "grocer", deviating("grocer", rule)), "grocer")


def test_more_or_fewer_points_than_announced_are_caught() -> None:
    fewer = one_kind(MaskedPoints, lambda sent: MaskedPoints(sent.owner, sent.data[:-1]))
    more = one_kind(MaskedPoints, lambda sent: [sent, sent])
    caught(run(2, "grocer", deviating("grocer", fewer)), "grocer", "were announced")
    caught(run(2, "grocer", deviating("grocer", more)), "grocer", "MaskedPoints")


def test_a_set_above_the_cap_is_refused_before_its_points_come() -> None:
    role = deviating("grocer", one_kind(SetSize, lambda sent: SetSize(2_000_000)))
    found = run(3, "grocer", role)
    assert isinstance(found["bank"], Refused)
    assert found["bank"].peer == "grocer"
    assert {found[name].exit_code for name in ("bank", "mill")} == {3}


# ---- points that no honest party sends


def on_the_twist() -> bytes:
    for u in range(2, 100):
        point = u.to_bytes(32, "little")
        try:
            CURVE.check_points(rows(point), sample=1)
        except ValueError:
            return point
    raise LookupError


BAD_POINTS = {
    "small order": ((1).to_bytes(32, "little"), "small order"),
    "small order 8": (bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "small order"),
    "zero": (bytes(32), "small order"),
    "not canonical": ((int(P) + 9).to_bytes(32, "little"), "canonical"),
    "top bit": ((9 + 2**255).to_bytes(32, "little"), "canonical"),
    "twist": (on_the_twist(), "twist"),
}


@pytest.mark.parametrize(("count", "cheater"), [(2, "bank"), (2, "grocer"), (3, "mill")])
@pytest.mark.parametrize("what", BAD_POINTS)
def test_a_point_that_no_honest_party_sends_is_caught(what: str, count: int, cheater: str) -> None:
    """One bad point in a set that is small enough for every point to be checked."""
    point, said = BAD_POINTS[what]
    rule = one_kind(MaskedPoints, lambda sent: MaskedPoints(sent.owner, with_first(sent.data, point)))
    found = run(count, cheater, deviating(cheater, rule, values=[]))
    assert all("5f9c" not in text for text in caught(found, cheater, said))


def test_a_list_on_the_twist_is_caught_however_long() -> None:
    seed = rows(on_the_twist())
    twist = lambda count: np.concatenate([CURVE.mask(seed, Stream(str(i))(32)) for i in range(count)])
    rule = one_kind(MaskedPoints, lambda sent: MaskedPoints(sent.owner, twist(len(sent.data))))
    caught(run(2, "grocer", deviating("grocer", rule)), "grocer", "twist")


@pytest.mark.parametrize(("count", "cheater"), [(2, "bank"), (2, "grocer"), (3, "mill")])
def test_a_point_twice_is_caught(count: int, cheater: str) -> None:
    rule = one_kind(MaskedPoints, lambda sent: MaskedPoints(sent.owner, with_first(sent.data, sent.data[5].tobytes())))
    caught(run(count, cheater, deviating(cheater, rule)), cheater, "duplicates")


def test_a_token_twice_is_caught() -> None:
    rule = one_kind(Tokens, lambda sent: Tokens(sent.owner, with_first(sent.data, sent.data[5].tobytes())))
    caught(run(2, "grocer", deviating("grocer", rule)), "grocer", "duplicates")


def test_tokens_of_another_width_or_set_are_caught() -> None:
    shorter = one_kind(Tokens, lambda sent: Tokens(sent.owner, sent.data[:, 1:].copy()))
    other = one_kind(Tokens, lambda sent: Tokens(sent.owner + 1, sent.data))
    caught(run(3, "mill", deviating("mill", shorter)), "mill", "not due")
    caught(run(3, "mill", deviating("mill", other)), "mill", "not due")


# ---- relays


def swapped(data: Array) -> Array:
    """Neighbours change places; a last odd one stays."""
    out = data.copy()
    even = len(data) // 2 * 2
    out[0:even:2], out[1:even:2] = data[1:even:2], data[0:even:2]
    return out


MOVES = {"rotates": lambda data: np.roll(data, 1, axis=0), "swaps": swapped}


def relaying(cheater: str, kind: type[Message], move: Callable[[Array], Array]) -> Rule:
    """Moves the rows of every set but its own."""
    place = NAMES.index(cheater)

    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        if isinstance(message, kind) and message.owner != place:  # type: ignore[attr-defined]
            return [kind(message.owner, move(message.data))]  # type: ignore[attr-defined, call-arg]
        return [message]

    return rule


@pytest.mark.parametrize(("count", "cheater"), [(3, "bank"), (3, "mill"), (4, "grocer")])
@pytest.mark.parametrize("kind", [MaskedPoints, Positions])
@pytest.mark.parametrize("move", MOVES)
def test_a_relay_that_moves_rows_is_caught(move: str, kind: type[Message], count: int, cheater: str) -> None:
    rule = relaying(cheater, kind, MOVES[move])
    caught(run(count, cheater, deviating(cheater, rule)), cheater)


@pytest.mark.parametrize("cheater", ["bank", "grocer"])
def test_two_positions_swapped_are_enough_to_be_caught(cheater: str) -> None:
    swap = lambda data: data[[1, 0, *range(2, len(data))]]
    found = run(3, cheater, deviating(cheater, relaying(cheater, Positions, swap)))
    caught(found, cheater, "row order differs")


def test_a_holder_that_hands_over_other_tokens_than_it_relayed_is_caught() -> None:
    """It rotates the tokens against the shuffle that it will undo."""
    rule = one_kind(Tokens, lambda sent: Tokens(sent.owner, np.roll(sent.data, 1, axis=0)))
    caught(run(3, "grocer", deviating("grocer", rule)), "grocer")


# ---- a hub that claims more


def inflating(patch: pytest.MonkeyPatch, extra: Callable[[Array], Array]) -> None:
    """The hub, and only the hub, intersects: of every list's rows outside the intersection it adds some."""
    plain = align_module.match

    def common(lists: list[Array]) -> list[Array]:
        found = plain(lists)
        rest = [np.setdiff1d(np.arange(len(tokens)), at) for tokens, at in zip(lists, found, strict=True)]
        return [np.concatenate([at, extra(left)]).astype(np.uint32) for at, left in zip(found, rest, strict=True)]

    patch.setattr(align_module, "match", common)


@pytest.fixture
def mostly_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, span in (("bank", range(300)), ("grocer", range(280, 580)), ("mill", range(285, 585))):
        monkeypatch.setitem(SETS, name, span)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.usefixtures("mostly_strangers")
def test_a_hub_that_claims_one_row_more_is_caught_by_the_order_test(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claimed row misses all decoys, as it mostly does: only the order test is left, and it is enough."""
    for number in range(20):
        with monkeypatch.context() as patch:
            inflating(patch, lambda rest, number=number: rest[number : number + 1])
            found = run(count, "bank", honest("bank"))
        if not any("decoys" in str(result) for result in found.values()):
            caught(found, "bank", "row order differs")
            return
    pytest.fail("every claim hit a decoy")


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.usefixtures("mostly_strangers")
def test_a_hub_that_claims_many_rows_more_meets_our_decoys(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inflating(monkeypatch, lambda rest: rest[:250])
    caught(run(count, "bank", honest("bank")), "bank", "decoys")


def test_a_hub_that_tells_different_sizes_is_caught() -> None:
    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        wrong = isinstance(message, IntersectionSize) and peer == "mill"
        return [IntersectionSize(message.rows - 1) if wrong else message]  # type: ignore[attr-defined]

    caught(run(3, "bank", deviating("bank", rule)), "bank")


def test_a_size_that_cannot_be_is_caught() -> None:
    rule = one_kind(IntersectionSize, lambda sent: IntersectionSize(41))
    caught(run(2, "bank", deviating("bank", rule)), "bank", "cannot be")
    small = one_kind(IntersectionSize, lambda sent: IntersectionSize(9))
    caught(run(2, "bank", deviating("bank", small), intersection={"minimum": 10}), "bank", "cannot be")


# ---- wrong positions

WRONG_POSITIONS: dict[str, tuple[Callable[[Positions], Positions], str]] = {
    "a row that is not common": (lambda sent: Positions(sent.owner, other_row(sent.data)), ""),
    "the same row twice": (lambda sent: Positions(sent.owner, np.r_[sent.data[:1], sent.data[:-1]]), "not distinct"),
    "out of range": (lambda sent: Positions(sent.owner, np.r_[sent.data[:-1], np.uint32(10**6)]), "not in the set"),
    "one too few": (lambda sent: Positions(sent.owner, sent.data[:-1]), "were announced"),
    "of another set": (lambda sent: Positions((sent.owner + 1) % 3, sent.data), "not due"),
}


def other_row(data: Array) -> Array:
    free = np.setdiff1d(np.arange(len(data) + 1, dtype=np.uint32), data)
    return np.r_[data[:-1], free[:1]]


@pytest.mark.parametrize(("count", "cheater"), [(2, "bank"), (2, "grocer"), (3, "bank"), (3, "grocer")])
@pytest.mark.parametrize("what", WRONG_POSITIONS)
def test_wrong_positions_are_caught(what: str, count: int, cheater: str) -> None:
    change, said = WRONG_POSITIONS[what]
    caught(run(count, cheater, deviating(cheater, one_kind(Positions, change))), cheater, said)


# ---- the order test


@pytest.mark.parametrize("cheater", ["bank", "grocer"])
def test_who_sends_our_own_order_point_back_is_caught(cheater: str) -> None:
    def role(session: Session) -> Any:
        for channel in session.channels.values():
            bend(session, channel, lambda session, peer, message: [message] * (not isinstance(message, OrderPoint)))
            listen(channel)
        return align(session, ids(cheater), randomness=Stream(cheater))

    def listen(channel: Channel) -> None:
        plain = channel.receive

        def receive(expected: type[Message], timeout: float | None = None) -> Message:
            message = plain(expected, timeout)
            if isinstance(message, OrderPoint):
                Channel.send(channel, message)
            return message

        channel.receive = receive  # type: ignore[method-assign, assignment]

    caught(run(2, cheater, role), cheater, "our own point back")


@pytest.mark.parametrize(("count", "cheater"), [(2, "bank"), (2, "grocer"), (3, "mill")])
def test_a_wrong_order_tag_is_caught(count: int, cheater: str) -> None:
    rule = one_kind(OrderTag, lambda sent: OrderTag(sent.data ^ np.uint8(1)))
    caught(run(count, cheater, deviating(cheater, rule)), cheater, "row order differs")


@pytest.mark.parametrize("point", ["small order", "not canonical", "twist"])
def test_a_bad_order_point_is_caught(point: str) -> None:
    rule = one_kind(OrderPoint, lambda sent: OrderPoint(np.frombuffer(BAD_POINTS[point][0], np.uint8)))
    caught(run(2, "grocer", deviating("grocer", rule)), "grocer", BAD_POINTS[point][1])


def test_a_tag_made_without_the_order_does_not_pass_whatever_point_goes_with_it() -> None:
    """The base is not ours to choose: a known multiple of the peer's point does not help."""
    known = CURVE.scalar()

    def role(session: Session) -> Any:
        channel = session.channels["bank"]
        bend(session, channel, rule)
        return align(session, ids("grocer"), randomness=Stream("grocer"))

    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        if isinstance(message, OrderPoint):
            return [OrderPoint(CURVE.mask(rows((9).to_bytes(32, "little")), known)[0])]
        return [message]

    caught(run(2, "grocer", role), "grocer", "row order differs")


def test_order_points_and_tags_passed_on_from_one_party_to_another_do_not_pass() -> None:
    """The mill knows no order: it plays the grocer's points and tags to the press, and the other way round."""

    def role(session: Session) -> None:
        grocer, press = session.channels["grocer"], session.channels["press"]
        plain = align_module.order_test

        def man_in_the_middle(session: Session, *arguments: Any) -> None:
            if session.name != "mill":
                return plain(session, *arguments)
            for kind in (OrderPoint, OrderTag):
                first, second = grocer.receive(kind), press.receive(kind)
                press.send(first)
                grocer.send(second)
            return None

        patch.setattr(align_module, "order_test", man_in_the_middle)
        align(session, ids("mill"), randomness=Stream("mill"))

    with pytest.MonkeyPatch.context() as patch:
        found = run(4, "mill", role)
    caught(found, "mill", "row order differs from that of mill")


def test_nobody_uses_rows_before_everybodys_checks_have_passed() -> None:
    """The grocer shows a wrong tag to the mill alone; the bank, which saw nothing wrong, must not go on either."""
    released = []

    def keeping(name: str) -> Callable[[Session], Any]:
        def role(session: Session) -> None:
            honest(name)(session)
            released.append(name)

        return role

    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        wrong = isinstance(message, OrderTag) and peer == "mill"
        return [OrderTag(message.data ^ np.uint8(1)) if wrong else message]  # type: ignore[attr-defined]

    roles = {"bank": keeping("bank"), "grocer": deviating("grocer", rule), "mill": keeping("mill")}
    found = outcomes(roles, agree(3), parties(3))
    caught(found, "grocer", "row order differs")
    assert released == []


# ---- replays, other kinds, out of order


@pytest.fixture(scope="module")
def earlier() -> dict[str, dict[str, MemoryLink]]:
    """What an honest session between the same parties under the same agreement left on the wire."""
    mesh: dict[str, dict[str, MemoryLink]] = {}
    play({name: honest(name) for name in NAMES[:2]}, agree(2), identities=parties(2), recorded=mesh)
    return mesh


@pytest.mark.parametrize("number", range(15))
def test_a_message_of_an_earlier_session_is_caught(number: int, earlier: dict[str, dict[str, MemoryLink]]) -> None:
    left = [number]

    def tamper(me: str, peer: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if me == "bank":
            left[0] -= 1
            if left[0] == -1:
                return earlier["bank"]["grocer"].sent[number]
        return head, payload

    found = outcomes({name: honest(name) for name in NAMES[:2]}, agree(2), parties(2), tamper=tamper)
    assert isinstance(found["grocer"], ProtocolViolation)
    assert "session" in str(found["grocer"])


def test_these_were_all_its_messages(earlier: dict[str, dict[str, MemoryLink]]) -> None:
    kinds = [kind_name(parse_header(head).kind) for head, _ in earlier["bank"]["grocer"].sent]
    assert (len(kinds), kinds[0], kinds[-1]) == (15, "Hello", "Closing")


OUT_OF_ORDER: dict[str, Rule] = {
    "another kind": one_kind(MaskedPoints, lambda sent: Gate(True, 0)),
    "left out": one_kind(MaskedPoints, lambda sent: []),
    "sent twice": one_kind(SetSize, lambda sent: [sent, sent]),
    "too early": one_kind(Tokens, lambda sent: [Gate(True, 0), sent]),
    "something more at the end": one_kind(SeedReveal, lambda sent: [sent, Gate(True, 0)]),
}


@pytest.mark.parametrize("what", OUT_OF_ORDER)
def test_a_message_that_is_not_due_is_caught(what: str) -> None:
    caught(run(2, "grocer", deviating("grocer", OUT_OF_ORDER[what])), "grocer")


def test_points_of_a_set_that_is_not_due_are_caught() -> None:
    rule = one_kind(MaskedPoints, lambda sent: MaskedPoints((sent.owner + 1) % 3, sent.data))
    caught(run(3, "grocer", deviating("grocer", rule)), "grocer", "not due")


# ---- what is not caught


def test_not_caught_a_tracing_hub_learns_which_of_its_rows_the_next_party_has_although_the_gate_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub gives chosen rows a private scalar each. It tries each scalar on the grocer's points, which are masked
    by all others when they come back, and compares with the tokens of its own rows."""
    traced = {place: Stream(f"trace {place}")(32) for place in (0, 5, 15, 25, 39)}
    seen: dict[str, Any] = {"order": [], "batches": []}
    common, shuffle = align_module.match, exchange_module.shuffle_order
    own, last = exchange_module.hash_and_mask, exchange_module.check_and_mask

    def shuffled(n: int, key: bytes | None = None) -> Array:
        order = shuffle(n, key)
        if threading.current_thread().name == "bank":
            seen["order"].append(order)
        return order

    def masking(name: str, key: bytes, inputs: list[bytes]) -> Array:
        out = own(name, key, inputs)
        if threading.current_thread().name == "bank":
            out = out.copy()
            for place, scalar in traced.items():
                at = np.flatnonzero(seen["order"][0] == place)
                out[at] = CURVE.mask(out[at], scalar)
            seen["key"] = key
        return out

    def relaying(name: str, key: bytes, session: bytes, width: int, points: Array) -> Array:
        if threading.current_thread().name == "bank":
            seen["batches"].append(points)
        return token(last(name, key, points), session, width)

    def keeping(lists: list[Array]) -> list[Array]:
        seen["tokens"] = {row.tobytes() for row in lists[0]}
        return common(lists)

    monkeypatch.setattr(exchange_module, "shuffle_order", shuffled)
    monkeypatch.setattr(exchange_module, "hash_and_mask", masking)
    monkeypatch.setattr(exchange_module, "check_mask_and_hide", relaying)
    monkeypatch.setattr(align_module, "match", keeping)
    opened = []

    def hub(session: Session) -> Any:
        opened.append(session.id)
        return honest("bank")(session)

    found = run(3, "bank", hub, intersection={"minimum": 1000})
    assert {type(result) for result in found.values()} == {Refused}  # nobody saw a violation

    theirs = CURVE.mask(seen["batches"][-1], seen["key"])  # the grocer's set, masked by all
    total = sum(len(SETS[name]) + 128 for name in NAMES[:3])
    known = {
        place
        for place, scalar in traced.items()
        if seen["tokens"] & {row.tobytes() for row in token(CURVE.mask(theirs, scalar), opened[0], token_width(total))}
    }
    assert known == {place for place in traced if SETS["bank"][place] in SETS["grocer"]} == {15, 25, 39}


def test_not_caught_guessed_ids_in_a_partys_own_input() -> None:
    guesses = [f"customer {number}" for number in range(500)]
    roles = {"bank": honest("bank"), "grocer": lambda session: align(session, guesses)}
    found = play(roles, agree(2), identities=parties(2))
    assert {guesses[row] for row in found["grocer"].rows} == set(ids("bank"))


def released(found: Mapping[str, Any]) -> int | None:
    """How many rows all parties got; None: nobody got any."""
    (count,) = {None if isinstance(result, Exception) else len(result.rows) for result in found.values()}
    return count


def endings(attempts: Iterable[Callable[[], dict[str, Any]]], until: set[int | None]) -> set[int | None]:
    seen: set[int | None] = set()
    for attempt in attempts:
        seen.add(released(attempt()))
        if seen >= until:
            break
    return seen


def test_not_caught_a_hub_that_drops_a_row_and_misses_the_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain join has 30 rows. A dropped canary is seen by all, a dropped customer by nobody."""
    plain = align_module.match

    def dropping(index: int) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(align_module, "match", lambda lists: [np.delete(found, index) for found in plain(lists)])
            return run(3, "bank", honest("bank"))

    assert endings((partial(dropping, index) for index in range(30)), {29, None}) == {29, None}


def test_not_caught_a_relay_that_replaces_a_row_and_misses_the_canaries() -> None:
    """It hits a canary (seen by all), a customer (seen by nobody) or a row that is not in common (no loss)."""

    def spoiling(index: int) -> dict[str, Any]:
        def spoil(data: Array) -> Array:
            return np.concatenate(
                [data[:index], CURVE.mask(data[index : index + 1], CURVE.scalar()), data[index + 1 :]]
            )

        return run(3, "grocer", deviating("grocer", relaying("grocer", MaskedPoints, spoil)))

    assert endings((partial(spoiling, index) for index in range(60)), {29, 30, None}) == {29, 30, None}


# ---- commitments, and rows for the label holder only


def test_a_share_of_the_seed_other_than_the_committed_one_is_caught() -> None:
    rule = one_kind(SeedReveal, lambda sent: SeedReveal(bytes(32)))
    caught(run(3, "grocer", deviating("grocer", rule)), "grocer", "another share of the seed")


def test_a_share_of_the_seed_copied_from_the_other_is_caught() -> None:
    """Who commits to what another has committed to, and reveals what it reveals, would cancel its share."""

    def copying(session: Session) -> Any:
        channel = session.channels["bank"]
        seen: dict[type[Message], Message] = {}
        plain_send, plain_receive = channel.send, channel.receive

        def send(message: Message, timeout: float | None = None) -> None:
            if isinstance(message, Seen):
                seen[Seen], message = message, plain_receive(Seen)
            elif isinstance(message, (InputCommitment, SeedReveal)):
                message = seen.setdefault(type(message), plain_receive(type(message)))
            plain_send(message, timeout)

        def receive(expected: type[Message], timeout: float | None = None) -> Message:
            return seen[expected] if expected in seen else plain_receive(expected, timeout)

        channel.send, channel.receive = send, receive  # type: ignore[method-assign, assignment]
        return align(session, ids("grocer"), randomness=Stream("grocer"))

    found = outcomes({"bank": honest("bank"), "grocer": copying}, agree(2), parties(2))
    caught(found, "grocer", "another share of the seed")


HUB_ONLY = {"result": "rows to the label holder"}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("cheater", "kind"), [("grocer", MaskedPoints), ("mill", Positions)])
def test_a_relay_that_moves_the_hubs_set_is_caught_also_where_only_the_hub_gets_rows(
    cheater: str, kind: type[Message], move: str
) -> None:
    rule = relaying(cheater, kind, MOVES[move])
    found = run(3, cheater, deviating(cheater, rule), intersection=HUB_ONLY)
    if kind is Positions:  # of the same rows in another order: the order means nothing here
        assert set(found["bank"].rows) == {n for n, row in enumerate(SETS["bank"]) if 10 <= row < 40}
    else:
        assert isinstance(found["bank"], ProtocolViolation)


@pytest.mark.parametrize("what", WRONG_POSITIONS)
def test_wrong_positions_are_caught_also_where_only_the_hub_gets_rows(what: str) -> None:
    change, said = WRONG_POSITIONS[what]
    found = run(3, "grocer", deviating("grocer", one_kind(Positions, change)), intersection=HUB_ONLY)
    assert isinstance(found["bank"], ProtocolViolation)
    assert said in str(found["bank"])


@pytest.mark.parametrize("count", [2, 3])
def test_a_hub_that_alone_gets_rows_cannot_overstate_the_size(count: int) -> None:
    """The holder of its set intersects: the hub never sees the tokens of its own set, so it has nothing to claim."""
    rule = one_kind(IntersectionSize, lambda sent: IntersectionSize(sent.rows + 5))
    found = run(count, "bank", deviating("bank", rule), intersection=HUB_ONLY | {"minimum": 31})
    assert all(isinstance(found[name], (Refused, PeerAborted)) for name in NAMES[1:count])
    assert "below the agreed minimum of 31" in str(found[NAMES[count - 1]])


@pytest.mark.parametrize("cheater", ["bank", "grocer"])
def test_different_commitments_for_different_parties_are_caught(cheater: str) -> None:
    def rule(session: Session, peer: str, message: Message) -> Iterable[Message]:
        other = isinstance(message, InputCommitment) and peer == "mill"
        return [InputCommitment(bytes(32), message.seed) if other else message]  # type: ignore[attr-defined]

    caught(run(3, cheater, deviating(cheater, rule)), cheater, "a party is lying")


def test_fewer_points_than_canaries_and_decoys_are_refused_at_once() -> None:
    rule = one_kind(SetSize, lambda sent: SetSize(150))
    found = run(2, "grocer", deviating("grocer", rule), intersection={"decoys": 200})
    caught(found, "grocer", "grocer announces a set of 150 points, fewer than canaries and decoys")


def test_three_parties_the_hub_learns_no_row_before_the_others_have_checked_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It claims one row more, and leaves as soon as it has its rows: it never gets that far."""
    inflating(monkeypatch, lambda rest: rest[-1:])
    got = []

    def keeping(entries: Array, *arguments: Any) -> Array:
        got.append(threading.current_thread().name)
        return plain(entries, *arguments)

    plain = align_module.check_entries
    monkeypatch.setattr(align_module, "check_entries", keeping)
    found = run(3, "bank", honest("bank"))
    caught(found, "bank")
    assert "bank" not in got


def test_not_caught_two_parties_a_hub_that_overstates_the_size_has_its_rows_before_the_order_test_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the minimum holds against a semi-honest hub only, unless the false rows hit a decoy or canary."""
    monkeypatch.setitem(SETS, "bank", range(300))
    monkeypatch.setitem(SETS, "grocer", range(297, 900))
    released = []

    def keeping(entries: Array, ours: Any, size: int) -> Array:
        real = plain(entries, ours, size)
        if threading.current_thread().name == "bank":
            released.append(len(real))
        return real

    plain = align_module.check_entries
    monkeypatch.setattr(align_module, "check_entries", keeping)
    for number in range(40):
        with monkeypatch.context() as patch:
            inflating(patch, lambda rest, number=number: rest[number : number + 1])
            found = run(2, "bank", honest("bank"), intersection={"minimum": 4})
        assert not any(isinstance(result, list) for result in found.values())
        if released:
            assert released == [4]
            return
    pytest.fail("every claim hit a decoy")
