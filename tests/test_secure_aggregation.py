"""The coordinator gets the exact sum over the clients that stay, or nothing; clients refuse one that cheats."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from parties.channel import Channel
from parties.errors import LocalError, PeerAborted, PeerLost, ProtocolViolation, Refused
from parties.identity import Identity
from parties.ledger import Ledger
from parties.memory import MemoryLink, Tamper, links
from parties.message import CLASSES, Array, decode, parse_header
from tests.training import altering, sent, with_data, with_fields
from vfl.horizontal.attempt import settle
from vfl.horizontal.context import SIZE_LIMIT, Context, Quantisation
from vfl.horizontal.masking import KEYS, Dealt, mask_key, pairwise_masks, read_offer, rows_of, self_mask, table
from vfl.horizontal.messages import (
    KeyList,
    KeyOffer,
    MaskedInput,
    SealedShares,
    ShareList,
    SignatureList,
    Step,
    Survivors,
    SurvivorSignature,
    Unmasking,
)
from vfl.horizontal.secure_aggregation import Aggregate, Begun, Outcome, aggregate, contribute
from vfl.horizontal.shamir import recover

STEPS: list[type[Step]] = [KeyOffer, SealedShares, MaskedInput, SurvivorSignature, Unmasking]
NAMES = tuple(f"c{number:02}" for number in range(12))
FIVE = NAMES[:5]
KEYRING = {name: Identity.generate(name) for name in (*NAMES, "hub")}
PUBLIC = {name: identity.public for name, identity in KEYRING.items()}
# Every key with which all secrets are 0 (libsodium's list): of order 1, 2, 4 or 8, reduced or not, either top bit.
_EIGHT = (
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
)
_REDUCED = [0, 1, *(int.from_bytes(bytes.fromhex(u), "little") for u in _EIGHT), 2**255 - 20]
SMALL_ORDER = [(u + top).to_bytes(32, "little") for u in [*_REDUCED, 2**255 - 19, 2**255 - 18] for top in (0, 2**255)]


def context(names: tuple[str, ...] = FIVE, **changes: Any) -> Context:
    n = len(names)
    fields = {"session": bytes(range(32)), "round": 3, "attempt": 0, "names": names, "threshold": n // 2 + 1}
    fields |= {"quantisation": Quantisation.finest(8.0, n)}
    return Context(**(fields | changes))


def inputs(names: tuple[str, ...] = FIVE, size: int = 7) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(i).normal(size=size) for i, name in enumerate(names)}


def plain_sum(values: Mapping[str, np.ndarray], survivors: Any, quantisation: Quantisation) -> list[float]:
    """The sum of the rounded values in exact integers, and the float64 nearest to it."""
    scale = 2**quantisation.fraction_bits
    size = len(next(iter(values.values())))
    totals = [sum(round(Fraction(values[name][i]) * scale) for name in survivors) for i in range(size)]
    return [float(Fraction(total, scale)) for total in totals]


class Star:
    """A coordinator called hub and its clients, joined in memory; may outlast several attempts."""

    def __init__(self, names: tuple[str, ...] = FIVE, tamper: Tamper | None = None) -> None:
        mesh = links(["hub", *names], tamper)
        self.recorded: dict[str, dict[str, MemoryLink]] = mesh
        self.hub = {name: self._channel("hub", name) for name in names}
        self.clients = {name: self._channel(name, "hub") for name in names}
        self.used: dict[str, set[bytes]] = {name: set() for name in names}
        self.outcomes: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []

    def _channel(self, me: str, peer: str) -> Channel:
        ledger = Ledger(KEYRING[me], None, frozenset(CLASSES))
        ids = {"our_id": PUBLIC[me].key_id, "peer_id": PUBLIC[peer].key_id}
        return Channel(self.recorded[me][peer], peer=peer, ledger=ledger, timeout=20.0, **ids)

    def start(
        self,
        shared: Context,
        values: Mapping[str, np.ndarray],
        vanish: Mapping[str, int] | None = None,
        before: Callable[[str, int], None] = lambda name, step: None,
        seeds: Mapping[str, bytes] | None = None,
        dealt: Mapping[str, tuple[Dealt, Array]] | None = None,
        told: Mapping[str, Context] | None = None,
    ) -> None:
        """Every client in a thread of its own; `vanish` says before which step one is gone. dealt: for a sum that is
        begun, by each client that is there; told: who was asked for another sum than the others."""

        def run(name: str) -> None:
            channel, link = self.clients[name], self.recorded[name]["hub"]
            steps = iter(range(5) if dealt is None else range(2, 5))
            plain_send = Channel.send

            def send(message: Any, timeout: float | None = None) -> None:
                step = next(steps)
                if step == (vanish or {}).get(name):
                    raise InterruptedError
                before(name, step)
                plain_send(channel, message, timeout)

            channel.send = send  # type: ignore[method-assign]
            try:
                asked = (told or {}).get(name, shared)
                given = (channel, KEYRING[name], PUBLIC, asked, values[name], self.used[name])
                options = {"seed": (seeds or {}).get(name), "dealt": (dealt or {}).get(name)}
                self.outcomes[name] = contribute(*given, **options)
            except Exception as error:
                self.outcomes[name] = error
                if isinstance(error, ProtocolViolation):
                    del channel.send
                    channel.abort(error.kind)
                link.leave()

        here = shared.names if dealt is None else tuple(dealt)
        self.threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in here]
        for thread in self.threads:
            thread.start()

    def finish(self) -> dict[str, Any]:
        for thread in self.threads:
            thread.join()
        return self.outcomes

    def add_up(
        self,
        shared: Context,
        values: Mapping[str, np.ndarray],
        owed: dict[str, type[Step]] | None = None,
        seconds: float = 20.0,
        begun: Begun | None = None,
        **options: Any,
    ) -> Any:
        """One attempt; what the coordinator ends with. `outcomes` has what the clients end with."""
        self.start(shared, values, **options)
        result: Any
        try:
            size, owed = len(next(iter(values.values()))), {} if owed is None else owed
            result = aggregate(self.hub, PUBLIC, shared, size, owed, seconds, begun=begun)
        except Exception as error:
            result = error
            for name in shared.names:
                self.recorded["hub"][name].leave()
        self.finish()
        return result

    def replies(self, names: tuple[str, ...] = FIVE) -> dict[str, list[Unmasking]]:
        return {name: sent(self.recorded, name, "hub", Unmasking) for name in names}


def attempt(values: Mapping[str, np.ndarray] | None = None, tamper: Tamper | None = None, **options: Any) -> Any:
    star = Star(FIVE, tamper)
    return star, star.add_up(context(), values or inputs(), **options)


# Sums


def test_the_sum_is_exact():
    values = inputs(size=1000)
    star, result = attempt(values)
    assert result.total.tolist() == plain_sum(values, FIVE, context().quantisation)
    assert result.survivors == FIVE and result.lost == {}
    assert star.outcomes == dict.fromkeys(FIVE, Outcome(FIVE))


@pytest.mark.parametrize("who", [who for count in range(3) for who in combinations(FIVE, count)])
def test_the_sum_is_exact_whoever_drops_out_at_any_step_while_the_threshold_is_met(who):
    """1 + 5 * 5 + 10 * 25 attempts in all."""
    values, shared = inputs(size=2), context()
    for when in product(range(5), repeat=len(who)):
        star, vanish = Star(), dict(zip(who, when, strict=True))
        result = star.add_up(shared, values, vanish=vanish)
        survivors = tuple(name for name in FIVE if vanish.get(name, 5) > 2)  # their masked input came
        assert isinstance(result, Aggregate), (vanish, result)
        assert result.survivors == survivors, vanish
        assert result.total.tolist() == plain_sum(values, survivors, shared.quantisation), vanish
        assert set(result.lost) == set(vanish) and all(isinstance(e, PeerLost) for e in result.lost.values())
        assert all(star.outcomes[name] == Outcome(survivors) for name in FIVE if name not in vanish)


def test_with_one_dropout_more_it_stops_and_nothing_can_be_opened():
    for who, when in zip(
        list(combinations(FIVE, 3)) * 4, combinations_with_replacement(range(5), 3), strict=False
    ):  # every combination of steps
        vanish = dict(zip(who, when, strict=True))
        star = Star()
        result = star.add_up(context(), inputs(size=2), vanish=vanish)
        assert type(result) is PeerLost, vanish
        assert all(f"{name} (lost)" in str(result) for name in who) and "2 of 5 clients are left" in str(result)
        shares = [message for replies in star.replies().values() for message in replies]
        assert len(shares) == (2 if when[2] == 4 else 0), vanish  # of the three that each secret needs
        left = [name for name in FIVE if name not in who]
        if when[2] < 4:  # else they have answered, and cannot know
            assert all(star.outcomes[name] == Outcome(()) for name in left)


def test_clients_that_are_left_can_try_again():
    values, star, owed = inputs(), Star(), {}
    first = star.add_up(context(), values, owed, vanish={"c00": 2, "c01": 2})
    assert first.survivors == FIVE[2:] and set(owed) == {"c00", "c01"}
    again = context(FIVE[2:], attempt=1, threshold=3, quantisation=context().quantisation)
    for name in again.names:
        del star.clients[name].send
    assert star.add_up(again, values, owed).total.tolist() == first.total.tolist()


@pytest.mark.parametrize("vanish", [{}, {"c03": 2, "c07": 1, "c09": 3}, {"c00": 2, "c05": 2, "c11": 4}])
@pytest.mark.parametrize("degree", [None, 8])
def test_sums_of_twelve_on_the_complete_and_on_a_regular_graph(degree, vanish):
    values, shared = inputs(NAMES), context(NAMES, degree=degree)
    star = Star(NAMES)
    result = star.add_up(shared, values, vanish=vanish)
    assert result.survivors == tuple(name for name in NAMES if vanish.get(name, 5) > 2)
    assert result.total.tolist() == plain_sum(values, result.survivors, shared.quantisation)
    shape = {sent(star.recorded, name, "hub", SealedShares)[0].data.shape for name in NAMES if vanish.get(name, 5) > 1}
    assert shape == {(12 if degree is None else 9, 80)}


def test_a_neighbourhood_with_too_few_left_opens_nothing():
    shared = context(NAMES, degree=2)
    middle = shared.neighbourhood(0)
    near = [j for j in middle if j != 0]
    result = Star(NAMES).add_up(shared, inputs(NAMES), vanish={NAMES[j]: 4 for j in near})
    assert type(result) is PeerLost and "1 of the clients that hold c00's shares are left, 2 are needed" in str(result)


SIX = NAMES[:6]


def opposite(shared: Context) -> tuple[int, int]:
    """Two clients without whom the ring falls apart into arcs of two, which share no masks."""
    order = shared._ring[0]
    return order[0], order[3]


def test_survivors_that_masks_do_not_hold_together_open_nothing():
    """On a ring of six with a degree of 2 the coordinator would read two sums of two, though four survive."""
    shared = context(SIX, degree=2)
    vanish = {SIX[j]: 2 for j in opposite(shared)}
    star = Star(SIX)
    result = star.add_up(shared, inputs(SIX), vanish=vanish)
    assert type(result) is PeerLost
    assert all(replies == [] for replies in star.replies(SIX).values())
    assert all(star.outcomes[name] == Outcome(()) for name in SIX if name not in vanish)


def test_a_client_refuses_survivors_that_masks_do_not_hold_together():
    shared, star = context(SIX, degree=2), Star(SIX)
    apart = opposite(shared)
    with pytest.MonkeyPatch.context() as patch:
        honest = Context.connected
        here = threading.current_thread()
        patch.setattr(Context, "connected", lambda *given: threading.current_thread() is here or honest(*given))
        star.add_up(shared, inputs(SIX), vanish={SIX[j]: 2 for j in apart}, seconds=3.0)
    for j, name in enumerate(SIX):
        assert j in apart or "do not hold them together" in str(star.outcomes[name])


@given(st.sets(st.integers(0, 11), min_size=1), st.sampled_from([2, 4, 6]))
def test_connected_is_one_component_of_the_graph(survivors, degree):
    shared = context(NAMES, degree=degree)
    reached, ahead = set(), [min(survivors)]
    while ahead:
        client = ahead.pop()
        if client not in reached:
            reached.add(client)
            ahead += [other for other in shared.neighbourhood(client) if other in survivors]
    assert shared.connected(survivors) == (reached == survivors)


# Late clients


@pytest.mark.parametrize("step", range(5))
def test_a_late_client_is_out_of_this_attempt_and_back_in_a_later_one(step):
    values, star, owed, closed = inputs(), Star(), {}, threading.Event()

    def before(name: str, at: int) -> None:
        if (name, at) == ("c01", step):
            closed.wait(20)

    star.start(context(), values, before=before)
    result = aggregate(star.hub, PUBLIC, context(), 7, owed, seconds=1.0)
    survivors = tuple(name for name in FIVE if name != "c01" or step > 2)
    assert result.survivors == survivors and set(result.lost) == {"c01"} and owed == {"c01": STEPS[step]}
    assert result.total.tolist() == plain_sum(values, survivors, context().quantisation)

    settle(star.hub, owed)  # nothing came yet
    with pytest.raises(ValueError, match="c01 still owe"):
        aggregate(star.hub, PUBLIC, context(round=4), 7, owed)
    closed.set()
    assert star.finish()["c01"] == Outcome(() if step < 4 else FIVE)
    settle(star.hub, owed)
    assert owed == {}
    for name in FIVE:
        del star.clients[name].send
    later = star.add_up(context(round=4), values, owed)
    assert later.survivors == FIVE
    assert later.total.tolist() == plain_sum(values, FIVE, context().quantisation)


# A coordinator that cheats


def refused(tamper: Tamper, who: str = "c01") -> str:
    """What the client says that is cheated; the sum is of the others, and the client unmasks nothing."""
    star, result = attempt(tamper=tamper)
    error = star.outcomes[who]
    assert isinstance(error, ProtocolViolation) and error.peer == "hub", error
    assert star.replies()[who] == []
    assert isinstance(result.lost[who], PeerAborted)
    return str(error)


def row(position: int, change: Callable[[Array], Any]) -> Callable[[Step], Step]:
    def changed(data: Array) -> Array:
        data[position] = change(data)
        return data

    return with_data(changed)


def forged(owner: str, signer: str, keys: bytes) -> Array:
    """An offer in a client's name, signed by anybody."""
    body = context().digest + keys
    return np.frombuffer(keys + KEYRING[signer].sign(KEYS, body), np.uint8)


