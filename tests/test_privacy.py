"""Accounting against dp-accounting, exact sums and plain numpy; noise against its probabilities; sensitivity."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import chisquare, norm

from parties.errors import LocalError
from vfl.horizontal import privacy
from vfl.horizontal.accounting import (
    Cost,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    noise_multiplier,
    sampled,
    sum_drift,
)
from vfl.horizontal.privacy import GaussianMechanism, clip, discrete_gaussian

Array = NDArray[np.float64]


def replay(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def pmf(variance: float, reach: int) -> Array:
    """Of the discrete Gaussian on -reach..reach, from its definition."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
    return weights / weights.sum()


def hockey_stick(p: Array, q: Array, epsilon: float) -> float:
    """The delta of two distributions at epsilon, by the definition of differential privacy."""
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


# ---- accounting


@pytest.mark.parametrize(
    ("multiplier", "rounds"), [(0.7, 1), (1, 1), (4, 1), (3, 10), (10, 10), (15, 100), (40, 100), (40, 1000)]
)
def test_epsilon_agrees_with_the_pld_accountant(multiplier: float, rounds: int) -> None:
    accountant = PLDAccountant().compose(GaussianDpEvent(multiplier), rounds)
    cost = Cost(mu_squared=multiplier**-2).times(rounds)
    for delta in (1e-3, 1e-5, 1e-8):
        assert cost.total(delta) == pytest.approx(accountant.get_epsilon(delta), rel=0.01)


def test_releases_of_different_noise_compose_exactly() -> None:
    multipliers = (0.9, 2.0, 5.0, 5.0)
    event = ComposedDpEvent([GaussianDpEvent(one) for one in multipliers])
    cost = sum((Cost(mu_squared=one**-2) for one in multipliers), Cost())
    assert cost.total(1e-6) == pytest.approx(PLDAccountant().compose(event).get_epsilon(1e-6), rel=0.01)


@given(st.floats(0.001, 20), st.floats(1e-10, 0.1))
def test_calibration_is_the_smallest_noise_that_is_private(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_delta(mu, epsilon) <= delta < gaussian_delta(mu * (1 + 1e-6), epsilon)
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-6)
    # Balle and Wang 2018, Theorem 8, term by term
    direct = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert gaussian_delta(mu, epsilon) == pytest.approx(direct, rel=1e-6, abs=1e-12)


