"""Gradient exchanges and whole trainings under the lattice scheme: exact, and whoever deviates is named."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from parties.errors import PeerAborted, ProtocolViolation, Refused
from parties.memory import outcomes
from parties.session import Session
from tests.training import (
    NAMES,
    agreed,
    altering,
    centralised,
    fit,
    joined,
    kinds,
    objective,
    sent,
    table,
    violation_at,
    with_data,
    with_fields,
)
from vfl import sgd
from vfl.encryption.layout import SEALED_BYTES
from vfl.exchange import Terms, accept_key, offer_key, open_gradients, weigh_gradient
from vfl.messages import OpenedGradient, Plan, SchemeKey, SealedGradient, SealedResidual

LATTICE = {"encryption": {"scheme": "lattice", "key_bits": 2048}}
ROWS = 60


def columns(*widths: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(len(widths))
    return {name: generator.normal(size=(rows, width)) for name, width in zip(NAMES[1:], widths, strict=False)}


def exchange(
    x: dict[str, np.ndarray], residual: np.ndarray, *, numbers: int = 1, magnitude: int = 30, **options: Any
) -> dict[str, Any]:
    """`numbers` gradient exchanges and nothing else; what each party ended with."""

    def terms(session: Session) -> Terms:
        plans = {name: Plan(bytes(32), len(residual), part.shape[1], 0, magnitude) for name, part in x.items()}
        return Terms.of(session.agreement, len(residual), plans, numbers)

    def label_holder(session: Session) -> Terms:
        end = offer_key(session, terms(session))
        for number in range(numbers):
            open_gradients(end, residual, number)
        return end.terms

    def feature_holder(session: Session) -> Any:
        known = terms(session)
        fixed = known.scales[session.name].features(x[session.name], [str(j) for j in range(x[session.name].shape[1])])
        end = accept_key(session, known, fixed)
        return [weigh_gradient(end, number)[:, 0] for number in range(numbers)]

    roles: dict[str, Callable[[Session], Any]] = {"bank": label_holder} | dict.fromkeys(x, feature_holder)
    return outcomes(roles, **(agreed(list(roles), **LATTICE) | options))


def residuals(rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(9).uniform(-1, 1, rows)


# What it computes


@pytest.mark.parametrize("widths", [(3,), (2, 9)])
@pytest.mark.parametrize(
    ("feature_bits", "magnitude", "bits", "parts"), [(20, 30, 30, 1), (20, 34, 28, 1), (30, 42, 20, 1), (30, 44, 20, 8)]
)
def test_every_feature_holder_gets_exactly_its_own_sums(widths, feature_bits, magnitude, bits, parts):
    """The larger the columns' sums, the coarser the residuals; at 2^-20 the sums come in parts."""
    x, r = columns(*widths), residuals()
    r[:3] = (1.0, -1.0, 0.0)
    known = agreed(["bank", *x], encryption={"scheme": "lattice", "key_bits": 2048, "feature_bits": feature_bits})
    ended = exchange(x, r, numbers=2, magnitude=magnitude, **known)
    terms = ended["bank"]
    assert (terms.scheme, set(terms.parts.values())) == ("lattice", {parts})
    fixed_r = [round(Fraction(value) * 2**bits) for value in r]
    for name, part in x.items():
        assert terms.scales[name].residual_bits == bits
        fixed = [[round(Fraction(value) * 2**feature_bits) for value in row] for row in part]
        sums = [sum(row[j] * value for row, value in zip(fixed, fixed_r, strict=True)) for j in range(part.shape[1])]
        for got in ended[name]:
            assert got.tolist() == [float(Fraction(value, 2 ** (feature_bits + bits))) for value in sums]