def test_a_forged_key_is_refused():
    change = row(2, lambda data: forged("c02", "hub", bytes(range(96))))
    assert "c02 are not signed by it" in refused(altering("hub", "c01", KeyList, change))


@pytest.mark.parametrize("byte", [0, 31, 32, 63, 64, 95, 96, 159])
def test_an_altered_key_is_refused(byte):
    def flipped(data: Array) -> Array:
        data[2, byte] ^= 1
        return data

    assert "c02 are not signed by it" in refused(altering("hub", "c01", KeyList, with_data(flipped)))


def test_one_client_under_two_names_is_refused():
    assert "c02 are not signed by it" in refused(altering("hub", "c01", KeyList, row(2, lambda data: data[3])))


def test_our_own_key_under_another_name_is_refused_even_if_that_client_signs_it():
    reflected = row(2, lambda data: data[1])
    assert "c02 are not signed by it" in refused(altering("hub", "c01", KeyList, reflected))
    colluding = row(2, lambda data: forged("c02", "c02", data[1, :96].tobytes()))
    assert "a key came twice" in refused(altering("hub", "c01", KeyList, colluding))


def test_our_own_key_must_come_back():
    for change in (row(1, lambda data: data[1] ^ 1), row(1, lambda data: 0)):
        assert "did not come back" in refused(altering("hub", "c01", KeyList, change))


