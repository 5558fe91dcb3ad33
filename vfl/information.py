"""Information value before any model: what each column tells of the label, from encrypted labels.

A feature holder gets the rows of each class in its bins in one exchange of the encrypted gradient protocol: R has a 0/1
column for each class but the first, X one for each bin. Zeros and ones are whole in any fixed point, so the counts are
exact. The first class is what is left of a bin's rows.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from parties.agreement import Agreement
from parties.errors import LocalError, ProtocolViolation, Refused, blame
from parties.preparation import Preparation
from parties.session import Session
from vfl.encryption.paillier import SecretKey
from vfl.exchange import Scales, Terms, accept_key, offer_key, open_gradients, weigh_gradient
from vfl.information_messages import LONGEST, ColumnValue
from vfl.inputs import MOST_CLASSES, check_columns, class_labels
from vfl.losses import Matrix
from vfl.training import agree
from vfl.weight_of_evidence import SMOOTHING, Information, bin_columns, evidence

log = logging.getLogger("colonnade")
DECIMALS = 3  # of an information value that is told


def label_holder(
    session: Session,
    binned: pd.DataFrame,
    y: object,
    *,
    allowed_counts: int,
    smoothing: float = SMOOTHING,
    secret: SecretKey | None = None,
) -> Information:
    """Let every feature holder count the classes in its bins; ours are counted here, and sent nowhere.

    `binned` (n, d) of `bin_columns`, d may be 0; y (n,) of two classes, of which the larger is the positive one, or of
    several; `allowed_counts` is the most counts that a feature holder may get, 0 none.

    Reveals:
        To a feature holder: the number of classes, and the rows of each (by its number, not its name) in each of its
        bins, hence in all rows. A bin whose rows are all of one class, or none of it, tells that of all its rows, one
        of few rows nearly so; bins of two columns, or of two runs, that differ in few rows tell of these. We see no
        bins: small and overlapping ones are refused by a feature holder that follows the protocol. One that deviates
        gets any linear functions of the labels in as many numbers, and with powers of two for weights some 40 labels
        from each (lattice), or nearly as many as a plaintext has bits (Paillier).
        To us: how many bins a feature holder has, over all its columns, and nothing else.
    Raises:
        LocalError: y has no classes. Refused: counts are not allowed, or not so many.
    """
    classes, coded = class_labels(y, len(binned))
    indicators = np.eye(len(classes))[coded][:, 1:]
    bins, ours = _bins(binned, smoothing)
    terms = _agree(session, np.empty((len(binned), 0)), allowed_counts, outputs=len(classes) - 1)
    open_gradients(offer_key(session, terms, secret), indicators, 0)
    return _evidence(bins, ours.T @ indicators, smoothing, [str(one) for one in classes])


def feature_holder(
    session: Session, binned: pd.DataFrame, *, allowed_counts: int, smoothing: float = SMOOTHING
) -> Information:
    """Count the classes in our bins, `binned` (n, d) of `bin_columns`, without seeing a label. Classes have numbers,
    from 0.

    Reveals:
        To the label holder: how many bins we have. If it deviates it chooses what is counted, and learns whether we
        stop: one bit about our bins, once.
    Raises:
        LocalError: bins of fewer than the agreed minimum_rows_off_mode rows, or that tell some row's label. Refused:
        counts are not allowed, or not so many. ProtocolViolation: counts that no labels can give.
    """
    bins, x = _bins(binned, smoothing)
    _check_bins(bins, x, session.agreement.model.minimum_rows_off_mode)
    scales = Scales.of(session.agreement, len(x))
    fixed = x.astype(np.int64) << scales.feature_bits
    terms = _agree(session, x, allowed_counts, magnitude=scales.magnitude(fixed))
    counts = weigh_gradient(accept_key(session, terms, fixed), 0)
    with blame(session.label_holder):
        _check_counts(bins, counts)
    return _evidence(bins, counts, smoothing, [str(number) for number in range(terms.width + 1)])


def tell_values(session: Session, information: Information) -> None:
    """As a feature holder, tell the label holder what our columns are worth, where the agreement says so.

    Reveals:
        To the label holder: our columns' names and, to three decimals, their information values, of every class; no
        bin. If it deviates, it chooses the classes, and a value tells something of how these rows fall into our bins:
        once a session, of no fewer rows than a bin must have. If we deviate, it hears whatever we say.
    Raises:
        Refused: a class has fewer than the agreed minimum_rows_off_mode rows.
    """
    lines = information.bins[information.bins["feature"] == information.bins["feature"].iloc[0]]
    of_class, rows = lines.groupby("class")["positives"].sum(), lines.drop_duplicates("bin")["rows"].sum()
    fewest, minimum = min(of_class.min(), rows - of_class.max()), session.agreement.model.minimum_rows_off_mode
    if fewest < minimum:
        raise Refused(
            f"a class has {fewest} rows, fewer than {minimum}: an information value would tell our bins of these rows; "
            "agree on values_to_label_holder = false in [information]"
        )
    values = information.by_class.round(DECIMALS)
    for left, (name, row) in zip(reversed(range(len(values))), values.iterrows(), strict=True):
        session.channels[session.label_holder].send(ColumnValue(str(name)[:LONGEST], left, row.to_numpy(np.float64)))


def hear_values(session: Session, most: int, classes: int) -> list[dict[str, Any]]:
    """As the label holder, what every feature holder tells: its columns in its order, `most` at most, a value for each
    of the `classes` against the rest (of two, one value).

    Reveals:
        To a feature holder: nothing; nothing is sent.
    Raises:
        ProtocolViolation: values of other classes, or too many columns.
    """
    heard, values = [], classes if classes > 2 else 1
    for party in session.agreement.ring[1:]:
        due = range(most)
        while due:
            told = session.channels[party.name].receive(ColumnValue)
            with blame(party.name):
                if told.left not in due or len(told.data) != values:
                    raise ValueError("information values of other columns or classes than are due")
            heard.append(_shown(party.name, told.name, told.data.tolist()))
            due = range(told.left - 1, told.left) if told.left else range(0)
    return heard


def rehearse(agreement: Agreement, features: pd.DataFrame, plan: Preparation, is_label_holder: bool) -> None:
    """What [information] would refuse of our columns once rows are common stops us now, on all our rows.

    Raises:
        LocalError, Refused: as `feature_holder`, before anything is sent.
    """
    agreed = agreement.information
    if agreed is None or is_label_holder:
        return
    minimum = agreement.model.minimum_rows_off_mode
    bins, x = _bins(bin_columns(features, plan, bins=agreed.bins, minimum=minimum), agreed.smoothing)
    _check_bins(bins, x, minimum)
    _check_allowed(len(bins), agreed.allowed_counts)


def measure(
    session: Session, features: pd.DataFrame, plan: Preparation, label: NDArray[Any] | None
) -> dict[str, list[dict[str, Any]]]:
    """[information] of the agreement at one party, as plain values; nothing without that section.

    `bins`: a line for each of our own bins and classes. `values`: a line a column, ours and at the label holder, if the
    agreement says so, everybody's: party, column, iv, and by class where there are several.

    Reveals:
        To every party: what `label_holder`, `feature_holder` and, with values_to_label_holder, `tell_values` reveal;
        no more.
    """
    agreed = session.agreement.information
    if agreed is None:
        return {}
    bins, counts, smoothing = agreed.bins, agreed.allowed_counts, agreed.smoothing
    features, told = features.reset_index(drop=True), list[dict[str, Any]]()
    with session.phase("information"):
        if session.is_label_holder:
            binned = bin_columns(features, plan, bins=bins)
            found = label_holder(session, binned, label, allowed_counts=counts, smoothing=smoothing)
            if agreed.values_to_label_holder:
                told = hear_values(session, counts, len(set(np.asarray(label).tolist())))
        else:
            minimum = session.agreement.model.minimum_rows_off_mode
            binned = bin_columns(features, plan, bins=bins, minimum=minimum)
            found = feature_holder(session, binned, allowed_counts=counts, smoothing=smoothing)
            if agreed.values_to_label_holder:
                tell_values(session, found)
    lines: Any = found.bins.to_dict("records")
    ours = [_shown(session.name, str(name), row.tolist()) for name, row in found.by_class.iterrows()]
    return {"bins": lines, "values": ours + told}


def _shown(party: str, column: str, by_class: list[float]) -> dict[str, Any]:
    return {"party": party, "column": column, "iv": sum(by_class), "by_class": by_class if len(by_class) > 1 else []}


def _evidence(bins: pd.DataFrame, counts: Matrix, smoothing: float, classes: list[str]) -> Information:
    """From the counts of all classes but the first."""
    if counts.shape[1] > 1:
        first = bins["rows"].to_numpy() - counts.sum(axis=1)
        return evidence(bins, np.column_stack([first, counts]), smoothing, classes)
    return evidence(bins, counts, smoothing, classes[1:])


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


def _check_bins(bins: pd.DataFrame, x: Matrix, minimum: int) -> None:
    """None that tell a row's label. Raises LocalError."""
    of_feature = bins.groupby("feature", sort=False)["rows"]
    small = [f"{name} ({(rows < minimum).sum()} of {len(rows)})" for name, rows in of_feature if rows.min() < minimum]
    if small:
        raise LocalError(
            f"bins of fewer than {minimum} rows: {', '.join(small)}; their counts would reveal labels: set fewer bins, "
            "merge levels, or drop the column"
        )
    several = np.ptp(x, axis=0) > 0  # the only bin of its column tells no more than that all rows have one
    check_columns(x[:, several], list(bins["feature"][several]), minimum)


