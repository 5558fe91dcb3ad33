"""Whole jobs whose clients have dealt their shares before the first attempt: keys came with the former signatures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parties.channel import Channel
from parties.errors import LocalError, PeerLost, ProtocolViolation
from parties.horizontal import Clients
from parties.memory import Tamper
from parties.message import decode, encode, parse_header
from tests.test_horizontal_rounds import (
    DOZEN,
    NAMES,
    PUBLIC,
    Table,
    Toy,
    begin,
    cheat,
    named_and_left_out,
    openly,
    own,
    stored,
    task,
)
from tests.training import altering, with_data, with_fields
from vfl.horizontal.messages import MaskedInput
from vfl.horizontal.round_messages import DECLINED, Ready, ReadyWithShares, Task, Turn, TurnWithShares
from vfl.horizontal.secure_aggregation import Ahead
from vfl.horizontal.star import Star


@pytest.mark.parametrize(
    ("alter", "text"),
    [
        (lambda data: data[:1], "0 rows where 4 are due"),
        (lambda data: data[:-80], "3 rows where 4 are due"),
        (lambda data: np.append(data, data[-80:]), "5 rows where 4 are due"),
        (lambda data: data[:-1], "a byte and rows of 80"),
        (lambda data: data[:0], "a byte and rows of 80"),
        (lambda data: np.append(np.array([200], np.uint8), data[1:]), "neither ready nor a known reason"),
        (lambda data: np.append(data[:-80], np.zeros(80, np.uint8)), "shares for others"),
        (lambda data: np.append(np.append(data[:1], data[1:81]), data[1:-80]), "shares for others"),
        (lambda data: np.append(np.array([DECLINED], np.uint8), data[1:]), "shares for a sum that it takes no part in"),
    ],
)
def test_a_client_whose_shares_come_damaged_with_its_ready_is_named_and_left_out(
    alter: Callable[[np.ndarray], np.ndarray], text: str
) -> None:
    frame = altering("c1", "hub", ReadyWithShares, with_data(alter))
    outcome = Damaged(own(), {name: Toy() for name in NAMES}, frame=frame).run()
    named_and_left_out(outcome)
    assert text in outcome.rounds[0].missing["c1"]


def test_shares_for_which_none_are_due_and_none_where_they_are_due_are_refused() -> None:
    """In the first sum nobody has keys yet, and afterwards all have."""
    shares = np.zeros(1 + 4 * 80, np.uint8)
    for frame in (
        altering("c1", "hub", Ready, lambda ready: ReadyWithShares(ready.round, 0, shares)),
        altering("c1", "hub", ReadyWithShares, lambda ready: Ready(ready.round, 0, ready.data[:1])),
    ):
        outcome = Damaged(own(), {name: Toy() for name in NAMES}, frame=frame).run()
        named_and_left_out(outcome)
        assert "shares where none are due, or none where they are" in outcome.rounds[0].missing["c1"]


@dataclass
class Damaged(Table):
    """One frame of which is altered."""

    frame: Tamper = lambda sender, receiver, header, payload: (header, payload)

    def _count(self, sender: str, receiver: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return super()._count(sender, receiver, *self.frame(sender, receiver, header, payload))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (with_fields(attempt=1), "shares where none are due"),
        (with_fields(what="kept"), "shares where none are due"),
        (lambda turn: with_fields(data=turn.data[:, :79])(turn), "80 bytes a row"),
        (lambda turn: with_fields(data=turn.data[1:])(turn), "3 rows where 4 are due"),
        (lambda turn: with_fields(data=turn.data[:0])(turn), "0 rows where 4 are due"),
        (with_data(lambda data: data * np.array([[1], [0], [0], [0]], np.uint8)), "shares of 2 clients where 3"),
        (lambda turn: with_fields(bound=2 * turn.bound)(turn), "a bound that was not agreed"),
        (lambda turn: Turn.of(turn.round, 0, "add", turn.bound), "secure aggregation needs 3 clients, not 0"),
    ],
)
def test_a_coordinator_that_spoils_the_turn_of_a_sum_that_is_begun_is_refused(damage: Any, text: str) -> None:
    table = Damaged(own(), {name: Toy() for name in NAMES}, frame=altering("hub", "c1", TurnWithShares, damage))
    outcome = table.run()
    assert text in str(table.outcomes["c1"]) and "MaskedInput" not in table.kinds["c1", "hub"][9:]
    assert [one.clients for one in outcome.rounds] == [("c0", "c2", "c3")] * 4


def test_keys_with_which_shares_were_dealt_in_vain_are_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that tells all that they are left out once they have dealt, and asks them again in the next round:
    their masks would be the same in two sums."""
    kept: list[Ahead | None] = []
    collect, add = Star.collect, Star._add_masked

    def asks(star: Star, task: Task, names: Any) -> Any:
        if task.stage == "train":
            kept.append(star.ahead)
            star.ahead = kept[0]
        return collect(star, task, names)

    def leaves_out(star: Star, until: float) -> Any:
        if star.task.stage != "train" or star.task.round:
            return add(star, until)
        assert star.task.again and len(star.waiting) == 4
        return np.ones(star.job.length("train", 0)), (), 0

    monkeypatch.setattr(Star, "collect", asks)
    monkeypatch.setattr(Star, "_add_masked", leaves_out)
    table = Table(own(rounds=2), {name: Toy() for name in NAMES})
    assert isinstance(table.run(), PeerLost) and kept[0] is not None
    for outcome in table.outcomes.values():
        assert isinstance(outcome, ProtocolViolation) and "signed a sum before, and we have not" in str(outcome)