@pytest.mark.parametrize("shape", [(4, 160), (6, 160), (5, 159)])
def test_more_or_fewer_clients_than_agreed_are_refused(shape):
    refused(altering("hub", "c01", KeyList, with_data(lambda data: np.ones(shape, np.uint8))))


def test_too_few_keys_are_refused():
    change = with_data(lambda data: np.where(np.arange(5)[:, None] < 2, data, 0).astype(np.uint8))
    assert "keys of 2 clients where 3" in refused(altering("hub", "c01", KeyList, change))


def test_too_few_shares_are_refused():
    change = with_data(lambda data: np.where(np.arange(5)[:, None] < 2, data, 0).astype(np.uint8))
    assert "shares of 2 clients where 3" in refused(altering("hub", "c01", ShareList, change))


def test_shares_of_a_client_without_keys_are_refused():
    star = Star(tamper=altering("hub", "c01", ShareList, row(4, lambda data: 1)))
    star.add_up(context(), inputs(), vanish={"c04": 0})
    assert "without keys" in str(star.outcomes["c01"]) and star.replies()["c01"] == []


def flags(*survivors: int, n: int = 5) -> Array:
    return np.isin(np.arange(n), survivors).astype(np.uint8)


@pytest.mark.parametrize(
    ("shown", "what"),
    [
        (flags(0, 1), "2 survivors"),
        (flags(1), "1 survivors"),
        (flags(0, 2, 3, 4), "not among them"),
        (flags(0, 1, 2, n=4), "another number of clients"),
        (flags(0, 1, 2, n=6), "another number of clients"),
        (2 * flags(0, 1, 2), "survives or it does not"),
    ],
)
def test_survivors_that_cannot_be_are_refused(shown, what):
    assert what in refused(altering("hub", "c01", Survivors, with_fields(data=shown)))


