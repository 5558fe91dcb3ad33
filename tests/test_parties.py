"""What a conversation between parties promises before any protocol begins: messages, channels, agreement, keys,
handshake, ledger and files."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.agreement import Agreement, differences, flatten
from parties.channel import Channel
from parties.errors import (
    ColonnadeError,
    LocalError,
    PeerAborted,
    PeerLost,
    ProtocolViolation,
    Refused,
)
from parties.files import make_folder, write_whole
from parties.handshake import AgreementText, Hello
from parties.identity import Identity, PublicIdentity
from parties.ledger import Ledger, check_ledger
from parties.memory import links, outcomes, play
from parties.message import _REGISTRY as REGISTRY
from parties.message import (
    CLASSES,
    HEADER_LIMIT,
    Abort,
    Header,
    Message,
    decode,
    encode,
    kind,
    parse_header,
)
from parties.party_file import Party
from parties.session import Session, allowed_classes, converse
from psi.messages import Gate, MaskedPoints, Positions, SetSize
from tests.conftest import IDENTITIES, NAMES, agree, changed, nonces, parties
from vfl.messages import PartialEmbedding

BANK, GROCER, MILL = (IDENTITIES[name] for name in NAMES[:3])
PRESS = IDENTITIES["press"].public
SESSION = hashlib.sha256(b"a session").digest()


# ---- messages


def points(count: int = 3) -> MaskedPoints:
    return MaskedPoints(1, np.arange(32 * count, dtype=np.uint8).reshape(count, 32))


def embedding() -> PartialEmbedding:
    return PartialEmbedding(0, np.zeros(1))


def framed(message: Message, number: int = 0) -> tuple[bytes, bytes]:
    head, payload = encode(message, SESSION, BANK.public.key_id, GROCER.public.key_id, number)
    return head, bytes(payload)


def reframed(message: Message, payload: bytes | None = None, **fields: Any) -> tuple[bytes, bytes]:
    """A frame whose header says something else; the digest fits the payload unless it is given."""
    head, honest = framed(message)
    body = honest if payload is None else payload
    header = msgspec.msgpack.decode(head, type=Header)
    fitting = {"digest": hashlib.sha256(body).digest(), "length": len(body)}
    return msgspec.msgpack.encode(msgspec.structs.replace(header, **(fitting | fields))), body


def read(head: bytes, payload: bytes, expected: type[Message]) -> Message:
    return decode(parse_header(head), payload, expected)


MESSAGES = [
    Abort("refused"),
    Hello(bytes(32), bytes(64), "train", bytes(32)),
    AgreementText(np.frombuffer(b"{}", np.uint8)),
    SetSize(2**32 - 1),
    points(),
    Gate(False, 7),
    Positions(2, np.arange(5, dtype="<u4")),
    PartialEmbedding(7, np.array([1.5, -2e-300])),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    back = read(*framed(message), type(message))
    for name, value in vars(message).items():
        assert np.array_equal(getattr(back, name), value)


@given(st.binary(max_size=300))
def test_a_random_header_is_a_value_error(head: bytes) -> None:
    with pytest.raises(ValueError):
        parse_header(head)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(
    st.sampled_from(MESSAGES),
    st.dictionaries(st.integers(0, 10), VALUES, max_size=3),
    st.none() | st.binary(max_size=200),
    st.sampled_from(sorted(REGISTRY)),
)
def test_a_message_with_garbage_in_it_is_a_value_error_or_a_message(
    message: Message, garbage: dict[int, Any], payload: bytes | None, expected: int
) -> None:
    head, body = framed(message)
    fields = msgspec.msgpack.decode(head)
    if payload is not None:
        body, fields[8], fields[9] = payload, len(payload), hashlib.sha256(payload).digest()
    for place, value in garbage.items():
        fields[place] = value
    try:
        result = read(msgspec.msgpack.encode(fields), body, REGISTRY[expected])
    except ValueError:
        return
    assert type(result) is REGISTRY[expected]


BAD_FRAMES: dict[str, tuple[Callable[[], tuple[bytes, bytes]], type[Message]]] = {
    "protocol version": (lambda: reframed(points(), version=2), MaskedPoints),
    "unknown kind": (lambda: reframed(points(), kind=99), MaskedPoints),
    "another kind": (lambda: framed(points()), Positions),
    "dtype not allowed": (lambda: reframed(points(), dtype="|O"), MaskedPoints),
    "dtype big-endian": (lambda: reframed(Positions(1, np.arange(4, dtype="<u4")), dtype=">u4"), Positions),
    "dtype of another message": (lambda: reframed(points(), dtype="<u4", shape=(3, 8)), MaskedPoints),
    "dimensions": (lambda: reframed(points(), shape=(96,)), MaskedPoints),
    "four dimensions": (lambda: reframed(points(), shape=(1, 1, 3, 32)), MaskedPoints),
    "negative size": (lambda: reframed(points(), shape=(-3, -32)), MaskedPoints),
    "shape larger than the buffer": (lambda: reframed(points(), shape=(4, 32)), MaskedPoints),
    "shape that overflows": (lambda: reframed(points(), shape=(2**39, 2**39, 2**39)), MaskedPoints),
    "length": (lambda: reframed(points(), length=95, shape=(95, 1)), MaskedPoints),
    "payload cut": (lambda: (framed(points())[0], framed(points())[1][:-1]), MaskedPoints),
    "payload where none is due": (lambda: (framed(Gate(True, 0))[0], b"x"), Gate),
    "digest": (lambda: reframed(points(), digest=bytes(32)), MaskedPoints),
    "not a number": (
        lambda: reframed(PartialEmbedding(0, np.zeros(1)), np.array([np.nan]).tobytes()),
        PartialEmbedding,
    ),
    "infinite": (lambda: reframed(PartialEmbedding(0, np.zeros(1)), np.array([-np.inf]).tobytes()), PartialEmbedding),
    "no rows": (lambda: reframed(points(), b"", shape=(0, 32)), MaskedPoints),
    "too many fields": (lambda: reframed(Gate(True, 0), fields=msgspec.Raw(b"\x93\xc3\x00\x00")), Gate),
    "too few fields": (lambda: reframed(Gate(True, 0), fields=msgspec.Raw(b"\x90")), Gate),
    "field of another type": (lambda: reframed(Gate(True, 0), fields=msgspec.Raw(b"\x92\x01\x00")), Gate),
    "field out of range": (lambda: reframed(SetSize(200), fields=msgspec.Raw(b"\x91\x05")), SetSize),
    "an unknown header field": (lambda: (b"\x9c" + framed(Gate(True, 0))[0][1:] + b"\x00", b""), Gate),
    "a header field less": (lambda: (b"\x9a" + framed(Gate(True, 0))[0][1:-2], b""), Gate),
    "bytes after the header": (lambda: (framed(Gate(True, 0))[0] + b"\x00", b""), Gate),
    "header too long": (lambda: (bytes(HEADER_LIMIT + 1), b""), Gate),
    "an unknown reason": (lambda: reframed(Abort("local"), fields=msgspec.Raw(b"\x91\xa4oops")), Abort),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
def test_a_malformed_frame_is_a_value_error(what: str) -> None:
    make, expected = BAD_FRAMES[what]
    with pytest.raises(ValueError) as caught:
        read(*make(), expected)
    assert "\n" not in str(caught.value)


def test_a_deeply_nested_header_is_a_value_error() -> None:
    head = framed(Gate(True, 0))[0][:-2] + b"\x91" * 3000 + b"\xc0"
    with pytest.raises(ValueError):
        decode(parse_header(head), b"", Gate)


BAD_VALUES: dict[str, Callable[[], Message]] = {
    "signed bytes": lambda: MaskedPoints(0, np.zeros((2, 32), np.int8)),
    "one dimension": lambda: MaskedPoints(0, np.zeros(64, np.uint8)),
    "points of 31 bytes": lambda: MaskedPoints(0, np.zeros((2, 31), np.uint8)),
    "big-endian": lambda: Positions(0, np.zeros(2, ">u4")),
    "single precision": lambda: PartialEmbedding(0, np.zeros(2, np.float32)),
    "not finite": lambda: PartialEmbedding(0, np.array([1.0, np.inf])),
    "a text as reason": lambda: Abort("customer 7 is missing"),
    "a short nonce": lambda: Hello(bytes(32), bytes(64), "train", bytes(31)),
    "a set without canaries": lambda: SetSize(100),
}


@pytest.mark.parametrize("what", BAD_VALUES)
def test_a_message_refuses_bad_values_when_it_is_built(what: str) -> None:
    with pytest.raises(ValueError):
        BAD_VALUES[what]()


@pytest.mark.parametrize(
    ("number", "ledger_class", "dtype"), [(100, "control", ""), (9000, "secret", ""), (9000, "control", "|O")]
)
def test_the_registry_takes_no_duplicate_class_or_dtype(number: int, ledger_class: str, dtype: str) -> None:
    before = dict(REGISTRY)
    with pytest.raises(TypeError):

        @kind(number, ledger_class, dtype)
        @dataclass(frozen=True, eq=False)
        class Another(Message):
            pass

    assert before == REGISTRY


def test_every_message_has_one_number_and_a_class_of_the_ledger() -> None:
    assert all(cls.kind == number and cls.ledger_class in CLASSES for number, cls in REGISTRY.items())


# ---- channels


@dataclass
class Pair:
    """Two ends of one conversation, and the links below them."""

    bank: Channel
    grocer: Channel
    mesh: Any

    def to_grocer(self, head: bytes, payload: bytes) -> None:
        self.mesh["bank"]["grocer"].send(head, payload, 1.0)


def channel(me: Identity, peer: Identity, link: Any, ledger: Ledger | None = None) -> Channel:
    made = Channel(
        link,
        peer=peer.name,
        our_id=me.public.key_id,
        peer_id=peer.public.key_id,
        ledger=ledger or Ledger(me, None, frozenset(CLASSES)),
        timeout=5.0,
    )
    made.session = SESSION
    return made


@pytest.fixture
def pair() -> Pair:
    mesh = links(["bank", "grocer"])
    return Pair(channel(BANK, GROCER, mesh["bank"]["grocer"]), channel(GROCER, BANK, mesh["grocer"]["bank"]), mesh)


def violation(pair: Pair, head: bytes, payload: bytes, expected: type[Message] = MaskedPoints) -> str:
    pair.to_grocer(head, payload)
    with pytest.raises(ProtocolViolation) as caught:
        pair.grocer.receive(expected)
    assert caught.value.peer == "bank"
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_both_ends_have_the_same_transcript(pair: Pair) -> None:
    pair.bank.send(points())
    pair.bank.send(Gate(True, 0))
    pair.grocer.receive(MaskedPoints)
    assert pair.bank.transcripts[0] != pair.grocer.transcripts[1]
    pair.grocer.receive(Gate)
    assert pair.bank.transcripts == pair.grocer.transcripts[::-1]


@pytest.mark.parametrize("what", sorted(set(BAD_FRAMES) - {"an unknown reason", "another kind"}))
def test_a_malformed_frame_is_a_violation_that_names_the_peer(what: str, pair: Pair) -> None:
    make, expected = BAD_FRAMES[what]
    violation(pair, *make(), expected)


def test_a_message_of_another_session_number_sender_receiver_or_kind_is_a_violation(pair: Pair) -> None:
    assert "another session" in violation(pair, *reframed(points(), session=bytes(32)))
    assert "message 1 where 0 is due" in violation(pair, *framed(points(), number=1))
    assert "another sender" in violation(pair, *reframed(points(), sender=MILL.public.key_id))
    assert "another sender or receiver" in violation(pair, *reframed(points(), receiver=MILL.public.key_id))
    assert "sent Gate where MaskedPoints is due" in violation(pair, *framed(Gate(True, 0)))


def test_our_own_message_sent_back_is_a_violation(pair: Pair) -> None:
    pair.grocer.send(points())
    violation(pair, *pair.mesh["grocer"]["bank"].sent[0])


def test_a_message_sent_twice_is_a_violation(pair: Pair) -> None:
    pair.bank.send(points())
    pair.grocer.receive(MaskedPoints)
    assert "message 0 where 1 is due" in violation(pair, *pair.mesh["bank"]["grocer"].sent[0])


@pytest.mark.parametrize("message", MESSAGES[1:], ids=lambda message: type(message).__name__)
def test_no_bit_of_a_header_can_change_unseen(message: Message) -> None:
    """It is a violation at once, or both ends see at close that they hold different transcripts."""
    head, payload = framed(message)
    for at in range(len(head)):
        mesh = links(["bank", "grocer"])
        bank = channel(BANK, GROCER, mesh["bank"]["grocer"])
        grocer = channel(GROCER, BANK, mesh["grocer"]["bank"])
        bank.send(message)
        mesh["grocer"]["bank"].receive(1.0)
        mesh["bank"]["grocer"].send(head[:at] + bytes([head[at] ^ 1]) + head[at + 1 :], payload, 1.0)
        try:
            grocer.receive(type(message))
        except ProtocolViolation:
            continue
        assert bank.transcripts[0] != grocer.transcripts[1]


def test_an_abort_tells_the_kind_of_the_error_and_nothing_else(pair: Pair) -> None:
    pair.bank.session = bytes(32)  # it may come before both sides know the session
    pair.bank.abort("refused")
    with pytest.raises(PeerAborted, match="its policy or agreement refuses") as caught:
        pair.grocer.receive(MaskedPoints)
    assert (caught.value.peer, caught.value.reason, caught.value.exit_code) == ("bank", "refused", 3)


def test_an_abort_never_raises() -> None:
    class Broken:
        def send(self, header: bytes, payload: bytes, timeout: float) -> None:
            raise PeerLost("gone", peer="grocer")

    channel(BANK, GROCER, Broken()).abort("local")


def test_silence_is_a_lost_peer(pair: Pair) -> None:
    with pytest.raises(PeerLost) as caught:
        pair.bank.receive(Gate, timeout=0.02)
    assert caught.value.peer == "grocer"


def test_a_message_too_large_for_a_frame_is_our_own_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.message.PAYLOAD_LIMIT", 95)
    with pytest.raises(LocalError, match="in parts"):
        pair.bank.send(points())
    assert pair.mesh["bank"]["grocer"].sent == []
    assert "length" in violation(pair, *framed_unlimited(monkeypatch))


def framed_unlimited(monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    with monkeypatch.context() as patch:
        patch.setattr("parties.message.PAYLOAD_LIMIT", 96)
        return framed(points())


class Answering:
    """A link whose other end answers every question with its number, and counts how many wait."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.most = self.answered = 0

    def send(self, header: bytes, payload: bytes, timeout: float) -> None:
        self.waiting.append(read(header, bytes(payload), SetSize).points)  # type: ignore[attr-defined]
        self.most = max(self.most, len(self.waiting))

    def receive(self, timeout: float) -> tuple[bytes, bytes]:
        answer = SetSize(1000 + self.waiting.pop(0))
        head, payload = encode(answer, SESSION, GROCER.public.key_id, BANK.public.key_id, self.answered)
        self.answered += 1
        return head, bytes(payload)


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 4, 25])
def test_ask_keeps_a_window_in_flight_and_the_order(window: int, count: int) -> None:
    link, drawn = Answering(), []

    def questions() -> Iterator[SetSize]:
        for number in range(count):
            drawn.append(number)
            yield SetSize(200 + number)

    seen = []
    for answer in channel(BANK, GROCER, link).ask(questions(), SetSize, window):
        seen.append(answer.points)
        assert len(drawn) - len(seen) < window
    assert seen == [1200 + number for number in range(count)]
    assert link.most == min(window, count)


