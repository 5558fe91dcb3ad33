"""The exact method against scikit-learn on all rows together, however the rows are dealt; the scaler likewise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import approx_fprime
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.preprocessing import StandardScaler

from parties.errors import LocalError
from vfl.horizontal.newton import (
    LARGEST,
    Exact,
    column_means,
    column_sums,
    scaler,
)
from vfl.horizontal.partition import Partition


def table(name):
    x, y = {"cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}[name](return_X_y=True)
    x, y = x[:400], y[:400]
    x = x[:, x.std(axis=0) > 0]
    x = x[:, ::3] if name == "digits" else x
    return StandardScaler().fit_transform(x), y


def counts(seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(400, 5))
    return x, generator.poisson(np.exp(x @ [0.5, -1.0, 0.2, 0.0, 0.4] + 2)) * 1.0


def dealt(x, y, how):
    """Clients' rows; "alone": the last client has one row, and one has none."""
    if how == "alone":
        return [(x[:-1], y[:-1]), (x[:0], y[:0]), (x[-1:], y[-1:])]
    if how == "sorted":
        return [(x[rows], y[rows]) for rows in np.array_split(np.argsort(y, kind="stable"), 7)]
    return [(x[rows], y[rows]) for rows in Partition.parse(how).deal(y, 5, seed=1)]


def fit(exact, data, noise=0.0):
    """As the roles do: contributions, their sum (to a fixed point of that width), a step, until done."""
    state = exact.start()
    while not state["done"][0]:
        total = sum(exact.contribution(state["weights"], x, exact.targets(y)) for x, y in data)
        state = exact.step(state, np.rint(total / noise) * noise if noise else total)
    return state


def objective(x, y, coef, intercept, C):
    """scikit-learn's C sum(log loss) + |w|^2 / 2, over C."""
    scores = x @ coef.T + intercept
    scores = np.column_stack([np.zeros(len(x)), scores]) if scores.shape[1] == 1 else scores
    chosen = scores[np.arange(len(y)), np.searchsorted(np.unique(y), y)]
    return float((logsumexp(scores, axis=1) - chosen).sum() + (coef**2).sum() / (2 * C))


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.1", "sorted", "alone"])
@pytest.mark.parametrize(
    ("name", "C", "rounds"),
    [("cancer", 1.0, 8), ("cancer", 100.0, 20), ("wine", 1.0, 8), ("wine", 0.01, 8), ("digits", 1.0, 8)],
)
def test_logistic_regression_is_scikit_learns(name, C, rounds, how):
    x, y = table(name)
    exact = Exact("logistic", x.shape[1], tuple(np.unique(y).tolist()), C=C)
    state = fit(exact, dealt(x, y, how))
    got = exact.estimator(state)
    oracle = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, y)
    assert state["converged"][0] == 1
    assert state["rounds"][0] == got.n_iter_[0] <= rounds
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.intercept_, oracle.intercept_, rtol=0, atol=1e-5)
    best = objective(x, y, oracle.coef_, oracle.intercept_, C)
    assert abs(objective(x, y, got.coef_, got.intercept_, C) / best - 1) < 1e-8
    assert (got.predict(x) == oracle.predict(x)).all()
    np.testing.assert_allclose(got.predict_proba(x), oracle.predict_proba(x), rtol=0, atol=1e-5)


def test_a_client_of_one_class_only_and_words_as_classes():
    x, y = table("wine")
    words = np.array(["red", "rosé", "white"])[y]
    data = [(x[y == k], words[y == k]) for k in range(3)]
    exact = Exact("logistic", x.shape[1], ("red", "rosé", "white"))
    got = exact.estimator(fit(exact, data), names=[f"c{j}" for j in range(x.shape[1])])
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, words)
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-5)
    assert got.classes_.tolist() == ["red", "rosé", "white"]
    assert got.feature_names_in_.tolist()[0] == "c0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # x has no names here
        assert got.score(x, words) == oracle.score(x, words)


@pytest.mark.parametrize("name", ["cancer", "wine"])
def test_without_an_intercept(name):
    x, y = table(name)
    exact = Exact("logistic", x.shape[1], tuple(np.unique(y).tolist()), fit_intercept=False)
    got = exact.estimator(fit(exact, dealt(x, y, "sorted")))
    oracle = LogisticRegression(fit_intercept=False, solver="newton-cholesky", tol=1e-12).fit(x, y)
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-5)
    assert got.intercept_.tolist() == oracle.intercept_.tolist()


