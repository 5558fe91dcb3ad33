"""Keys for the next sum come with the signatures under one: as exact, as safe, two steps fewer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from parties.errors import PeerAborted, PeerLost, ProtocolViolation
from parties.memory import Tamper
from parties.message import Array, parse_header
from tests.test_secure_aggregation import (
    FIVE,
    KEYRING,
    NAMES,
    PUBLIC,
    SMALL_ORDER,
    Star,
    context,
    flags,
    inputs,
    plain_sum,
    row,
)
from tests.training import altering, sent, with_data
from vfl.horizontal.context import Context, Quantisation
from vfl.horizontal.masking import SURVIVORS, Dealt, Keys, deal
from vfl.horizontal.messages import (
    KeyList,
    KeyOffer,
    MaskedInput,
    SealedShares,
    ShareList,
    SignatureList,
    SurvivorSignature,
    Unmasking,
)
from vfl.horizontal.secure_aggregation import Aggregate, Ahead, Begun, Outcome, aggregate, contribute


def first_sum(tamper: Tamper | None = None, **options: Any) -> tuple[Star, Aggregate]:
    star = Star(FIVE, tamper)
    result = star.add_up(context(), inputs(), **options)
    ready(star)
    return star, result


def ready(star: Star) -> None:
    """For one more sum."""
    for name in FIVE:
        vars(star.clients[name]).pop("send", None)


def company(ahead: Ahead, number: int = 4, **changes: Any) -> Context:
    return context(tuple(ahead.offers), round=number, former=ahead.former, **changes)


def dealt_by(star: Star, name: str, **changes: Any) -> Dealt:
    """What a client deals with the keys that it has seen."""
    ahead, own = star.outcomes[name].ahead
    shared = company(ahead, **changes)
    us = shared.names.index(name)
    offers = {j: offer for j, offer in enumerate(ahead.offers.values()) if j != us}
    return deal(shared, us, own, offers)


def begin(ahead: Ahead) -> Begun:
    return Begun(company(ahead), tuple(ahead.offers.values()))


def next_sum(
    star: Star,
    ahead: Ahead,
    values: Mapping[str, np.ndarray],
    here: Sequence[str] = FIVE,
    alter: Callable[[str, Array], Array] = lambda name, shares: shares,
    dealing: Mapping[str, Dealt] | None = None,
    **options: Any,
) -> Any:
    """With those who are `here`. alter: what the coordinator shows a client of the others' shares."""
    shared, begun = company(ahead), begin(ahead)
    dealt = {name: (dealing or {}).get(name) or dealt_by(star, name) for name in here}
    for name, given in dealt.items():
        begun.take(name, given.sealed)
    given = {name: (dealt[name], alter(name, begun.shown(name).copy())) for name in here}
    return star.add_up(shared, values, begun=begun, dealt=given, **options)


def test_sums_that_follow_each_other_are_exact_and_exchange_no_keys():
    star, result = first_sum()
    for number in range(3):
        values = {name: value * number for name, value in inputs().items()}
        result = next_sum(star, result.ahead, values)
        assert result.total.tolist() == plain_sum(values, FIVE, context().quantisation)
        assert star.outcomes == dict.fromkeys(FIVE, Outcome(FIVE))
        ready(star)
    for name in FIVE:
        kinds = {kind: len(sent(star.recorded, name, "hub", kind)) for kind in (KeyOffer, SealedShares, MaskedInput)}
        assert kinds == {KeyOffer: 1, SealedShares: 1, MaskedInput: 4}
        assert [len(sent(star.recorded, "hub", name, kind)) for kind in (KeyList, ShareList)] == [1, 1]


@pytest.mark.parametrize("who", [who for count in range(3) for who in combinations(FIVE, count)])
def test_the_sum_is_exact_whoever_drops_out_at_any_step_while_the_threshold_is_met(who):
    """1 + 5 * 4 + 10 * 16 sums: before its shares come, or at each of the three steps that are left."""
    values = inputs(size=2)
    for when in product((1, 2, 3, 4), repeat=len(who)):
        star, first = first_sum()
        vanish = dict(zip(who, when, strict=True))
        here = [name for name in FIVE if vanish.get(name) != 1]
        result = next_sum(star, first.ahead, values, here, vanish=vanish)
        survivors = tuple(name for name in FIVE if vanish.get(name, 5) > 2)
        assert isinstance(result, Aggregate), (vanish, result)
        assert result.survivors == survivors, vanish
        assert result.total.tolist() == plain_sum(values, survivors, context().quantisation), vanish
        assert set(result.lost) == {name for name in vanish if name in here}
        assert all(star.outcomes[name] == Outcome(survivors) for name in FIVE if name not in vanish)
        assert (result.ahead is not None) == (4 not in vanish.values())  # all who signed have heard of each other