def test_a_survivor_that_dealt_no_shares_is_refused():
    star = Star(tamper=altering("hub", "c01", Survivors, with_fields(data=flags(0, 1, 2, 3, 4))))
    star.add_up(context(), inputs(), vanish={"c04": 1})
    assert "dealt no shares" in str(star.outcomes["c01"]) and star.replies()["c01"] == []


def test_survivors_that_others_did_not_sign_are_refused():
    """The set is shrunk for one client only: it signs another one than the others, whose signatures it then sees."""
    star, shared = Star(), context()
    star.start(shared, inputs())
    by_hand(star, shared, lambda client: flags(0, 1, 2) if client == 1 else flags(0, 1, 2, 3, 4))
    outcomes = star.finish()
    assert "has not signed these survivors" in str(outcomes["c01"])
    assert all("c01 has not signed these survivors" in str(outcomes[name]) for name in FIVE if name != "c01")
    assert all(replies == [] for replies in star.replies().values())


def test_a_different_set_for_every_client_opens_nothing():
    """Each sees three survivors with itself; c00 is in all sets, the others in two or three: fewer could be summed."""
    star, shared = Star(), context()
    star.start(shared, inputs())
    by_hand(star, shared, lambda i: flags(0, i or 3, i % 4 + 1), own_only=True)
    assert all("signatures of 1 clients where 3" in str(outcome) for outcome in star.finish().values())
    assert all(replies == [] for replies in star.replies().values())


