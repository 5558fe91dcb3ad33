"""A training in memory, with the real roles, on data that one has in one place; and what each side saw of it.

What a run shows does not depend on how gradients are encrypted, so that the lattice scheme is used: it is the quickest.
A rehearsal goes on for as many exchanges as the agreement allows, the most that any data could need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from parties.agreement import Agreement, Model, Result
from parties.identity import Identity
from parties.memory import MemoryLink, make_agreement, play
from parties.message import decode, parse_header
from parties.session import Session
from psi.align import align
from psi.job import ALIGN
from vfl.estimator import VerticalLinearModel
from vfl.inner import Problem
from vfl.losses import Loss, Matrix, Vector
from vfl.messages import MaskedEmbedding, PartialEmbedding
from vfl.task import linear

Rows = NDArray[np.int64]
NEVER = 1e-300  # a tolerance that stops nothing
MEMBERS = 200  # made-up ids of a party, of which half are common


@dataclass(frozen=True)
class Seen:
    """What each side would see.

    embeddings (n, t): all that the label holder got over the same rows, sums where there are several feature holders.
    aggregates: by feature holder X^T R (d, e), an exchange each, over `rows`: all, or with mini-batches the first one.
    shares: by feature holder the embeddings (n, m) of its trained model. gradients: by feature holder (n, k), a row
    each, where a training sends such.
    """

    embeddings: Matrix = field(repr=False)
    aggregates: Mapping[str, Matrix] = field(repr=False)
    shares: Mapping[str, Matrix] = field(repr=False)
    rows: Rows = field(repr=False)
    exchanges: int
    gradients: Mapping[str, Matrix] = field(default_factory=dict, repr=False)


def rehearse(parts: Mapping[str, pd.DataFrame], y: Vector, agreed: Agreement) -> Seen:
    """Train on `parts`, the label holder's columns (maybe none) first, rows aligned, and y (n,), under what was agreed
    but for the parties and the tolerance.

    Raises:
        LocalError, Refused: what a training on these columns is refused for.
    """
    names, recorded = list(parts), dict[str, dict[str, MemoryLink]]()
    identities = {name: Identity.generate(name) for name in names}
    here = make_agreement(identities)
    agreement = msgspec.structs.replace(
        agreed,
        parties=here.parties,
        expires=here.expires,
        deadlines=here.deadlines,
        model=msgspec.structs.replace(agreed.model, tolerance=NEVER, early_stopping=False),
        encryption=msgspec.structs.replace(agreed.encryption, scheme="lattice"),
    )

    roles = {name: _trainer(x, y if name == names[0] else None, agreement.model) for name, x in parts.items()}
    trained = play(roles, agreement, identities=identities, recorded=recorded)
    residuals = trained[names[0]].problem_.residuals
    rows = residuals[0][0]
    aggregated = [residual for _, residual in residuals if len(residual) == len(y)] or [residuals[0][1]]
    holders = {name: parts[name].to_numpy(np.float64) for name in names[1:]}
    return Seen(
        embeddings=_over_the_same_rows(_sums(recorded, names, agreement), residuals, len(y)),
        aggregates={name: np.column_stack([x[rows].T @ one for one in aggregated]) for name, x in holders.items()},
        shares={name: x @ trained[name].coef_.T for name, x in holders.items()},
        rows=rows,
        exchanges=len(residuals),
    )


def rehearse_alignment(result: Result) -> list[tuple[NDArray[np.bool_], Vector]]:
    """At the label holder, then at a feature holder, on made-up ids: which of its own rows are common, (n,), and what
    an intersection with this result told it of each, 0 to 1."""
    names = ["label", "feature"]
    identities = {name: Identity.generate(name) for name in names}
    agreement = make_agreement(identities, intersection={"result": result, "minimum": 1})
    ids = {
        name: [str(number) for number in range(start, start + MEMBERS)]
        for name, start in zip(names, (0, MEMBERS // 2), strict=True)
    }
    played = play(
        {name: lambda session: align(session, ids[session.name]) for name in names},
        agreement,
        identities=identities,
        task=ALIGN,
    )
    rows = np.arange(MEMBERS)
    told = [
        np.full(MEMBERS, played[name].size / MEMBERS)
        if played[name].rows is None
        else np.isin(rows, played[name].rows).astype(np.float64)
        for name in names
    ]
    return list(zip((rows >= MEMBERS // 2, rows < MEMBERS // 2), told, strict=True))


@dataclass(frozen=True)
class _Watched(Problem):
    """A problem that keeps the residuals it was asked for, and of which rows."""

    residuals: list[tuple[Rows, Matrix]] = field(default_factory=list)
    at: Rows | None = None

    def rows(self, rows: Rows) -> Problem:
        return replace(self, y=self.y[rows], weights=self.weights[rows], at=rows)

    def residual(self, scores: Matrix) -> Matrix:
        out = super().residual(scores)
        self.residuals.append((np.arange(len(out)) if self.at is None else self.at, out))
        return out


def _trainer(x: pd.DataFrame, y: Vector | None, model: Model) -> Callable[[Session], VerticalLinearModel]:
    return lambda session: _watched(linear(model)).fit(x, y, session=session)


def _watched(model: VerticalLinearModel) -> VerticalLinearModel:
    """The same estimator, which keeps the residuals at the label holder: who knows these and the columns of a feature
    holder knows what that one is given."""

    class Watched(type(model)):  # type: ignore[misc]
        def _problem(self, loss: Loss, targets: Matrix, weights: Vector) -> Problem:
            plain = super()._problem(loss, targets, weights)
            self.problem_ = _Watched(plain.loss, plain.y, plain.weights, plain.penalty, plain.fit_intercept)
            return self.problem_

    out: VerticalLinearModel = Watched(**model.get_params())
    return out


def _sums(recorded: Mapping[str, Mapping[str, MemoryLink]], names: list[str], agreement: Agreement) -> list[Vector]:
    """What the label holder can add up of the embeddings on the wire, step by step."""
    steps: dict[int, dict[str, list[Any]]] = {}
    kind: type[PartialEmbedding | MaskedEmbedding] = PartialEmbedding if len(names) == 2 else MaskedEmbedding
    for name in names[1:]:
        for head, payload in recorded[name][names[0]].sent:
            header = parse_header(head)
            if header.kind == kind.kind:
                message = decode(header, payload, kind)
                steps.setdefault(message.exchange, {}).setdefault(name, []).append(message.data)
    sums = [np.sum([np.concatenate(parts) for parts in steps[step].values()], axis=0) for step in sorted(steps)]
    if kind is PartialEmbedding:
        return sums
    return [np.ldexp(one.astype(np.int64).astype(np.float64), -agreement.encryption.embedding_bits) for one in sums]


def _over_the_same_rows(sums: list[Vector], residuals: list[tuple[Rows, Matrix]], n: int) -> Matrix:
    """Embeddings (n, t): full ones side by side; those of mini-batches an epoch beside the other."""
    rows = residuals[0][0]
    if len(rows) == n:
        return np.column_stack([one.reshape(n, -1) for one in sums]) if sums else np.empty((n, 0))
    epochs: list[Matrix] = []
    times = np.zeros(n, np.int64)
    for values, (batch, residual) in zip(sums, residuals, strict=True):
        if times[batch[0]] == len(epochs):
            epochs.append(np.zeros((n, residual.shape[1])))
        epochs[-1][batch] = values.reshape(len(batch), -1)
        times[batch] += 1
    return np.hstack(epochs)