@pytest.mark.parametrize("when", [(1, 1, 2), (1, 2, 2), (1, 2, 3), (2, 2, 2), (1, 3, 3), (2, 3, 4), (3, 3, 3)])
def test_with_one_dropout_more_it_stops_and_nothing_can_be_opened(when):
    star, first = first_sum()
    vanish = dict(zip(FIVE, when, strict=False))
    before = {name: len(replies) for name, replies in star.replies().items()}
    result = next_sum(star, first.ahead, inputs(), [name for name in FIVE if vanish.get(name) != 1], vanish=vanish)
    assert type(result) is PeerLost and f"2 of {5 - when.count(1)} clients are left" in str(result)
    opened = sum(len(replies) - before[name] for name, replies in star.replies().items())
    assert opened == (2 if 4 in when else 0)  # of the three that each secret needs


def test_every_sum_has_fresh_keys():
    star, result = first_sum()
    seen = []
    for _ in range(3):
        seen += [key for offer in result.ahead.offers.values() for key in (offer.sealing, offer.mask, offer.commitment)]
        result = next_sum(star, result.ahead, inputs())
        ready(star)
    offered = [sent(star.recorded, name, "hub", KeyOffer)[0].data.tobytes() for name in FIVE]
    seen += [raw[i : i + 32] for raw in offered for i in (0, 32, 64)]
    assert len(set(seen)) == len(seen) == 4 * 15


@pytest.mark.parametrize("missing", ["SurvivorSignature", "Unmasking"])
def test_who_was_not_there_to_the_end_is_asked_again_with_fresh_keys_only(missing):
    """Who has signed and not unmasked may not have the others' keys; who has not signed has given none."""
    star, first = first_sum(vanish={"c02": 3 if missing == "SurvivorSignature" else 4})
    assert first.survivors == FIVE
    if missing == "Unmasking":
        assert first.ahead is None
    else:
        assert tuple(first.ahead.offers) == ("c00", "c01", "c03", "c04")
        assert star.outcomes["c00"].ahead[0] == first.ahead and first.ahead.former == context().full_digest


def test_on_a_graph_keys_come_in_each_sum():
    star, shared = Star(NAMES), context(NAMES, degree=4)
    assert star.add_up(shared, inputs(NAMES)).ahead is None
    assert all(outcome.ahead is None for outcome in star.outcomes.values())


# A coordinator that cheats


@pytest.mark.parametrize("byte", [0, 31, 32, 63, 64, 95, 96, 159])
def test_an_altered_key_is_refused_before_anything_is_unmasked(byte):
    def flipped(data: Array) -> Array:
        data[2, byte] ^= 1
        return data

    star, result = first_sum(altering("hub", "c01", SignatureList, with_data(flipped)))
    assert "c02 has not signed these survivors" in str(star.outcomes["c01"])
    assert star.replies()["c01"] == [] and isinstance(result.lost["c01"], PeerAborted) and result.ahead is None


def forged(shared: Context, owner: str, signer: str, keys: bytes, shown: Array) -> Array:
    """A signature in a client's name under these survivors, with keys, by anybody."""
    body = shared.full_digest + shared.names.index(owner).to_bytes(4, "little") + shown.tobytes() + keys
    return np.frombuffer(keys + KEYRING[signer].sign(SURVIVORS, body), np.uint8)


def test_a_forged_key_is_refused():
    everybody = flags(*range(5))
    for make in (
        row(2, lambda data: forged(context(), "c02", "hub", bytes(range(96)), everybody)),  # in the middle
        row(2, lambda data: data[3]),  # one client under two names
        row(2, lambda data: forged(context(attempt=1), "c02", "c02", bytes(range(96)), everybody)),
        row(2, lambda data: forged(context(), "c02", "c02", bytes(range(96)), flags(0, 1, 2))),
    ):
        star, _ = first_sum(altering("hub", "c01", SignatureList, make))
        assert "c02 has not signed these survivors" in str(star.outcomes["c01"])


