"""All attacks on data that one has in one place, before a release: a pilot's, or one's own columns split in two.

Each finding has a metric, a baseline (what an attacker manages without the leak) and a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from parties.errors import LocalError
from vfl.leakage import features, labels
from vfl.leakage.labels import leak_auc
from vfl.losses import Matrix, Vector

FOLDS = 5


@dataclass(frozen=True)
class Finding:
    """What one attack reached. It fails the audit where `value` is above `threshold`."""

    attack: str
    metric: str
    value: float
    baseline: float
    threshold: float

    @property
    def passed(self) -> bool:
        return self.value <= self.threshold


@dataclass(frozen=True)
class Limits:
    """Thresholds: AUC of attacks on per-row gradients, and what attacks may add to what is known without them.

    `above_model`: AUC above what a model of the same columns predicts of unseen rows. A feature holder has its trained
    share, and a share that predicts is what training is for; labels of the rows trained on must not show beyond that.
    `column`: share of the best rebuilt column's variance.
    `membership`: 0 where the agreement keeps rows from the party, 1 where it gives them.
    """

    norm: float = 0.6
    direction: float = 0.7
    above_model: float = 0.05
    column: float = 0.99
    membership: float = 0.0


def audit_labels(
    x: Matrix,
    y: Vector,
    known: NDArray[np.intp],
    *,
    gradients: Matrix | None = None,
    aggregates: Matrix | None = None,
    outputs: int = 1,
    share: Matrix | None = None,
    limits: Limits | None = None,
) -> list[Finding]:
    """What a feature holder with columns x (n, d) learns of y (n,) in {0, 1}; it knows the labels of the `known` rows.

    gradients (n, k): per row, as plain or open split learning sends them, of one epoch or a mean over epochs;
    aggregates (d, m): X^T R, one column an exchange and output (of `outputs`), as the encrypted exchange gives them;
    share (n, k): the embeddings of its trained model. With aggregates alone, attacks on rows get what there is: the
    same for every row.

    Raises:
        LocalError: known rows, or the others, without both labels, or too few rows of a label.
    """
    limits = limits or Limits()
    rest = np.setdiff1d(np.arange(len(y)), known)
    for rows, what, least in ((known, "known", 1), (rest, "other", FOLDS)):
        counts = [int((y[rows] == label).sum()) for label in (0, 1)]
        if min(counts) < least:
            raise LocalError(f"{counts[0]} negative and {counts[1]} positive {what} rows; {least} of each are needed")
    target = y[rest]

    def finding(attack: str, scores: Vector, baseline: float, threshold: float, either_way: bool = False) -> Finding:
        return Finding(attack, "AUC", leak_auc(scores[rest], target, either_way=either_way), baseline, threshold)

    findings = []
    per_row = gradients
    if gradients is None and aggregates is not None:
        per_row = np.broadcast_to(aggregates.ravel(), (len(x), aggregates.size))
    if per_row is not None:
        towards = labels.directions(per_row, per_row[known[y[known] == 1]])
        findings += [
            finding("gradient norm", labels.norms(per_row), 0.5, limits.norm),
            finding("gradient direction", towards, 0.5, limits.direction),
            finding("gradient spectrum", labels.spectrum(per_row), 0.5, limits.direction, either_way=True),
        ]
    if aggregates is None and share is None:
        return findings
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    predicted = cross_val_predict(model, x[rest], target, cv=FOLDS, method="decision_function")
    predictable = leak_auc(predicted, target)

    if aggregates is not None:
        solved = labels.residuals(x, aggregates)  # of several outputs they may add up to zero: known rows tell the sign
        scores = -solved.mean(axis=1) if outputs == 1 else labels.completion(solved, known, y[known])
        findings.append(finding("solved residuals", scores, predictable, predictable + limits.above_model))
    if share is not None:
        alone = leak_auc(labels.completion(x, known, y[known])[rest], target)
        limit = max(alone, predictable) + limits.above_model
        findings.append(finding("model completion", labels.completion(share, known, y[known]), alone, limit))
        alone = leak_auc(labels.clusters(x)[rest], target, either_way=True)
        limit = max(alone, predictable) + limits.above_model
        findings.append(finding("clusters", labels.clusters(share), alone, limit, either_way=True))
    return findings


def audit_columns(
    x: Matrix,
    seen: Matrix,
    known: NDArray[np.intp],
    *,
    own: Matrix | None = None,
    limits: Limits | None = None,
) -> list[Finding]:
    """What a label holder that saw embeddings, or sums of them, (n, t) learns of a feature holder's columns x (n, d).

    It knows these columns in the `known` rows, and its own columns, own (n, d0), in all.
    """
    limits = limits or Limits()
    own = np.empty((len(x), 0)) if own is None else own
    both = np.column_stack([own, seen])
    return [
        Finding(attack, "share of the best column's variance", float(value.max()), float(baseline.max()), limits.column)
        for attack, value, baseline in (
            ("span of the embeddings", features.spanned(both, x), features.spanned(own, x)),
            ("rebuilt from known rows", features.rebuilt_from(both, known, x), features.rebuilt_from(own, known, x)),
        )
    ]


def audit_membership(common: NDArray[np.bool_], told: Vector, *, limits: Limits | None = None) -> Finding:
    """What a party learns of which of its own rows are in common (n,), from what it was told of each (n,), 0 to 1."""
    value = features.membership(common, told)
    return Finding("membership", "rows placed right above size", value, 0.0, (limits or Limits()).membership)