def test_extremes_of_the_gaussian() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_delta(0.0, 1.0) == 0
    assert gaussian_epsilon(1.0, 0.0) == math.inf
    assert gaussian_epsilon(1e-7, 1e-5) == gaussian_epsilon(3.0, 1.0) == 0  # nothing to hide at this delta
    for epsilon, delta in ((0.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (math.inf, 1e-5), (math.nan, 1e-5)):
        with pytest.raises(LocalError, match="positive epsilon and a delta between 0 and 1"):
            gaussian_mu(epsilon, delta)


def sampled_by_hand(multiplier: float, rate: float, rounds: int, delta: float) -> float:
    """Epsilon of a Poisson-sampled Gaussian from its privacy loss on a grid, raised to a power by FFT."""
    x = np.linspace(-14 * multiplier, 14 * multiplier + 1, 400_001)
    without = norm.pdf(x, scale=multiplier) * (x[1] - x[0])
    joined = (1 - rate) * without + rate * norm.pdf(x, 1, multiplier) * (x[1] - x[0])
    loss, step, size = np.log(joined / without), 2e-4, 1 << 18
    worst = 0.0
    for values, chances in ((loss, joined), (-loss, without)):  # to leave, and to join
        histogram = np.bincount(np.rint(values / step).astype(int) % size, chances, size)
        total = np.fft.irfft(np.fft.rfft(histogram) ** rounds, size)
        losses = step * ((np.arange(size) + size // 2) % size - size // 2)
        low, high = 0.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            above = losses > middle
            if total[above] @ -np.expm1(middle - losses[above]) > delta:
                low = middle
            else:
                high = middle
        worst = max(worst, high)
    return worst


@pytest.mark.parametrize(
    ("multiplier", "rate", "rounds", "delta"), [(1.0, 0.1, 50, 1e-5), (0.8, 0.3, 10, 1e-6), (2.0, 0.5, 100, 1e-5)]
)
def test_sampled_rounds_against_convolution_by_hand(multiplier: float, rate: float, rounds: int, delta: float) -> None:
    cost = sampled(Cost(mu_squared=multiplier**-2), rounds, rate, delta)
    assert cost.total(delta) == pytest.approx(sampled_by_hand(multiplier, rate, rounds, delta), rel=0.01)
    assert cost.total(delta) < Cost(mu_squared=multiplier**-2).times(rounds).total(delta)


def test_the_noise_multiplier_keeps_its_promise() -> None:
    exact = noise_multiplier(1.0, 1e-5, 5)
    assert Cost(mu_squared=exact**-2).times(5).total(1e-5) == pytest.approx(1, rel=1e-6)
    less = noise_multiplier(1.0, 1e-5, 5, 0.2)
    assert less < exact / 2
    spent = [sampled(Cost(mu_squared=one**-2), 5, 0.2, 1e-5).epsilon for one in (less, less / 1.02)]
    assert spent[0] <= 1 < spent[1]


def test_sampling_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(LocalError, match=r"pip install 'colonnade\[dp\]'"):
        sampled(Cost(mu_squared=1), 10, 0.1, 1e-5)
    assert noise_multiplier(1.0, 1e-5, 10) > 1  # without sampling nothing is missing


@pytest.mark.parametrize("cost", [Cost(), Cost(mu_squared=1, epsilon=1, delta=1e-6)])
def test_only_gaussian_releases_can_be_sampled(cost: Cost) -> None:
    with pytest.raises(LocalError, match="only a release of Gaussian noise"):
        sampled(cost, 10, 0.1, 1e-5)


def test_costs_that_are_not_gaussian_add_up() -> None:
    other = Cost(epsilon=0.5, delta=4e-6)
    both = Cost(mu_squared=0.04) + other
    assert both.total(1e-5) == pytest.approx(0.5 + gaussian_epsilon(0.2, 6e-6))
    assert (other + other).total(1e-5) == 1
    assert (other + other + other).total(1e-5) == math.inf  # their delta alone is more
    with pytest.raises(ValueError, match="none negative"):
        Cost(mu_squared=-1.0)
    with pytest.raises(ValueError, match="finite"):
        Cost(epsilon=math.inf)


# ---- the discrete Gaussian's privacy, by exact sums


@pytest.mark.parametrize("variance", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("summands", [2, 3, 6])
def test_a_sum_of_discrete_gaussians_drifts_no_further_than_stated(variance: float, summands: int) -> None:
    one = pmf(variance, 15)
    total = one
    for _ in range(summands - 1):
        total = np.convolve(total, one)
    near = slice(len(total) // 2 - 8, len(total) // 2 + 9)  # where nothing was cut off
    ideal = pmf(summands * variance, len(total) // 2)
    drift = np.abs(np.log(total[near] / ideal[near])).max()
    assert 1e-10 < drift <= sum_drift(variance, summands)
    assert sum_drift(variance, 1) == 0


@pytest.mark.parametrize("contributors", [1, 3])
@pytest.mark.parametrize("multiplier", [0.7, 1.5, 4.0])
def test_the_stated_cost_covers_the_exact_one(multiplier: float, contributors: int) -> None:
    """One parameter, a step of 1, a contribution of 4 (bound 3.5, rounding 0.5): every probability is summed up."""
    mechanism = GaussianMechanism(3.5, multiplier, 1, 0, contributors)
    assert mechanism.sensitivity == 4
    noise = one = pmf(mechanism.variance, 150)
    for _ in range(contributors - 1):
        noise = np.convolve(noise, one)
    far = np.pad(noise, (4, 0))
    here = np.pad(noise, (0, 4))
    for delta in (1e-2, 1e-4, 1e-6):
        epsilon = mechanism.cost.total(delta)
        assert hockey_stick(here, far, epsilon) <= delta
        assert hockey_stick(here, far, 0.75 * epsilon) > delta  # and is not far off, even on so coarse a grid


def test_the_stated_cost_covers_two_parameters() -> None:
    mechanism = GaussianMechanism(5 - math.sqrt(0.5), 1.0, 2, 0)
    assert mechanism.sensitivity == pytest.approx(5)
    one = pmf(mechanism.variance, 60)
    here, far = np.outer(np.pad(one, (0, 3)), np.pad(one, (0, 4))), np.outer(np.pad(one, (3, 0)), np.pad(one, (4, 0)))
    for delta in (1e-2, 1e-4, 1e-6):
        assert hockey_stick(here, far, mechanism.cost.total(delta)) <= delta


def test_on_a_fine_grid_the_cost_is_that_of_the_continuous_gaussian() -> None:
    multiplier = noise_multiplier(1.0, 1e-5, 20)
    mechanism = GaussianMechanism(1.0, multiplier, 100_000, 20, contributors=34)
    assert mechanism.cost.times(20).total(1e-5) == pytest.approx(1, rel=1e-8)
    assert mechanism.cost.times(20).total(1e-5) <= 1
    assert mechanism.cost.drift > 0
    assert 34 * mechanism.variance >= (multiplier * (2**20 + math.sqrt(100_000) / 2)) ** 2


def test_a_grid_must_fit_the_noise() -> None:
    with pytest.raises(LocalError, match="finer than the grid at 0 fraction bits; agree on more"):
        GaussianMechanism(1.0, 1.0, 1, 0, contributors=50)
    with pytest.raises(LocalError, match="too large for 50 fraction bits; agree on fewer"):
        GaussianMechanism(100.0, 1.0, 1, 50)
    for arguments in (
        (0.0, 1.0, 1, 16),
        (1.0, math.inf, 1, 16),
        (1.0, 1.0, 0, 16),
        (math.nan, 1.0, 1, 16),
        (1.0, 1.0, 1, 53),
    ):
        with pytest.raises(LocalError, match="change the agreement"):
            GaussianMechanism(*arguments)


# ---- the sampler


@pytest.mark.parametrize("variance", [1, 2, 9, 100])
def test_noise_has_exactly_its_probabilities(variance: int) -> None:
    drawn, reach = discrete_gaussian(variance, 200_000, replay(variance)), math.ceil(3.5 * math.sqrt(variance))
    assert drawn.dtype == np.int64
    inner = np.clip(drawn, -reach, reach) + reach  # the two last bins hold the tails
    chances = pmf(variance, 12 * reach)
    middle = 12 * reach
    expected = chances[middle - reach : middle + reach + 1].copy()
    expected[0] = expected[-1] = chances[: middle - reach + 1].sum()
    counts = np.bincount(inner, minlength=2 * reach + 1)
    assert chisquare(counts, len(drawn) * expected / expected.sum()).pvalue > 0.01
    assert np.var(drawn) == pytest.approx(variance, rel=0.02)
    positive, negative = np.count_nonzero(drawn > 0), np.count_nonzero(drawn < 0)
    assert abs(positive - negative) < 3 * math.sqrt(positive + negative)


@pytest.mark.parametrize("variance", [10**6 + 1, 10**14, 2**79])
def test_wide_noise_has_the_probabilities_of_the_normal(variance: int) -> None:
    drawn = discrete_gaussian(variance, 100_000, replay(5)) / math.sqrt(variance)
    edges = norm.ppf(np.linspace(0, 1, 101)[1:-1])  # a step is 1e-3 of a deviation or less
    assert chisquare(np.bincount(np.searchsorted(edges, drawn), minlength=100)).pvalue > 0.01
    assert np.abs(drawn).max() > 4


def test_low_bits_of_wide_noise_are_uniform() -> None:
    drawn = discrete_gaussian(10**14, 64_000, replay(6))
    assert chisquare(np.bincount(drawn % 64, minlength=64)).pvalue > 0.01


def test_noise_is_replayed_from_its_entropy_and_fresh_without() -> None:
    ours, again = (discrete_gaussian(10**6, 1000, replay(8)) for _ in range(2))
    assert np.array_equal(ours, again)
    assert not np.array_equal(discrete_gaussian(10**6, 1000), discrete_gaussian(10**6, 1000))
    assert discrete_gaussian(5, 0).shape == (0,)
    for variance in (0, 2**80):
        with pytest.raises(ValueError, match="a variance"):
            discrete_gaussian(variance, 1)


@pytest.mark.parametrize("exponent", [Fraction(1), Fraction(1, 3), Fraction(10**30 + 7, 10**29), Fraction(40)])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("decided_by", [117, 181])
def test_a_chance_is_decided_at_its_very_last_bit(exponent: Fraction, side: int, decided_by: int) -> None:
    """A uniform real that agrees with exp(-exponent) until bit 117 or 181, far beyond what float64 can see."""
    with localcontext(prec=120):
        digits = int((-Decimal(exponent.numerator) / exponent.denominator).exp() * (1 << decided_by)) - side
    first, *more = (digits >> (decided_by - end) for end in range(53, decided_by + 1, 64))
    stream = [(first << 11).to_bytes(8, "little"), *((part & (2**64 - 1)).to_bytes(8, "little") for part in more)]
    stream.reverse()
    found = privacy._chances(np.array([float(exponent)]), lambda i: exponent, lambda count: stream.pop())
    assert found.tolist() == [side == 1]
    assert not stream


# ---- clipping and sensitivity

finite = st.floats(-1e100, 1e100)


def exact_norm_squared(vector: NDArray[np.generic]) -> Fraction:
    return sum((Fraction(one) ** 2 for one in vector.tolist()), Fraction())


@given(arrays(np.float64, st.integers(1, 30), elements=finite), st.floats(1e-3, 1e3))
def test_a_clipped_vector_is_within_its_bound_in_exact_arithmetic(vector: Array, bound: float) -> None:
    clipped = clip(vector, bound)
    assert exact_norm_squared(clipped) <= Fraction(bound) ** 2
    if np.linalg.norm(vector) < 0.999 * bound:
        assert np.array_equal(clipped, vector)
    else:
        assert np.linalg.norm(clipped) == pytest.approx(min(bound, float(np.linalg.norm(vector))), rel=1e-8)


@given(arrays(np.float64, st.integers(1, 30), elements=finite), st.floats(0.1, 100), st.integers(4, 30))
def test_a_contribution_is_within_the_sensitivity_exactly(update: Array, bound: float, bits: int) -> None:
    mechanism = GaussianMechanism(bound, 2.0, len(update), bits)
    ints = mechanism.contribution(update)
    assert ints.dtype == np.int64
    assert sum(one**2 for one in ints.tolist()) <= Fraction(mechanism.sensitivity) ** 2
    assert np.abs(ints / 2**bits - clip(update, bound)).max() <= 0.5 / 2**bits
    assert not mechanism.contribution(np.zeros(len(update))).any()  # who is not there contributes nothing


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    mechanism = GaussianMechanism(1.0, 1.0, 3, 20)
    with pytest.raises(LocalError, match="the update"):
        mechanism.contribution(np.array([0.0, broken, 1.0]))
    with pytest.raises(LocalError, match="the gradients"):
        mechanism.sum_examples(np.ones((4, 3)), np.array([0.1, broken, 0.1, 0.1]))
    with pytest.raises(ValueError, match="not an update"):
        mechanism.contribution(np.zeros(4))
    with pytest.raises(ValueError, match="not the gradients"):
        mechanism.sum_examples(np.ones((4, 3)), np.ones((4, 2)))


def table(rows: int, outputs: int | None) -> tuple[Array, Array]:
    """Columns and the residuals of a model: Poisson for one output, softmax for several."""
    rng = np.random.default_rng(rows)
    x = np.column_stack([rng.normal(size=(rows, 6)) * rng.lognormal(0, 1, (rows, 1)), np.ones(rows)])
    if outputs is None:
        return x, np.exp(x @ rng.normal(size=7) * 0.3) - rng.poisson(1.0, rows)
    scores = x @ rng.normal(size=(7, outputs))
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return x, chances - np.eye(outputs)[rng.integers(outputs, size=rows)]


@pytest.mark.parametrize("outputs", [None, 4])
def test_clipped_gradients_against_one_example_at_a_time(outputs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residuals = table(200, outputs)
    mechanism = GaussianMechanism(0.8, 1.0, 7 * (outputs or 1), 24)
    found = mechanism.sum_examples(x, residuals)
    assert found.shape == (7, *residuals.shape[1:])
    each = [np.multiply.outer(row, residual) for row, residual in zip(x, residuals, strict=True)]
    plain = sum(one * min(1, 0.8 / np.linalg.norm(one)) for one in each)
    clipped = sum(np.linalg.norm(one) > 0.8 for one in each)
    assert 20 < clipped < 200  # both kinds are there
    assert np.abs(found / 2**24 - plain).max() <= 200 * (0.5 / 2**24 + 1e-9)
    monkeypatch.setattr(privacy, "ELEMENTS", 100)
    assert np.array_equal(mechanism.sum_examples(x, residuals), found)  # however it is cut into chunks
    nobody = mechanism.sum_examples(x[:0], residuals[:0])
    assert nobody.shape == found.shape
    assert not nobody.any()


@settings(max_examples=30)
@given(st.integers(0, 79), st.sampled_from([None, 3]))
def test_one_example_moves_the_sum_by_its_sensitivity_at_most(index: int, outputs: int | None) -> None:
    x, residuals = table(80, outputs)
    mechanism = GaussianMechanism(0.5, 1.0, 7 * (outputs or 1), 16)
    others = np.arange(80) != index
    moved = mechanism.sum_examples(x, residuals) - mechanism.sum_examples(x[others], residuals[others])
    assert sum(one**2 for one in moved.ravel().tolist()) <= Fraction(mechanism.sensitivity) ** 2
    assert np.array_equal(moved, mechanism.sum_examples(x[~others], residuals[~others]))


def test_many_examples_do_not_overflow() -> None:
    mechanism = GaussianMechanism(2.0**11, 1e-6, 1, 40)
    with pytest.raises(LocalError, match="2048 examples overflow a grid of 40 fraction bits"):
        mechanism.sum_examples(np.ones((2048, 1)), np.ones(2048))


# ---- noise on contributions


def test_the_noise_of_a_quorum_is_the_noise_agreed() -> None:
    quorum, parameters = 7, 20_000
    mechanism = GaussianMechanism(1.0, 1.5, parameters, 16, contributors=quorum)
    clients = [mechanism.contribution(np.random.default_rng(i).normal(size=parameters)) for i in range(quorum)]
    sent = [mechanism.add_noise(ints, replay(i)) for i, ints in enumerate(clients)]
    noise = sum(sent) - sum(clients)
    sigma = 1.5 * mechanism.sensitivity
    assert np.std(noise) == pytest.approx(sigma, rel=0.02)
    assert np.std(sent[0] - clients[0]) == pytest.approx(sigma / math.sqrt(quorum), rel=0.02)
    assert max(np.abs(one).max() for one in sent) <= mechanism.largest


def test_noise_keeps_the_shape_of_a_gradient() -> None:
    mechanism = GaussianMechanism(1.0, 1.0, 12, 16)
    ints = np.zeros((4, 3), np.int64)
    noised = mechanism.add_noise(ints, replay(1))
    assert noised.shape == (4, 3)
    assert not ints.any()
    assert np.array_equal(noised.ravel(), discrete_gaussian(mechanism.variance, 12, replay(1)))
