"""What every vertical training begins and ends with: a plan that all share, its limits, and honest warnings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError, ProtocolViolation, Refused
from parties.session import Session
from vfl import sgd
from vfl.exchange import Scales, Terms
from vfl.inputs import check_columns, rank
from vfl.losses import Matrix
from vfl.messages import Plan
from vfl.solver import Limits, Result, Schedule

log = logging.getLogger("colonnade")
NO_LIMIT = 1 << 30
Batches = Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Setup:
    """What all agreed on before any data moved. `x` is our table in fixed point (feature holders); `ranks` are those of
    the feature holders' columns."""

    terms: Terms
    limits: Limits
    batches: Batches
    x: NDArray[np.int64]
    ranks: dict[str, int]


def agree(session: Session, purpose: str, params: Mapping[str, Any], x: Matrix, **ours: int) -> dict[str, Plan]:
    """All parties compare what they are about to do, and count rows and columns, before any data moves.

    Reveals:
        To all: our numbers of rows and columns and what `ours` says of them. Returns everybody's plan, ours included.
    Raises:
        Refused: a peer is about to do something else. ProtocolViolation: it has another number of rows.
    """
    text = msgspec.json.encode([purpose, params], order="sorted")
    digest = hashlib.sha256(b"colonnade/plan/1" + session.id + text).digest()
    mine = Plan(digest, len(x), x.shape[1], **ours)
    session.broadcast(mine)
    plans = session.gather(Plan)
    for name, plan in plans.items():
        if plan.digest != mine.digest:
            raise Refused(
                f"{name} is about to do something else: other hyper-parameters, or a share of another training",
                peer=name,
            )
        if plan.rows != mine.rows:
            raise ProtocolViolation(f"{name} has {plan.rows} rows where we have {mine.rows}", peer=name)
    return plans | {session.name: mine}


