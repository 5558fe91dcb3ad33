"""Our table as the main job takes it, read and checked at one party before anything is sent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import lapack

from parties.agreement import Agreement, Model
from parties.errors import LocalError, Refused
from parties.party_file import Party, TableChoice
from parties.preparation import Preparation
from parties.tables import Source, Table
from psi import job as psi_job
from vfl.bottoms import Deep, frozen
from vfl.exchange import Scales
from vfl.information import rehearse
from vfl.inputs import RANK_TOLERANCE, check_columns, matrix, row_weights
from vfl.losses import Vector
from vfl.optimisers import Rule, load_torch
from vfl.own_code import Own, blamed_on, own_module
from vfl.preparation import FittedCategory, FittedColumns, fit
from vfl.task import check_range, classes_of, label_use, outputs_for
from vfl.top import Top

log = logging.getLogger("colonnade")


@dataclass(frozen=True)
class Prepared(psi_job.Prepared):
    """Our input, checked: nothing has been sent yet. Features and label are those of the rows that take part, in the
    order of `ids.rows`; features as our table has them: float64, NaN where one is missing and will be filled, or text.

    `plan` is our file's [prepare]; `fitted` what it comes to on all these rows or, when scoring, what our share brings.
    """

    features: pd.DataFrame = field(repr=False)
    label: NDArray[Any] | None = field(repr=False)
    plan: Preparation = field(repr=False)
    fitted: FittedColumns = field(repr=False)
    weights: Vector | None = field(default=None, repr=False)
    own: Own | None = None


def prepare(
    party: Party,
    *,
    source: Source | None = None,
    trained: FittedColumns | None = None,
    look: Callable[[Table], None] = lambda table: None,
) -> Prepared:
    """Read and check our table, for training; or for scoring, with the preparation that a share was `trained` with.

    Raises:
        LocalError: names file, column and count. Refused: the agreement does not allow a model, or as many columns.
    """
    choice, plan, agreement, own = party.file.table, party.file.prepare, party.agreement, own_module(party)
    names = list(choice.features if trained is None else trained.columns)
    if not names and not party.is_label_holder:
        raise LocalError(f"{party.path}: name our columns as features in [table]; 'colonnade align' needs none")
    if agreement.intersection.result != "rows":
        raise Refused(f'the agreement reveals only {agreement.intersection.result!r}: a model needs result = "rows"')
    if trained is None and party.is_label_holder and not choice.label:
        raise LocalError(f"{party.path}: the label holder names its label in [table]; 'colonnade align' needs none")
    categories, gaps = _declared(plan) if trained is None else _learnt(trained)
    label = choice.label if trained is None else ""
    use = label_use(agreement.model, choice.positive)
    weight = choice.weight if label else ""
    if weight and agreement.search is not None:
        raise Refused(f"{party.path}: a search takes no weights; take weight out of [table]")
    wanted, binary = (names, label) if use == "binary" or not label else ([*names, label], "")
    wanted = [*wanted, weight] if weight else wanted
    read = psi_job.prepare(
        party,
        source=source,
        features=wanted,
        label=binary,
        categories=categories | ({label} if use == "classes" and label else set()),
        gaps=gaps,
        look=look,
    )
    table = read.table
    target = table.label if not label or binary else table.features.pop(label)
    if label and use == "classes" and target is not None:
        target = classes_of(table.source, label, target)
    if label and use == "numbers":
        check_range(f"{table.source}, column {label!r}", target, agreement.model.residual_range)
    if label and agreement.is_network:
        load_torch()
    weights = table.features.pop(weight)[read.ids.rows] if weight else None
    features, truth = _taking_part(read, choice, target)
    if weights is not None:
        try:
            row_weights(weights, len(weights))
        except LocalError as error:
            raise LocalError(f"{table.source}, column {weight!r}: {error}") from None
    try:
        fitted = trained or fitted_on(features, plan, agreement.model, party.is_label_holder)
        columns = fitted.transform(features)
        if trained is None:
            rehearse(agreement, features, plan, party.is_label_holder)
    except LocalError as error:
        raise LocalError(f"{read.table.source}: {error}") from None
    prepared = Prepared(read.table, read.ids, features, truth, plan, fitted, weights, own)
    if trained is None:
        _rehearse(party, exchanged(columns, prepared, agreement), read.table.source)
    return prepared


def exchanged(columns: pd.DataFrame, prepared: Prepared, agreement: Agreement) -> pd.DataFrame:
    """The columns that the encrypted exchange will see: our prepared ones, or what a frozen module of ours makes of
    them; none below a module that learns. Raises LocalError: our module is for other columns or classes."""
    own, network = prepared.own, agreement.network
    if own is None:
        return columns
    outputs = outputs_for(agreement.model, prepared.label)
    module = own.modules(agreement, columns.shape[1], outputs)[own.part]
    rule, width = Rule("sgd", agreement.model.learning_rate, 0.0, 0.0), network.hidden[0]
    with blamed_on(f"our {own.part}"):
        if own.part == "top":
            classifies = agreement.model.kind == "network classifier"
            Top(module, own.merged(agreement, columns.shape[1]), outputs, classifies, rule)
            return columns
        if network.mode == "open":
            Deep(columns.to_numpy(), module, width, rule)
            return columns.iloc[:, :0]
        features, names = matrix(frozen(module, columns))
        return pd.DataFrame(features, columns=names)


def _declared(plan: Preparation) -> tuple[set[str], set[str]]:
    """Which columns are text, and in which numbers may be missing."""
    return set(plan.categories), {name for name, column in plan.numbers.items() if column.missing != "refuse"}


def _learnt(fitted: FittedColumns) -> tuple[set[str], set[str]]:
    """Likewise, of a preparation that has been fitted."""
    texts = {name for name, column in fitted.columns.items() if isinstance(column, FittedCategory)}
    return texts, {name for name, column in fitted.columns.items() if name not in texts and column.fill is not None}


def fitted_on(features: pd.DataFrame, plan: Preparation, model: Model, is_label_holder: bool) -> FittedColumns:
    """Every level of a feature holder's columns has the agreed number of rows: its gradients are sums over them."""
    minimum = 1 if is_label_holder else model.minimum_rows_off_mode
    return fit(features, plan, standardise=model.standardise, minimum=minimum)


