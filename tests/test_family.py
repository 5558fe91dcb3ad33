"""Every estimator of the family finds what scikit-learn finds on the joined table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.linear_model import ElasticNet, LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.metrics import mean_poisson_deviance

from parties.errors import ColonnadeError, LocalError
from parties.memory import outcomes
from parties.session import Session
from tests.training import agreed, sent
from vfl.linear import (
    VerticalLinearModel,
    VerticalLinearRegression,
    VerticalLogisticRegression,
    VerticalPoissonRegressor,
    VerticalRidge,
)
from vfl.messages import PartialEmbedding

NAMES = ("bank", "grocer", "mobile")


def cut(x: np.ndarray, *widths: int) -> dict[str, pd.DataFrame]:
    """Standardised columns, in consecutive blocks; the last party has what remains."""
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    edges = [0, *np.cumsum(widths), x.shape[1]]
    return {
        name: pd.DataFrame(x[:, low:high], columns=[f"{name}{j}" for j in range(high - low)])
        for name, low, high in zip(NAMES, edges, edges[1:], strict=False)
    }


def train(
    parts: dict[str, pd.DataFrame],
    y: Any,
    make: Callable[[], VerticalLinearModel],
    weights: np.ndarray | None = None,
    then: Callable[[VerticalLinearModel, Session], Any] = lambda model, session: model,
    recorded: Any = None,
    **model: Any,
) -> dict[str, Any]:
    """Every party's model (or `then` of it), over memory links and the lattice scheme."""

    def role(session: Session) -> Any:
        first = session.is_label_holder
        fitted = make().fit(
            parts[session.name], y if first else None, session=session, sample_weight=weights if first else None
        )
        return then(fitted, session)

    tables = {
        "encryption": {"scheme": "lattice"},
        "model": {"allow_reconstruction": True, "max_exchanges": 2000} | model,
    }
    ended = outcomes(dict.fromkeys(parts, role), recorded=recorded, **agreed(list(parts), **tables))
    for outcome in ended.values():
        if isinstance(outcome, Exception) and not isinstance(outcome, ColonnadeError):
            raise outcome
    return ended


def joined(ended: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return np.hstack([model.coef_ for model in ended.values()]), ended["bank"].intercept_


def counts(rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(rows, 7))
    return x, generator.poisson(np.exp(0.4 * x @ generator.normal(size=7) * 0.6 + 0.5)).astype(float)


def wine() -> tuple[np.ndarray, np.ndarray]:
    return load_wine(return_X_y=True)


def digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x[:, x.std(axis=0) > 1.0], y


@pytest.mark.parametrize(("data", "widths"), [(wine, (6, 4)), (digits, (26,))], ids=["wine", "digits"])
def test_multinomial(data, widths):
    x, y = data()
    parts = cut(x, *widths)
    ended = train(parts, y, lambda: VerticalLogisticRegression(C=0.5, tol=1e-7))
    whole = np.hstack(list(parts.values()))
    oracle = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(whole, y)
    coef, intercept = joined(ended)
    assert coef.shape == oracle.coef_.shape and ended["bank"].converged_
    assert np.abs(coef - oracle.coef_).max() < 1e-3
    assert np.abs((intercept - intercept.mean()) - (oracle.intercept_ - oracle.intercept_.mean())).max() < 1e-3
    assert gap(coef, intercept, oracle, whole, y, 0.5) < 1e-6


def gap(coef, intercept, oracle, x, y, C) -> float:
    """Relative difference of scikit-learn's objective, multinomial."""

    def objective(w, b):
        scores = x @ w.T + b
        scores = scores - scores.max(axis=1, keepdims=True)
        loss = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y)), y]
        return C * loss.sum() + (w**2).sum() / 2

    best = objective(oracle.coef_, oracle.intercept_)
    return float((objective(coef, intercept) - best) / best)


