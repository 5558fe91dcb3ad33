"""`colonnade audit`: every attack of the suite on a rehearsal with one's own data, before anything is released.

Nobody has the other side's data, so that each party audits what is its own: the label holder its labels, against
columns that stand in for a feature holder's; a feature holder its columns, against labels drawn at random. On test data
that has both sides, everything. A finding is a figure over all rows; no value of a row is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from parties.agreement import Agreement
from parties.leakage import Leakage
from vfl.leakage.suite import FOLDS, Finding, Limits, audit_columns, audit_labels, audit_membership
from vfl.losses import Vector
from vfl.own_code import Own
from vfl.rehearsal import Seen, rehearse, rehearse_alignment

FEWEST, SYNTHETIC = 4, 8  # columns of a label holder that can lend some; made-up ones where it cannot


@dataclass(frozen=True)
class Case:
    """What is rehearsed: columns by party, the label holder's first, rows aligned; y (n,).

    `holder` is the feature holder whose sight and columns are audited; `real_labels` and `real_columns` say which of y
    and its columns are real. `note` tells in a line what the others are; `own` is a module of ours that is rehearsed.
    """

    parts: dict[str, pd.DataFrame] = field(repr=False)
    y: NDArray[Any] = field(repr=False)
    holder: str
    real_labels: bool
    real_columns: bool
    note: str
    own: Own | None = None

    @property
    def label_holder(self) -> str:
        return next(iter(self.parts))


class Explained(msgspec.Struct, frozen=True):
    """An attack in three lines: what was tried, what it would mean, what protects."""

    tried: str
    means: str
    protects: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one attack came to. `value`, `baseline` and `threshold` are None where it does not apply: `reason` says why.
    The agreement's limits are the thresholds."""

    attack: str
    by: str
    on: str
    verdict: Literal["PASS", "FAIL", "NOT APPLICABLE"]
    metric: str = ""
    value: float | None = None
    baseline: float | None = None
    threshold: float | None = None
    reason: str = ""
    explained: Explained


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """All verdicts of one case. `embeddings` of the same rows the label holder got in `exchanges`; at the most
    `harmless` of them keep a feature holder's columns below their threshold (None: not measured)."""

    note: str
    rows: int
    known: int
    exchanges: int
    embeddings: int
    harmless: int | None
    verdicts: tuple[Verdict, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(one.attack for one in self.verdicts if one.verdict == "FAIL")


def labels_case(columns: pd.DataFrame, y: NDArray[Any], names: Sequence[str], minimum: int) -> Case:
    """For a label holder, the first of `names`: every second of its columns stands in for the next one's; with fewer
    than four, made-up columns do, one of which goes with the label. Lent are columns with `minimum` rows off their most
    frequent value."""
    usable = [name for name in columns if len(columns) - columns[name].value_counts().iloc[0] >= minimum]
    if len(usable) >= FEWEST:
        lent = columns[usable[1::2]]
        note = f"{lent.shape[1]} of our {columns.shape[1]} columns stand in for a feature holder's; labels are ours"
    else:
        made_up = np.random.default_rng(0).normal(size=(len(columns), SYNTHETIC))
        told = y if np.issubdtype(y.dtype, np.number) else _two_valued(y)
        made_up[:, 0] += (told - told.mean()) / told.std()
        lent = pd.DataFrame(made_up, columns=[f"made-up {number}" for number in range(SYNTHETIC)])
        note = f"{SYNTHETIC} made-up columns stand in for a feature holder's, one goes with the label; labels are ours"
    rest = columns.drop(columns=[name for name in lent if name in columns])
    return Case({names[0]: rest, names[1]: lent}, y, names[1], True, False, note)


def columns_case(columns: pd.DataFrame, name: str, names: Sequence[str]) -> Case:
    """For the feature holder `name` of `names`, the label holder first: labels drawn at random, a label holder without
    columns, and for each of the others that hold features as many random columns as ours."""
    generator = np.random.default_rng(0)
    parts = {names[0]: columns.iloc[:, :0], name: columns}
    for other in names[1:]:
        if other != name:
            parts[other] = pd.DataFrame(generator.normal(size=columns.shape))
    also = f"; the other {len(parts) - 2} feature holders' columns are made up" if len(parts) > 2 else ""
    y = generator.permutation(np.arange(len(columns)) % 2).astype(np.float64)
    return Case(parts, y, name, False, True, f"columns are ours; labels of two classes are drawn at random{also}")


def joint_case(own: pd.DataFrame, y: NDArray[Any], columns: pd.DataFrame, names: tuple[str, str]) -> Case:
    """On test data of the label holder and one feature holder, `names`, rows aligned; embeddings are in clear."""
    note = f"test data of both sides: labels and {own.shape[1]} columns; {columns.shape[1]} columns of {names[1]}"
    return Case({names[0]: own, names[1]: columns}, y, names[1], True, True, note)


def audit(case: Case, agreed: Agreement, leakage: Leakage, known: int = 40) -> Audit:
    """Rehearse the training, and attack what each side saw; an attacker knows `known` rows.

    Raises:
        LocalError, Refused: a training on these columns is refused, or there are too few rows of a label.
    """
    whose = case.label_holder if case.own is not None and case.own.part == "top" else case.holder
    own = {} if case.own is None else {whose: case.own}
    seen, result = rehearse(case.parts, case.y, agreed, own), agreed.intersection.result
    limits = Limits(
        norm=leakage.norm_auc,
        direction=leakage.leak_auc,
        above_model=leakage.above_model,
        column=leakage.column_share,
        membership=1.0 if result == "rows" else 0.0,
    )
    harmless, verdicts = None, []
    if case.real_labels:
        found = label_findings(case, seen, known, limits)
        verdicts += _verdicts(found, case.holder, "labels")
        left = {name: one for name, one in LABEL_ATTACKS.items() if name not in {each.attack for each in found}}
        verdicts += _not_applicable(left, case.holder, "labels", "gradients travel a row each, not as sums")
    else:
        verdicts += _not_applicable(
            LABEL_ATTACKS, case.holder, "labels", "labels are the label holder's: it audits them"
        )
    if case.real_columns:
        verdicts += _verdicts(
            column_findings(case, seen, known, limits), case.label_holder, f"columns of {case.holder}"
        )
        harmless = _harmless(case, seen, known, limits)
    else:
        why = "these columns are stand-ins: each feature holder audits its own"
        verdicts += _not_applicable(COLUMN_ATTACKS, case.label_holder, f"columns of {case.holder}", why)
    for party, learnt in zip((case.label_holder, case.holder), rehearse_alignment(result), strict=True):
        verdicts += _verdicts([audit_membership(*learnt, limits=limits)], party, f"rows of {party}")
    batches = "; weights differ between mini-batches: attacks on columns are a lower bound"
    return Audit(
        note=case.note + (batches if len(seen.rows) < len(case.y) else ""),
        rows=len(case.y),
        known=known,
        exchanges=seen.exchanges,
        embeddings=seen.embeddings.shape[1],
        harmless=harmless,
        verdicts=tuple(verdicts),
    )


def label_findings(case: Case, seen: Seen, known: int, limits: Limits) -> list[Finding]:
    """What the feature holder learns of labels: from gradients, of all rows or of the first batch, and from its share;
    of gradients a row the worst of all epochs and of their mean.

    Of several classes the rarest is what must not show; of numbers, which are above the median."""
    x, y = case.parts[case.holder].to_numpy(np.float64), _two_valued(case.y)
    rows, everywhere = seen.rows, known_rows(y, known)
    summed: list[Finding] = []
    if (aggregates := seen.aggregates.get(case.holder)) is not None:
        where, of = known_rows(y[rows], known), seen.outputs
        summed = audit_labels(x[rows], y[rows], where, aggregates=aggregates, outputs=of, limits=limits)
    if gradients := seen.gradients.get(case.holder):
        attacked = (audit_labels(x, y, everywhere, gradients=one, limits=limits) for one in gradients)
        worst = [max(one, key=lambda finding: finding.value) for one in zip(*attacked, strict=True)]
        summed = worst + summed[3:]
    return summed + audit_labels(x, y, everywhere, share=seen.shares[case.holder], limits=limits)


def column_findings(case: Case, seen: Seen, known: int, limits: Limits) -> list[Finding]:
    """What the label holder learns of the feature holder's columns, of which it knows some rows. Weights change from
    batch to batch: what the first one's embeddings tell of its own rows counts where it is more."""
    own, x = (case.parts[name].to_numpy(np.float64) for name in (case.label_holder, case.holder))
    found = audit_columns(x, seen.embeddings, _some(np.arange(len(x)), known), own=own, limits=limits)
    if len(rows := seen.rows) == len(x):
        return found
    first, where = seen.embeddings[rows, : seen.width], _some(np.arange(len(rows)), known)
    batch = audit_columns(x[rows], first, where, own=own[rows], limits=limits)
    return [max(both, key=lambda finding: finding.value) for both in zip(found, batch, strict=True)]


def known_rows(y: Vector, count: int) -> NDArray[np.int64]:
    """As many rows of both labels, as far as there are; the rest keeps what the suite needs."""
    halves = (np.flatnonzero(y == label) for label in (0, 1))
    return np.sort(np.concatenate([_some(half, min(count // 2, len(half) - FOLDS)) for half in halves]))


def _some(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).permutation(rows)[: max(count, 0)])


def _two_valued(y: NDArray[Any]) -> Vector:
    values, rows = np.unique(y, return_counts=True)
    if len(values) == 2:
        return np.asarray(y == values[1], np.float64)
    text = not np.issubdtype(values.dtype, np.number)
    return np.asarray(y == values[rows.argmin()] if text else y > np.median(y), np.float64)


def _harmless(case: Case, seen: Seen, known: int, limits: Limits) -> int:
    """How many of the embeddings may be disclosed, one after the other, before an attack on columns succeeds."""
    for most in range(seen.embeddings.shape[1]):
        fewer = replace(seen, embeddings=seen.embeddings[:, : most + 1])
        if not all(one.passed for one in column_findings(case, fewer, known, limits)):
            return most
    return int(seen.embeddings.shape[1])


def _verdicts(findings: Iterable[Finding], by: str, on: str) -> list[Verdict]:
    return [
        Verdict(
            attack=one.attack,
            by=by,
            on=on,
            verdict="PASS" if one.passed else "FAIL",
            metric=one.metric,
            value=round(one.value, 4),
            baseline=round(one.baseline, 4),
            threshold=round(one.threshold, 4),
            explained=EXPLAINED[one.attack],
        )
        for one in findings
    ]


def _not_applicable(attacks: Iterable[str], by: str, on: str, reason: str) -> list[Verdict]:
    return [
        Verdict(attack=one, by=by, on=on, verdict="NOT APPLICABLE", reason=reason, explained=EXPLAINED[one])
        for one in attacks
    ]


SUMS = "gradients leave the label holder encrypted; a feature holder is given one sum over all rows"
SPAN = "fewer embeddings than independent columns: most_exchanges_share, max_exchanges, more feature holders' masks"
LABEL_ATTACKS = {
    "gradient norm": Explained(
        "rank rows by the length of what is known of their gradients (Li et al. 2021)",
        "rows of the rarer label could be picked out by whoever sees gradients",
        SUMS,
    ),
    "gradient direction": Explained(
        "compare every row's gradient with those of rows known to be positive (Li et al. 2021)",
        "a few known positive rows would give away all others",
        SUMS,
    ),
    "gradient spectrum": Explained(
        "cut the gradients in two along their main direction (Sun et al. 2022)",
        "labels would show as two groups, without knowing any",
        SUMS,
    ),
    "solved residuals": Explained(
        "solve X^T R = G for every row's residual, hence label",
        "the gradient's sums would tell single rows' labels: too few rows for the columns",
        "more rows than columns in every batch, at least minimum_rows_off_mode rows behind every column",
    ),
    "model completion": Explained(
        "fit a head to the trained share with the known labels (Fu et al. 2022)",
        "the share would know the labels it was trained on by heart, beyond what its columns predict",
        "a linear share with a penalty; a share that predicts new rows as well leaks no more than any model",
    ),
    "clusters": Explained(
        "cluster the embeddings of the trained share in two",
        "labels would show as two groups in the share's own embeddings",
        "a linear share with a penalty",
    ),
}
COLUMN_ATTACKS = {
    "span of the embeddings": Explained(
        "rebuild the columns as well as any linear map of all embeddings can",
        "a label holder that learns the right map, from whatever source, has a whole column",
        SPAN,
    ),
    "rebuilt from known rows": Explained(
        "regress the columns on the embeddings in the known rows, and predict all others",
        "a label holder that knows these customers elsewhere has a column of all of them",
        SPAN,
    ),
}
EXPLAINED = (
    LABEL_ATTACKS
    | COLUMN_ATTACKS
    | {
        "membership": Explained(
            "say of each of one's own rows whether it is common, from what the intersection told",
            "a party knows which of its customers the other one has",
            'result = "size" or "rows to the label holder" keeps it back; a model needs result = "rows", by consent',
        )
    }
)