def test_a_key_under_two_names_deals_no_shares_even_if_that_client_signs_it():
    everybody = flags(*range(5))
    colluding = row(2, lambda data: forged(context(), "c02", "c02", data[1, :96].tobytes(), everybody))
    star, _ = first_sum(altering("hub", "c01", SignatureList, colluding))
    with pytest.raises(ValueError, match="a key came twice"):
        dealt_by(star, "c01")


def test_keys_of_too_few_deal_no_shares():
    star, _ = first_sum()
    ahead, own = star.outcomes["c01"].ahead
    few = dict(list(enumerate(ahead.offers.values()))[2:3])
    with pytest.raises(ValueError, match="keys of 2 clients where 3 are needed"):
        deal(company(ahead), 1, own, few)


def test_signatures_that_one_client_is_not_shown_leave_it_out_of_the_next_sum():
    """It takes others for its company than they do: nothing that it seals opens, and no signature fits."""
    star, first = first_sum(altering("hub", "c01", SignatureList, row(4, lambda data: 0)))
    assert tuple(star.outcomes["c01"].ahead[0].offers) == FIVE[:4] and tuple(first.ahead.offers) == FIVE
    shares = dealt_by(star, "c01")
    assert shares.sealed.shape == (4, 80)
    with pytest.raises(ValueError, match="4 rows where 5 are due"):
        begin(first.ahead).take("c01", shares.sealed)


def test_shares_are_for_one_sum():
    star, first = first_sum()
    dealt = dealt_by(star, "c01")
    for other in (
        company(first.ahead, number=5),
        company(first.ahead, attempt=1),
        company(first.ahead, subject=bytes([1]) * 32),
        replace(company(first.ahead), former=bytes(32)),
        replace(company(first.ahead), former=b""),
        replace(company(first.ahead), names=FIVE[:4]),
    ):
        given = (star.clients["c01"], KEYRING["c01"], PUBLIC, other, inputs()["c01"], set())
        with pytest.raises(ProtocolViolation, match="another sum than that for which we have dealt"):
            contribute(*given, dealt=(dealt, np.zeros((5, 80), np.uint8)))
        with pytest.raises(ValueError, match="for one sum"):
            aggregate(star.hub, PUBLIC, other, 7, {}, begun=begin(first.ahead))
    assert len(star.recorded["c01"]["hub"].sent) == 5  # of the first sum


def test_a_sum_with_keys_that_came_ahead_exchanges_none():
    """What is offered there would be bound to the former sum."""
    star, first = first_sum()
    shared = company(first.ahead)
    with pytest.raises(ProtocolViolation, match="we have dealt no shares"):
        contribute(star.clients["c01"], KEYRING["c01"], PUBLIC, shared, inputs()["c01"], set())
    with pytest.raises(ValueError, match="for one sum"):
        aggregate(star.hub, PUBLIC, shared, 7, {})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda shares: shares[:4], "4 rows where 5 are due"),
        (lambda shares: np.vstack([shares, shares[:1]]), "6 rows where 5 are due"),
        (lambda shares: np.where(np.arange(5)[:, None] < 2, shares, 0).astype(np.uint8), "shares of 2 clients where 3"),
    ],
)
def test_shares_that_cannot_be_are_refused(change, what):
    star, first = first_sum()
    to_one = {"alter": lambda name, shares: change(shares) if name == "c01" else shares}
    result = next_sum(star, first.ahead, inputs(), **to_one)
    assert what in str(star.outcomes["c01"]) and result.survivors == ("c00", "c02", "c03", "c04")
    assert len(sent(star.recorded, "c01", "hub", MaskedInput)) == 1  # of the first sum


def test_shares_that_were_dealt_for_another_task_open_nothing():
    """c01 was asked something else: nobody can open what it sealed, it signs another sum, and its masks stay on."""
    star, first = first_sum()
    other = {"subject": bytes([1]) * 32}
    dealing, told = {"c01": dealt_by(star, "c01", **other)}, {"c01": company(first.ahead, **other)}
    result = next_sum(star, first.ahead, inputs(), dealing=dealing, told=told)
    assert isinstance(result, ProtocolViolation) and result.peer == "c01"
    for name in ("c00", "c02", "c03", "c04"):
        assert star.outcomes[name].unopened == ("c01",)
        assert not sent(star.recorded, name, "hub", Unmasking)[-1].data[1].any()


