"""Distillation on a public table: against the paper in plain numpy, through the real rounds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import BernoulliNB, GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from parties.errors import LocalError
from parties.horizontal import Array, Clients, Horizontal, Privacy, Public
from vfl.horizontal.distillation import Distilled, PublicTable
from vfl.horizontal.federated import train
from vfl.horizontal.local import Correction, Plan
from vfl.horizontal.simulate import simulate


def plan(public: PublicTable, rounds: int = 3, **given: Any) -> Horizontal:
    return Horizontal(model="own", strategy="distillation", public=public.agreed, rounds=rounds, **given)


def table(x: np.ndarray) -> PublicTable:
    return PublicTable(x, tuple(f"x{place}" for place in range(x.shape[1])))


def predictions(model: Distilled) -> np.ndarray:
    return model.fit_local(Plan(), Correction(), (0,)).weights


# ---- the papers, in plain numpy: soft labels enter as the weights of classes, never as rows repeated


def gaussian(x: np.ndarray, soft: np.ndarray, ask: np.ndarray) -> np.ndarray:
    """Naive Bayes with normal densities; soft (n, m) are the rows' weights by class."""
    total = soft.sum(axis=0)
    mean = soft.T @ x / total[:, None]
    variance = np.stack([soft[:, c] @ (x - mean[c]) ** 2 / total[c] for c in range(soft.shape[1])])
    gap = (ask[:, None] - mean) ** 2 / variance
    return normalised(np.log(total / total.sum()) - (gap + np.log(2 * np.pi * variance)).sum(axis=2) / 2)


def bernoulli(x: np.ndarray, soft: np.ndarray, ask: np.ndarray) -> np.ndarray:
    """Naive Bayes on signs, smoothed by one."""
    total = soft.sum(axis=0)
    chance = (soft.T @ (x > 0) + 1) / (total + 2)[:, None]
    signs = (ask > 0).astype(float)
    return normalised(np.log(total / total.sum()) + signs @ np.log(chance).T + (1 - signs) @ np.log(1 - chance).T)