@pytest.mark.parametrize("outputs", [2, 3])
def test_without_a_penalty(outputs):
    generator = np.random.default_rng(2)
    x = generator.normal(size=(300, 3))
    y = (x @ generator.normal(size=(3, outputs)) + 2 * generator.gumbel(size=(300, outputs))).argmax(axis=1)
    exact = Exact("logistic", 3, tuple(range(outputs)), C=np.inf)
    got = exact.estimator(fit(exact, dealt(x, y, "sorted")))
    oracle = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(x, y)
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.intercept_, oracle.intercept_, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["iid", "sorted", "alone"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_linear_regression_takes_one_round(alpha, intercept, how):
    x, y = load_diabetes(return_X_y=True)
    x, y = 20 * x[:, :6], y / 50
    exact = Exact("linear", 6, alpha=alpha, fit_intercept=intercept)
    state = fit(exact, dealt(x, y, how))
    got = exact.estimator(state)
    oracle = (Ridge(alpha, fit_intercept=intercept) if alpha else LinearRegression(fit_intercept=intercept)).fit(x, y)
    assert type(got) is type(oracle)
    assert state["rounds"][0] == 1
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-9)
    np.testing.assert_allclose(got.predict(x), oracle.predict(x), rtol=0, atol=1e-9)


def test_columns_that_depend_on_each_other():
    """One-hot columns beside an intercept: the least coefficients, as scikit-learn's least squares."""
    generator = np.random.default_rng(3)
    x = np.column_stack([np.eye(3)[generator.integers(0, 3, 200)], generator.normal(size=200), np.zeros(200)])
    y = x @ [1.0, 2.0, 3.0, 0.5, 0.0] + generator.normal(size=200)
    exact = Exact("linear", 5)
    got, oracle = exact.estimator(fit(exact, dealt(x, y, "sorted"))), LinearRegression().fit(x, y)
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(got.intercept_, oracle.intercept_, rtol=0, atol=1e-8)


@pytest.mark.parametrize("how", ["sorted", "alone"])
@pytest.mark.parametrize(("alpha", "intercept"), [(0.0, True), (1.0, True), (0.1, False)])
def test_poisson_regression_is_scikit_learns(alpha, intercept, how):
    x, y = counts()
    exact = Exact("poisson", 5, alpha=alpha, fit_intercept=intercept)
    state = fit(exact, dealt(x, y, how))
    got = exact.estimator(state)
    oracle = PoissonRegressor(
        alpha=alpha, fit_intercept=intercept, solver="newton-cholesky", tol=1e-12, max_iter=1000
    ).fit(x, y)
    assert state["converged"][0] == 1
    assert state["rounds"][0] <= 20
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.predict(x), oracle.predict(x), rtol=1e-5)