def _check_allowed(counts: int, allowed: int) -> None:
    if counts > allowed:
        raise Refused(
            f"{counts} counts of the label by bin, {allowed} allowed: agree on more, set fewer bins or drop columns"
        )


def _agree(session: Session, x: Matrix, allowed: int, **ours: int) -> Terms:
    """All allow the same number of counts, and nobody wants more of them. Raises Refused, ProtocolViolation."""
    _check_allowed(max(x.shape[1], 1), allowed)
    plans = agree(session, "information value", {"counts": allowed}, x, **ours)
    label_plan = plans.pop(session.label_holder)
    outputs = label_plan.outputs
    if (label_plan.columns, label_plan.range_bits) != (0, 0) or not 0 < outputs < MOST_CLASSES:
        raise ProtocolViolation(f"{session.label_holder} plans with other than one label", peer=session.label_holder)
    for name, plan in plans.items():
        counts = plan.columns * outputs
        if counts > allowed or plan.columns + 1 >= plan.rows:
            raise Refused(
                f"{name} wants {counts} counts of {plan.rows} rows, {allowed} are allowed: agree on more, set fewer "
                "bins or drop columns",
                peer=name,
            )
        if counts * plan.rows.bit_length() >= plan.rows:
            log.warning("%d rows are few for %d counts: %s might work out labels", plan.rows, counts, name)
    return Terms.of(session.agreement, len(x), plans, 1, width=outputs)


def _check_counts(bins: pd.DataFrame, counts: Matrix) -> None:
    """What any labels give, of classes that all have rows. Raises ValueError."""
    rows = bins["rows"].to_numpy()
    strange = ((counts != np.rint(counts)) | (counts < 0)).any(axis=1) | (counts.sum(axis=1) > rows)
    if strange.any():
        raise ValueError(
            f"counts of {strange.sum()} of {len(bins)} bins are not whole, or not between 0 and the rows of their bin"
        )
    totals = np.unique(pd.DataFrame(counts).groupby(bins["feature"]).sum(), axis=0)
    in_all = int(rows.sum()) // bins["feature"].nunique()
    if len(totals) > 1 or not (totals > 0).all() or totals.sum() >= in_all:
        raise ValueError("counts that do not add up to the same numbers for every column, or leave a class empty")
