"""Whole jobs whose clients have dealt their shares before the first attempt: keys came with the former signatures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parties.errors import LocalError, ProtocolViolation
from parties.horizontal import Clients
from parties.memory import Tamper
from tests.test_horizontal_rounds import DOZEN, NAMES, Table, Toy, cheat, named_and_left_out, openly, own, stored, task
from tests.training import altering, with_data, with_fields
from vfl.horizontal.round_messages import DECLINED, Ready, ReadyWithShares, Turn, TurnWithShares


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