def by_hand(
    star: Star,
    shared: Context,
    shown: Callable[[int], Array],
    own_only: bool = False,
    then: Callable[[dict[int, Array]], dict[int, Array]] = lambda signatures: signatures,
) -> dict[int, dict[type[Step], Array]]:
    """A coordinator that shows each client what it likes; everything that it received, by client."""
    seen: dict[int, dict[type[Step], Array]] = {i: {} for i in range(len(shared.names))}

    def gather(kind: type[Step]) -> dict[int, Array]:
        for i, name in enumerate(shared.names):
            try:
                seen[i][kind] = star.hub[name].receive(kind).data
            except (PeerAborted, PeerLost):
                continue
        return {i: found[kind] for i, found in seen.items() if kind in found}

    def tell(kind: type[Step], data: Callable[[int], Array]) -> None:
        for i, name in enumerate(shared.names):
            star.hub[name].send(kind(shared.round, shared.attempt, data(i)))

    offers = gather(KeyOffer)
    tell(KeyList, lambda i: np.stack(list(offers.values())))
    sealed = gather(SealedShares)
    tell(ShareList, lambda i: np.stack([rows[i] for rows in sealed.values()]))
    gather(MaskedInput)
    tell(Survivors, shown)
    signatures = then(gather(SurvivorSignature))
    none = np.zeros(160, np.uint8)
    tell(
        SignatureList,
        lambda i: np.stack([signatures.get(j, none) if i == j or not own_only else none for j in seen]),
    )
    gather(Unmasking)
    return seen


def test_signatures_of_another_attempt_are_refused():
    star, everybody = Star(), flags(*range(5))
    kept: dict[int, Array] = {}
    star.start(context(), inputs())
    by_hand(star, context(), lambda i: everybody, then=lambda signatures: kept.update(signatures) or signatures)
    assert star.finish() == dict.fromkeys(FIVE, Outcome(FIVE))
    for name in FIVE:
        del star.clients[name].send
    star.start(context(attempt=1), inputs())
    by_hand(star, context(attempt=1), lambda i: everybody, then=lambda signatures: kept)
    assert all("has not signed these survivors of this attempt" in str(error) for error in star.finish().values())
    assert all(len(replies) == 1 for replies in star.replies().values())  # of the first attempt


def test_keys_of_another_attempt_are_refused():
    first = Star()
    first.add_up(context(), inputs())
    old = sent(first.recorded, "hub", "c01", KeyList)[0].data
    star = Star(tamper=altering("hub", "c01", KeyList, row(2, lambda data: old[2])))
    star.add_up(context(attempt=1), inputs())
    assert "c02 are not signed by it for this attempt" in str(star.outcomes["c01"])


@pytest.mark.parametrize("answer", [KeyList, ShareList, Survivors, SignatureList])
def test_answers_of_another_attempt_are_refused(answer):
    assert "of another attempt" in refused(altering("hub", "c01", answer, with_fields(attempt=1)))


def test_an_attempt_cannot_be_repeated_to_get_the_other_seeds():
    star, result = attempt()
    assert result.survivors == FIVE
    for name in FIVE:
        del star.clients[name].send
    again = star.add_up(context(), inputs(), seconds=2.0)
    assert type(again) is PeerLost
    assert all("once more" in str(star.outcomes[name]) for name in FIVE)
    assert all(len(replies) == 1 for replies in star.replies().values())


def test_a_second_set_of_survivors_is_refused():
    """A coordinator that asks for the self mask of c04, then, showing it as dropped, for its mask key."""
    star, shared = Star(), context()

    def ask_again(signatures: dict[int, Array]) -> dict[int, Array]:
        for name in FIVE[:4]:
            star.hub[name].send(Survivors(shared.round, shared.attempt, flags(0, 1, 2, 3)))
        return signatures

    star.start(shared, inputs())
    by_hand(star, shared, lambda i: flags(*range(5)), then=ask_again)
    outcomes = star.finish()
    assert all("sent Survivors where SignatureList is due" in str(outcomes[name]) for name in FIVE[:4])
    assert all(star.replies()[name] == [] for name in FIVE[:4])


@pytest.mark.parametrize("dropped", [(), (4,), (3, 4)])
def test_a_client_gives_one_share_of_each_of_one_secret_only(dropped):
    """Of survivors the share of the self mask, of the others that of the mask key: seen with all secrets known."""
    shared = context()
    star, result = attempt(
        vanish={FIVE[j]: 2 for j in dropped}, seeds={name: name.encode() * 10 + b"xx" for name in FIVE}
    )
    offers = {j: read_offer(shared, j, PUBLIC[FIVE[j]], offer_of(star, j)) for j in range(5)}
    for owner in range(5):
        shares = [
            (j + 1, int.from_bytes(star.replies()[FIVE[j]][0].data[owner].tobytes(), "big"))
            for j in range(5)
            if j not in dropped
        ]
        of_mask_key = fits(shares, lambda s, owner=owner: public(s) == offers[owner].mask)
        assert of_mask_key == (owner in dropped)
    assert result.survivors == tuple(FIVE[j] for j in range(5) if j not in dropped)