@pytest.mark.parametrize("numbers_per_key", [3, 16])
def test_a_key_opens_few_numbers_of_one_feature_holder_in_one_exchange(numbers_per_key):
    """Whoever chooses what is opened learns something of the key: so little of it is used."""
    recorded: Any = {}
    x = columns(20, 3)
    encryption = {"scheme": "lattice", "key_bits": 2048, "numbers_per_key": numbers_per_key}
    known = agreed(["bank", *x], encryption=encryption)
    ended = exchange(x, residuals(), numbers=2, recorded=recorded, **known)
    keys = []
    for name, part in x.items():
        assert len(ended[name][0]) == part.shape[1]
        own = [message.data for message in sent(recorded, "bank", name, SchemeKey)]
        opened = [len(message.data) for message in sent(recorded, "bank", name, OpenedGradient)]
        assert len(own) == len(opened)
        assert max(opened) <= numbers_per_key
        assert sum(opened) == 2 * part.shape[1]
        assert {key.shape for key in own} == {(1, SEALED_BYTES)}
        keys += [key.tobytes() for key in own]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("magnitude", [0, 34, 35, 63])
def test_a_feature_holder_that_asks_for_more_partial_sums_than_its_features_can_need_is_refused(magnitude):
    ended = exchange(columns(3), residuals(), magnitude=magnitude)
    if magnitude <= 34:  # 2^20 * 60 rows * 2^8
        assert isinstance(ended["bank"], Terms)
        return
    assert isinstance(ended["bank"], Refused)
    assert ended["bank"].peer == "grocer"


# Whole trainings


@pytest.mark.parametrize("parties", [2, 3])
def test_training_reaches_what_scikit_learn_finds_on_the_joined_table(parties):
    parts, y = table(parties, 117, seed=parties)
    ended = fit(parts, y, None, policy={"allow_reconstruction": True}, **agreed(list(parts), **LATTICE))
    coef = np.hstack([ended[name].coef_[0] for name in parts])
    oracle, x = centralised(parts, y), joined(parts)
    assert np.abs(coef - oracle.coef_[0]).max() < 1e-3
    assert abs(ended["bank"].intercept_[0] - oracle.intercept_[0]) < 1e-3
    best = objective(x, y, oracle.coef_[0], oracle.intercept_[0], 1.0)
    assert -1e-9 < objective(x, y, coef, ended["bank"].intercept_[0], 1.0) - best < 1e-6
    assert {(model.converged_, model.terms_.scheme) for model in ended.values()} == {(True, "lattice")}


def test_sgd_takes_exactly_the_steps_of_a_plain_loop_over_the_joined_table():
    parts, y = table(3, 100)
    rate, C, seed = 0.3, 2.0, 7
    params = {"solver": "sgd", "C": C, "epochs": 2, "batch_size": 32, "learning_rate": rate, "random_state": seed}
    ended = fit(parts, y, None, params=params, policy={"allow_reconstruction": True}, **agreed(list(parts), **LATTICE))

    bank = parts["bank"].to_numpy()
    alone = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12).fit(bank, y)
    x = np.hstack([bank, *(np.rint(parts[name] * 2**20) / 2**20 for name in list(parts)[1:]), np.ones((100, 1))])
    weights = np.zeros(x.shape[1])
    weights[: bank.shape[1]], weights[-1] = alone.coef_[0], alone.intercept_[0]
    penalty = np.append(np.full(x.shape[1] - 1, 1 / (C * 100)), 0.0)
    for rows in sgd.batches(100, 32, 2, seed):
        residual = expit(x[rows] @ weights) - y[rows]
        weights -= rate * (x[rows].T @ residual / len(rows) + penalty * weights)
    np.testing.assert_allclose(np.hstack([model.coef_[0] for model in ended.values()]), weights[:-1], atol=1e-5)


# Either side deviates


def flip(data: np.ndarray) -> np.ndarray:
    """It reaches two sums of three, of which nine of ten show it: of 32, none once in 10^12."""
    data[0, 0] ^= 1
    return data