# ---- ledger


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_message_is_recorded_before_it_leaves(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    mesh = links(["bank", "grocer"])
    bank = channel(BANK, GROCER, mesh["bank"]["grocer"], Ledger(BANK, path, frozenset(CLASSES)))
    bank.send(points())
    (line,) = lines(path)
    head, payload = mesh["bank"]["grocer"].sent[0]
    told = {key: line[key] for key in ("to", "kind", "class", "shape", "bytes")}
    assert told == {
        "to": "grocer",
        "kind": "MaskedPoints",
        "class": "masked",
        "shape": [3, 32],
        "bytes": len(head) + len(payload),
    }
    assert line["digest"] == hashlib.sha256(len(head).to_bytes(4, "big") + head + payload).hexdigest()


def test_a_class_that_is_not_allowed_is_refused_and_neither_sent_nor_recorded(pair: Pair) -> None:
    ledger = Ledger(BANK, None, frozenset(CLASSES) - {"plaintext"})
    mesh = links(["bank", "grocer"])
    bank = channel(BANK, GROCER, mesh["bank"]["grocer"], ledger)
    before = bank.transcripts
    with pytest.raises(Refused, match="PartialEmbedding is plaintext") as caught:
        bank.send(PartialEmbedding(0, np.ones(4)))
    assert caught.value.peer == "grocer"
    assert (mesh["bank"]["grocer"].sent, ledger.entries, bank.transcripts) == ([], 0, before)
    bank.send(Gate(True, 0))
    assert {key[:2] for key in ledger.bytes_sent} == {("grocer", "Gate")}


def test_plaintext_leaves_only_where_there_is_nobody_to_hide_behind() -> None:
    assert "plaintext" in allowed_classes(agree(2))
    assert "plaintext" not in allowed_classes(agree(3))
    assert allowed_classes(agree(3)) | {"plaintext"} == set(CLASSES)


def test_a_sealed_ledger_passes_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(BANK, path, frozenset(CLASSES))
    ledger.note("opened", party="bank")
    ledger.record("grocer", "Gate", "control", (), 10, bytes(32))
    with pytest.raises(LocalError, match="without a signature"):
        check_ledger(path, BANK.public)
    ledger.seal()
    assert check_ledger(path, BANK.public)[ledger.entries] == ledger.head
    with pytest.raises(LocalError, match="line 3: the chain is broken"):
        check_ledger(path, GROCER.public)


def test_nothing_is_sent_when_it_cannot_be_recorded(tmp_path: Path) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    ledger = Ledger(BANK, None, frozenset(CLASSES))
    ledger._file = Full()  # type: ignore[assignment]
    mesh = links(["bank", "grocer"])
    with pytest.raises(LocalError, match="No space left"):
        channel(BANK, GROCER, mesh["bank"]["grocer"], ledger).send(Gate(True, 0))
    assert mesh["bank"]["grocer"].sent == []
    with pytest.raises(LocalError, match="cannot write the ledger"):
        Ledger(BANK, tmp_path / "missing" / "ledger.jsonl")


# ---- identity


def test_a_key_file_is_private_comes_back_equal_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    BANK.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path) == BANK
    with pytest.raises(LocalError, match="never overwritten"):
        GROCER.save(path)
    assert Identity.load(path) == BANK


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_key_file_that_others_can_touch_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    BANK.save(path)
    path.chmod(mode)
    with pytest.raises(LocalError, match="chmod 600"):
        Identity.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        '{"colonnade_key": 1}',
        '{"colonnade_key": 1, "name": "a", "curve_secret": "zz", "sign_secret": "zz"}',
        '{"colonnade_key": 1, "name": "a", "curve_secret": "00ff", "sign_secret": "00ff"}',
        json.dumps({"colonnade_key": 1, "name": "a", "curve_secret": "11" * 28, "sign_secret": "11" * 32}),
        json.dumps({"colonnade_key": 1, "name": "a", "curve_secret": "11" * 32, "sign_secret": "11" * 31}),
    ],
)
def test_what_is_not_a_key_file_is_refused_without_showing_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    write_whole(path, text.encode(), mode=0o600)
    with pytest.raises(LocalError, match="is not a key file") as caught:
        Identity.load(path)
    assert "1111" not in str(caught.value)


