"""What releases with Gaussian noise cost in privacy: epsilon at a given delta, and costs that add up.

One number tells all of a Gaussian release: mu = sensitivity / sigma (Gaussian differential privacy, Dong, Roth and Su
2022). Any number of them, each chosen after seeing the earlier ones, together cost exactly mu^2 = sum of mu_i^2.

The discrete Gaussian needs no other accounting. Take the continuous Gaussian of variance sigma^2 - 4 about the true
value, then draw an integer from the discrete Gaussian of variance 4 about the result (Peikert 2010, Theorem 3.1): that
is the discrete Gaussian of variance sigma^2, but for a factor within exp(+-`ROUNDED`) on every probability. What is
made from a private value is as private, so the discrete one costs no more than mu^2 = sensitivity^2 / (sigma^2 - 4) and
a `drift`, the sum of such exponents over all coordinates. A sum of discrete Gaussians drifts from one by `sum_drift`.
"""

from __future__ import annotations

import math
from functools import cache

import msgspec
from scipy.optimize import brentq
from scipy.special import log_ndtr

from parties.errors import LocalError

SMOOTHING = 4.0  # the part of a discrete Gaussian's variance that hides the grid
ROUNDED = 3e-34  # per coordinate: 4.2 exp(-2 pi^2 SMOOTHING) bounds both normalisations (Poisson summation)


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What releases cost; costs are added.

    Of Gaussian releases: `mu_squared`, the sum of (sensitivity / sigma)^2, and `drift`, the exponent by which their
    probabilities may differ from Gaussian ones. Of all others: `epsilon` at `delta`, added up (basic composition).
    """

    mu_squared: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0
    drift: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= part < math.inf for part in msgspec.structs.astuple(self)):
            raise ValueError("a cost is made of finite numbers, none negative")

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return Cost(**{name: a + b for name, a, b in zip(self.__struct_fields__, mine, theirs, strict=True)})

    def times(self, releases: int) -> Cost:
        """Of so many such releases."""
        return Cost(**{name: releases * part for name, part in msgspec.structs.asdict(self).items()})

    def total(self, delta: float) -> float:
        """Epsilon of everything together at `delta`; infinite when the others leave nothing of it.

        With P'(S) within e^drift of P(S), and Q' of Q: P(S) <= e^drift (e^(epsilon + drift) Q(S) + delta).
        """
        left = (delta - self.delta) * math.exp(-self.drift)
        if left < -1e-9 * delta:  # beyond the rounding of a sum
            return math.inf
        return self.epsilon + 2 * self.drift + gaussian_epsilon(math.sqrt(self.mu_squared), left)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The least delta at which a Gaussian release of mu = sensitivity / sigma is (epsilon, delta)-private.

    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu): Balle and Wang 2018, Theorem 8.
    """
    return math.exp(_log_delta(mu, epsilon)) if mu else 0.0


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon of such a release at `delta`; infinite when `delta` is not positive."""
    if not mu or delta >= 1:
        return 0.0
    if delta <= 0:
        return math.inf
    aim = math.log(delta)
    if _log_delta(mu, 0.0) <= aim:
        return 0.0
    most = mu**2 / 2 + mu * math.sqrt(-2 * aim)  # there Phi(mu/2 - epsilon/mu) alone is below delta
    return brentq(lambda epsilon: _log_delta(mu, epsilon) - aim, 0.0, most)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu that is (epsilon, delta)-private, so sigma = sensitivity / mu: Balle and Wang 2018, Algorithm 1.

    Raises LocalError: epsilon is not positive and finite, or delta is not between 0 and 1.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise LocalError("privacy needs a positive epsilon and a delta between 0 and 1; change the agreement")
    aim = math.log(delta)
    low = max(math.sqrt(2 * epsilon - 2 * aim) - math.sqrt(-2 * aim), delta)  # the same bound, and delta <= 0.4 mu
    high = 2 * low
    while _log_delta(high, epsilon) <= aim:
        high *= 2
    mu = brentq(lambda mu: _log_delta(mu, epsilon) - aim, low, high, xtol=1e-12 * low)
    return mu * (1 - 1e-9)  # to the safe side


def _log_delta(mu: float, epsilon: float) -> float:
    upper, lower = float(log_ndtr(mu / 2 - epsilon / mu)), float(log_ndtr(-mu / 2 - epsilon / mu))
    return upper + math.log(max(-math.expm1(epsilon + lower - upper), 5e-324))


def sum_drift(variance: float, summands: int) -> float:
    """Per coordinate: |log P(sum = k) / P(one = k)|, where so many discrete Gaussians of `variance` each are summed and
    `one` is the discrete Gaussian of the same total variance (Kairouz, Liu and Steinke 2021)."""
    return 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, summands))


def sampled(release: Cost, rounds: int, rate: float, delta: float) -> Cost:
    """The cost at `delta` of `rounds` releases, each of which everyone joins with chance `rate`, independently, unseen.

    Numerical, an upper bound: the privacy loss distributions of the library dp-accounting. What else is charged to the
    same budget needs a delta of its own.

    Raises:
        LocalError: dp-accounting is not installed, the release is not of Gaussian noise alone, or it hides too little.
    """
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise LocalError("privacy with sampled clients needs: pip install 'colonnade[dp]'") from None
    if not release.mu_squared or release.epsilon or not 0 < rate <= 1:
        raise LocalError("only a release of Gaussian noise can be sampled, at a rate above 0 and up to 1")
    accountant, drift = PLDAccountant(), rounds * release.drift
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(release.mu_squared**-0.5)), rounds)
    epsilon = accountant.get_epsilon(delta * math.exp(-drift)) + 2 * drift
    if not epsilon < math.inf:
        raise LocalError("so little noise keeps nothing private; agree on more noise or a larger delta")
    return Cost(epsilon=float(epsilon), delta=delta)


@cache
def noise_multiplier(epsilon: float, delta: float, rounds: int = 1, rate: float = 1.0) -> float:
    """sigma / sensitivity with which `rounds` releases cost `epsilon` at `delta`: exact, or up to 1 % more if sampled.

    Raises LocalError as `gaussian_mu` and `sampled` do.
    """
    high = math.sqrt(rounds) / gaussian_mu(epsilon, delta)
    if rate == 1:
        return high
    low = high  # sampling never needs more noise
    while sampled(Cost(mu_squared=low**-2), rounds, rate, delta).epsilon <= epsilon:
        high, low = low, low / 2
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        spent = sampled(Cost(mu_squared=middle**-2), rounds, rate, delta).epsilon
        low, high = (low, middle) if spent <= epsilon else (middle, high)
    return high