def _rehearse(party: Party, columns: pd.DataFrame, place: str) -> None:
    """What would stop training once rows are common stops us now, on all our rows and prepared columns."""
    if party.file.model.bottom and not columns.shape[1]:
        return
    agreement, names, rows = party.agreement, list(map(str, columns)), len(columns)
    agreed = agreement.party(party.name).columns
    if agreed and len(names) > agreed:
        raise Refused(f"{party.path}: {len(names)} columns once they are prepared; the agreement allows us {agreed}")
    if not party.is_label_holder:
        check_columns(columns.to_numpy(), names, agreement.model.minimum_rows_off_mode, place)
        Scales.of(agreement, rows).features(columns.to_numpy(), names)
    if rows <= len(names):
        raise LocalError(f"{place}: {rows} rows for {len(names)} prepared columns; bring more rows")
    _warn_dependent(columns)


def _warn_dependent(columns: pd.DataFrame) -> None:
    """Columns that depend on others are solved for all the same: the penalty says how they share a weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.nan_to_num(np.atleast_2d(np.corrcoef(columns.to_numpy(), rowvar=False)))
    _, order, independent, _ = lapack.dpstrf(correlations, tol=RANK_TOLERANCE**2)
    names = [columns.columns[number - 1] for number in sorted(order[independent:])]
    if names:
        log.warning(
            "columns that others of ours add up to: %s; the penalty alone decides how they share a weight: drop them",
            ", ".join(map(repr, names)),
        )


def _taking_part(
    read: psi_job.Prepared, choice: TableChoice, label: NDArray[Any] | None
) -> tuple[pd.DataFrame, NDArray[Any] | None]:
    """One row of features and one label for every id; several rows of one id are aggregated if our file says so."""
    table, ids = read.table, read.ids
    features = pd.DataFrame(table.features, index=range(len(table)), copy=False)
    if choice.duplicates != "aggregate" or not ids.counts["duplicate"]:
        return features.iloc[ids.rows], None if label is None else label[ids.rows]
    part = ids.groups >= 0
    grouped = features[part].groupby(ids.groups[part], sort=True)
    if label is not None:
        spread = pd.Series(label[part]).groupby(ids.groups[part]).agg(["min", "max"])
        differing = int((spread["min"] != spread["max"]).sum())
        if differing:
            raise LocalError(
                f"{table.source}, column {choice.label!r}: {differing} ids have rows of different labels; correct them"
            )
    return grouped.agg(dict(choice.aggregate))[list(features)].astype(np.float64), (
        None if label is None else label[ids.rows]
    )