def test_a_key_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.key", tmp_path):
        with pytest.raises(LocalError, match="cannot read the key file"):
            Identity.load(path)


def test_no_repr_shows_a_secret() -> None:
    for text in (repr(BANK), str(BANK), f"{[BANK]}"):
        assert str(BANK.curve_secret) not in text
        assert str(BANK.sign_secret) not in text
        assert BANK.sign_secret.hex() not in text


def test_a_signature_counts_for_its_purpose_its_data_and_its_signer_only() -> None:
    signature = BANK.sign("approval", b"data")
    assert BANK.public.signed("approval", b"data", signature)
    assert not BANK.public.signed("ledger", b"data", signature)
    assert not BANK.public.signed("approval", b"Data", signature)
    assert not GROCER.public.signed("approval", b"data", signature)
    assert not BANK.public.signed("approval", b"data", b"")
    assert not BANK.public.signed("approva", b"l/1data", BANK.sign("approval", b"data"))


def test_a_public_key_is_one_line_and_has_a_fingerprint_of_its_own() -> None:
    assert PublicIdentity.parse(str(BANK.public)) == BANK.public
    assert len({identity.public.fingerprint for identity in IDENTITIES.values()}) == 4
    assert len(BANK.public.fingerprint) == 39
    swapped = PublicIdentity(BANK.public.verify, BANK.public.curve)
    assert swapped.fingerprint != BANK.public.fingerprint


