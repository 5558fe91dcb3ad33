"""The encrypted gradient exchange gives exact sums, and refuses whatever its step does not allow, naming the peer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from math import lcm
from typing import Any

import gmpy2
import numpy as np
import pytest

from parties.errors import ColonnadeError, PeerAborted, ProtocolViolation
from parties.memory import Tamper, outcomes
from parties.message import parse_header
from parties.session import Closing, Session
from tests.training import agreed, altering, fit, kinds, planned, sent, table, violation_at, with_data, with_fields
from vfl.encryption import paillier
from vfl.encryption.paillier import ROOTS, SecretKey, generate
from vfl.encryption.scheme import from_wire, to_wire
from vfl.exchange import Terms, accept_key, offer_key, open_gradients, weigh_gradient
from vfl.linear import VerticalLogisticRegression
from vfl.messages import (
    Direction,
    MaskedEmbedding,
    MaskedScalars,
    MaskKey,
    OpenedGradient,
    PartialEmbedding,
    PartialScalars,
    Plan,
    SchemeKey,
    SealedGradient,
    SealedResidual,
    Weights,
)

ROWS = 12
TIED = int(gmpy2.next_prime(1 << 999))


@pytest.fixture
def decryptions(monkeypatch) -> list[int]:
    """Grows by two with every ciphertext that anybody decrypts."""
    seen: list[int] = []
    original = paillier._Half.decrypt
    monkeypatch.setattr(paillier._Half, "decrypt", lambda half, c: seen.append(1) or original(half, c))
    return seen


def columns(*widths: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(len(widths))
    return {
        name: generator.normal(size=(rows, width)) for name, width in zip(("grocer", "mobile"), widths, strict=False)
    }


def exchange(
    secret: SecretKey, x: dict[str, np.ndarray], residual: np.ndarray, *, numbers: int = 1, **options: Any
) -> dict[str, Any]:
    """`numbers` gradient exchanges and nothing else; what each party ended with."""

    def terms(session: Session) -> Terms:
        bits = 20 + len(residual).bit_length()
        plans = {name: Plan(bytes(32), len(residual), part.shape[1], 0, bits) for name, part in x.items()}
        return Terms.of(session.agreement, len(residual), plans, numbers)

    def label_holder(session: Session) -> None:
        end = offer_key(session, terms(session), secret)
        for number in range(numbers):
            open_gradients(end, residual, number)

    def feature_holder(session: Session) -> Any:
        agreed_terms = terms(session)
        part = x[session.name]
        fixed = agreed_terms.scales[session.name].features(part, [str(j) for j in range(part.shape[1])])
        end = accept_key(session, agreed_terms, fixed)
        return [weigh_gradient(end, number)[:, 0] for number in range(numbers)]

    roles: dict[str, Callable[[Session], Any]] = {"bank": label_holder} | dict.fromkeys(x, feature_holder)
    roles |= options.pop("roles", {})
    return outcomes(roles, **(agreed(list(roles)) | options))


def residuals(rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(9).uniform(-1, 1, rows)


# What it computes


@pytest.mark.parametrize("widths", [(3,), (2, 5)])
def test_every_feature_holder_gets_exactly_its_own_sums(secret, widths):
    x, r = columns(*widths), residuals()
    r[:3] = (1.0, -1.0, 0.0)
    ended = exchange(secret, x, r)
    fixed_r = [round(Fraction(value) * 2**30) for value in r]
    for name, part in x.items():
        fixed = [[round(Fraction(value) * 2**20) for value in row] for row in part]
        sums = [sum(row[j] * value for row, value in zip(fixed, fixed_r, strict=True)) for j in range(part.shape[1])]
        assert ended[name][0].tolist() == [float(Fraction(value, 2**50)) for value in sums]
    assert ended["bank"] is None


def test_more_columns_than_a_plaintext_has_slots_and_more_rows_than_a_message_holds(secret):
    rows = 2100  # a message holds 2048
    x = {"grocer": np.random.default_rng(1).integers(-4, 5, (rows, 30)).astype(float)}
    r = np.where(np.arange(rows) % 2 == 0, 0.5, -0.25)
    recorded: Any = {}
    ended = exchange(secret, x, r, recorded=recorded)
    assert ended["grocer"][0].tolist() == (x["grocer"].T @ r).tolist()  # small dyadic numbers: exact in float64
    assert [len(part.data) for part in sent(recorded, "bank", "grocer", SealedResidual)] == [2048, 52]
    assert len(sent(recorded, "grocer", "bank", SealedGradient)[0].data) == 2  # 30 slots of 72 bits, 28 in a pack


# Either side deviates


def first(secret: SecretKey, what: str) -> Callable[[np.ndarray], np.ndarray]:
    """Put something that is no ciphertext in the first place."""
    n = secret.public.n
    p = int(secret._p.prime)
    bad = {
        "0": 0,
        "n": n,
        "3n": 3 * n,
        "n^2": n * n,
        "n^2 + 1": n * n + 1,
        "p": p,
        "p^2": p * p,
        "p^2 (n+1)": p * p * 5,
    }

    def change(data: np.ndarray) -> np.ndarray:
        data[0] = to_wire([bad[what]], data.shape[1])[0]
        return data

    return change


NO_CIPHERTEXTS = ["0", "n", "3n", "n^2", "n^2 + 1", "p", "p^2", "p^2 (n+1)"]


@pytest.mark.parametrize("what", NO_CIPHERTEXTS)
def test_the_label_holder_decrypts_nothing_when_a_reply_holds_what_is_no_ciphertext(secret, decryptions, what):
    tamper = altering("grocer", "bank", SealedGradient, with_data(first(secret, what)))
    text = violation_at(exchange(secret, columns(3), residuals(), tamper=tamper), "bank", "grocer")
    assert "1 of 1 numbers are no ciphertexts" in text
    assert decryptions == []


@pytest.mark.parametrize("what", NO_CIPHERTEXTS)
def test_a_feature_holder_weighs_nothing_with_what_is_no_ciphertext(secret, what):
    recorded: Any = {}
    tamper = altering("bank", "grocer", SealedResidual, with_data(first(secret, what)))
    text = violation_at(exchange(secret, columns(3), residuals(), tamper=tamper, recorded=recorded), "grocer", "bank")
    assert f"1 of {ROWS} numbers are no ciphertexts" in text
    assert "SealedGradient" not in kinds(recorded, "grocer", "bank")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_fields(exchange=1), id="another exchange"),
        pytest.param(with_data(lambda data: np.vstack([data, data])), id="too many packs"),
        pytest.param(with_data(lambda data: data[:0]), id="no pack"),
        pytest.param(with_data(lambda data: data[:, :-1]), id="too narrow"),
        pytest.param(with_data(lambda data: np.hstack([data, 0 * data[:, :1]])), id="too wide"),
    ],
)
def test_a_reply_of_another_step_or_size_is_refused_before_anything_is_decrypted(secret, decryptions, change):
    tamper = altering("grocer", "bank", SealedGradient, change)
    violation_at(exchange(secret, columns(3), residuals(), tamper=tamper), "bank", "grocer")
    assert decryptions == []


def test_a_reply_of_the_step_before_is_refused_without_another_decryption(secret, decryptions):
    tamper = altering("grocer", "bank", SealedGradient, with_fields(exchange=0), at=1)
    violation_at(exchange(secret, columns(3), residuals(), numbers=2, tamper=tamper), "bank", "grocer")
    assert len(decryptions) == 2  # the honest exchange before: one ciphertext, modulo p and q


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_fields(exchange=1), id="another exchange"),
        pytest.param(with_data(lambda data: data[:-1]), id="too few rows"),
        pytest.param(with_data(lambda data: np.vstack([data, data[:1]])), id="too many rows"),
        pytest.param(with_data(lambda data: data[:, :-1]), id="too narrow"),
    ],
)
def test_residuals_of_another_step_or_size_are_refused_and_not_answered(secret, change):
    recorded: Any = {}
    tamper = altering("bank", "grocer", SealedResidual, change)
    violation_at(exchange(secret, columns(3), residuals(), tamper=tamper, recorded=recorded), "grocer", "bank")
    assert "SealedGradient" not in kinds(recorded, "grocer", "bank")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda n: lambda data: add(data, 1 << 1000, n), id="far out of range"),
        pytest.param(lambda n: lambda data: add(data, 1 << 60, n), id="one slot out of range"),
        pytest.param(lambda n: lambda data: add(data, n, 1 << 2048), id="n added"),
        pytest.param(lambda n: lambda data: 0 * data, id="zero"),
        pytest.param(lambda n: lambda data: data[:0], id="nothing"),
        pytest.param(lambda n: lambda data: data[:, :-1], id="too narrow"),
    ],
)
def test_an_opened_gradient_that_cannot_be_is_refused(secret, change):
    tamper = altering("bank", "grocer", OpenedGradient, with_data(change(secret.public.n)))
    text = violation_at(exchange(secret, columns(3), residuals(), tamper=tamper), "grocer", "bank")
    assert "out of their range" in text or "expected 1 plaintexts" in text


def add(data: np.ndarray, number: int, modulus: int) -> np.ndarray:
    return to_wire([(from_wire(data)[0] + number) % modulus], data.shape[1])


def test_an_opened_gradient_of_another_exchange_is_refused(secret):
    tamper = altering("bank", "grocer", OpenedGradient, with_fields(exchange=3))
    violation_at(exchange(secret, columns(3), residuals(), tamper=tamper), "grocer", "bank")


def test_a_deviating_feature_holder_is_named_although_another_one_is_honest(secret):
    tamper = altering("mobile", "bank", SealedGradient, with_data(first(secret, "0")))
    ended = exchange(secret, columns(2, 2), residuals(), tamper=tamper)
    violation_at(ended, "bank", "mobile")
    assert isinstance(ended["grocer"], (PeerAborted, ProtocolViolation))


# Keys


@pytest.fixture(scope="module")
def bad_moduli(secret) -> dict[str, int]:
    short = gmpy2.next_prime(3 << 1022)
    k = (3 << 2046) // (2 * TIED**2)
    while not gmpy2.is_prime(2 * k * TIED + 1):
        k += 1
    tied = TIED * (2 * k * TIED + 1)
    assert tied.bit_length() == 2048
    return {
        "small factor": 3 * (((1 << 2047) // 3) | 1),
        "even": secret.public.n + 1,
        "prime": int(gmpy2.next_prime(1 << 2047)),
        "perfect power": int(short) ** 2,
        "q = 2kp + 1": int(tied),
        "too long": secret.public.n * 4 + 1,
        "too short": secret.public.n >> 1 | 1,
        "zero": 0,
    }


def refused_key(offer: Callable[[Session], Any], **options: Any) -> str:
    """The text with which the feature holder refused the key, in a whole training."""
    parts, y = table(2, 60)

    def label_holder(session: Session) -> None:
        planned(session, parts["bank"])
        offer(session)
        session.channels["grocer"].receive(SealedGradient)

    recorded: Any = {}
    ended = fit(parts, y, None, roles={"bank": label_holder}, recorded=recorded, **options)
    assert "SealedGradient" not in kinds(recorded, "grocer", "bank")
    assert "PartialScalars" not in kinds(recorded, "grocer", "bank")
    return violation_at(ended, "grocer", "bank")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("small factor", "small factor"),
        ("even", "odd number of exactly 2048 bits"),
        ("prime", "a prime or a perfect power"),
        ("perfect power", "a prime or a perfect power"),
        ("q = 2kp + 1", "proof"),
        ("too long", "exactly 2048 bits"),
        ("too short", "exactly 2048 bits"),
        ("zero", "exactly 2048 bits"),
    ],
)
def test_a_bad_key_is_refused_inside_the_session_that_it_was_sent_in(bad_moduli, what, text):
    n = bad_moduli[what]
    roots = range(2, 2 + ROOTS)
    assert text in refused_key(lambda session: session.broadcast(SchemeKey(to_wire([n, *roots], 260))))


def test_a_shorter_key_than_agreed_is_refused_even_with_a_valid_proof():
    short = generate(1024, insecure_for_tests=True)

    def offer(session: Session) -> None:
        plans = {"grocer": Plan(bytes(32), 60, 3, 3, 26)}
        offer_key(session, Terms.of(session.agreement, 60, plans, 1), short)

    assert "exactly 2048 bits" in refused_key(offer)


def test_an_owner_who_knows_the_factors_of_q_2kp_1_has_no_proof_to_offer(bad_moduli):
    n = bad_moduli["q = 2kp + 1"]
    p, q = TIED, n // TIED
    exponent = int(gmpy2.invert(n, lcm(p - 1, q - 1) // p))  # right for the one element in p that has a root

    def offer(session: Session) -> None:
        context = session.id + session.me.public.key_id
        roots = [pow(int(paillier._challenge(n, context, index)), exponent, n) for index in range(ROOTS)]
        session.broadcast(SchemeKey(to_wire([n, *roots], 256)))

    assert "proof" in refused_key(offer)


def test_a_key_and_proof_that_were_good_in_another_session_are_refused_in_this_one(secret):
    agreement, recorded = agreed(["bank", "grocer"]), {}
    ended = exchange(secret, columns(3), residuals(), recorded=recorded, **agreement)
    assert ended["bank"] is None  # there it was accepted
    (replayed,) = sent(recorded, "bank", "grocer", SchemeKey)
    assert "proof" in refused_key(lambda session: session.broadcast(replayed), **agreement)


def test_a_proof_of_another_party_is_refused(secret):
    def offer(session: Session) -> None:
        proof = secret.prove(session.id + session.agreement.party("grocer").identity.key_id)
        session.broadcast(SchemeKey(to_wire([secret.public.n, *proof], 256)))

    assert "proof" in refused_key(offer)


@pytest.mark.parametrize("roots", [0, ROOTS - 1, ROOTS + 1])
def test_a_key_with_another_number_of_roots_is_refused(secret, roots):
    def offer(session: Session) -> None:
        proof = (secret.prove(session.id + session.me.public.key_id) * 2)[:roots]
        session.broadcast(SchemeKey(to_wire([secret.public.n, *proof], 256)))

    assert "roots" in refused_key(offer)


# Solvers


def test_a_label_holder_that_goes_on_beyond_the_agreed_exchanges_is_refused_before_it_gets_more(secret):
    parts, y = table(2, 60)

    def greedy(session: Session) -> Any:
        model = VerticalLogisticRegression(max_iter=5)  # pretends to have agreed on 2
        honest = VerticalLogisticRegression(max_iter=2).get_params
        model.get_params = honest  # type: ignore[method-assign]
        return model.fit(parts["bank"], y, session=session, secret=secret)

    recorded: Any = {}
    ended = fit(parts, y, secret, params={"max_iter": 2}, roles={"bank": greedy}, recorded=recorded)
    assert "more than 2 exchanges" in violation_at(ended, "grocer", "bank")
    assert kinds(recorded, "grocer", "bank").count("PartialEmbedding") == 1
    assert kinds(recorded, "grocer", "bank").count("SealedGradient") == 2


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Direction, with_data(lambda data: np.append(data, 1.0))),
        (Direction, with_fields(exchange=4)),
        (Weights, with_data(lambda data: np.append(data, 1.0))),
        (Weights, with_fields(exchange=4)),
    ],
)
def test_a_direction_or_weights_of_another_exchange_or_size_is_refused(secret, kind, change):
    parts, y = table(3, 60)
    ended = fit(parts, y, secret, params={"max_iter": 3}, tamper=altering("bank", "grocer", kind, change, at=1))
    violation_at(ended, "grocer", "bank")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("parties", "way", "kind"),
    [
        (2, ("bank", "grocer"), Direction),
        (2, ("grocer", "bank"), PartialEmbedding),
        (2, ("grocer", "bank"), PartialScalars),
        (3, ("bank", "grocer"), Direction),
    ],
)
def test_absurd_numbers_end_in_a_typed_error(secret, parties, way, kind):
    parts, y = table(parties, 60)
    tamper = altering(*way, kind, with_data(lambda data: np.full_like(data, 1e308)), at=1)
    ended = fit(parts, y, secret, params={"max_iter": 4}, policy={"allow_reconstruction": True}, tamper=tamper)
    assert all(isinstance(error, ColonnadeError) for error in ended.values()), ended


# Every message of a whole training, altered in turn

WAYS = [
    ("bank", "grocer", Plan),
    ("grocer", "mobile", Plan),
    ("bank", "grocer", SchemeKey),
    ("grocer", "mobile", MaskKey),
    ("bank", "grocer", SealedResidual),
    ("grocer", "bank", SealedGradient),
    ("bank", "grocer", OpenedGradient),
    ("grocer", "bank", MaskedScalars),
    ("bank", "mobile", Direction),
    ("mobile", "bank", MaskedEmbedding),
    ("bank", "mobile", Weights),
    ("mobile", "grocer", Closing),
]


def damage(sender: str, receiver: str, kind: Any, how: str) -> Tamper:
    done = threading.Event()

    def tamper(source: str, target: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if (source, target, parse_header(head).kind) != (sender, receiver, kind.kind) or done.is_set():
            return head, payload
        done.set()
        if how == "buffer" and payload:
            return head, payload[:-1] + bytes([payload[-1] ^ 1])
        if how == "cut":
            return head, payload[:-1] if payload else payload + b"\0"
        return head[:-1] + bytes([head[-1] ^ 1]), payload  # a field: the last byte of the header

    return tamper


@pytest.mark.parametrize("how", ["buffer", "header", "cut"])
@pytest.mark.parametrize(("sender", "receiver", "kind"), WAYS, ids=lambda value: getattr(value, "__name__", value))
def test_one_altered_frame_ends_in_a_typed_error_and_never_in_a_model(secret, sender, receiver, kind, how):
    parts, y = table(3, 30)
    ended = fit(parts, y, secret, params={"max_iter": 2}, tamper=damage(sender, receiver, kind, how))
    assert isinstance(ended[receiver], ProtocolViolation), ended
    assert ended[receiver].peer == sender
    assert kind is Closing or isinstance(ended[sender], ColonnadeError)  # after its last message nobody can be told


@pytest.mark.parametrize(
    ("sender", "receiver", "kind"), WAYS[4:11], ids=lambda value: getattr(value, "__name__", value)
)
def test_a_well_framed_lie_that_only_the_numbers_show_is_noticed_at_the_latest_at_the_close(
    secret, sender, receiver, kind
):
    def nudge(message: Any) -> Any:
        if kind is SealedResidual:  # another row's residual in place of the first: as valid a ciphertext
            return with_data(lambda data: np.vstack([data[-1:], data[1:]]))(message)
        if kind is SealedGradient:  # the same plaintext, randomised once more
            n2 = secret.public.n**2
            again = [value * pow(3, secret.public.n, n2) % n2 for value in from_wire(message.data)]
            return with_data(lambda data: to_wire(again, data.shape[1]))(message)
        if kind is OpenedGradient:
            return with_data(lambda data: add(data, 1, secret.public.n))(message)
        return with_data(lambda data: data + np.ones(1, data.dtype))(message)

    parts, y = table(3, 30)
    ended = fit(parts, y, secret, params={"max_iter": 2}, tamper=altering(sender, receiver, kind, nudge))
    assert all(isinstance(ended[name], ColonnadeError) for name in (sender, receiver)), ended
    assert any(isinstance(error, ProtocolViolation) for error in ended.values())
