"""Robust aggregation against scipy, plain loops and poisoned clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import trim_mean
from sklearn.datasets import load_breast_cancer

from parties.errors import LocalError
from parties.horizontal import Horizontal
from vfl.horizontal import robust
from vfl.horizontal.robust import NAMES, Rule

Array = NDArray[np.float64]


def named(name: str, poisoned: int = 2, bound: float = 1.0) -> Rule:
    return robust.rule(name, poisoned=poisoned, bound=bound)


def krum_by_definition(updates: Array, poisoned: int) -> list[int]:
    """Indices by score, best first: Blanchard et al. 2017, Section 4, word by word."""
    clients, scores = len(updates), []
    for i in range(clients):
        distances = [
            sum((a - b) ** 2 for a, b in zip(updates[i], updates[j], strict=True)) for j in range(clients) if j != i
        ]
        scores.append(sum(sorted(distances)[: clients - poisoned - 2]))
    return sorted(range(clients), key=lambda i: scores[i])


# ---- against independent references

sizes = st.tuples(st.integers(7, 12), st.integers(1, 6))
tables = arrays(np.float64, sizes, elements=st.floats(-1e6, 1e6))


@given(tables, st.integers(1, 2))
def test_rules_against_scipy_and_numpy(updates: Array, poisoned: int) -> None:
    clients = len(updates)
    weights = np.arange(1.0, clients + 1)
    assert np.array_equal(named("median")(updates, weights), np.median(updates, axis=0))
    trimmed = trim_mean(updates, (poisoned + 0.5) / clients, axis=0)  # scipy rounds the count down
    assert np.allclose(named("trimmed_mean", poisoned)(updates, weights), trimmed, rtol=1e-12, atol=1e-6)
    assert np.allclose(named("mean")(updates, weights), np.average(updates, axis=0, weights=weights), atol=1e-6)
    short = [one * 5 / max(5, np.linalg.norm(one)) for one in updates]
    expected = np.average(short, axis=0, weights=weights)
    assert np.allclose(named("norm_bound", bound=5.0)(updates, weights), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_krum_against_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients, poisoned = (5, 1) if seed == 0 else (int(rng.integers(9, 15)), int(rng.integers(1, 4)))
    updates, weights = rng.normal(size=(clients, 4)), np.ones(clients)
    ranked = krum_by_definition(updates, poisoned)
    assert np.array_equal(named("krum", poisoned)(updates, weights), updates[ranked[0]])
    chosen = updates[ranked[: clients - poisoned]].mean(axis=0)
    assert np.allclose(named("multi_krum", poisoned)(updates, weights), chosen, rtol=1e-12)
    two = robust.multi_krum(updates, weights, poisoned, chosen=2)
    assert np.allclose(two, updates[ranked[:2]].mean(axis=0), rtol=1e-12)


@given(arrays(np.float64, sizes, elements=st.integers(-3, 3).map(float)), st.randoms(use_true_random=False))
def test_no_rule_depends_on_the_clients_order(updates: Array, random: object) -> None:
    """Small integers make ties of every kind."""
    order = list(range(len(updates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    weights = np.arange(1.0, len(updates) + 1)
    for name in NAMES:
        rule = named(name)
        assert np.allclose(rule(updates, weights), rule(updates[order], weights[order]), rtol=0, atol=1e-12), name


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mean", "norm_bound")])
def test_a_claimed_weight_buys_nothing(name: str) -> None:
    updates = np.random.default_rng(1).normal(size=(9, 5))
    greedy = np.array([1e9] + [1.0] * 8)
    assert np.array_equal(named(name)(updates, greedy), named(name)(updates, np.ones(9)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mean"])
@pytest.mark.parametrize("attack", [1e3, 1e9])
def test_two_of_nine_cannot_move_the_result_far(name: str, attack: float) -> None:
    rng = np.random.default_rng(2)
    updates = 0.3 + 0.05 * rng.normal(size=(9, 4))
    honest = updates[2:].mean(axis=0)
    updates[:2] = attack
    assert np.abs(named("mean")(updates, np.ones(9)) - honest).max() > 100
    assert np.abs(named(name)(updates, np.ones(9)) - honest).max() < 0.3


# ---- poisoned training


def accuracy_after(aggregate: Rule, poisoned: int, rounds: int = 30) -> float:
    """Federated logistic regression, ten clients; the first `poisoned` flip the sign of what they send, times five."""
    x, y = load_breast_cancer(return_X_y=True)
    x = np.column_stack([(x - x.mean(axis=0)) / x.std(axis=0), np.ones(len(x))])
    order = np.random.default_rng(3).permutation(len(x))
    test, clients = order[:150], np.array_split(order[150:], 10)
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        updates = np.zeros((10, len(weights)))
        for client, rows in enumerate(clients):
            local = weights.copy()
            for _ in range(5):
                local -= 0.5 * x[rows].T @ (expit(x[rows] @ local) - y[rows]) / len(rows)
            updates[client] = local - weights
        updates[:poisoned] *= -5
        weights = weights + aggregate(updates, np.array([float(len(rows)) for rows in clients]))
    return float(np.mean((x[test] @ weights > 0) == y[test]))


def test_a_fifth_flips_signs_and_only_the_mean_collapses() -> None:
    clean = accuracy_after(named("mean"), 0)
    assert clean > 0.95
    assert accuracy_after(named("mean"), 2) < clean - 0.3
    for name in NAMES:
        if name != "mean":
            assert accuracy_after(named(name), 2) > clean - 0.03, name


# ---- bad input and the agreement


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_updates_that_are_not_finite_are_refused(name: str, broken: float) -> None:
    updates = np.ones((9, 3))
    updates[4, 1] = broken
    with pytest.raises(ValueError, match="updates are not finite"):
        named(name)(updates, np.ones(9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("updates", "weights"), [((0, 3), 0), ((9, 3), 8), ((9,), 9)])
def test_shapes_are_checked(name: str, updates: tuple[int, ...], weights: int) -> None:
    with pytest.raises(ValueError, match="updates are"):
        named(name)(np.ones(updates), np.ones(weights))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
def test_weights_of_a_mean_are_checked(weights: list[float]) -> None:
    for name in ("mean", "norm_bound"):
        with pytest.raises(ValueError, match="weights are finite"):
            named(name)(np.ones((2, 3)), np.array(weights))


def test_too_few_clients_for_the_poisoned_ones() -> None:
    with pytest.raises(LocalError, match="2 poisoned clients among at least 5, and there are 4"):
        named("trimmed_mean")(np.ones((4, 2)), np.ones(4))
    for name in ("krum", "multi_krum"):
        with pytest.raises(LocalError, match="2 poisoned clients among at least 7, and there are 6"):
            named(name)(np.ones((6, 2)), np.ones(6))
        with pytest.raises(LocalError, match=f"{name} withstands 2 .* at least 7, and there are 6"):
            robust.rule(name, poisoned=2, clients=6)


def test_an_agreement_names_a_rule_and_its_parameter() -> None:
    with pytest.raises(LocalError, match="no aggregation is called mode; choose mean, norm_bound"):
        robust.rule("mode")
    for name in ("trimmed_mean", "krum", "multi_krum"):
        with pytest.raises(LocalError, match=f"{name} needs the most clients that may be poisoned"):
            robust.rule(name)
    for bound in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(LocalError, match="norm bound of updates is a positive number"):
            robust.rule("norm_bound", bound=bound)


@pytest.mark.parametrize("name", NAMES)
def test_secure_aggregation_goes_with_what_a_client_can_do_to_its_own_update(name: Any) -> None:
    settings = {"strategy": "fedavg", "robust": name, "poisoned": 1, "norm_bound": 1.0}
    assert not Horizontal(**settings, secure_aggregation="none").secure
    if name in ("mean", "norm_bound"):
        assert Horizontal(**settings).secure
    else:
        with pytest.raises(ValueError, match=f"robust {name} needs each client's own update"):
            Horizontal(**settings)
