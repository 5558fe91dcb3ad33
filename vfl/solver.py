"""What the solvers share: when to stop, what comes out, how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parties.errors import LocalError
from vfl.losses import Matrix, Vector


@dataclass(frozen=True)
class Limits:
    """When to stop: |gradient of F| (2-norm) at most `tolerance`; after `exchanges` encrypted gradients; or before the
    label holder has `embeddings` independent embeddings of the feature holders' columns."""

    tolerance: float
    exchanges: int
    embeddings: int


@dataclass(frozen=True)
class Result:
    """Our slice of the weights (d, m), and at the label holder the intercepts (m,); `objective` and `gradient_norm` are
    known to the label holder only (NaN elsewhere)."""

    weights: Matrix
    intercept: Vector
    exchanges: int
    converged: bool
    objective: float = np.nan
    gradient_norm: float = np.nan


def check_finite(residual: Matrix, exchange: int) -> None:
    """Raises LocalError when training has exploded."""
    if not np.isfinite(residual).all():
        raise LocalError(f"the loss exploded in exchange {exchange + 1}; use a smaller learning_rate, or standardise")


def expected(first: float, now: float, exchange: int, limits: Limits) -> int:
    """How many exchanges it may take in all, for the progress bar: the gradient falls about geometrically."""
    if not 0 < limits.tolerance < now < first:
        return min(max(exchange + 2, 20), limits.exchanges)
    total = exchange * np.log(first / limits.tolerance) / np.log(first / now)
    return int(min(max(total + 1, exchange + 2), limits.exchanges))