def test_another_fixed_point_for_one_client_opens_noise():
    """Its masks and its signature are for another sum than the others'."""
    star, first = first_sum()
    nothing = {name: np.zeros(1000) for name in FIVE}
    shared = company(first.ahead)
    told = {"c01": replace(shared, quantisation=Quantisation.finest(4.0, 5))}
    result = next_sum(star, first.ahead, nothing, told=told)
    assert "c01 has not signed these survivors" in str(result.lost["c01"]) and result.ahead is not None
    most = 2.0 ** (63 - shared.quantisation.fraction_bits)
    assert result.total.std() == pytest.approx(most / np.sqrt(3), rel=0.1)  # uniform


# A client that cheats


def signing(name: str, change: Callable[[bytes], bytes]) -> Tamper:
    """It signs other keys than it should."""

    def changed(data: Array) -> Array:
        return forged(context(), name, name, change(data[:96].tobytes()), flags(*range(5)))

    return altering(name, "hub", SurvivorSignature, with_data(changed))


@pytest.mark.parametrize("weak", SMALL_ORDER[:5], ids=bytes.hex)
@pytest.mark.parametrize("place", [0, 32])
def test_a_client_that_signs_a_key_of_small_order_is_named(weak, place):
    star, result = first_sum(signing("c01", lambda keys: keys[:place] + weak + keys[place + 32 :]))
    assert result.total.tolist() == plain_sum(inputs(), FIVE, context().quantisation)  # its numbers had come
    assert "no canonical point of large order" in str(result.lost["c01"])
    assert tuple(result.ahead.offers) == ("c00", "c02", "c03", "c04") and isinstance(star.outcomes["c01"], PeerAborted)


def test_a_client_that_signs_one_key_twice_is_named():
    _, result = first_sum(signing("c01", lambda keys: keys[:32] * 2 + keys[64:]))
    assert "has offered already" in str(result.lost["c01"])


def test_a_client_that_signs_the_keys_of_another_is_named():
    others: list[bytes] = []
    notes = altering("c00", "hub", SurvivorSignature, lambda message: others.append(message.data.tobytes()) or message)
    copies = signing("c01", lambda keys: others[0][:96])

    def tamper(*frame: Any) -> tuple[bytes, bytes]:
        until = time.monotonic() + 10
        while frame[0] == "c01" and parse_header(frame[2]).kind == SurvivorSignature.kind and not others:
            time.sleep(0.001)
            assert time.monotonic() < until
        return copies(*frame[:2], *notes(*frame))

    _, result = first_sum(tamper)
    assert "has offered already" in str(result.lost["c01"])


@pytest.mark.parametrize("victims", [(0,), (2, 4)])
def test_shares_that_do_not_open_are_survived_and_their_dealer_is_named_to_the_holders(victims):
    star, first = first_sum()
    dealt = dealt_by(star, "c01")
    broken = np.where(np.isin(np.arange(5), victims)[:, None], dealt.sealed ^ 1, dealt.sealed)
    result = next_sum(star, first.ahead, inputs(), dealing={"c01": replace(dealt, sealed=broken)})
    assert result.total.tolist() == plain_sum(inputs(), FIVE, context().quantisation)
    assert {name for name, outcome in star.outcomes.items() if outcome.unopened} == {FIVE[j] for j in victims}


def test_a_self_mask_that_is_not_the_one_that_was_signed_is_noticed():
    star, first = first_sum()
    ahead, own = star.outcomes["c01"].ahead
    drawn = replace(own.drawn, self_seed=own.drawn.self_seed ^ 1)
    star.outcomes["c01"] = replace(star.outcomes["c01"], ahead=(ahead, Keys(drawn, own.shown)))
    result = next_sum(star, first.ahead, inputs())
    assert isinstance(result, ProtocolViolation) and result.peer == "c01" and "committed" in str(result)


def test_a_commitment_is_for_one_sum(monkeypatch):
    plain = Keys.draw

    def draw(origin: bytes, name: str, seed: bytes | None = None) -> Keys:
        return plain(bytes(32) if name == "c01" and origin == context().full_digest else origin, name, seed)

    monkeypatch.setattr(Keys, "draw", draw)
    star, first = first_sum()
    result = next_sum(star, first.ahead, inputs())
    assert isinstance(result, ProtocolViolation) and result.peer == "c01" and "committed" in str(result)