def offer_of(star: Star, client: int) -> bytes:
    return sent(star.recorded, FIVE[client], "hub", KeyOffer)[0].data.tobytes()


def public(seed: int) -> bytes:
    return mask_key(seed).public_key().public_bytes_raw()


def fits(shares: list[tuple[int, int]], check: Callable[[int], bool]) -> bool:
    try:
        recover(shares, 3, check)
    except ValueError:
        return False
    return True


# A client that cheats, or fails


def damage(sender: str, step: type[Step], change: Callable[[Array], Array]) -> Tamper:
    return altering(sender, "hub", step, with_data(change))


def flip_rows(*positions: int) -> Callable[[Array], Array]:
    return lambda data: np.where(np.isin(np.arange(len(data)), positions)[:, None], data ^ 1, data)


@pytest.mark.parametrize("victims", [(0,), (2, 4)])
def test_shares_that_do_not_open_are_survived_and_their_dealer_is_named_to_the_holders(victims):
    star, result = attempt(tamper=damage("c01", SealedShares, flip_rows(*victims)))
    assert result.total.tolist() == plain_sum(inputs(), FIVE, context().quantisation)
    assert {name for name, outcome in star.outcomes.items() if outcome.unopened} == {FIVE[j] for j in victims}
    assert all(star.outcomes[FIVE[j]].unopened == ("c01",) for j in victims)


def test_a_client_most_of_whose_shares_do_not_open_is_named():
    _, result = attempt(tamper=damage("c01", SealedShares, flip_rows(0, 2, 4)))
    assert isinstance(result, ProtocolViolation) and result.peer == "c01"
    assert "2 shares where 3 are needed" in str(result)


@pytest.mark.parametrize(
    ("step", "change", "what"),
    [
        (KeyOffer, lambda data: data ^ 1, "c01 are not signed by it"),
        (KeyOffer, lambda data: data[:100], "160 bytes a row"),
        (
            SealedShares,
            lambda data: np.where(np.arange(5)[:, None] == 3, 0, data).astype(np.uint8),
            "shares for others",
        ),
        (SealedShares, lambda data: data[:4], "4 rows where 5"),
        (MaskedInput, lambda data: data[:6], "6 values where 7"),
        (SurvivorSignature, lambda data: data ^ 1, "c01 has not signed these survivors"),
        (Unmasking, lambda data: data[:4], "4 rows where 5"),
    ],
)
def test_a_client_that_breaks_a_step_is_named_and_the_others_go_on(step, change, what):
    star, result = attempt(tamper=damage("c01", step, change))
    assert set(result.lost) == {"c01"} and isinstance(result.lost["c01"], ProtocolViolation)
    assert what in str(result.lost["c01"])
    survivors = tuple(name for name in FIVE if name != "c01" or STEPS.index(step) > 2)
    assert result.survivors == survivors
    assert result.total.tolist() == plain_sum(inputs(), survivors, context().quantisation)
    if step is not Unmasking:
        assert isinstance(star.outcomes["c01"], PeerAborted)


@pytest.mark.parametrize("weak", SMALL_ORDER, ids=bytes.hex)
@pytest.mark.parametrize("place", [0, 32])
def test_a_client_with_a_key_of_small_order_is_named(weak, place):
    def weaken(data: Array) -> Array:
        body = data[:96].tobytes()
        return forged("c01", "c01", body[:place] + weak + body[place + 32 :])

    with pytest.raises(ValueError, match="shared key"):
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(weak))
    _, result = attempt(tamper=damage("c01", KeyOffer, weaken))
    assert result.survivors == ("c00", "c02", "c03", "c04") and isinstance(result.lost["c01"], ProtocolViolation)
    assert "no canonical point of large order" in str(result.lost["c01"])


def test_a_wrong_share_is_passed_over_while_there_are_more_than_needed():
    _, result = attempt(tamper=damage("c01", Unmasking, lambda data: data ^ 1), vanish={"c03": 2})
    assert result.total.tolist() == plain_sum(inputs(), result.survivors, context().quantisation)


def test_a_share_out_of_range_is_passed_over_and_never_blamed_on_its_owner():
    """c01 returns numbers above the prime for everybody's secrets."""
    _, result = attempt(tamper=damage("c01", Unmasking, lambda data: data * 0 + 255))
    assert result.total.tolist() == plain_sum(inputs(), FIVE, context().quantisation)
    _, result = attempt(tamper=damage("c01", Unmasking, lambda data: data * 0 + 255), vanish={"c02": 4, "c03": 4})
    assert type(result) is PeerLost and "2 of the clients that hold c00's shares are left" in str(result)