@pytest.mark.parametrize(
    "text", ["", "colonnade1:", "colonnade2:" + "A" * 86, "colonnade1:" + "A" * 82, "colonnade1:é", "A" * 86]
)
def test_what_is_not_a_public_key_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a public key"):
        PublicIdentity.parse(text)


@pytest.mark.parametrize("respell", [lambda text: text[:30] + "!\n" + text[30:], lambda text: text[:-1] + "_"])
def test_a_public_key_has_one_spelling(respell: Callable[[str], str]) -> None:
    text = str(BANK.public)
    assert respell(text) != text
    with pytest.raises(ValueError):
        PublicIdentity.parse(respell(text))


# ---- agreement

HEAD = """
title = "Joint score"
purpose = "credit risk"
legal_basis = "consent"
expires = 2999-12-31
"""


def party_lines(name: str, role: str = "feature holder", endpoint: str | None = None, key: str = "") -> str:
    endpoint = f"tcp://{name}:1" if endpoint is None else endpoint
    listens = f'endpoint = "{endpoint}"\n' if endpoint else ""
    return f'[[parties]]\nname = "{name}"\nrole = "{role}"\npublic_key = "{key or IDENTITIES[name].public}"\n{listens}'


TOML = HEAD + party_lines("bank", "label holder") + party_lines("grocer") + "[model]\nC = 2.5\n"


def load(tmp_path: Path, text: str) -> Agreement:
    path = tmp_path / "agreement.toml"
    path.write_text(text)
    return Agreement.load(path)


