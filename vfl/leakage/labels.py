"""Attacks on labels: a score per row from what a feature holder sees. Whoever has the labels compares (`leak_auc`).

    norm, direction   of per-row gradients: Li et al. 2021, "Label leakage and protection in two-party split learning"
    spectrum          of gradients or embeddings: Sun et al. 2022, "Label leakage and protection from forward embedding"
    completion        of a trained share with a few known labels: Fu et al. 2022, "Label inference attacks against
                      vertical federated learning"
    clusters          of embeddings; residuals: solved from aggregate gradients

All are pure functions. Scores are higher where an attacker bets on the positive label; where it cannot tell which of
two groups is the positive one (spectrum, clusters), `leak_auc(..., either_way=True)` gives it the right bet.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vfl.losses import Matrix, Vector


def leak_auc(scores: Vector, y: Vector, *, either_way: bool = False) -> float:
    """AUC of an attack's scores (n,) for labels y (n,) in {0, 1}: 0.5 tells nothing, 1 tells all."""
    area = float(roc_auc_score(y, scores))
    return max(area, 1 - area) if either_way else area


def norms(gradients: Matrix) -> Vector:
    """Scores (n,): the length of each row's gradient (n, k). The rarer label is predicted worse: longer gradients."""
    out: Vector = np.sqrt(np.einsum("ij,ij->i", gradients, gradients))
    return out


def directions(gradients: Matrix, positives: Matrix) -> Vector:
    """Scores (n,): mean cosine of each row's gradient (n, k) to the gradients (p, k) of rows known to be positive."""
    known = np.divide(positives, norms(positives)[:, None], where=positives != 0, out=np.zeros_like(positives))
    length = norms(gradients)
    out: Vector = np.einsum("ij,j->i", gradients, known.mean(axis=0)) / np.where(length > 0, length, 1)
    return out


def spectrum(values: Matrix) -> Vector:
    """Scores (n,): gradients or embeddings (n, k), centred, along their first singular vector; sign unknown."""
    centred = values - values.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    out: Vector = np.einsum("ij,j->i", centred, axis)
    return out


def clusters(embeddings: Matrix) -> Vector:
    """Scores (n,): how much nearer the second of two k-means centres is than the first; which is which is unknown."""
    distances = KMeans(2, n_init=10, random_state=0).fit(embeddings).transform(embeddings)
    out: Vector = distances[:, 0] - distances[:, 1]
    return out


def completion(embeddings: Matrix, known: NDArray[np.intp], y_known: Vector) -> Vector:
    """Scores (n,): a head for a trained share, fitted to embeddings (n, k) of the few `known` rows and their labels."""
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    out: Vector = head.fit(embeddings[known], y_known).decision_function(embeddings)
    return out


def residuals(x: Matrix, gradients: Matrix) -> Matrix:
    """R (n, m), the shortest with X^T R = G for columns x (n, d) and their aggregate gradients G (d, m).

    Exact where the rows are independent (n <= rank of X); expit(score) - y is negative where the label is positive, so
    that -R scores labels. With more rows it is a linear function of the columns: no more than any model of these.
    """
    return np.asarray(np.linalg.lstsq(x.T, gradients, rcond=None)[0], np.float64)