def test_shares_in_a_sum_in_clear_are_refused() -> None:
    def insists(hub: Channel) -> None:
        begin(hub)
        hub.send(TurnWithShares(0, 0, np.zeros((4, 80), np.uint8), "add", 2.0**24))

    for settings in (own(), openly()):
        error = cheat(insists, settings)
        assert isinstance(error, ProtocolViolation) and "for which we have dealt none" in str(error)


def test_a_message_goes_for_the_kind_from_which_it_is_derived_and_for_no_other() -> None:
    shares = ReadyWithShares(0, 0, np.zeros(81, np.uint8))
    head, data = encode(shares, bytes(32), bytes(16), bytes(16), 0)
    found = decode(parse_header(head), bytes(data), Ready)
    assert isinstance(found, ReadyWithShares) and found.shares.shape == (1, 80)
    with pytest.raises(ValueError, match="sent ReadyWithShares where Turn is due"):
        decode(parse_header(head), bytes(data), Turn)
    head, data = encode(Ready(0, 0, np.zeros(1, np.uint8)), bytes(32), bytes(16), bytes(16), 0)
    with pytest.raises(ValueError, match="sent Ready where ReadyWithShares is due"):
        decode(parse_header(head), bytes(data), ReadyWithShares)


def test_a_coordinator_that_asks_again_who_has_signed_nothing_is_refused() -> None:
    error = cheat(lambda hub: hub.send(replace(task(0, 0), again=True)), own())
    assert isinstance(error, ProtocolViolation) and "signed a sum before, and we have not" in str(error)
    error = cheat(lambda hub: hub.send(replace(task(0, 0), again=True)), openly())
    assert isinstance(error, ProtocolViolation) and "signed a sum before, and we have not" in str(error)


# ---- who is asked again, and who is not


def offered(table: Table, name: str = "c0") -> list[int]:
    """By sum: how many messages of a client exchange keys or shares."""
    sums: list[int] = []
    for kind in table.kinds[name, "hub"]:
        if kind.startswith("Ready"):
            sums.append(0)
        elif kind in ("KeyOffer", "SealedShares"):
            sums[-1] += 1
    return sums


def test_only_the_first_sum_of_a_job_without_mishap_exchanges_keys() -> None:
    table = Table(own(), {name: Toy() for name in NAMES})
    np.testing.assert_allclose(table.run().weights, 4.0)
    assert offered(table) == [2, 0, 0, 0, 0]


def test_when_a_client_leaves_the_others_go_on_with_the_keys_that_they_have() -> None:
    """It vanishes at its Ready of round 1."""
    table = Table(own(rounds=5), {name: Toy() for name in NAMES}, dies={"c2": 12})
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 5.0)
    assert [len(one.clients) for one in outcome.rounds] == [4, 3, 3, 3, 3]
    assert [one.attempts for one in outcome.rounds] == [1] * 5
    assert offered(table) == [2, 0, 0, 0, 0, 0]


def test_a_client_that_cannot_train_once_is_missed_once() -> None:
    """Who is asked again is not whom the keys are of: for one sum they are exchanged."""

    def fails(weights: np.ndarray) -> np.ndarray:
        raise LocalError("the client's own reason")

    table = Table(own(), {name: Toy(acts={1: fails} if name == "c2" else {}) for name in NAMES})
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 4.0)
    assert [len(one.clients) for one in outcome.rounds] == [4, 3, 4, 4] and "could not train" in str(outcome.rounds[1])
    assert offered(table) == [2, 0, 0, 2, 0] and offered(table, "c2") == [2, 0, 0, 2, 0]


def test_a_client_that_is_late_is_missed_and_comes_back() -> None:
    def slow(weights: np.ndarray) -> np.ndarray:
        time.sleep(0.8)
        return weights + 1

    def steady(weights: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return weights + 1

    parts = {name: Toy(acts=dict.fromkeys(range(2, 12), steady)) for name in NAMES}
    parts["c2"] = Toy(acts={1: slow})
    table = Table(own(rounds=10, clients=Clients(deadline=0.5)), parts)
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 10.0)
    assert outcome.rounds[1].clients == outcome.rounds[2].clients == ("c0", "c1", "c3")
    assert outcome.rounds[-1].clients == NAMES and outcome.gone == ()
    assert offered(table)[-1] == 0 and 4 <= sum(offered(table)) <= 6