SIZES = [
    pytest.param(with_fields(exchange=1), id="another exchange"),
    pytest.param(with_data(lambda data: np.vstack([data, data[:1]])), id="one too many"),
    pytest.param(with_data(lambda data: data[:-1]), id="one too few"),
    pytest.param(with_data(lambda data: data[:, :-1]), id="truncated"),
    pytest.param(with_data(lambda data: 0 * data), id="zero"),
    pytest.param(with_data(lambda data: data | 255), id="no residues"),
]


@pytest.mark.parametrize("change", [*SIZES, pytest.param(with_data(flip), id="flipped")])
def test_a_bad_reply_is_refused_and_opens_nothing(change):
    recorded: Any = {}
    tamper = altering("grocer", "bank", SealedGradient, change)
    ended = exchange(columns(32), residuals(), tamper=tamper, recorded=recorded)
    violation_at(ended, "bank", "grocer")
    assert "OpenedGradient" not in kinds(recorded, "bank", "grocer")


@pytest.mark.parametrize("change", SIZES)
def test_bad_residuals_are_refused_and_not_answered(change):
    recorded: Any = {}
    tamper = altering("bank", "grocer", SealedResidual, change)
    violation_at(exchange(columns(3), residuals(), tamper=tamper, recorded=recorded), "grocer", "bank")
    assert "SealedGradient" not in kinds(recorded, "grocer", "bank")


@pytest.mark.parametrize("change", SIZES[1:])
def test_a_bad_key_is_refused_and_not_answered(change):
    recorded: Any = {}
    tamper = altering("bank", "grocer", SchemeKey, change)
    violation_at(exchange(columns(3), residuals(), tamper=tamper, recorded=recorded), "grocer", "bank")
    assert "SealedGradient" not in kinds(recorded, "grocer", "bank")


@pytest.mark.parametrize(
    "change",
    [
        with_fields(exchange=3),
        with_data(lambda data: data ^ np.array([0] * 7 + [128], np.uint8)),
        with_data(lambda data: data[::-1]),
        with_data(lambda data: 0 * data),
        with_data(lambda data: data[:-1]),
        with_data(lambda data: data[:, :-1]),
    ],
)
def test_an_opened_gradient_that_cannot_be_is_refused(change):
    tamper = altering("bank", "grocer", OpenedGradient, change)
    violation_at(exchange(columns(3), residuals(), tamper=tamper), "grocer", "bank")


@pytest.mark.parametrize("kind", [SchemeKey, SealedResidual, SealedGradient])
def test_what_belongs_to_an_earlier_exchange_is_refused_in_this_one(kind):
    """Replayed byte for byte, with the number of this exchange: the key is another one, which the noise shows."""
    ways = ("grocer", "bank") if kind is SealedGradient else ("bank", "grocer")
    earlier: list[np.ndarray] = []

    def replay(source: str, target: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return again(source, target, *remember(source, target, head, payload))

    def keep(message: Any) -> Any:
        earlier.append(message.data.copy())
        return message

    remember = altering(*ways, kind, keep)
    again = altering(*ways, kind, with_data(lambda data: earlier[0]), at=1)
    text = violation_at(exchange(columns(8), residuals(), numbers=2, tamper=replay), "bank", "grocer")
    assert "more noise" in text


def test_what_was_sealed_in_another_session_is_refused_in_this_one():
    recorded: Any = {}
    assert exchange(columns(8), residuals(), recorded=recorded)["bank"] is not None
    (reply,) = sent(recorded, "grocer", "bank", SealedGradient)
    tamper = altering("grocer", "bank", SealedGradient, with_data(lambda _: reply.data))
    assert "more noise" in violation_at(exchange(columns(8), residuals(), tamper=tamper), "bank", "grocer")


def test_a_deviating_feature_holder_is_named_although_another_one_is_honest():
    tamper = altering("mobile", "bank", SealedGradient, with_data(flip))
    ended = exchange(columns(2, 32), residuals(), tamper=tamper)
    violation_at(ended, "bank", "mobile")
    assert isinstance(ended["grocer"], (PeerAborted, ProtocolViolation))