def test_a_wrong_share_among_as_many_as_needed_is_noticed():
    _, result = attempt(tamper=damage("c01", Unmasking, lambda data: data ^ 1), vanish={"c02": 4, "c03": 2})
    assert isinstance(result, ProtocolViolation) and "committed" in str(result)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 8.0000001, -9.0, 1e300])
def test_a_value_that_cannot_be_summed_is_refused_before_anything_is_sent(broken):
    values = inputs() | {"c01": np.array([0, 1, broken, 0, 0, 0, 0])}
    star, result = attempt(values)
    assert isinstance(star.outcomes["c01"], LocalError) and "1 of 7 values" in str(star.outcomes["c01"])
    assert star.recorded["c01"]["hub"].sent == []
    assert result.survivors == ("c00", "c02", "c03", "c04")


# What the coordinator sees


def looks_uniform(words: Array) -> bool:
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = words.nbytes / 256
    return bool(120 < ((counts - expected) ** 2 / expected).sum() < 420)  # 255 +- 6 standard deviations or more


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(8192) for name in FIVE}


def test_a_masked_input_looks_uniform_even_when_it_is_all_zero():
    star, result = attempt(zeros())
    assert not result.total.any()
    for name in FIVE:
        assert looks_uniform(sent(star.recorded, name, "hub", MaskedInput)[0].data)


def test_masks_do_not_depend_on_what_they_hide():
    """With all secrets replayed, what a client sends differs by its input and in nothing else: a one-time pad."""
    seeds = {name: name.encode() * 10 + b"xx" for name in FIVE}
    first, second = inputs(), {name: -values for name, values in inputs().items()}
    words = context().quantisation.words
    stars = [attempt(values, seeds=seeds)[0] for values in (first, second)]
    for name in FIVE:
        frames = [[payload for _, payload in star.recorded[name]["hub"].sent] for star in stars]
        same = [step for step, one, other in zip(STEPS, *frames, strict=True) if one == other]
        assert same == [KeyOffer, SealedShares, SurvivorSignature, Unmasking]
        one, other = (sent(star.recorded, name, "hub", MaskedInput)[0].data for star in stars)
        np.testing.assert_array_equal(one - other, words(first[name]) - words(second[name]))


def test_masks_are_fresh_in_every_attempt():
    seeds = {name: name.encode() * 10 + b"xx" for name in FIVE}
    stars = [Star(), Star()]
    for star, number in zip(stars, (0, 1), strict=True):
        star.add_up(context(attempt=number), zeros(), seeds=seeds)  # even if a client drew the same secrets twice
    for name in FIVE:
        one, other = (sent(star.recorded, name, "hub", MaskedInput)[0].data for star in stars)
        assert looks_uniform(one - other)


def test_a_survivors_input_stays_masked_when_its_self_mask_is_opened():
    shared = context()
    star, _ = attempt(zeros())
    for owner, name in enumerate(FIVE):
        shares = [(j + 1, int.from_bytes(star.replies()[FIVE[j]][0].data[owner].tobytes(), "big")) for j in range(3)]
        seed = recover(shares, 3, lambda found: True)
        masked = sent(star.recorded, name, "hub", MaskedInput)[0].data
        assert looks_uniform(masked - self_mask(shared, owner, seed, 8192))


def test_the_input_of_one_that_is_said_to_have_dropped_stays_masked():
    """A coordinator that keeps c04's input and calls it dropped gets its mask key: the self mask still hides it."""
    star, shared = Star(), context()
    star.start(shared, zeros())
    seen = by_hand(star, shared, lambda i: flags(0, 1, 2, 3))
    outcomes = star.finish()
    assert isinstance(outcomes["c04"], ProtocolViolation)
    shares = [(j + 1, int.from_bytes(seen[j][Unmasking][4].tobytes(), "big")) for j in range(4)]
    offers = {j: read_offer(shared, j, PUBLIC[FIVE[j]], seen[j][KeyOffer].tobytes()) for j in range(5)}
    key = mask_key(recover(shares, 3, lambda seed: public(seed) == offers[4].mask))
    others = {j: offers[j] for j in range(4)}
    assert looks_uniform(seen[4][MaskedInput] - pairwise_masks(shared, 4, key, others, 8192))


def test_frames_are_recorded_in_classes_that_say_what_they_are():
    star, _ = attempt()
    classes = [kind.ledger_class for kind in STEPS]
    assert classes == ["control", "ciphertext", "masked", "control", "aggregate"]
    for head, payload in star.recorded["c00"]["hub"].sent:
        header = parse_header(head)
        (step,) = [kind for kind in STEPS if kind.kind == header.kind]
        assert (decode(header, payload, step).round, decode(header, payload, step).attempt) == (3, 0)