def test_layout_comments_and_spelt_out_defaults_do_not_change_what_is_signed(tmp_path: Path) -> None:
    plain = load(tmp_path, TOML)
    other = load(
        tmp_path,
        "# our job\nexpires=2999-12-31\nlegal_basis='consent'\nmodel = {solver = 'subspace', C = 2.5}\n"
        + 'purpose = """credit risk"""\n'
        + "title = 'Joint score'\nintersection.minimum = 100\n"
        + party_lines("bank", "label holder")
        + "\n\n"
        + party_lines("grocer"),
    )
    assert other == plain
    assert (other.canonical, other.digest) == (plain.canonical, plain.digest)
    assert load(tmp_path, TOML.replace("2.5", "2.50001")).digest != plain.digest
    assert (
        load(tmp_path, TOML.replace("C = 2.5", "C = 2")).canonical
        == load(tmp_path, TOML.replace("C = 2.5", "C = 2.0")).canonical
    )


def put(plain: Any, path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for key in outer:
        plain = next(party for party in plain if party["name"] == key) if isinstance(plain, list) else plain[key]
    plain[int(last) if isinstance(plain, list) else last] = value


def another(plain: bytes, path: str, value: Any) -> tuple[Any, bytes] | None:
    """Some other value that an agreement may have at `path`, and that agreement's text."""
    near = [not value] if isinstance(value, bool) else []
    if isinstance(value, (int, float)) and not near:
        near = [value + 1, value / 2, (1 + value) / 2]
    named = ["size", "P256_XMD:SHA-256_SSWU_RO_", "sgd", "paillier", "2998-12-31", "tcp://other:1", str(PRESS)]
    for candidate in [*near, f"{value}x", 2048, *named]:
        theirs = json.loads(plain)
        put(theirs, path, candidate)
        try:
            return candidate, msgspec.convert(theirs, Agreement, strict=True).canonical
        except msgspec.ValidationError:
            continue
    return None


def test_every_single_difference_is_listed_with_both_values() -> None:
    ours = agree(3)
    fixed = set()
    for path, value in flatten(ours).items():
        if path.startswith("network."):  # needs another kind of model: two differences
            continue
        changed_value = another(ours.canonical, path, value)
        if changed_value is None:
            fixed.add(path)
            continue
        found = differences(ours, changed_value[1])
        if path.endswith(".name"):  # another party altogether: all its fields are listed
            assert {path for path, _, _ in found} >= {path, f"parties.{value}x.role"}
        else:
            assert found == [(path, value, changed_value[0])]
    roles = {f"parties.{name}.role" for name in NAMES[:3]}
    places = {f"parties.{name}.place" for name in NAMES[:3]}  # another order is a difference of its own
    others = {"job.mode", "job.coordinator_trains", "horizontal", "columns"}  # tables of other jobs
    absent = {"search", "information"} | others
    bound = {"model.kind", "model.early_stopping"}  # what else is agreed on does not go with another
    assert fixed <= roles | places | absent | bound
    assert differences(ours, ours.canonical) == []


def test_another_order_of_the_parties_is_a_difference() -> None:
    ours = agree(3)
    theirs = changed(ours, parties=[ours.parties[0], ours.parties[2], ours.parties[1]])
    assert theirs.digest != ours.digest
    assert differences(ours, theirs.canonical)


@pytest.mark.parametrize("text", [b"", b"[]", b"7", b"{", b"\xff", agree(2).canonical[:-1] + b',"extra":1}'])
def test_a_peers_text_that_is_no_agreement_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        differences(agree(2), text)


def test_a_peers_deeply_nested_text_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        differences(agree(2), b"[" * 100_000)


FIELD_ERRORS = {
    "unknown field": (TOML + "D = 1\n", "unknown field 'D'.*model"),
    "unknown table": (TOML + "[modle]\n", "unknown field 'modle'"),
    "missing field": (TOML.replace('purpose = "credit risk"', ""), "missing required field 'purpose'"),
    "empty text": (TOML.replace("credit risk", ""), "purpose"),
    "wrong type": (TOML.replace("2.5", '"2.5"'), "model.C"),
    "out of range": (TOML.replace("2.5", "0"), "model.C"),
    "not finite": (TOML.replace("2.5", "inf"), "not finite"),
    "not a number": (TOML.replace("2.5", "nan"), "model.C|not finite"),
    "few decoys": (TOML + "[intersection]\ndecoys = 63\n", "intersection.decoys"),
    "no minimum": (TOML + "[intersection]\nminimum = -1\n", "intersection.minimum"),
    "short key": (TOML + "[encryption]\nkey_bits = 1024\n", "encryption.key_bits"),
    "another scheme": (TOML + '[encryption]\nscheme = "rot13"\n', "encryption.scheme"),
    "too few rows off the mode": (TOML + "minimum_rows_off_mode = 9\n", "model.minimum_rows_off_mode"),
    "not a date": (TOML.replace("2999-12-31", '"soon"'), "expires"),
    "not a key": (TOML.replace("colonnade1:", "colonnade:"), "not a public key.*parties"),
    "bad name": (TOML.replace('"grocer"', '"The Grocer"'), "The Grocer.*parties"),
    "bad endpoint": (TOML.replace("tcp://bank:1", "http://bank"), "endpoint of bank.*parties"),
    "bad role": (TOML.replace('"feature holder"', '"observer"'), "parties.*role"),
    "one party": (HEAD + party_lines("bank", "label holder"), "parties"),
    "no label holder": (HEAD + party_lines("bank") + party_lines("grocer"), "exactly one party is the label holder"),
    "two label holders": (TOML.replace("feature holder", "label holder"), "exactly one party is the label holder"),
    "same name": (TOML + party_lines("grocer", key=str(MILL.public)), "same name"),
    "same key": (TOML + party_lines("mill", key=str(GROCER.public)), "same public_key"),
    "two without endpoint": (
        HEAD + party_lines("bank", "label holder", "") + party_lines("grocer", endpoint="") + party_lines("mill"),
        "two parties without an endpoint",
    ),
    "not TOML": ("title = ", "is not valid TOML"),
}


MISSPELT = {
    "[modle]\nC = 1.0": "did you mean 'model'?",
    '[model]\nsolvr = "sgd"': "did you mean 'solver'?",
    '[model]\nsolver = "subspac"': "did you mean 'subspace'?",
    '[[parties]]\nname = "bank"\nrole = "label hodler"\n[[parties]]\nname = "b"': "did you mean 'label holder'?",
    "[encryption]\nkey_bits = 1024": "allowed are '2048', '3072', '4096'",
    "[job]\nzzz = 1": "allowed are 'mode', 'coordinator_trains'",
    "[search.grid]\nalfa = [1.0]": "did you mean 'alpha'?",
    "title = 3": "write it in quotes",
    '[model]\nC = "1.0"': "write it without quotes",
    'title = "A"': "missing required field 'purpose'; add it",
}


@pytest.mark.parametrize("text", MISSPELT)
def test_what_is_misspelt_in_an_agreement_is_said_with_what_may_stand_there(text: str, tmp_path: Path) -> None:
    (tmp_path / "agreement.toml").write_text(text)
    with pytest.raises(LocalError) as error:
        Agreement.load(tmp_path / "agreement.toml")
    assert str(error.value).endswith(MISSPELT[text])


@pytest.mark.parametrize("what", FIELD_ERRORS)
def test_a_bad_agreement_is_refused_with_file_and_field(what: str, tmp_path: Path) -> None:
    text, match = FIELD_ERRORS[what]
    with pytest.raises(LocalError, match=match) as caught:
        load(tmp_path, text)
    assert "agreement.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_agreement_that_is_not_utf8_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "agreement.toml").write_bytes(b'title = "\xe9"')
    with pytest.raises(LocalError, match="not valid TOML"):
        Agreement.load(tmp_path / "agreement.toml")
    with pytest.raises(LocalError, match="cannot read the agreement"):
        Agreement.load(tmp_path / "another.toml")


def test_an_agreement_ends_with_its_last_day() -> None:
    agreement = agree(2, expires="2030-06-30")
    agreement.check_expiry(date(2030, 6, 30))
    with pytest.raises(Refused, match="expired on 2030-06-30"):
        agreement.check_expiry(date(2030, 7, 1))


def test_of_two_parties_the_earlier_with_an_endpoint_listens_and_the_label_holder_is_the_hub(tmp_path: Path) -> None:
    agreement = load(
        tmp_path,
        HEAD + party_lines("mill", endpoint="") + party_lines("grocer") + party_lines("bank", "label holder"),
    )
    assert [party.name for party in agreement.ring] == ["bank", "mill", "grocer"]
    assert agreement.feature_holders == 2
    for pair in (("mill", "grocer"), ("mill", "bank"), ("grocer", "bank")):
        assert sum(agreement.listens(*order) for order in (pair, pair[::-1])) == 1
    assert agreement.listens("grocer", "bank")
    assert agreement.listens("bank", "mill")
    with pytest.raises(LocalError, match="no party named 'press'"):
        agreement.party("press")


# ---- handshake and close


def meet(folder: Path | None = None, *, tamper: Any = None, **sides: dict[str, Any]) -> dict[str, Any]:
    """A handshake between parties that need not agree; each side's options of `converse`. Ids, or how it ended."""
    mesh, found = links(list(sides), tamper), {}

    def run(name: str, options: dict[str, Any]) -> None:
        ledger = Ledger(IDENTITIES[name], folder and folder / f"{name}.jsonl", frozenset(CLASSES))
        try:
            with converse(IDENTITIES[name], links=mesh[name], ledger=ledger, **options) as session:
                found[name] = session.id
        except ColonnadeError as error:
            found[name] = error
        for link in mesh[name].values():
            link.leave()

    threads = [threading.Thread(target=run, args=side) for side in sides.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_a_differing_agreement_is_refused_at_both_sides_field_by_field() -> None:
    ours = agree(2)
    theirs = changed(ours, title="Another", model={"C": 3.0})
    found = meet(bank={"agreement": ours}, grocer={"agreement": theirs})
    assert {type(result) for result in found.values()} == {Refused}
    bank, grocer = str(found["bank"]), str(found["grocer"])
    assert "grocer has another agreement (2 fields differ)" in bank
    assert "model.C: ours 1.0, theirs 3.0" in bank
    assert "model.C: ours 3.0, theirs 1.0" in grocer
    assert "title: ours 'Another', theirs 'in memory'" in grocer


@pytest.mark.parametrize("odd", NAMES[:3])
def test_one_party_with_another_agreement_stops_all_before_any_data(odd: str) -> None:
    ours = agree(3)
    sides = {name: {"agreement": changed(ours, purpose="else") if name == odd else ours} for name in NAMES[:3]}
    found = meet(**sides)
    assert {result.exit_code for result in found.values()} == {3}
    assert sum("purpose: ours" in str(result) for result in found.values()) >= 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"line\\nERROR all is well": 1}', ProtocolViolation),
        (changed(agree(2), title="x\nERROR all is well" * 9).canonical, Refused),
    ],
    ids=["field", "value"],
)
def test_a_peers_agreement_cannot_break_our_error_line(text: bytes, error: type[ColonnadeError]) -> None:
    def tamper(me: str, peer: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if me == "grocer" and parse_header(head).kind == AgreementText.kind:
            forged = AgreementText(np.frombuffer(text, np.uint8))
            head, data = encode(forged, bytes(32), GROCER.public.key_id, BANK.public.key_id, 1)
            return head, bytes(data)
        return head, payload

    found = meet(tamper=tamper, bank={"agreement": agree(2)}, grocer={"agreement": agree(2, title="another")})
    assert isinstance(found["bank"], error)
    assert "\n" not in str(found["bank"])


@pytest.mark.parametrize(
    "approval",
    [bytes(64), agree(2, title="another").approve(GROCER), agree(2).approve(MILL)],
    ids=["none", "another agreement's", "another party's"],
)
def test_a_party_that_has_not_approved_is_refused(approval: bytes) -> None:
    agreement = agree(2)
    found = meet(bank={"agreement": agreement}, grocer={"agreement": agreement, "approval": approval})
    assert isinstance(found["bank"], Refused)
    assert "grocer has not approved" in str(found["bank"])
    assert found["grocer"].exit_code == 3


def test_two_tasks_do_not_meet() -> None:
    agreement = agree(2)
    found = meet(bank={"agreement": agreement, "task": "train"}, grocer={"agreement": agreement, "task": "score"})
    assert {type(result) for result in found.values()} == {Refused}
    assert "wants to score, we want to train" in str(found["bank"])


def test_an_expired_agreement_or_a_key_that_it_does_not_list_starts_nothing() -> None:
    expired = agree(2, expires="2020-01-01")
    stranger = changed(agree(2), parties=msgspec.to_builtins(agree(3).parties[:1] + agree(3).parties[2:]))
    for agreement, text in ((expired, "expired"), (impostor(stranger), "another key")):
        mesh = links(["bank", "grocer"])
        with pytest.raises(Refused, match=text), converse(BANK, agreement, mesh["bank"], ledger=Ledger(BANK)):
            pass
        assert mesh["bank"]["grocer"].sent == []


def impostor(agreement: Agreement) -> Agreement:
    """The bank's name with the grocer's key."""
    listed = msgspec.to_builtins(agreement)["parties"]
    listed[0]["public_key"] = str(GROCER.public)
    return changed(agreement, parties=listed)


def test_session_ids_are_equal_at_all_and_fresh_each_time() -> None:
    runs = [
        play({name: lambda session: session.id for name in NAMES[:3]}, agree(3), identities=parties(3)) for _ in "ab"
    ]
    assert all(len(set(found.values())) == 1 for found in runs)
    assert runs[0]["bank"] != runs[1]["bank"]


def test_a_session_id_depends_on_agreement_task_and_every_nonce() -> None:
    def session(agreement: Agreement, task: str, given: dict[str, bytes]) -> bytes:
        found = outcomes(
            {name: lambda session: session.id for name in NAMES[:2]}, agreement, parties(2), task=task, nonces=given
        )
        return bytes(found["bank"])

    given = nonces(2)
    base = session(agree(2), "train", given)
    assert session(agree(2), "train", given) == base
    others = [
        session(agree(2, title="another"), "train", given),
        session(agree(2), "score", given),
        session(agree(2), "train", given | {"bank": bytes(32)}),
        session(agree(2), "train", given | {"grocer": bytes(32)}),
    ]
    assert len({base, *others}) == 5


def test_at_close_the_ledger_holds_every_peers_signature_under_what_both_saw(tmp_path: Path) -> None:
    agreement = agree(3)
    found = meet(tmp_path, **{name: {"agreement": agreement} for name in NAMES[:3]})
    session_id = found["bank"]
    countersigned = {}
    for name in NAMES[:3]:
        check_ledger(tmp_path / f"{name}.jsonl", IDENTITIES[name].public)
        for line in lines(tmp_path / f"{name}.jsonl"):
            if line.get("event") == "countersigned":
                countersigned[name, line["peer"]] = line
    assert len(countersigned) == 6
    for (me, peer), line in countersigned.items():
        mirror = countersigned[peer, me]
        assert (line["sent"], line["received"]) == (mirror["received"], mirror["sent"])
        halves = [(IDENTITIES[me].public.key_id, line["sent"]), (IDENTITIES[peer].public.key_id, line["received"])]
        (first, sent), (second, received) = sorted(halves)
        statement = session_id + first + second + bytes.fromhex(sent) + bytes.fromhex(received)
        assert IDENTITIES[peer].public.signed("transcript", statement, bytes.fromhex(line["signature"]))


def say(session: Session) -> str:
    """One harmless message each way, whose value the role does not check."""
    session.broadcast(SetSize(200))
    session.gather(SetSize)
    return "done"


def close_with(number: int) -> dict[str, Any]:
    """Flip the last bit of the bank's message `number`, which stays well formed."""
    left = [number]

    def tamper(me: str, peer: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if me == "bank":
            left[0] -= 1
            if left[0] == -1:
                return head[:-1] + bytes([head[-1] ^ 1]), payload
        return head, payload

    return outcomes(dict.fromkeys(NAMES[:2], say), agree(2), parties(2), tamper=tamper)


def test_an_altered_message_that_nobody_checked_is_found_at_close() -> None:
    assert set(outcomes(dict.fromkeys(NAMES[:2], say), agree(2), parties(2)).values()) == {"done"}
    found = close_with(1)
    assert {type(result) for result in found.values()} == {ProtocolViolation}
    assert "its record of this session differs from ours" in str(found["grocer"])
    assert "signature under the transcript" in str(close_with(2)["grocer"])


@pytest.mark.parametrize(
    ("error", "reason", "exit_code"),
    [
        (LocalError("customer 7 is missing"), "local", 4),
        (Refused("customer 7 says no"), "refused", 3),
        (ProtocolViolation("customer 7 lies"), "violation", 5),
        (ZeroDivisionError("customer 7"), "error", 4),
    ],
)
def test_an_error_in_one_role_reaches_the_others_as_its_kind_only(
    error: Exception, reason: str, exit_code: int
) -> None:
    def failing(session: Session) -> None:
        raise error

    mesh: dict[str, Any] = {}
    found = outcomes({"bank": failing, "grocer": say, "mill": say}, agree(3), parties(3), recorded=mesh)
    assert found["bank"] is error
    for name in ("grocer", "mill"):
        assert isinstance(found[name], PeerAborted)
        assert (found[name].reason, found[name].exit_code, found[name].peer) == (reason, exit_code, "bank")
    assert not any(b"customer" in head + payload for link in mesh["bank"].values() for head, payload in link.sent)


def test_an_error_knows_its_phase_and_the_innermost_one_counts() -> None:
    def role(session: Session) -> None:
        with session.phase("align"), session.phase("reveal"):
            raise LocalError("no")

    found = outcomes({"bank": role, "grocer": role}, agree(2), parties(2))
    assert found["bank"].phase == "reveal"


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {error.kind: error.exit_code for error in (LocalError, Refused, PeerLost, ProtocolViolation)}
    assert codes == {"local": 2, "refused": 3, "lost": 4, "violation": 5}
    aborted = {reason: PeerAborted("", peer="a", reason=reason).exit_code for reason in (*codes, "error")}
    assert aborted == {"local": 4, "refused": 3, "lost": 4, "violation": 5, "error": 4}


# ---- a party's own file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "agreement.toml").write_text(TOML)
    BANK.save(tmp_path / "bank.key")
    GROCER.save(tmp_path / "grocer.key")
    return tmp_path


def own_file(folder: Path, name: str = "bank", key: str = "", label: str = 'label = "y"', more: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(
        f'agreement = "agreement.toml"\nkey = "{key or name}.key"\noutput = "out"\n'
        f'[table]\npath = "{name}.csv"\nid = "id"\nfeatures = ["x"]\n{label}\n{more}'
    )
    return path


def test_a_partys_file_is_read_relative_to_itself(folder: Path) -> None:
    party = Party(own_file(folder))
    assert (party.name, party.is_label_holder) == ("bank", True)
    assert (party.source.path, party.output) == (folder / "bank.csv", folder / "out")
    assert not Party(own_file(folder, "grocer", label="")).is_label_holder


@pytest.mark.parametrize(
    ("more", "text"),
    [("minimum_key_bits = 4096", "keys of 4096 bits"), ("maximum_exchanges = 99", "allows 99 exchanges")],
)
def test_a_stricter_policy_refuses_what_the_agreement_allows(more: str, text: str, folder: Path) -> None:
    with pytest.raises(Refused, match=text):
        Party(own_file(folder, more=f"[policy]\n{more}\n"))


def test_a_laxer_policy_changes_nothing(folder: Path) -> None:
    lax = "[policy]\nminimum_key_bits = 2048\nmaximum_exchanges = 100\nminimum_intersection = 1\n"
    party = Party(own_file(folder, more=lax))
    assert party.agreement == Agreement.load(folder / "agreement.toml")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "grocer"}, "the label holder, and nobody else"),
        ({"more": "[policy]\nfrobid = []\n"}, "unknown field 'frobid'.*did you mean 'forbid'"),
        ({"more": '[prepare.numbers.x]\nmissing = "med"\n'}, "did you mean 'median'"),
        ({"more": "[prepare.categories.x]\nvalus = []\n"}, "did you mean 'values'"),
        ({"more": '[policy]\nforbid = ["control"]\n'}, "policy.forbid"),
        ({"more": "[policy]\nminimum_intersection = -1\n"}, "policy.minimum_intersection"),
        ({"more": 'separator = ";;"\n'}, "table.separator"),
        ({"key": "nobody"}, "cannot read the key file"),
    ],
)
def test_a_bad_party_file_is_refused(change: dict[str, str], text: str, folder: Path) -> None:
    with pytest.raises(LocalError, match=text):
        Party(own_file(folder, **change))


