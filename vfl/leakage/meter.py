"""The leak meter: what an epoch has disclosed, as figures, and the rule that says when to stop. Nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vfl.leakage.labels import directions, leak_auc, norms, spectrum
from vfl.losses import Matrix, Vector

KNOWN_POSITIVES = 10  # rows whose label the direction attack is given


@dataclass(frozen=True)
class Reading:
    """The figures after an epoch (with a full batch: after an exchange).

    `disclosed`: embeddings that the label holder got over the same rows; `ranks`: independent directions of the columns
    behind them. Both by whose columns these are: a feature holder's, or, where only sums are seen, all together's.
    `leak_auc`: the best attack on this epoch's per-row gradients; None where none are sent.
    `correlation`: of the embeddings with the label; None at a feature holder.
    """

    disclosed: Mapping[str, int]
    ranks: Mapping[str, int]
    leak_auc: float | None = None
    correlation: float | None = None


@dataclass(frozen=True)
class Stop:
    """Training must not go on; `reason` is one line for the report."""

    reason: str


def stop(reading: Reading, *, width: int, allow_reconstruction: bool, leak_limit: float) -> Stop | None:
    """Whether the agreement forbids another exchange: an embedding of `width` columns, and a gradient.

    Without consent, embeddings must stay fewer than the rank; per-row gradients may reach a leak AUC of `leak_limit`.
    """
    for name, rank in reading.ranks.items():
        disclosed = reading.disclosed[name]
        if not allow_reconstruction and disclosed + width >= rank:
            return Stop(
                f"{disclosed} embeddings over the same rows and {width} more would span the {rank} independent "
                f"columns of {name}: the label holder could rebuild them; allow_reconstruction = true consents"
            )
    if reading.leak_auc is not None and reading.leak_auc > leak_limit:
        return Stop(
            f"the per-row gradients tell labels with AUC {reading.leak_auc:.3f}, above the agreed {leak_limit:.3f}; "
            "use more noise or fewer epochs"
        )
    return None


def gradient_leak(gradients: Matrix, y: Vector) -> float:
    """AUC of the best of the norm, direction and spectral attacks on per-row gradients (n, k) for labels y (n,).

    The direction attack is given the first positive rows, at most ten and half of them; they are not counted. NaN where
    fewer than two rows are positive or none is negative.
    """
    positive = np.flatnonzero(y == 1)
    if len(positive) < 2 or len(positive) == len(y):
        return float("nan")
    known = positive[: min(KNOWN_POSITIVES, len(positive) // 2)]
    rest = np.setdiff1d(np.arange(len(y)), known)
    others, labels = gradients[rest], y[rest]
    return max(
        leak_auc(norms(others), labels),
        leak_auc(directions(others, gradients[known]), labels),
        leak_auc(spectrum(others), labels, either_way=True),
    )


def label_correlation(embeddings: Matrix, y: Vector) -> float:
    """The multiple correlation, 0 to 1, of y (n,) with embeddings (n, k): with their best linear map."""
    centred, labels = embeddings - embeddings.mean(axis=0), y - y.mean()
    return correlation_of(moments(centred, labels))


def moments(embeddings: Matrix, y: Vector) -> Matrix:
    """Sums (k + 2, k + 2) of products of embeddings (n, k), y (n,) and 1: those of batches add up."""
    block = np.column_stack([embeddings, y, np.ones(len(y))])
    return np.asarray(block.T @ block)


def correlation_of(sums: Matrix) -> float:
    """`label_correlation`, from `moments` of the same rows."""
    spread = sums[:-1, :-1] - np.outer(sums[-1, :-1], sums[-1, :-1]) / max(sums[-1, -1], 1.0)
    inner, across, square = spread[:-1, :-1], spread[:-1, -1], float(spread[-1, -1])
    if square <= 1e-12 * sums[-2, -2]:  # y is constant
        return 0.0
    explained = float(across @ np.linalg.lstsq(inner, across, rcond=None)[0])
    return float(np.sqrt(min(max(explained / square, 0.0), 1.0)))
