"""What each column tells of the label, before any model: weight of evidence (WOE) and information value (IV).

    woe_j = ln(p_j / q_j)        IV = sum_j (p_j - q_j) woe_j

p_j and q_j are the shares of a column's bin j in the positives and in the negatives (Good 1950, ch. 6; IV is Jeffreys'
divergence: Kullback and Leibler 1951; in scoring: Siddiqi 2006, ch. 6). A feature holder gets the positives of its bins
in one exchange of the encrypted gradient protocol: R is y, X has a 0/1 column for each bin. Zeros and ones are whole in
any fixed point, so the counts are exact.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from parties.errors import LocalError, ProtocolViolation, Refused, blame
from parties.preparation import Preparation
from parties.session import Session
from vfl import preparation
from vfl.encryption.paillier import SecretKey
from vfl.exchange import Scales, Terms, accept_key, offer_key, open_gradients, weigh_gradient
from vfl.inputs import check_columns, class_labels
from vfl.losses import Matrix, Vector
from vfl.preparation import FittedNumber
from vfl.training import agree

log = logging.getLogger("colonnade")
SMOOTHING = 0.5  # of a row, in every bin and class: a bin of one class has finite evidence


@dataclass(frozen=True)
class Information:
    """A line a bin: feature, bin, rows, positives, woe, iv (its term of the sum)."""

    bins: pd.DataFrame

    @property
    def values(self) -> pd.Series[Any]:
        """IV by feature, in the order of the columns."""
        return self.bins.groupby("feature", sort=False)["iv"].sum()

    def above(self, threshold: float = 0.02) -> list[str]:
        """The features whose IV is larger. Below 0.02 a column is usually taken to predict nothing (Siddiqi 2006)."""
        values = self.values
        return list(values.index[values > threshold])


def bin_columns(frame: pd.DataFrame, plan: Preparation, *, bins: int = 5, minimum: int = 1) -> pd.DataFrame:
    """Our columns (n, d), each a categorical: every row's bin, by name. What `label_holder` and `feature_holder` take.

    Text: the levels that `plan` declares, of at least `minimum` rows. Numbers: quantile bins, `bins` or what `plan`
    says for the column; equal values go together, by their mean rank, so that two values make two bins however many
    rows one has. A missing number is in a bin of its own if `plan` sets an indicator, else where its fill is.

    Raises:
        LocalError: as `preparation.fit`.
    """
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    numbers = {name: msgspec.structs.replace(one, bins=None) for name, one in plan.numbers.items()}
    unbinned = msgspec.structs.replace(plan, numbers=numbers)
    binned: dict[str, pd.Series[Any]] = {}
    for name, fitted in preparation.fit(frame, unbinned, standardise=False, minimum=minimum).columns.items():
        column = fitted.read(frame[name])
        if isinstance(fitted, FittedNumber):
            wanted = plan.numbers[name].bins if name in plan.numbers else None
            binned[name] = _quantile_bins(name, fitted, column, wanted or bins)
        else:
            levels = pd.Series(pd.Categorical(column, categories=fitted.levels), index=frame.index)
            binned[name] = levels.cat.rename_categories(
                {level: f"{name}={level}" if level else f"{name} other" for level in fitted.levels}
            )
    return pd.DataFrame(binned, index=frame.index)


def _quantile_bins(name: str, fitted: FittedNumber, numbers: pd.Series[Any], bins: int) -> pd.Series[Any]:
    if fitted.fill is not None and not fitted.indicator:
        numbers = numbers.fillna(fitted.fill)
    known = numbers.dropna()
    halves = (2 * known.rank()).astype(np.int64)  # mean ranks are multiples of 1/2
    lowest = known.groupby((halves * bins - 1) // (2 * len(known))).min()
    binned: pd.Series[Any] = pd.cut(numbers, [-np.inf, *lowest[1:], np.inf], right=False)
    binned = binned.cat.rename_categories(lambda interval: f"{name} in {interval}")
    if fitted.indicator:
        binned = binned.cat.add_categories(f"{name} missing").fillna(f"{name} missing")
    return binned


def evidence(bins: pd.DataFrame, positives: Vector, smoothing: float = SMOOTHING) -> Information:
    """WOE and IV from counts: `bins` has feature, bin and rows of each bin, `positives` (bins,) how many are positive.

    `smoothing` is added to both counts of every bin, so that the shares still add up to 1 and no IV is negative. With 0
    a bin of one class has infinite evidence.
    """
    negatives = bins["rows"] - positives
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (
            (count + smoothing) / (count + smoothing).groupby(bins["feature"]).transform("sum")
            for count in (pd.Series(positives, index=bins.index), negatives)
        )
        woe = np.log(p / q)
        return Information(bins.assign(positives=positives.astype(np.int64), woe=woe, iv=(p - q) * woe))


def label_holder(
    session: Session,
    binned: pd.DataFrame,
    y: object,
    *,
    allowed_counts: int,
    smoothing: float = SMOOTHING,
    secret: SecretKey | None = None,
) -> Information:
    """Let every feature holder count the positives in its bins; ours are counted here, and sent nowhere.

    `binned` (n, d) of `bin_columns`, d may be 0; y (n,) of two classes, of which the larger is the positive one;
    `allowed_counts` is the most counts that a feature holder may get, 0 none.

    Reveals:
        To a feature holder: the positives in each of its bins, hence in all rows. A bin with as many positives as rows,
        or none, tells the labels of all its rows, one of few rows nearly so; bins of two columns, or of two runs, that
        differ in few rows tell of these. We see no bins: small ones are refused by a feature holder that follows the
        protocol. One that deviates gets any linear functions of the labels in as many numbers, and with powers of two
        for weights some 40 labels from each (lattice), or nearly as many as a plaintext has bits (Paillier).
        To us: how many bins a feature holder has, over all its columns, and nothing else.
    Raises:
        LocalError: y is not of two classes. Refused: counts are not allowed, or not so many.
    """
    classes, coded = class_labels(y, len(binned))
    if len(classes) != 2:
        raise LocalError(f"the label has {len(classes)} classes; weight of evidence is defined for two")
    positive = coded.astype(np.float64)
    bins, ours = _bins(binned, smoothing)
    terms = _agree(session, np.empty((len(binned), 0)), allowed_counts, outputs=1)
    open_gradients(offer_key(session, terms, secret), positive, 0)
    return evidence(bins, ours.T @ positive, smoothing)


def feature_holder(
    session: Session, binned: pd.DataFrame, *, allowed_counts: int, smoothing: float = SMOOTHING
) -> Information:
    """Count the positives in our bins, `binned` (n, d) of `bin_columns`, without seeing a label.

    Reveals:
        To the label holder: how many bins we have. If it deviates it chooses what is counted, and learns whether we
        stop: one bit about our bins, once.
    Raises:
        LocalError: bins of fewer than the agreed minimum_rows_off_mode rows, or that tell some row's label. Refused:
        counts are not allowed, or not so many. ProtocolViolation: counts that no labels can give.
    """
    bins, x = _bins(binned, smoothing)
    _check_bins(session, bins, x)
    scales = Scales.of(session.agreement, len(x))
    fixed = x.astype(np.int64) << scales.feature_bits
    terms = _agree(session, x, allowed_counts, magnitude=scales.magnitude(fixed))
    positives = weigh_gradient(accept_key(session, terms, fixed), 0)[:, 0]
    with blame(session.label_holder):
        _check_counts(bins, positives)
    return evidence(bins, positives, smoothing)


def _bins(binned: pd.DataFrame, smoothing: float) -> tuple[pd.DataFrame, Matrix]:
    """Every bin with its feature and rows, and which rows these are: 0/1, (n, bins). Raises LocalError."""
    if not 0 <= smoothing < math.inf:
        raise LocalError("smoothing is a finite number, not negative")
    if any(not isinstance(kind, pd.CategoricalDtype) for kind in binned.dtypes) or binned.isna().any(axis=None):
        raise LocalError("every row needs a bin of every column; take them from bin_columns")
    names = [(feature, name) for feature in binned for name in binned[feature].cat.categories]
    columns = [binned[feature] == name for feature, name in names]
    x = np.array(columns, dtype=np.float64).reshape(len(names), len(binned)).T
    bins = pd.DataFrame(names, columns=["feature", "bin"])
    return bins.assign(rows=x.sum(axis=0).astype(np.int64)), x


def _check_bins(session: Session, bins: pd.DataFrame, x: Matrix) -> None:
    """None that tell a row's label. Raises LocalError."""
    minimum = session.agreement.model.minimum_rows_off_mode
    of_feature = bins.groupby("feature", sort=False)["rows"]
    small = [f"{name} ({(rows < minimum).sum()} of {len(rows)})" for name, rows in of_feature if rows.min() < minimum]
    if small:
        raise LocalError(
            f"bins of fewer than {minimum} rows: {', '.join(small)}; their counts would reveal labels: set fewer bins, "
            "merge levels, or drop the column"
        )
    check_columns(x, list(bins["feature"]), minimum)