def test_a_key_that_the_agreement_does_not_list_is_refused_with_our_fingerprint(folder: Path) -> None:
    forged = Identity("bank", MILL.public, MILL.curve_secret, MILL.sign_secret)
    forged.save(folder / "forged.key")
    with pytest.raises(Refused, match=MILL.public.fingerprint):
        Party(own_file(folder, key="forged"))


def test_an_approval_is_asked_for_and_ends_with_any_change_of_the_agreement(folder: Path) -> None:
    party = Party(own_file(folder))
    with pytest.raises(Refused, match="colonnade sign"):
        _ = party.approval
    party.sign()
    assert party.agreement.approved("bank", party.approval)
    assert not party.agreement.approved("grocer", party.approval)
    (folder / "agreement.toml").write_text(TOML.replace("2.5", "2.6"))
    with pytest.raises(Refused, match="has changed since we approved it"):
        _ = Party(own_file(folder)).approval
    party.approval_path.write_text('{"party": "bank", "agreement": "", "signature": "zz"}')
    with pytest.raises(Refused, match="sign it again"):
        _ = party.approval
    (folder / "agreement.toml").write_text(TOML.replace("2999", "2020"))
    with pytest.raises(Refused, match="expired"):
        Party(own_file(folder)).sign()


# ---- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, b"first")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(LocalError, match="No space left"):
            write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, b"third")
    assert path.read_bytes() == b"third"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing" / "a", tmp_path / "taken", tmp_path / "file" / "a"):
        with pytest.raises(LocalError, match=f"cannot write {path}"):
            write_whole(path, b"x")
    with pytest.raises(LocalError, match="cannot create the folder"):
        make_folder(tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_refusal_that_is_heard_of_second_hand_is_told_as_such_with_its_own_exit_code() -> None:
    def refuses(session: Session) -> None:
        raise Refused("no")

    def waits_for(name: str) -> Callable[[Session], None]:
        return lambda session: session.channels[name].receive(Gate)  # type: ignore[return-value]

    found = outcomes({"bank": refuses, "grocer": waits_for("bank"), "mill": waits_for("grocer")}, agree(3), parties(3))
    assert [error.exit_code for error in found.values()] == [3, 3, 3]
    assert "bank stopped (its policy or agreement refuses)" in str(found["grocer"])
    assert "grocer stopped (because another party did: its policy or agreement refuses)" in str(found["mill"])