# What is agreed


@given(st.floats(1e-6, 1e12), st.integers(3, 5000), st.integers(1, 30))
def test_the_finest_quantisation_never_wraps_around(bound, clients, size):
    quantisation = Quantisation.finest(bound, clients)
    assert quantisation.headroom(clients) + 1e-6 >= 1
    word = int(quantisation.words(np.array([bound]))[0])
    assert clients * word < 2**63 and 4 * clients * (word + 1) > 2**62  # and wastes no more than two bits
    assert quantisation.words(np.array([-bound])).view(np.int64)[0] == -word


def test_sums_at_the_bound_do_not_wrap_around():
    values = {name: np.array([8.0, -8.0]) for name in FIVE}
    _, result = attempt(values)
    assert result.total.tolist() == [40.0, -40.0]


def test_headroom_counts_the_bits_that_are_free():
    assert Quantisation(1.0, 40).headroom(4) == pytest.approx(21)
    assert Quantisation(1.0, 61).headroom(4) <= 0 < Quantisation(1.0, 60).headroom(4)


def test_too_many_values_or_dimensions_are_refused():
    quantisation = context().quantisation
    for values in (np.zeros(SIZE_LIMIT + 1), np.zeros((2, 2)), np.zeros(())):
        with pytest.raises(LocalError, match="one vector"):
            quantisation.words(values)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
def test_a_bound_is_a_positive_number(bound):
    with pytest.raises(LocalError, match="positive"):
        Quantisation.finest(bound, 3)


@pytest.mark.parametrize(
    ("names", "changes", "what"),
    [
        (NAMES[:2], {"threshold": 2}, "needs 3 clients, not 2"),
        (NAMES[:3], {"threshold": 2}, "each of two subtracts its own part"),
        (FIVE, {"threshold": 2}, "each of two subtracts its own part"),
        (NAMES[:6], {"threshold": 3}, "no majority"),
        (NAMES[:7], {"threshold": 3}, "no majority"),
        (FIVE, {"threshold": 6}, "no majority"),
        (FIVE, {"degree": 3}, "no degree"),
        (FIVE, {"degree": 4}, "no degree"),
        (FIVE, {"degree": 0}, "no degree"),
        (FIVE, {"quantisation": Quantisation(8.0, 58)}, "could overflow"),
    ],
)
def test_agreements_that_protect_nothing_are_refused(names, changes, what):
    with pytest.raises(Refused, match=what):
        context(names, **changes)


@pytest.mark.parametrize(
    "changes", [{"session": b""}, {"round": -1}, {"attempt": 2**31}, {"names": ("a", "b", "a")}, {"subject": b""}]
)
def test_contexts_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError):
        context(**changes)


def test_everything_agreed_is_in_the_digest():
    changes: list[dict[str, Any]] = [
        {},
        {"session": bytes(32)},
        {"round": 4},
        {"attempt": 1},
        {"threshold": 8},
        {"degree": 4},
        {"degree": 6},
        {"quantisation": Quantisation(4.0, 40)},
        {"quantisation": Quantisation(8.0, 40)},
        {"names": NAMES[::-1]},
        {"subject": bytes(31) + b"x"},
        {"former": bytes(31) + b"x"},
    ]
    made = [replace(context(NAMES), **change) for change in changes]
    assert len({one.full_digest for one in made}) == len(made)
    assert len({one.digest for one in made}) == len(made) - 2  # shares are sealed before the fixed point is known
    assert made[0].digest == made[0].origin and made[-1].former == made[-1].origin


@pytest.mark.parametrize("degree", [2, 4, 8, 10])
def test_neighbourhoods_are_mutual_and_follow_from_the_context(degree):
    graphs = []
    for number in range(2):
        shared = context(NAMES, degree=degree, attempt=number)
        near = [shared.neighbourhood(client) for client in range(12)]
        assert all(len(set(holders)) == degree + 1 and list(holders) == sorted(holders) for holders in near)
        assert all(client in near[client] for client in range(12))
        assert all(client in near[other] for client in range(12) for other in near[client])
        assert 2 * shared.quorum > degree + 1
        reached = {0}
        for _ in range(12):
            reached |= {other for client in reached for other in near[client]}
        assert len(reached) == 12
        graphs.append(near)
    assert degree == 10 or graphs[0] != graphs[1]


def test_tables_keep_their_rows_in_place():
    rows = {4: b"\x01" * 3, 9: b"\x02" * 3}
    made = table([2, 4, 9], rows, 3)
    assert made.tolist() == [[0] * 3, [1] * 3, [2] * 3] and rows_of([2, 4, 9], made) == rows
    with pytest.raises(ValueError, match="3 rows where 2"):
        rows_of([2, 4], made)