def test_when_too_few_are_left_the_next_attempt_exchanges_keys(tmp_path: Path) -> None:
    """All four are needed; one is killed when it has dealt its shares, and comes back."""
    settings = own(clients=Clients(quorum=4, deadline=10.0))
    table = Table(settings, {name: Toy() for name in NAMES}, dies={"c1": 13}, again={"c1": -1}, **stored(tmp_path))
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 4.0)
    assert [one.attempts for one in outcome.rounds] == [1, 2, 1, 1]
    assert offered(table) == [2, 0, 2, 0, 0]


def test_clients_of_which_some_are_chosen_exchange_keys_as_others_are_chosen() -> None:
    """Five of twelve, by turns: hardly ever those of the round before."""
    settings = own(rounds=6, clients=Clients(fraction=0.5, deadline=5.0))
    table = Table(settings, {name: Toy() for name in DOZEN})
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 6.0)
    assert all(one.attempts == 1 and len(one.clients) == 6 for one in outcome.rounds)
    alike = sum(a.clients == b.clients for a, b in pairwise(outcome.rounds))
    assert sum(sum(offered(table, name)) for name in DOZEN) == 2 * (12 + 6 * (6 - alike))


@pytest.mark.parametrize("dies", range(13, 18))
def test_no_fewer_clients_may_drop_out_than_if_keys_were_exchanged(dies: int) -> None:
    """The coordinator is a client, too: of five it needs four, of four three. Its own client cannot train once."""

    def fails(weights: np.ndarray) -> np.ndarray:
        raise LocalError("the client's own reason")

    table = Table(
        own(clients=Clients(deadline=2.0, attempts=1)),
        {name: Toy() for name in NAMES},
        dies={"c3": dies},  # from its message after Ready to the last of the round
        hub={"own": None, "model": Toy(acts={1: fails})},
    )
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 4.0)
    left = ("c0", "c1", "c2") if dies < 16 else NAMES
    assert outcome.rounds[1].clients == left and "hub" in outcome.rounds[1].missing
    assert offered(table) == [2, 0, 2, 2, 0]


@pytest.mark.parametrize("quorum", [3, 4])
def test_who_was_killed_and_is_back_between_two_sums_is_not_asked_for_keys_that_it_has_lost(
    quorum: int, tmp_path: Path
) -> None:
    settings = own(clients=Clients(quorum=quorum, deadline=3.0))
    dies = {"c1": 7}  # its score, after the sum of rows
    table = Table(settings, {name: Toy() for name in NAMES}, dies=dies, again={"c1": -1}, **stored(tmp_path))
    outcome = table.run()
    assert outcome.gone == () and offered(table)[1] == 2 and isinstance(table.outcomes["c1"].weights, np.ndarray)


def test_a_second_attempt_exchanges_keys_also_when_nobody_was_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four are needed, and one is late with its masked input."""
    plain = Channel.send

    def send(channel: Channel, message: Any, timeout: float | None = None) -> None:
        late = isinstance(message, MaskedInput) and (message.round, message.attempt) == (2, 0)
        if late and channel._our_id == PUBLIC["c1"].key_id:
            time.sleep(0.8)
        plain(channel, message, timeout)

    monkeypatch.setattr(Channel, "send", send)
    table = Table(own(clients=Clients(quorum=4, deadline=0.5)), {name: Toy() for name in NAMES})
    outcome = table.run()
    assert [one.attempts for one in outcome.rounds] == [2, 1, 1, 1] and offered(table) == [2, 2, 0, 0, 0]
    np.testing.assert_allclose(outcome.weights, 4.0)


def test_who_has_dealt_and_is_gone_before_its_turn_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came back with another table, say."""
    plain = Star._roll

    def roll(star: Star, until: float, have: Sequence[str] = ()) -> list[str]:
        if star.task.number == 2:
            star.gone["c1"] = "came back with another table"
        return plain(star, until, have)

    monkeypatch.setattr(Star, "_roll", roll)
    table = Table(own(), {name: Toy() for name in NAMES})
    outcome = table.run()
    assert [one.clients for one in outcome.rounds] == [("c0", "c2", "c3")] * 4
    assert offered(table) == [2, 2, 0, 0, 0] and "MaskedInput" not in table.kinds["c1", "hub"][9:]


def test_a_client_that_is_gone_before_the_task_is_not_asked_again() -> None:
    table = Table(own(clients=Clients(deadline=2.0)), {name: Toy() for name in NAMES}, dies={"c1": 7})
    table.run()
    assert offered(table) == [2, 2, 0, 0, 0]


def test_a_coordinator_that_stops_its_own_client_goes_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, threads = Star._note, []
    monkeypatch.setattr(threading, "excepthook", threads.append)

    def note(star: Star, name: str, ready: Ready) -> None:
        if name == "hub" and star.task.number == 2:
            raise ValueError("it breaks the protocol")
        plain(star, name, ready)

    monkeypatch.setattr(Star, "_note", note)
    hub = {"own": None, "model": Toy()}
    outcome = Table(own(clients=Clients(deadline=2.0)), {name: Toy() for name in NAMES}, hub=hub).run()
    assert outcome.gone == ("hub",) and [one.clients for one in outcome.rounds] == [NAMES] * 4
    assert not threads
