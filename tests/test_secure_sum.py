"""The label holder gets sums and nothing but sums; a mask is used once; what would wrap around is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from parties.errors import LocalError, PeerAborted, ProtocolViolation, Refused
from parties.memory import outcomes
from parties.session import Session
from tests.training import NAMES, agreed, altering, kinds, sent, with_data, with_fields
from vfl.messages import MaskedEmbedding, MaskedScalars, MaskKey, PartialEmbedding, PartialScalars
from vfl.secure_sum import Contribution, sum_embeddings, sum_scalars

LIMIT = {1: 2.0**62, 2: 2.0**22, 3: 2.0**23 / 3}  # |value| * holders * 2^40 < 2^63
SMALL_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


def add_up(values: dict[str, np.ndarray], what: str = "embedding", exchange: int = 0, **options: Any) -> dict[str, Any]:
    """One sum; what each party ended with."""
    rows = len(next(iter(values.values())))

    def label_holder(session: Session) -> Any:
        return (sum_embeddings if what == "embedding" else sum_scalars)(session, rows, exchange).ravel()

    def feature_holder(session: Session) -> None:
        contribution = Contribution(session)
        if what == "embedding":
            contribution.send_embedding(values[session.name], exchange)
        else:
            contribution.send_scalars(values[session.name].tolist(), exchange)

    roles: dict[str, Callable[[Session], Any]] = {"bank": label_holder} | dict.fromkeys(values, feature_holder)
    roles |= options.pop("roles", {})
    return outcomes(roles, **(agreed(list(roles)) | options))


def parts(holders: int, rows: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(holders)
    return {name: scale * generator.normal(size=rows) for name in NAMES[1 : holders + 1]}


def words(recorded: Any, sender: str) -> np.ndarray:
    return np.concatenate([message.data for message in sent(recorded, sender, "bank", MaskedEmbedding)])


# Sums


@pytest.mark.parametrize("holders", [1, 2, 3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_the_label_holder_gets_the_sum_of_the_embeddings(holders, scale):
    values = parts(holders, 500, scale)
    total = add_up(values)["bank"]
    assert np.abs(total - sum(values.values())).max() <= holders * 2.0**-39


@pytest.mark.parametrize("holders", [1, 2, 3])
def test_the_label_holder_gets_the_sums_of_scalars_to_eighty_bits(holders):
    values = parts(holders, 60, 1e-9)
    total = add_up(values, "scalars")["bank"]
    exact = [sum(Fraction(values[name][i]) for name in values) for i in range(60)]
    assert max(abs(Fraction(got) - want) for got, want in zip(total, exact, strict=True)) <= Fraction(1, 2**79)


@pytest.mark.parametrize("holders", [2, 3])
def test_large_and_small_scalars_sum_side_by_side(holders):
    limit = 2.0**46 / holders
    values = {name: np.array([0.99 * limit, -0.99 * limit, 1e-20, 0.0]) for name in NAMES[1 : holders + 1]}
    total = add_up(values, "scalars")["bank"]
    np.testing.assert_allclose(total, [0.99 * 2.0**46, -0.99 * 2.0**46, holders * 1e-20, 0.0], rtol=1e-15, atol=2**-79)


def test_no_rows_sum_to_no_rows():
    assert add_up(parts(2, 0))["bank"].shape == (0,)


# Masks


def test_a_masked_part_alone_looks_uniform_even_when_it_is_all_zero():
    recorded: Any = {}
    add_up({name: np.zeros(4096) for name in NAMES[1:4]}, recorded=recorded)
    for name in NAMES[1:4]:
        counts = np.bincount(words(recorded, name).view(np.uint8), minlength=256)
        chi_square = float(((counts - 128) ** 2 / 128).sum())
        assert 120 < chi_square < 420  # 255 +- 6 standard deviations
        ones = np.unpackbits(words(recorded, name).view(np.uint8)).mean()
        assert abs(ones - 0.5) < 0.006  # 6 standard deviations of 2^18 bits


def test_a_masked_part_alone_tells_nothing_of_its_values():
    recorded: Any = {}
    values = parts(2, 4096, 1e4)
    add_up(values, recorded=recorded)
    for name, ours in values.items():
        for seen in (words(recorded, name).astype(np.int64), words(recorded, name)):
            assert abs(np.corrcoef(seen.astype(float), ours)[0, 1]) < 0.1  # 6 standard deviations


def test_masked_scalars_are_uniform_too():
    recorded: Any = {}
    add_up({name: np.zeros(2048) for name in NAMES[1:3]}, "scalars", recorded=recorded)
    for name in NAMES[1:3]:
        (message,) = sent(recorded, name, "bank", MaskedScalars)
        counts = np.bincount(message.data.ravel(), minlength=256)
        assert 120 < ((counts - 128) ** 2 / 128).sum() < 420


def test_no_mask_serves_two_exchanges_two_kinds_two_sessions_or_two_holders():
    seen: list[bytes] = []
    for _ in range(2):
        recorded: Any = {}

        def feature_holder(session: Session) -> None:
            contribution = Contribution(session)
            for exchange in (0, 1, 2):
                contribution.send_embedding(np.zeros(4), exchange)
                contribution.send_scalars([0.0, 0.0], exchange)

        def label_holder(session: Session) -> None:
            for exchange in (0, 1, 2):
                sum_embeddings(session, 4, exchange)
                sum_scalars(session, 2, exchange)

        roles = {"bank": label_holder} | dict.fromkeys(NAMES[1:4], feature_holder)
        outcomes(roles, recorded=recorded, **agreed(list(roles)))
        for name in NAMES[1:4]:
            for kind in (MaskedEmbedding, MaskedScalars):
                seen += [message.data.tobytes() for message in sent(recorded, name, "bank", kind)]
    blocks = [block[i : i + 8] for block in seen for i in range(0, len(block), 8)]
    assert len(blocks) == 2 * 3 * 2 * 3 * 4
    assert len(set(blocks)) == len(blocks)


def test_a_mask_cannot_be_used_twice():
    def feature_holder(session: Session) -> None:
        contribution = Contribution(session)
        contribution.send_embedding(np.zeros(3), 5)
        contribution.send_scalars([0.0], 5)
        with pytest.raises(RuntimeError, match="once"):
            contribution.send_embedding(np.ones(3), 5)
        with pytest.raises(RuntimeError, match="once"):
            contribution.send_scalars([1.0], 5)

    def label_holder(session: Session) -> None:
        sum_embeddings(session, 3, 5)
        sum_scalars(session, 1, 5)

    roles = {"bank": label_holder, "grocer": feature_holder, "mobile": feature_holder}
    assert outcomes(roles, **agreed(list(roles))) == dict.fromkeys(roles)


# Overflow


@pytest.mark.parametrize("holders", [2, 3])
def test_values_just_within_the_limit_sum_without_wrapping(holders):
    edge = LIMIT[holders] * (1 - 2.0**-20)
    values = {name: np.array([edge, -edge]) for name in NAMES[1 : holders + 1]}
    total = add_up(values)["bank"]
    np.testing.assert_allclose(total, [holders * edge, -holders * edge], rtol=1e-12)


@pytest.mark.parametrize("holders", [2, 3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("what", ["embedding", "scalars"])
def test_a_value_whose_sum_could_wrap_is_refused_before_it_is_sent(holders, sign, what):
    values = parts(holders, 3)
    values["grocer"][1] = sign * (LIMIT[holders] if what == "embedding" else 2.0**46 / holders)
    recorded: Any = {}
    ended = add_up(values, what, recorded=recorded)
    assert isinstance(ended["grocer"], LocalError)
    assert isinstance(ended["bank"], PeerAborted)
    assert kinds(recorded, "grocer", "bank") == ["Hello", "Abort"]


@pytest.mark.parametrize("what", ["embedding", "scalars"])
def test_a_value_that_is_no_number_is_refused_before_it_is_sent(what):
    values = parts(2, 3)
    values["grocer"][1] = math.nan
    recorded: Any = {}
    ended = add_up(values, what, recorded=recorded)
    assert isinstance(ended["grocer"], LocalError)
    assert kinds(recorded, "grocer", "bank") == ["Hello", "Abort"]


@pytest.mark.parametrize("what", ["embedding", "scalars"])
def test_a_single_feature_holder_refuses_it_with_a_typed_error_too(what):
    ended = add_up({"grocer": np.array([1.0, math.inf])}, what)
    assert isinstance(ended["grocer"], LocalError)


# Who gets what


@pytest.mark.parametrize("holders", [1, 2, 3])
def test_parts_travel_in_clear_only_where_there_is_one_feature_holder(holders):
    ledgers: Any = {}
    values = parts(holders, 5)
    add_up(values, ledgers=ledgers)
    for name in values:
        left = {kind for to, kind, *_ in ledgers[name].bytes_sent if to == "bank"}
        assert left == {"Hello", "Closing", "PartialEmbedding" if holders == 1 else "MaskedEmbedding"}
        assert {kind for to, kind, *_ in ledgers[name].bytes_sent if to != "bank"} <= {"Hello", "Closing", "MaskKey"}
    ledgers.clear()
    add_up(values, "scalars", ledgers=ledgers)
    for name in values:
        left = {kind for to, kind, *_ in ledgers[name].bytes_sent if to == "bank"}
        assert left == {"Hello", "Closing", "PartialScalars" if holders == 1 else "MaskedScalars"}


def test_with_two_feature_holders_the_ledger_lets_no_embedding_out_in_clear():
    def careless(session: Session) -> None:
        session.channels["bank"].send(PartialEmbedding(0, np.ones(3)))

    recorded: Any = {}
    ended = add_up(parts(2, 3), roles={"grocer": careless}, recorded=recorded)
    assert isinstance(ended["grocer"], Refused)
    assert "PartialEmbedding" not in kinds(recorded, "grocer", "bank")


def test_the_label_holder_gets_no_mask_key():
    recorded: Any = {}
    add_up(parts(3, 3), recorded=recorded)
    assert all("MaskKey" not in kinds(recorded, name, "bank") for name in NAMES[1:4])
    assert len({sent(recorded, "grocer", other, MaskKey)[0].data.tobytes() for other in ("mobile", "clinic")}) == 1


# Peers that deviate


@pytest.mark.parametrize("point", SMALL_ORDER, ids=lambda point: point.hex()[:8])
def test_a_mask_key_of_small_order_is_refused(point):
    tamper = altering("mobile", "grocer", MaskKey, with_data(lambda _: np.frombuffer(point, np.uint8)))
    ended = add_up(parts(2, 3), tamper=tamper)
    assert isinstance(ended["grocer"], ProtocolViolation)
    assert ended["grocer"].peer == "mobile"


def test_our_own_mask_key_sent_back_is_refused():
    def mirror(session: Session) -> None:
        session.channels["grocer"].send(session.channels["grocer"].receive(MaskKey))
        session.channels["bank"].send(MaskedEmbedding(0, np.zeros(3, "<u8")))

    recorded: Any = {}
    ended = add_up(parts(2, 3), roles={"mobile": mirror}, recorded=recorded)
    assert isinstance(ended["grocer"], ProtocolViolation)
    assert ended["grocer"].peer == "mobile"
    assert "MaskedEmbedding" not in kinds(recorded, "grocer", "bank")


@pytest.mark.parametrize(
    ("holders", "what", "kind", "change"),
    [
        (2, "embedding", MaskedEmbedding, with_data(lambda data: data[:-1])),
        (2, "embedding", MaskedEmbedding, with_fields(exchange=1)),
        (1, "embedding", PartialEmbedding, with_data(lambda data: np.append(data, 0.0))),
        (1, "embedding", PartialEmbedding, with_fields(exchange=1)),
        (2, "scalars", MaskedScalars, with_data(lambda data: data[:1])),
        (2, "scalars", MaskedScalars, with_fields(exchange=7)),
        (1, "scalars", PartialScalars, with_data(lambda data: data[:0])),
        (1, "scalars", PartialScalars, with_fields(exchange=7)),
    ],
)
def test_a_part_of_another_step_or_length_is_refused(holders, what, kind, change):
    ended = add_up(parts(holders, 4), what, tamper=altering("grocer", "bank", kind, change))
    assert isinstance(ended["bank"], ProtocolViolation)
    assert ended["bank"].peer == "grocer"


def test_a_part_in_clear_is_refused_where_a_masked_one_is_due():
    def careless(session: Session) -> None:
        session.channels["bank"]._ledger.allowed |= {"plaintext"}
        Contribution(session)
        session.channels["bank"].send(PartialEmbedding(0, np.ones(3)))

    ended = add_up(parts(2, 3), roles={"grocer": careless})
    assert isinstance(ended["bank"], ProtocolViolation)
    assert ended["bank"].peer == "grocer"


def test_a_part_that_was_altered_on_the_way_is_noticed_at_the_close():
    tamper = altering("grocer", "bank", MaskedEmbedding, with_data(lambda data: data + np.uint64(1 << 40)))
    ended = add_up(parts(2, 3), tamper=tamper)
    assert any(isinstance(error, ProtocolViolation) for error in ended.values())
    assert all(isinstance(ended[name], Exception) for name in ("bank", "grocer"))