def test_a_step_too_far_is_halved_and_never_sent():
    """Counts without an intercept from zero weights: the full step overshoots beyond what a number may be."""
    x, y = np.ones((50, 1)), np.full(50, 200.0)
    exact = Exact("poisson", 1, fit_intercept=False)
    first = exact.step(exact.start(), exact.contribution(np.zeros(1), x, y))
    sent = exact.contribution(first["weights"], x, y)
    assert sent.tolist() == [50.0, LARGEST, 0.0, 0.0]
    second = exact.step(first, sent)
    np.testing.assert_allclose(second["weights"], first["weights"] / 2)
    state = fit(exact, [(x, y)])
    assert state["converged"][0] == 1
    np.testing.assert_allclose(state["weights"], np.log(200.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cancer", "digits"])
def test_the_rounding_of_a_secure_sum_does_not_matter(name):
    x, y = table(name)
    exact = Exact("logistic", x.shape[1], tuple(np.unique(y).tolist()))
    got = exact.estimator(fit(exact, dealt(x, y, "sorted"), noise=2.0**-20))
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, y)
    np.testing.assert_allclose(got.coef_, oracle.coef_, rtol=0, atol=1e-5)


def test_a_checkpoint_goes_on_to_the_same_bits(tmp_path):
    x, y = table("cancer")
    exact = Exact("logistic", x.shape[1], (0, 1))
    state = exact.start()
    for _ in range(4):
        state = exact.step(state, exact.contribution(state["weights"], x, exact.targets(y)))
        np.savez(tmp_path / "state.npz", **state)
        state = dict(np.load(tmp_path / "state.npz"))
    while not state["done"][0]:
        state = exact.step(state, exact.contribution(state["weights"], x, exact.targets(y)))
    assert (state["weights"] == fit(exact, [(x, y)])["weights"]).all()


def test_separable_rows_without_penalty_stop_at_the_last_round():
    x, y = np.array([[-1.0], [1.0]] * 20), np.array([0, 1] * 20)
    exact = Exact("logistic", 1, (0, 1), C=np.inf, rounds=9)
    state = fit(exact, [(x, y)])
    assert (state["rounds"][0], state["converged"][0]) == (9, 0)
    assert np.isfinite(state["weights"]).all()


@settings(max_examples=40)
@given(st.sampled_from(["logistic", "multinomial", "linear", "poisson"]), st.booleans(), st.integers(0, 2**32))
def test_a_contribution_holds_the_derivatives(family, intercept, seed):
    generator = np.random.default_rng(seed)
    classes = {"logistic": (0, 1), "multinomial": (0, 1, 2)}.get(family, ())
    exact = Exact("logistic" if classes else family, 2, classes, fit_intercept=intercept)
    size = exact.objective.size
    x, w = generator.normal(size=(6, 2)), generator.normal(size=size)
    y = generator.integers(0, max(len(classes), 2), 6) * 1.0
    got = exact.contribution(w, x, y)
    assert len(got) == exact.length and got[0] == 6
    gradient, upper = got[2 : 2 + size], np.triu_indices(size)
    np.testing.assert_allclose(
        gradient, approx_fprime(w, lambda v: exact.contribution(v, x, y)[1], 1e-7), rtol=1e-4, atol=1e-4
    )
    numeric = approx_fprime(w, lambda v: exact.contribution(v, x, y)[2 : 2 + size], 1e-7)
    np.testing.assert_allclose(got[2 + size :], np.atleast_2d(numeric)[upper], rtol=1e-4, atol=1e-4)
    parts = [exact.contribution(w, x[rows], y[rows]) for rows in (slice(0, 1), slice(1, 1), slice(1, 6))]
    np.testing.assert_allclose(np.sum(parts, axis=0), got, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("attempt", "text"),
    [
        (lambda: Exact("probit", 2), "unknown family 'probit'"),
        (lambda: Exact("logistic", 2, (1,)), "two classes or more"),
        (lambda: Exact("logistic", 2, (1, 0)), "sorted and distinct"),
        (lambda: Exact("linear", 2, (0, 1)), "the others have none"),
        (lambda: Exact("logistic", 2, (0, 1), C=0.0), "C and the tolerance are positive"),
        (lambda: Exact("linear", 2, alpha=-1.0), "alpha is 0 or more"),
        (
            lambda: Exact("logistic", 2, (0, 1)).targets(np.array([0, 1, 2, 3])),
            "2 of 4 labels are none of the 2 agreed",
        ),
        (lambda: Exact("poisson", 2).targets(np.array([0, -1.0])), "1 of 2 targets"),
        (lambda: Exact("linear", 2).targets(np.array([np.nan, 1.0])), "1 of 2 targets"),
        (lambda: fit(Exact("linear", 2), [(np.empty((0, 2)), np.empty(0))]), "no client has a row"),
        (lambda: fit(Exact("linear", 1), [(np.full((2, 1), 1e7), np.ones(2))]), "standardise the columns"),
        (lambda: fit(Exact("linear", 1), [(np.ones((2, 1)), np.full(2, 8e5))] * 2), "standardise the columns"),
        (lambda: fit(Exact("poisson", 1), [(np.ones((2, 1)), np.zeros(2))]), "no client has a count above zero"),
        (lambda: fit(Exact("logistic", 1, (0, 1)), [(np.ones((2, 1)), np.ones(2))]), "an agreed class has no row"),
        (
            lambda: fit(Exact("logistic", 1, (0, 1, 2)), [(np.eye(2)[:, :1], np.arange(2))]),
            "an agreed class has no row",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(attempt, text):
    with pytest.raises(LocalError, match=text):
        attempt()


def standardise(parts):
    mean = column_means(sum(column_sums(part) for part in parts))
    return scaler(mean, sum(column_sums(part, mean) for part in parts))


@given(
    arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.floats(-1e3, 1e3)),
    st.lists(st.integers(0, 30), max_size=3),
    st.sampled_from([0.0, 1e9, -1e12]),
)
def test_the_scaler_is_scikit_learns_also_far_from_zero(x, cuts, offset):
    x = x + offset
    got, oracle = standardise(np.split(x, sorted(cuts))), StandardScaler().fit(x)
    np.testing.assert_allclose(got.mean_, oracle.mean_, rtol=1e-12, atol=1e-12)
    exact = np.var(x - x[:1], axis=0)  # a table near zero, of the same variance
    np.testing.assert_allclose(got.var_, exact, rtol=1e-9, atol=1e-9)
    assert (got.n_samples_seen_, got.n_features_in_) == (len(x), x.shape[1])
    if offset == 0:
        np.testing.assert_allclose(got.transform(x), oracle.transform(x), rtol=1e-7, atol=1e-7)


def test_a_constant_column_stays_as_it_is():
    got = standardise([np.full((3, 1), 0.1), np.full((4, 1), 0.1)])
    assert got.scale_.tolist() == [1.0]
    with pytest.raises(LocalError, match="no client has a row"):
        standardise([np.empty((0, 2))] * 2)