@pytest.mark.parametrize("widths", [(4,), (4, 3)])
@pytest.mark.parametrize(
    ("make", "oracle"),
    [
        (VerticalLinearRegression, LinearRegression()),
        (lambda: VerticalRidge(alpha=30.0), Ridge(alpha=30.0)),
        (lambda: VerticalRidge(alpha=30.0, fit_intercept=False), Ridge(alpha=30.0, fit_intercept=False)),
    ],
    ids=["plain", "ridge", "no intercept"],
)
def test_linear_regression(make, oracle, widths):
    x, y = load_diabetes(return_X_y=True)
    parts = cut(x, *widths)
    ended = train(parts, y, make, residual_range=1024)
    whole = np.hstack(list(parts.values()))
    oracle.fit(whole, y)
    coef, intercept = joined(ended)
    assert np.abs(coef[0] - oracle.coef_).max() < 1e-3
    assert np.abs(intercept - oracle.intercept_).max() < 1e-3

    def objective(w: np.ndarray, b: Any) -> float:
        return float(((y - whole @ w - b) ** 2).sum() + getattr(oracle, "alpha", 0.0) * (w**2).sum())

    best = objective(oracle.coef_, oracle.intercept_)
    assert abs(objective(coef[0], intercept) - best) < 1e-6 * best


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_poisson(alpha):
    x, y = counts()
    parts = cut(x, 2, 3)
    ended = train(parts, y, lambda: VerticalPoissonRegressor(alpha=alpha), residual_range=64)
    oracle = PoissonRegressor(alpha=alpha, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    whole = np.hstack(list(parts.values()))
    oracle.fit(whole, y)
    coef, intercept = joined(ended)
    assert np.abs(coef[0] - oracle.coef_).max() < 1e-3
    assert np.abs(intercept - oracle.intercept_).max() < 1e-3

    def objective(w: np.ndarray, b: Any) -> float:
        return mean_poisson_deviance(y, np.exp(whole @ w + b)) / 2 + alpha / 2 * float((w**2).sum())

    best = objective(oracle.coef_, oracle.intercept_)
    assert abs(objective(coef[0], intercept) - best) < 1e-6 * best


@pytest.mark.parametrize("family", ["logistic", "ridge", "poisson"])
def test_sample_weights(family):
    x, y = counts(300)
    if family == "logistic":
        y = (y > 1).astype(int)
    weights = np.random.default_rng(0).uniform(0, 5, len(y))
    make, oracle = {
        "logistic": (VerticalLogisticRegression, LogisticRegression(solver="newton-cholesky", tol=1e-12)),
        "ridge": (lambda: VerticalRidge(alpha=2.0), Ridge(alpha=2.0)),
        "poisson": (
            lambda: VerticalPoissonRegressor(alpha=0.1),
            PoissonRegressor(alpha=0.1, solver="newton-cholesky", tol=1e-12),
        ),
    }[family]
    parts = cut(x, 2, 3)
    ended = train(parts, y, make, weights, residual_range=512)
    oracle.fit(np.hstack(list(parts.values())), y, sample_weight=weights)
    coef, intercept = joined(ended)
    assert np.abs(np.ravel(coef) - np.ravel(oracle.coef_)).max() < 1e-3
    assert np.abs(intercept - oracle.intercept_).max() < 1e-3


@pytest.mark.parametrize("l1_ratio", [0.5, 1.0])
def test_elastic_net(l1_ratio):
    x, y = load_diabetes(return_X_y=True)
    parts, n = cut(x, 4, 3), len(y)
    make = lambda: VerticalRidge(alpha=3.0 * n, l1_ratio=l1_ratio, solver="proximal", max_iter=2000)
    ended = train(parts, y, make, residual_range=1024)
    oracle = ElasticNet(alpha=3.0, l1_ratio=l1_ratio, tol=1e-12, max_iter=100_000)
    oracle.fit(np.hstack(list(parts.values())), y)
    coef, _ = joined(ended)
    assert np.abs(coef[0] - oracle.coef_).max() < 1e-3
    assert ((np.abs(coef[0]) < 1e-9) == (oracle.coef_ == 0)).all() and (oracle.coef_ == 0).any()


def test_sparse_logistic_regression():
    x, y = counts()
    y = (y > 1).astype(int)
    parts, C = cut(x, 2, 3), 0.05
    make = lambda: VerticalLogisticRegression(C=C, l1_ratio=1.0, solver="proximal", max_iter=2000, tol=1e-8)
    ended = train(parts, y, make)
    oracle = LogisticRegression(C=C, l1_ratio=1.0, solver="saga", tol=1e-10, max_iter=100_000)
    oracle.fit(np.hstack(list(parts.values())), y)
    coef, _ = joined(ended)
    assert np.abs(coef - oracle.coef_).max() < 1e-3
    assert (np.abs(coef) < 1e-9).any()


def test_a_label_holder_without_columns_of_its_own():
    x, y = counts()
    y = (y > 1).astype(int)
    whole = cut(x, 0, 3)
    assert whole["bank"].shape[1] == 0
    ended = train(whole, y, VerticalLogisticRegression)
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(np.hstack(list(whole.values())), y)
    coef, intercept = joined(ended)
    assert np.abs(coef - oracle.coef_).max() < 1e-3 and abs(intercept - oracle.intercept_) < 1e-3


def test_residuals_beyond_the_agreed_range_are_refused_with_the_remedy():
    x, y = load_diabetes(return_X_y=True)
    ended = train(cut(x, 4), y, VerticalRidge, residual_range=16)
    assert isinstance(ended["bank"], LocalError)
    assert str(ended["bank"]) == "residuals exceed 16; agree on a larger residual_range in [model]"


def test_predictions_scores_and_shares(tmp_path):
    x, y = counts()
    parts = cut(x, 2, 3)

    def then(model: VerticalLinearModel, session: Session) -> Any:
        model.save(tmp_path / session.name)
        again = VerticalLinearModel.load(tmp_path / session.name)
        assert type(again) is VerticalPoissonRegressor
        mine = parts[session.name]
        return again.predict(mine, session=session), model.score(mine, y, session=session), model

    ended = train(parts, y, VerticalPoissonRegressor, then=then, residual_range=64)
    coef, intercept = joined({name: outcome[2] for name, outcome in ended.items()})
    expected = np.exp(np.hstack(list(parts.values())) @ coef[0] + intercept)
    np.testing.assert_allclose(ended["bank"][0], expected, rtol=1e-9)
    assert 0.3 < ended["bank"][1] < 1 and ended["grocer"][:2] == (None, None)
    with pytest.raises(LocalError, match="not of VerticalLogisticRegression"):
        VerticalLogisticRegression.load(tmp_path / "grocer")


@pytest.mark.parametrize("outputs", [2, 3])
def test_without_consent_the_label_holder_gets_fewer_embeddings_than_the_columns_have_directions(outputs):
    x, y = load_wine(return_X_y=True)
    parts = cut(x, 6)  # 7 columns at the grocer
    ended = train(
        parts, np.minimum(y, outputs - 1), lambda: VerticalLogisticRegression(tol=1e-12), allow_reconstruction=False
    )
    directions = ended["grocer"].n_iter_ - 1 if outputs == 2 else 2 * (ended["grocer"].n_iter_ - 1)
    assert 0 < directions <= 6
    assert not ended["bank"].converged_


@pytest.mark.parametrize("outputs", [2, 3])
def test_an_l1_penalty_keeps_the_limit_on_embeddings_too(outputs):
    x, y = load_wine(return_X_y=True)
    parts, recorded = cut(x, 6), {}  # 7 columns at the grocer
    make = lambda: VerticalLogisticRegression(l1_ratio=0.5, solver="proximal", max_iter=500)
    ended = train(parts, np.minimum(y, outputs - 1), make, recorded=recorded, allow_reconstruction=False)
    width = 1 if outputs == 2 else 3
    embedded = sent(recorded, "grocer", "bank", PartialEmbedding)
    assert 0 < width * len(embedded) < 7
    assert not ended["grocer"].converged_
    assert ended["bank"].objective_ > 0
