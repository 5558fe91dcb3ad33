"""The choice between the schemes: bytes that are predicted are sent, and everybody chooses the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from parties.memory import outcomes
from parties.message import parse_header
from parties.session import Session
from tests.training import agreed
from vfl.encryption.choice import BANDWIDTH, REFERENCE, Cost, choose, measured, predict, strength
from vfl.encryption.ring import PRIMES
from vfl.exchange import Terms, accept_key, offer_key, open_gradients, weigh_gradient
from vfl.messages import OpenedGradient, Plan, SchemeKey, SealedGradient, SealedResidual

UNITS = REFERENCE[2048]


def recorded_bytes(scheme: str, rows: int, widths: dict[str, int], exchanges: int) -> tuple[int, Terms]:
    """Payloads of the exchanges, as they went over every connection; Paillier's one key left out."""
    x = {name: np.random.default_rng(1).normal(size=(rows, width)) for name, width in widths.items()}

    def terms(session: Session) -> Terms:
        plans = {name: Plan(bytes(32), rows, width, 0, 32) for name, width in widths.items()}
        return Terms.of(session.agreement, rows, plans, exchanges)

    def label_holder(session: Session) -> Terms:
        end = offer_key(session, terms(session))
        for number in range(exchanges):
            open_gradients(end, np.linspace(-1, 1, rows), number)
        return end.terms

    def feature_holder(session: Session) -> None:
        known = terms(session)
        fixed = known.scales[session.name].features(x[session.name], [str(j) for j in range(widths[session.name])])
        end = accept_key(session, known, fixed)
        for number in range(exchanges):
            weigh_gradient(end, number)

    roles: dict[str, Callable[[Session], Any]] = {"bank": label_holder} | dict.fromkeys(widths, feature_holder)
    recorded: Any = {}
    options = agreed(list(roles), encryption={"scheme": scheme, "key_bits": 2048})
    ended = outcomes(roles, recorded=recorded, **options)
    counted = {SealedResidual.kind, SealedGradient.kind, OpenedGradient.kind}
    if scheme == "lattice":
        counted.add(SchemeKey.kind)
    frames = [frame for links in recorded.values() for link in links.values() for frame in link.sent]
    return sum(len(payload) for head, payload in frames if parse_header(head).kind in counted), ended["bank"]


@pytest.mark.parametrize("scheme", ["lattice", "paillier"])
@pytest.mark.parametrize("widths", [{"grocer": 7}, {"grocer": 3, "mobile": 30}])
def test_the_bytes_predicted_are_the_bytes_sent(scheme, widths):
    rows, exchanges = 300, 2
    sent, terms = recorded_bytes(scheme, rows, widths, exchanges)
    assert terms.scheme == scheme
    predicted = predict(UNITS, rows, tuple(widths.values()), exchanges=exchanges)[scheme].bytes
    assert predicted == pytest.approx(sent, rel=0 if scheme == "lattice" else 0.01)
    assert terms.costs[scheme].bytes == predicted


def test_the_choice_follows_from_what_all_know_whatever_the_order_of_holders():
    for rows in (20, 70, 300, 45_211):
        costs = [predict(UNITS, rows, order, exchanges=14) for order in permutations((3, 40, 8))]
        assert {repr(cost) for cost in costs} == {repr(costs[0])}
        assert len({choose("auto", cost) for cost in costs}) == 1


def test_auto_takes_the_scheme_that_takes_less_time_at_the_usual_bandwidth():
    cheap, dear = Cost(1.0, 0), Cost(0.5, int(BANDWIDTH))
    assert dear.elapsed == 1.5
    assert choose("auto", {"paillier": cheap, "lattice": dear}) == "paillier"
    assert choose("auto", {"paillier": dear, "lattice": cheap}) == "lattice"
    for agreed_on in ("paillier", "lattice"):
        for costs in ({"paillier": cheap, "lattice": dear}, {"paillier": dear, "lattice": cheap}):
            assert choose(agreed_on, costs) == agreed_on


@pytest.mark.parametrize("columns", [(1,), (8,), (50,), (8, 8)])
@pytest.mark.parametrize("key_bits", REFERENCE)
def test_auto_takes_paillier_for_a_handful_of_rows_and_the_lattice_for_many(columns, key_bits):
    """Where it turns depends on the key: 30 to 100 rows at 2048 bits; at 4096 hardly any table is short enough."""
    chosen = [choose("auto", predict(REFERENCE[key_bits], rows, columns, exchanges=14)) for rows in range(1, 300)]
    turn = 1 + chosen.index("lattice")
    assert set(chosen[turn:]) == {"lattice"}
    low, high = {2048: (20, 150), 3072: (2, 40), 4096: (1, 5)}[key_bits]
    assert low <= turn <= high
    for rows in (10_000, 1_000_000):
        assert choose("auto", predict(REFERENCE[key_bits], rows, columns)) == "lattice"


def test_costs_grow_with_what_is_asked():
    base = predict(UNITS, 20_000, (10,), exchanges=3)
    for more in (
        predict(UNITS, 40_000, (10,), exchanges=3),
        predict(UNITS, 20_000, (60,), exchanges=3),
        predict(UNITS, 20_000, (10, 10), exchanges=3),
        predict(UNITS, 20_000, (10,), 3, exchanges=3),
        predict(UNITS, 20_000, (10,), exchanges=6),
    ):
        for scheme, cost in base.items():
            assert more[scheme].seconds > cost.seconds
            assert more[scheme].bytes > cost.bytes
    cold = predict(UNITS, 20_000, (10,), exchanges=3, cached=False)
    assert cold["paillier"] == base["paillier"]
    assert cold["lattice"].seconds > base["lattice"].seconds
    assert cold["lattice"].seconds == pytest.approx(3 * predict(UNITS, 20_000, (10,))["lattice"].seconds)


def test_every_figure_says_how_strong_its_scheme_is():
    assert strength("paillier", 3072) == "paillier, 3072 bit"
    bits = sum(np.log2(PRIMES))
    assert strength("lattice", 3072) == f"lattice, 128-bit security (N = 8192, q of {int(bits) + 1} bits)"


def test_what_is_measured_has_every_unit():
    units = measured(2048)
    assert units.key_bits == 2048
    assert all(value >= 0 for value in vars(units).values())
    assert min(units.seal, units.open, units.lattice_seal, units.lattice_take, units.encode, units.weigh) > 0
    assert predict(units, 1000, (5,))["lattice"].seconds > 0