def _agree(session: Session, x: Matrix, allowed: int, **ours: int) -> Terms:
    """All allow the same number of counts, and nobody wants more of them. Raises Refused, ProtocolViolation."""
    if allowed < max(x.shape[1], 1):
        raise Refused(
            f"{x.shape[1]} counts of the label by bin, {allowed} allowed: agree on more, set fewer bins or drop columns"
        )
    plans = agree(session, "information value", {"counts": allowed}, x, **ours)
    label_plan = plans.pop(session.label_holder)
    if (label_plan.columns, label_plan.outputs, label_plan.range_bits) != (0, 1, 0):
        raise ProtocolViolation(f"{session.label_holder} plans with other than one label", peer=session.label_holder)
    for name, plan in plans.items():
        if plan.columns > allowed or plan.columns + 1 >= plan.rows:
            raise Refused(f"{name} wants {plan.columns} counts of {plan.rows} rows, {allowed} are allowed", peer=name)
        if plan.columns * plan.rows.bit_length() >= plan.rows:
            log.warning("%d rows are few for %d counts: %s might work out labels", plan.rows, plan.columns, name)
    return Terms.of(session.agreement, len(x), plans, 1)


def _check_counts(bins: pd.DataFrame, positives: Vector) -> None:
    """What any labels of two classes give. Raises ValueError."""
    strange = int(((positives != np.rint(positives)) | (positives < 0) | (positives > bins["rows"])).sum())
    if strange:
        raise ValueError(f"{strange} of {len(bins)} counts are not whole, or not between 0 and the rows of their bin")
    totals = np.unique(pd.Series(positives).groupby(bins["feature"]).sum())
    rows = int(bins["rows"].sum()) // bins["feature"].nunique()
    if len(totals) > 1 or not 0 < totals[0] < rows:
        raise ValueError("counts that do not add up to the same number for every column, or leave one class empty")