def prepare(
    session: Session,
    purpose: str,
    params: Mapping[str, Any],
    x: Matrix,
    names: Sequence[str],
    *,
    tolerance: float,
    exchanges: int,
    batches: Batches = (),
    epochs: int = 1,
    outputs: int = 0,
    bounded: bool = True,
) -> Setup:
    """Check our columns, agree on the plan, and derive terms and limits. `batches` are those of all `epochs`. The label
    holder says `outputs` and `bounded` (|residuals| <= 1).

    Reveals:
        To all: numbers of rows, columns and outputs, the feature holders' ranks and magnitudes, whether residuals are
        bounded.
    Raises:
        LocalError: our columns cannot be trained on, before anything is sent. Refused, ProtocolViolation: a bad plan.
    """
    agreed, scales = session.agreement.model, Scales.of(session.agreement, len(x))
    smallest, largest = (pick(map(len, batches), default=len(x)) for pick in (min, max))
    if session.is_label_holder:
        fixed = np.empty((0, 0), np.int64)
        plans = agree(session, purpose, params, x, outputs=outputs, range_bits=0 if bounded else _range_bits(agreed))
    else:
        for batch in batches or [np.arange(len(x))]:
            where = "a batch" if batches else "the table"
            check_columns(x[batch], list(names), agreed.minimum_rows_off_mode, where)
            session.tick()
        fixed = scales.features(x, names)
        if len(np.unique(x, axis=0)) < len(x) / 2 and not agreed.allow_reconstruction:
            log.warning(
                "our columns take few combinations of values: one or two embeddings may tell them all, long before the "
                "limit; see docs/threats.md"
            )
        plans = agree(session, purpose, params, x, rank=rank(x), magnitude=scales.magnitude(fixed, batches))
    label_plan = plans.pop(session.label_holder)
    if not label_plan.outputs or label_plan.range_bits not in (0, _range_bits(agreed)):
        raise ProtocolViolation(
            f"{session.label_holder} plans with {label_plan.outputs} outputs and residuals of {label_plan.range_bits} "
            "bits, which the agreement does not say",
            peer=session.label_holder,
        )
    for name, plan in plans.items():
        _check_holder(session, name, plan.columns, smallest)
    limits = _limits(session, plans, label_plan.outputs, tolerance, exchanges, len(batches) // epochs, epochs)
    weighed = max(plan.columns for plan in plans.values()) if session.is_label_holder else x.shape[1]
    _warn_few_rows(session, smallest, weighed * label_plan.outputs, limits)
    terms = Terms.of(
        session.agreement,
        largest,
        plans,
        limits.exchanges,
        width=label_plan.outputs,
        range_bits=label_plan.range_bits,
        cached=not batches,
    )
    ranks = {name: plan.rank for name, plan in plans.items()}
    return Setup(terms, limits, batches[: limits.exchanges], fixed, ranks)


def schedule(
    rows: int, size: int, epochs: int, seed: int, allowed: int, *, held: float, patience: int, tolerance: float
) -> Schedule:
    """All mini-batches, known to every party in advance, and the share `held` of the rows that is held out, by token
    order. LocalError: more batches than are allowed."""
    order = np.random.default_rng([seed, 1]).permutation(rows)  # not a secret: all share it
    validation = np.sort(order[: round(held * rows)])
    rest = np.setdiff1d(np.arange(rows), validation)
    plan = [rest[batch] for batch in sgd.batches(len(rest), size, epochs, seed)]
    if len(plan) > allowed:
        raise LocalError(
            f"{len(rest)} rows need {len(plan)} encrypted exchanges, {allowed} are allowed; use larger batches, "
            "fewer epochs, or agree on more exchanges"
        )
    return Schedule(plan, len(plan) // epochs, validation, patience, tolerance)


def say_why(result: Result, limits: Limits, wanted: int) -> None:
    """Training ended before the tolerance: for whose sake."""
    why = "fixed point allows no further progress; a larger tol would call this converged"
    if limits.embeddings < NO_LIMIT and result.exchanges < wanted:
        why = (
            "with as many as the feature holders' columns have independent directions the label holder could rebuild "
            "them; allow_reconstruction in the agreement lifts this"
        )
    elif result.exchanges == limits.exchanges:
        why = "as many as were agreed"
    log.warning("training stopped after %d exchanges, before the optimum: %s", result.exchanges, why)


def _range_bits(agreed: Any) -> int:
    return max(int(np.ceil(np.log2(agreed.residual_range))), 0)


def _check_holder(session: Session, name: str, columns: int, rows: int) -> None:
    """None with more columns than agreed, nor so many that its gradient is R.

    All parties check all: claimed columns give labels, and lift the limit on exchanges for everybody.
    """
    agreed = session.agreement.party(name).columns
    if not columns or columns + 1 >= rows or (agreed and columns > agreed):
        limit = f"the agreement allows {agreed}" if agreed else f"a batch has {rows} rows"
        raise Refused(f"{name} brings {columns} columns, {limit}: its gradients would give it labels", peer=name)


def _limits(
    session: Session,
    plans: Mapping[str, Plan],
    outputs: int,
    tolerance: float,
    exchanges: int,
    batches: int,
    epochs: int,
) -> Limits:
    """The caps; every party computes them, so that none can be led beyond them.

    Without consent the label holder gets fewer embeddings than the feature holders' columns have independent directions
    together: so many, or sums of them, let it rebuild these columns up to a linear map. [leakage] may say less. With
    batches every row is embedded `outputs` times an epoch, one that is held out too, and as often again when the
    finished model scores it.
    """
    agreed = session.agreement.model
    wanted = epochs * batches or min(exchanges, agreed.max_exchanges)
    if agreed.allow_reconstruction:
        return Limits(tolerance, wanted, NO_LIMIT)
    together = max(sum(plan.rank for plan in plans.values()), 1)
    most = session.agreement.leakage.most_embeddings(together)
    if not batches:
        return Limits(tolerance, min(wanted, most + 1), most)
    allowed = most // outputs - 1
    if allowed < 1:
        raise Refused(
            f"an epoch and the scoring after it each embed every row {outputs} times, and the feature holders' columns "
            f"have {together} independent directions: the label holder could rebuild them; agree on "
            "allow_reconstruction, or on fewer outputs"
        )
    return Limits(tolerance, min(epochs, allowed) * batches, most)


def _warn_few_rows(session: Session, rows: int, numbers: int, limits: Limits) -> None:
    """Both sides say it: gradients are sums over rows, and lattice reduction can undo sums of few."""
    if rows <= session.agreement.encryption.feature_bits * numbers * limits.exchanges:
        log.warning(
            "%d rows are few for up to %d gradients of %d numbers: a feature holder with a lattice attack might learn "
            "labels, see docs/threats.md",
            rows,
            limits.exchanges,
            numbers,
        )