def normalised(logs: np.ndarray) -> np.ndarray:
    scaled = np.exp(logs - logs.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def wine() -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Three clients of unequal size, two columns, overlapping classes; and the public rows."""
    x, y = load_wine(return_X_y=True)
    x = StandardScaler().fit_transform(x)[:, [1, 2]]
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    return [(x[:25], y[:25]), (x[25:70], y[25:70]), (x[70:100], y[70:100])], x[100:150]


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_consensus_is_that_of_the_paper(weight: float) -> None:
    clients, public = wine()
    kinds = [gaussian, bernoulli, gaussian]
    consensus: Any = None
    for _ in range(4):
        answers = []
        for (x, y), kind in zip(clients, kinds, strict=True):
            rows, soft = x, np.eye(3)[y]
            if consensus is not None:
                rows, soft = np.vstack([x, public]), np.vstack([soft, weight * consensus])
            answers.append(kind(rows, soft, public))
        consensus = np.mean(answers, axis=0)
    given = {gaussian: GaussianNB(var_smoothing=0), bernoulli: BernoulliNB()}
    models = {
        f"c{i}": Distilled(given[kind], x, y, table(public), range(3), weight)
        for i, ((x, y), kind) in enumerate(zip(clients, kinds, strict=True))
    }
    outcome = train(models, plan(table(public), 4))
    np.testing.assert_allclose(outcome.weights.reshape(-1, 3), consensus, rtol=0, atol=1e-7)
    expected = gaussian(
        np.vstack([clients[0][0], public]), np.vstack([np.eye(3)[clients[0][1]], weight * consensus]), public
    )
    np.testing.assert_allclose(models["c0"].estimator.predict_proba(public), expected, rtol=0, atol=1e-7)


def test_regression_takes_the_consensus_as_targets() -> None:
    x, y = load_diabetes(return_X_y=True)
    x = x * 20
    public, clients = x[300:], [(x[:60], y[:60]), (x[60:200], y[60:200]), (x[200:300], y[200:300])]

    def ridge(rows: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
        mean, level = rows.mean(axis=0), targets.mean()
        left = (rows - mean).T @ (rows - mean) + alpha * np.eye(rows.shape[1])
        return level + (public - mean) @ np.linalg.solve(left, (rows - mean).T @ (targets - level))

    alphas, consensus = [0.1, 1.0, 10.0], None
    for _ in range(3):
        answers = []
        for (rows, targets), alpha in zip(clients, alphas, strict=True):
            if consensus is not None:
                rows, targets = np.vstack([rows, public]), np.append(targets, consensus)
            answers.append(ridge(rows, targets, alpha))
        consensus = np.mean(answers, axis=0)
    models = [Distilled(Ridge(alpha), *part, table(public)) for part, alpha in zip(clients, alphas, strict=True)]
    outcome = simulate(plan(table(public), secure_aggregation="none"), models)
    np.testing.assert_allclose(outcome.weights, consensus, rtol=1e-9)
    assert outcome.clients["client-0"].after.loss == pytest.approx(
        np.mean((models[0].estimator.predict(clients[0][0]) - clients[0][1]) ** 2)
    )


# ---- through the rounds


def digits() -> tuple[list[tuple[np.ndarray, np.ndarray]], PublicTable, tuple[np.ndarray, np.ndarray]]:
    """Four clients that know five, five, four and six of ten digits; public rows without labels; rows to test on."""
    x, y = load_digits(return_X_y=True)
    x = x / 16
    known = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (0, 2, 4, 6), (1, 3, 5, 7, 8, 9)]
    parts = [np.flatnonzero(np.isin(y[:900], some))[i::2] for i, some in zip((0, 0, 1, 1), known, strict=True)]
    return [(x[part], y[part]) for part in parts], table(x[900:1300]), (x[1300:], y[1300:])


KINDS: list[Any] = [
    RandomForestClassifier(30, random_state=0),
    make_pipeline(StandardScaler(), LogisticRegression()),
    GaussianNB(var_smoothing=0.01),
    DecisionTreeClassifier(random_state=0),
]


def test_clients_of_different_types_learn_classes_that_they_have_never_seen() -> None:
    parts, public, test = digits()
    models = [Distilled(kind, x, y, public, range(10), test=test) for kind, (x, y) in zip(KINDS, parts, strict=True)]
    outcome = simulate(plan(public, secure_aggregation="none"), models)
    for model, one in zip(models, outcome.clients.values(), strict=True):
        assert one.before.accuracy < 0.6
        assert one.after.accuracy > one.before.accuracy + 0.15
        assert one.after.accuracy == model.estimator.score(*test)
        assert one.after.loss < one.before.loss


def test_under_secure_aggregation_it_is_the_same() -> None:
    parts, rows = wine()
    public = table(rows)
    kinds = [BernoulliNB(), LogisticRegression(solver="newton-cholesky", tol=1e-10), GaussianNB(var_smoothing=0.1)]
    found = [
        simulate(
            plan(public, 3, secure_aggregation=secure),
            [Distilled(kind, x, y, public, range(3)) for kind, (x, y) in zip(kinds, parts, strict=True)],
        ).weights
        for secure in ("on", "none")
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-8)
    np.testing.assert_allclose(found[0].reshape(-1, 3).sum(axis=1), 1, atol=1e-9)


def test_every_client_counts_alike_and_one_without_rows_is_only_taught() -> None:
    parts, public, test = digits()
    x, y = parts[0]
    one_class = x[y == 0], y[y == 0]
    dealt = [parts[0], parts[1], one_class, (x[:0], y[:0])]
    models = [Distilled(GaussianNB(var_smoothing=0.01), *part, public, range(10)) for part in dealt]
    alone = [predictions(model) for model in models[:3]]
    assert (alone[2].reshape(-1, 10) == np.eye(10)[0]).all()
    outcome = simulate(plan(public, 1, secure_aggregation="none"), models)
    np.testing.assert_allclose(outcome.weights, np.mean(alone, axis=0), rtol=0, atol=1e-12)
    assert outcome.clients["client-3"].after.rows == 0
    assert models[3].estimator.score(*test) > 0.5


def test_a_pipeline_learns_where_all_know_the_same_one_class() -> None:
    parts, public, _ = digits()
    x, y = parts[0][0][parts[0][1] == 0], np.zeros(np.count_nonzero(parts[0][1] == 0), int)
    model = make_pipeline(StandardScaler(), GaussianNB())
    models = [Distilled(model, x, y, public, range(10)) for _ in range(3)]
    outcome = simulate(plan(public, 2, secure_aggregation="none"), models)
    np.testing.assert_array_equal(outcome.weights.reshape(-1, 10), np.tile(np.eye(10)[0], (len(public.x), 1)))


def test_the_coordinators_student_needs_the_consensus_alone() -> None:
    parts, public, test = digits()
    models = [Distilled(kind, x, y, public, range(10)) for kind, (x, y) in zip(KINDS, parts, strict=True)]
    outcome = simulate(plan(public, secure_aggregation="none"), models)
    student = Distilled(LogisticRegression(), np.zeros((0, 64)), np.zeros(0, int), public, range(10))
    with pytest.raises(LocalError, match="needs the others' predictions"):
        student.estimator  # noqa: B018
    student.set(outcome.weights)
    assert student.estimator.score(*test) > 0.6
    assert student.rows == 0 and student.estimator.classes_.tolist() == list(range(10))


def test_labels_may_be_text_and_robust_rules_and_compression_go_with_it() -> None:
    parts, public, test = digits()
    names = np.array([f"digit {number}" for number in range(10)])
    for given in ({"robust": "median"}, {"compression": "8bit"}):
        models = [Distilled(GaussianNB(var_smoothing=0.01), x, names[y], public, names.tolist()) for x, y in parts]
        simulate(plan(public, secure_aggregation="none", **given), models)
        assert models[0].estimator.score(test[0], names[test[1]]) > 0.5


def test_clients_remember_nothing_so_that_a_restart_ends_where_an_undisturbed_run_does(tmp_path: Path) -> None:
    parts, public, _ = digits()

    def models() -> list[Distilled]:
        return [Distilled(GaussianNB(var_smoothing=0.01), *part, public, range(10)) for part in parts]

    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    agreed = plan(public, 3, secure_aggregation="none")
    with pytest.raises(InterruptedError):
        simulate(agreed, models(), progress=stop, folder=tmp_path)
    again = simulate(agreed, models(), folder=tmp_path)
    np.testing.assert_array_equal(again.weights, simulate(agreed, models()).weights)


# ---- what is refused


def test_another_public_table_is_refused_with_the_difference() -> None:
    parts, public, _ = digits()
    changed = public.x.copy()
    changed[7, 7] += 1e-9
    for other, reason in (
        (PublicTable(public.x[1:], public.names), "has 399 rows and the digest .* the agreement's 400"),
        (
            PublicTable(changed, public.names),
            f"400 rows and the digest .*the agreement's 400 and {public.agreed.digest}",
        ),
        (PublicTable(public.x, (*public.names[1:], "x0")), "400 rows and the digest"),
    ):
        models = {
            f"c{i}": Distilled(GaussianNB(), x, y, other if i == 2 else public, range(10))
            for i, (x, y) in enumerate(parts)
        }
        with pytest.raises(LocalError, match=reason):
            train(models, plan(public, clients=Clients(quorum=4)))
    with pytest.raises(LocalError, match="64 columns, those of the public table 3"):
        Distilled(GaussianNB(), *parts[0], table(public.x[:, :3]), range(10))


@pytest.mark.parametrize(
    ("estimator", "classes", "weight", "reason"),
    [
        (KNeighborsClassifier(), range(10), 1.0, "KNeighborsClassifier lacks predict_proba or sample_weight"),
        (LinearSVC(), range(10), 1.0, "LinearSVC lacks predict_proba"),
        (make_pipeline(StandardScaler(), KNeighborsClassifier()), range(10), 1.0, "Pipeline lacks"),
        (KNeighborsRegressor(), (), 0.5, "takes no sample_weight"),
        (GaussianNB(), range(5), 1.0, "none of the agreed classes"),
        (object(), range(10), 1.0, "a distillation takes scikit-learn's estimators, and object is none"),
    ],
)
def test_estimators_that_cannot_learn_so_are_refused(estimator: Any, classes: Any, weight: float, reason: str) -> None:
    parts, public, _ = digits()
    with pytest.raises(LocalError, match=reason):
        Distilled(estimator, *parts[1], public, classes, weight)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"model": "logistic"}, 'of own models; set model = "own"'),
        ({"public": None}, r"needs \[horizontal.public\]"),
        ({"strategy": "fedavg"}, "and no other does"),
        ({"personal": "head."}, "every client keeps its own model"),
        ({"arrays": (Array(name="coef_"),)}, "every client keeps its own model"),
        ({"privacy": Privacy(level="client", rows=9), "classes": (0, 1)}, "averaging strategies"),
        ({"standardise": True}, "an own model standardises"),
    ],
)
def test_settings_that_contradict_a_distillation(given: dict[str, Any], reason: str) -> None:
    agreed = {"model": "own", "strategy": "distillation", "public": Public(rows=1, digest="0" * 64)}
    with pytest.raises(ValueError, match=reason):
        Horizontal(**(agreed | given))


def test_only_distilled_models_take_part_in_one() -> None:
    from vfl.horizontal.models import Estimator

    parts, public, _ = digits()
    model = Estimator(LogisticRegression(), *parts[0], range(10))
    with pytest.raises(LocalError, match="behind Distilled, not Estimator"):
        simulate(plan(public, secure_aggregation="none", clients=Clients(quorum=1)), [model])
