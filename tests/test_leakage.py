"""What the leak audit, the meter and the defences promise, against optimisers, closed forms and planted leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import kstest, norm
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from parties.errors import LocalError
from vfl.inputs import rank
from vfl.leakage import features, labels
from vfl.leakage.defences import marvell, max_norm, normal, optimal_noise, sum_kl_within
from vfl.leakage.meter import Reading, gradient_leak, label_correlation, stop
from vfl.leakage.suite import Finding, Limits, audit_columns, audit_labels, audit_membership

KNOWN = np.arange(40)


def replayed(seed: int) -> Any:
    return np.random.default_rng(seed).bytes


def failed(findings: list[Finding]) -> set[str]:
    return {finding.attack for finding in findings if not finding.passed}


def planted(seed: int = 1, rows: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Ten columns, of which one tells something of a label that 30 in 100 rows have."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 10))
    return x, (generator.random(rows) < expit(0.8 * x[:, 0] - 0.9)).astype(float)


# The noise


def oracle(u: float, v: float, size: int, squared: float, share: float, power: float) -> float:
    """The problem of theorem 2 as it stands in the paper, by a general optimiser from several starts."""

    def value(l10: float, l20: float, l11: float, l21: float) -> float:
        across = (l20 + u) / (l21 + v) + (l21 + v) / (l20 + u)
        along = (l10 + u + squared) / (l11 + v) + (l11 + v + squared) / (l10 + u)
        return ((size - 1) * across + along) / 2 - size

    def left(noise: np.ndarray) -> float:
        l10, l20, l11, l21 = noise
        return power - share * (l11 + (size - 1) * l21) - (1 - share) * (l10 + (size - 1) * l20)

    bounds: list[Any] = [{"type": "ineq", "fun": left}]
    bounds += [{"type": "ineq", "fun": lambda noise, i=i: noise[i] - noise[i + 1]} for i in (0, 2)]
    starts = [power / size * np.array(start) for start in ((1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 1, 0), (0.5, 0.1, 0, 0))]
    found = [
        minimize(
            lambda noise: value(*noise), start, method="SLSQP", bounds=[(0, None)] * 4, constraints=bounds, tol=1e-13
        )
        for start in starts
    ]
    return min((run.fun for run in found if run.success), default=np.inf)


variance = st.floats(0.05, 20)


@settings(max_examples=40)
@given(variance, variance, st.integers(1, 12), variance, st.floats(0.03, 0.97), variance)
def test_no_noise_of_that_power_makes_the_classes_more_alike(u, v, size, squared, share, power):
    chosen = optimal_noise(u, v, size, squared, share, power)
    assert chosen.sum_kl <= oracle(u, v, size, squared, share, power) * (1 + 1e-6)
    (a, b), (e, f) = chosen.along, chosen.across
    assert min(a - e, b - f, e, f) >= -1e-9
    assert (1 - share) * (a + (size - 1) * e) + share * (b + (size - 1) * f) <= power * (1 + 1e-9)


def divergences(means: Any, covariances: Any) -> float:
    """KL(P1 || P0) + KL(P0 || P1) of two Gaussians, from the definition."""
    total = 0.0
    for this, other in ((0, 1), (1, 0)):
        inverse, gap = np.linalg.inv(covariances[other]), means[1] - means[0]
        logs = np.linalg.slogdet(covariances[other])[1] - np.linalg.slogdet(covariances[this])[1]
        total += (np.trace(inverse @ covariances[this]) + gap @ inverse @ gap - len(gap) + logs) / 2
    return total


@pytest.mark.parametrize(("u", "v"), [(0.3, 2.0), (2.0, 0.3), (1.0, 1.0)])
def test_the_stated_divergence_is_that_of_the_gaussians_with_the_noise(u, v):
    gap, power = np.array([1.0, -2.0, 0.5]), 4.0
    chosen = optimal_noise(u, v, 3, gap @ gap, 0.2, power)
    axis = np.outer(gap, gap) / (gap @ gap)
    pairs = zip((u, v), chosen.along, chosen.across, strict=True)
    covariances = [(own + across) * np.eye(3) + (along - across) * axis for own, along, across in pairs]
    assert chosen.sum_kl == pytest.approx(divergences((0 * gap, gap), covariances), rel=1e-9)


@pytest.mark.parametrize("leak", [0.55, 0.6, 0.7, 0.9])
def test_the_divergence_allowed_is_where_the_papers_bound_meets_the_auc(leak):
    allowed = sum_kl_within(leak)
    assert 0.5 + np.sqrt(allowed) / 2 - allowed / 8 == pytest.approx(leak)
    assert norm.cdf(np.sqrt(allowed / 2)) <= leak  # two Gaussians a distance sqrt(allowed) apart, told by the best test
    assert sum_kl_within(leak, 5) == pytest.approx(allowed / 5)


@pytest.mark.parametrize(("leak", "epochs"), [(0.5, 1), (1.0, 1), (0.6, 0)])
def test_an_auc_or_a_number_of_epochs_that_cannot_be_is_refused(leak, epochs):
    with pytest.raises(ValueError, match="between"):
        sum_kl_within(leak, epochs)


def two_classes(rows: int = 20_000, gap: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(4)
    y = (generator.random(rows) < 0.2).astype(float)
    return generator.normal(size=(rows, 4)) * np.where(y == 1, 1.5, 0.7)[:, None] + np.outer(y, [gap, 0, 0, 0]), y


def test_marvell_holds_every_attack_below_the_auc_that_was_asked_for():
    gradients, y = two_classes()
    assert gradient_leak(gradients, y) > 0.95
    for leak in (0.6, 0.7):
        noised = marvell(gradients, y, sum_kl_within(leak), replayed(2))
        best = noised[:, 0]  # the difference of the classes, which an attacker does not even know
        assert max(gradient_leak(noised, y), labels.leak_auc(best, y)) < leak
        assert labels.leak_auc(best, y) > 0.53  # no more noise than is due


def test_marvell_adds_the_optimal_noise_around_unchanged_gradients():
    gradients, y = two_classes()
    added = marvell(gradients, y, 0.1, replayed(3)) - gradients
    for value in (0, 1):
        noise = added[y == value]
        assert np.abs(noise.mean(axis=0)).max() < 5 * noise.std(axis=0).max() / np.sqrt(len(noise))
    along, across = (added[y == 0] @ np.eye(4)[:2].T).var(axis=0)
    assert along > 20 * across > 0  # most of it where the classes differ; negatives lack spread, so some across
    assert np.abs(added[y == 1, 1:]).max() < 0.2 * added[y == 1, 0].std()


def test_gradients_that_are_alike_already_are_left_as_they_are():
    gradients = np.random.default_rng(1).normal(size=(400, 3))
    y = np.repeat([0.0, 1.0], 200)
    assert np.array_equal(marvell(gradients, y, 1.0), gradients)
    assert np.array_equal(marvell(gradients * 0, y, 1.0), gradients * 0)


def test_gradients_without_spread_of_their_own_are_hidden_too():
    y = np.repeat([0.0, 1.0], 4000)
    noised = marvell(np.outer(y, [3.0, 4.0]), y, sum_kl_within(0.6), replayed(1))
    assert labels.leak_auc(noised @ [0.6, 0.8], y) < 0.6


def test_a_batch_with_one_label_is_refused():
    with pytest.raises(LocalError, match="larger batches"):
        marvell(np.ones((5, 2)), np.ones(5), 0.1)


def test_a_divergence_that_no_noise_reaches_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        marvell(*two_classes(100), 0.0)


def test_max_norm_brings_every_row_to_the_largest_mean_square_along_itself():
    gradients = np.array([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0], [1.0, 0.0]])
    drawn = np.stack([max_norm(gradients, replayed(seed)) for seed in range(4000)])
    squares = np.square(drawn).sum(axis=2).mean(axis=0)
    assert squares[[0, 2]].tolist() == [25.0, 0.0]
    assert squares[[1, 3]] == pytest.approx([25, 25], rel=0.1)  # 4 deviations of 4000 squares
    assert drawn.mean(axis=0)[[1, 3]] == pytest.approx(gradients[[1, 3]], abs=0.35)  # unbiased
    across = drawn[:, :, 0] * gradients[:, 1] - drawn[:, :, 1] * gradients[:, 0]
    assert np.abs(across).max() < 1e-12


def test_noise_is_normal_replays_with_its_bytes_and_else_never():
    assert kstest(normal((20_000,), replayed(1)), "norm").pvalue > 1e-3
    assert np.array_equal(normal((3, 2), replayed(1)), normal((6,), replayed(1)).reshape(3, 2))
    assert not np.isin(normal((100,)), normal((100,))).any()
    extremes = [normal((1,), lambda size, byte=byte: byte * size)[0] for byte in (b"\0", b"\xff")]
    assert np.isfinite(extremes).all()


# Attacks on labels


def test_norms_and_directions_are_what_the_paper_says():
    gradients = np.array([[3.0, 4.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    assert labels.norms(gradients).tolist() == [5, 1, 0, 2]
    known = np.array([[1.0, 0.0], [0.0, 5.0]])
    cosines = [[0.6, 0.8], [-1, 0], [0, 0], [0, 1]]
    assert labels.directions(gradients, known) == pytest.approx(np.mean(cosines, axis=1))


def test_the_gradient_of_a_linear_head_tells_every_label():
    x, y = planted()
    gradients = np.outer(expit(x[:, 0]) - y, [0.5, -2.0, 1.0])  # dL/dE = (p - y) w
    rest = np.arange(40, len(y))
    known = gradients[:40][y[:40] == 1][:1]
    assert labels.leak_auc(labels.directions(gradients[rest], known), y[rest]) == 1.0
    assert labels.leak_auc(labels.spectrum(gradients), y, either_way=True) == 1.0


def test_the_spectrum_is_the_first_principal_component():
    values = np.random.default_rng(2).normal(size=(200, 4)) * [1, 5, 1, 1] + 7
    centred = values - values.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov(centred.T))
    assert np.abs(labels.spectrum(values)) == pytest.approx(np.abs(centred @ axes[:, -1]))


def test_rows_fewer_than_columns_give_away_every_residual_and_more_rows_do_not():
    x, y = planted(rows=60)
    wide = np.random.default_rng(5).normal(size=(60, 80))
    residual = expit(x[:, :1]) - y[:, None]
    assert np.abs(labels.residuals(wide, wide.T @ residual) - residual).max() < 1e-9
    told = labels.residuals(x, x.T @ residual)
    assert np.abs(x.T @ told - x.T @ residual).max() < 1e-9
    assert np.abs(told - residual).max() > 0.1


# Attacks on columns


def test_the_span_holds_the_columns_from_as_many_embeddings_as_their_rank():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(300, 6))
    x[:, 5] = x[:, 0] - x[:, 1]  # rank 5
    embeddings = x @ generator.normal(size=(6, 6)) + 3
    known = np.arange(20)
    assert rank(x) == rank(embeddings) == 5
    assert features.spanned(embeddings[:, :5], x).min() > 1 - 1e-9
    assert features.rebuilt_from(embeddings[:, :5], known, x).min() > 1 - 1e-9
    assert features.spanned(embeddings[:, :4], x).max() < 0.999
    assert features.rebuilt_from(embeddings[:, :4], known, x).max() < 0.999
    assert rank(embeddings[:, :4]) == 4


def test_the_span_of_one_embedding_is_its_squared_correlation_with_each_column():
    x = np.random.default_rng(3).normal(size=(200, 3)) @ [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    seen = x[:, :1] + x[:, 2:] * 0.5
    expected = [np.corrcoef(seen[:, 0], column)[0, 1] ** 2 for column in x.T]
    assert features.spanned(seen, x) == pytest.approx(expected)


def test_a_guess_no_better_than_the_mean_and_a_constant_column_count_as_nothing():
    x = np.column_stack([np.arange(10.0), np.ones(10)])
    assert features.explained(x, x).tolist() == [1, 0]
    assert features.explained(x, x * 0 - 50).tolist() == [0, 0]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_membership_is_what_rows_add_to_the_size(share):
    common = np.arange(100) < 100 * share
    assert features.membership(common, common.astype(float)) == pytest.approx(1 - max(share, 1 - share))
    assert features.membership(common, np.full(100, share + 1e-9)) == 0
    assert failed([audit_membership(common, common.astype(float))]) == {"membership"}
    assert audit_membership(common, np.full(100, share + 1e-9)).passed
    assert audit_membership(common, common.astype(float), limits=Limits(membership=1)).passed


# The audit


def test_a_share_that_learnt_the_labels_by_heart_fails_and_one_that_generalises_passes():
    x, y = planted()
    deep = MLPClassifier((64, 2), "tanh", alpha=0, max_iter=300, learning_rate_init=0.02, tol=0, random_state=1)
    with pytest.warns(UserWarning, match="converge"):
        deep.fit(x, y)
    hidden = np.tanh(x @ deep.coefs_[0] + deep.intercepts_[0])
    embeddings = np.tanh(hidden @ deep.coefs_[1] + deep.intercepts_[1])
    by_heart = audit_labels(x, y, KNOWN, share=embeddings)
    assert failed(by_heart) == {"model completion", "clusters"}
    linear = LogisticRegression().fit(x, y)
    assert not failed(audit_labels(x, y, KNOWN, share=linear.decision_function(x)[:, None]))
    (completed,) = (finding for finding in by_heart if finding.attack == "model completion")
    alone = LogisticRegression(max_iter=1000)
    mean, spread = x[KNOWN].mean(axis=0), x[KNOWN].std(axis=0)
    alone.fit((x[KNOWN] - mean) / spread, y[KNOWN])  # the baseline: 40 rows of raw columns
    scores = alone.decision_function((x[40:] - mean) / spread)
    assert completed.baseline == pytest.approx(labels.leak_auc(scores, y[40:]))


def test_aggregates_of_too_few_rows_fail_and_of_enough_rows_pass():
    x, y = planted()
    residual = 0.3 - y[:, None]
    enough = audit_labels(x, y, KNOWN, aggregates=x.T @ residual)
    assert not failed(enough)
    assert [finding.value for finding in enough if finding.attack.startswith("gradient")] == [0.5] * 3
    x, few = np.random.default_rng(1).normal(size=(150, 160)), slice(150)
    assert failed(audit_labels(x, y[few], KNOWN, aggregates=x.T @ residual[few])) == {"solved residuals"}


def test_residuals_of_several_classes_add_up_to_zero_and_are_found_all_the_same():
    _, y = planted()
    few = y[:150]
    classes = np.eye(3)[few.astype(int) * (1 + np.arange(150) % 2)]  # the positive label is one of two classes
    x = np.random.default_rng(1).normal(size=(150, 160))
    residual = classes.mean(axis=0) - classes
    assert np.abs(residual.sum(axis=1)).max() < 1e-12
    found = audit_labels(x, few, KNOWN, aggregates=x.T @ residual, outputs=3)
    assert failed(found) == {"solved residuals"} and found[3].value > 0.99
    x = np.random.default_rng(1).normal(size=(150, 20))
    assert not failed(audit_labels(x, few, KNOWN, aggregates=x.T @ residual, outputs=3))


@pytest.mark.parametrize("known", [np.array([], int), np.array([0]), np.arange(598)])
def test_known_or_other_rows_without_both_labels_are_refused(known):
    x, y = planted()
    with pytest.raises(LocalError, match="are needed"):
        audit_labels(x, y, known, share=x)


def test_own_columns_count_as_the_baseline_of_rebuilding():
    generator = np.random.default_rng(2)
    x = generator.normal(size=(300, 8))
    own = x[:, :1] + 0.1 * generator.normal(size=(300, 1))
    without = audit_columns(x, x @ generator.normal(size=(8, 2)), np.arange(30))
    for finding in audit_columns(x, x @ generator.normal(size=(8, 2)), np.arange(30), own=own):
        assert finding.baseline == pytest.approx(0.99, abs=0.005)  # 1 / (1 + 0.1^2)
    assert [finding.baseline < 0.05 for finding in without] == [True, True]
    assert not failed(without)
    assert failed(audit_columns(x, x @ generator.normal(size=(8, 8)), np.arange(30))) == {
        "span of the embeddings",
        "rebuilt from known rows",
    }


# The meter


@pytest.mark.parametrize("width", [1, 3])
def test_training_stops_before_the_embeddings_span_the_columns(width):
    for disclosed in range(12):
        reading = Reading({"grocer": disclosed}, {"grocer": 10})
        halted = stop(reading, width=width, allow_reconstruction=False, leak_limit=0.6)
        assert (halted is not None) == (disclosed + width >= 10)
        assert stop(reading, width=width, allow_reconstruction=True, leak_limit=0.6) is None
    assert halted is not None
    assert "grocer" in halted.reason


def test_one_feature_holder_at_its_rank_stops_training_for_all():
    reading = Reading({"grocer": 4, "mobile": 4}, {"grocer": 20, "mobile": 5})
    halted = stop(reading, width=1, allow_reconstruction=False, leak_limit=0.6)
    assert halted is not None
    assert "mobile" in halted.reason


def test_training_stops_above_the_agreed_leak_whatever_else_is_allowed():
    for leak, expected in ((0.6, False), (0.601, True), (None, False), (float("nan"), False)):
        halted = stop(Reading({}, {}, leak_auc=leak), width=1, allow_reconstruction=True, leak_limit=0.6)
        assert (halted is not None) == expected


def test_the_gradient_leak_is_the_best_attack_and_nan_where_there_is_nothing_to_tell():
    y = np.repeat([0.0, 1.0], 300)
    noise = np.random.default_rng(1).normal(size=(600, 3))
    assert gradient_leak(noise * (1 + 20 * y[:, None]), y) > 0.99  # by norm
    assert gradient_leak(noise + 20 * y[:, None], y) > 0.99  # by direction
    assert gradient_leak(noise, y) < 0.6
    assert np.isnan(gradient_leak(noise, 0 * y))


def test_the_correlation_is_that_of_the_best_linear_map():
    x, y = planted()
    for columns in (1, 3):
        assert label_correlation(x[:, :1], y) == pytest.approx(abs(np.corrcoef(x[:, 0], y)[0, 1]))
        design = np.column_stack([x[:, :columns], np.ones(len(y))])
        fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        assert label_correlation(x[:, :columns], y) == pytest.approx(np.corrcoef(fitted, y)[0, 1])
    assert label_correlation(x, y * 0) == 0
