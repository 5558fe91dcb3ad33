"""A training in memory, with the real roles, on data that one has in one place; and what each side saw of it.

What a run shows does not depend on how gradients are encrypted, so that the lattice scheme is used: it is the quickest.
A rehearsal goes on for as many exchanges as the agreement allows, the most that any data could need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from parties.agreement import Agreement, Result
from parties.identity import Identity
from parties.memory import MemoryLink, make_agreement, play
from parties.message import Message, decode, parse_header
from parties.session import Session
from psi.align import align
from psi.job import ALIGN
from vfl import sgd
from vfl.bottoms import Deep, Linear, Randomness
from vfl.estimator import VerticalLinearModel
from vfl.inner import Problem
from vfl.losses import Loss, Matrix, Vector
from vfl.messages import MaskedEmbedding, PartialEmbedding
from vfl.neural_estimator import VerticalMLP
from vfl.open_messages import OpenGradient, SeparateEmbedding
from vfl.own_code import Own
from vfl.task import estimator, outputs_for

Rows = NDArray[np.int64]
Recorded = Mapping[str, Mapping[str, MemoryLink]]
NEVER = 1e-300  # a tolerance that stops nothing
MEMBERS = 200  # made-up ids of a party, of which half are common


@dataclass(frozen=True)
class Seen:
    """What each side would see.

    embeddings (n, t): all that the label holder got over the same rows, sums where there are several feature holders
    (of a network that puts them side by side, each one's), `width` of them an exchange.
    aggregates: by feature holder X^T R (d, e), `outputs` columns an exchange, over `rows`: all, or with mini-batches
    the first one; none where gradients travel a row each. shares: by feature holder the embeddings (n, m) of its
    trained model. gradients: by feature holder (n, m), a row each, of every epoch and then their mean, where a training
    sends such.
    """

    embeddings: Matrix = field(repr=False)
    aggregates: Mapping[str, Matrix] = field(repr=False)
    shares: Mapping[str, Matrix] = field(repr=False)
    rows: Rows = field(repr=False)
    exchanges: int
    outputs: int = 1
    width: int = 1
    gradients: Mapping[str, list[Matrix]] = field(default_factory=dict, repr=False)


def rehearse(
    parts: Mapping[str, pd.DataFrame], y: NDArray[Any], agreed: Agreement, own: Mapping[str, Own] | None = None
) -> Seen:
    """Train on `parts`, the label holder's columns (maybe none) first, rows aligned, and y (n,), under what was agreed
    but for the parties, the tolerance and early stopping; with `own` modules of a network, by party.

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
        network=msgspec.structs.replace(agreed.network, early_stopping=False),
        encryption=msgspec.structs.replace(agreed.encryption, scheme="lattice"),
    )
    outputs = outputs_for(agreement.model, y)
    modules = {name: one.modules(agreement, parts[name].shape[1], outputs) for name, one in (own or {}).items()}
    roles = {name: _trainer(x, y if name == names[0] else None, modules.get(name, {})) for name, x in parts.items()}
    trained = play(roles, agreement, identities=identities, recorded=recorded)
    if agreement.is_network:
        return _seen_of_network(trained, recorded, names, agreement, len(y))
    residuals = trained[names[0]].problem_.residuals
    rows = residuals[0][0]
    aggregated = [residual for _, residual in residuals if len(residual) == len(y)] or [residuals[0][1]]
    holders = {name: parts[name].to_numpy(np.float64) for name in names[1:]}
    sums, outputs = _sums(recorded, names, agreement), residuals[0][1].shape[1]
    return Seen(
        embeddings=_over_the_same_rows(sums, [batch for batch, _ in residuals], len(y)),
        aggregates={name: np.column_stack([x[rows].T @ one for one in aggregated]) for name, x in holders.items()},
        shares={name: x @ trained[name].coef_.T for name, x in holders.items()},
        rows=rows,
        exchanges=len(residuals),
        outputs=outputs,
        width=sums[0].size // len(rows) if sums else 0,
    )


def _seen_of_network(
    trained: Mapping[str, Any], recorded: Recorded, names: list[str], agreement: Agreement, rows: int
) -> Seen:
    """What each side saw of a network's training; its batches follow from the agreement."""
    holders, outputs, model = names[1:], agreement.network.hidden[0], agreement.model
    plan = sgd.batches(rows, model.batch_size, model.epochs, model.seed)
    sums = _sums(recorded, names, agreement)
    gradients = dict[str, list[Matrix]]()
    for name in holders:
        if sent := _sent(recorded[names[0]][name], OpenGradient):
            epochs = _over_the_same_rows(sent, plan, rows)
            each = np.split(epochs, epochs.shape[1] // outputs, axis=1)
            gradients[name] = [*each, np.mean(each, axis=0)]
    return Seen(
        embeddings=_over_the_same_rows(sums, plan, rows),
        aggregates={name: trained[name].bottom_.first * len(plan[0]) for name in holders if name not in gradients},
        shares={name: trained[name].bottom_.embed(np.arange(rows), learning=False) for name in holders},
        rows=plan[0],
        exchanges=len(sums),
        outputs=outputs,
        width=sums[0].size // len(plan[0]),
        gradients=gradients,
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


class _Noting(Linear):
    """A bottom that keeps the first gradient it was given."""

    first: Matrix | None = None

    def learn(self, gradient: Matrix) -> None:
        self.first = gradient if self.first is None else self.first
        super().learn(gradient)


def _trainer(
    x: pd.DataFrame, y: NDArray[Any] | None, modules: Mapping[str, Any]
) -> Callable[[Session], VerticalLinearModel | VerticalMLP]:
    return lambda session: _watched(estimator(session.agreement).set_params(**modules)).fit(x, y, session=session)


def _watched(model: VerticalLinearModel | VerticalMLP) -> Any:
    """The same estimator, which keeps what a feature holder is given: a network, the first gradient; else the residuals
    at the label holder, of which these gradients follow."""

    class Watched(type(model)):  # type: ignore[misc]
        def _problem(self, loss: Loss, targets: Matrix, weights: Vector) -> Problem:
            plain = super()._problem(loss, targets, weights)
            self.problem_ = _Watched(plain.loss, plain.y, plain.weights, plain.penalty, plain.fit_intercept)
            return self.problem_

        def _bottom(self, x: Matrix, randomness: Randomness = os.urandom) -> Linear | Deep:
            plain = super()._bottom(x, randomness)
            self.bottom_ = plain if isinstance(plain, Deep) else _Noting(x, plain.weights, self._rule)
            return self.bottom_

    return Watched(**model.get_params())


def _sent(link: MemoryLink, kind: type[Message]) -> list[Any]:
    """What went over a link in messages of this kind, an exchange each."""
    steps: dict[int, list[Any]] = {}
    for head, payload in link.sent:
        header = parse_header(head)
        if header.kind == kind.kind:
            message: Any = decode(header, payload, kind)
            steps.setdefault(message.exchange, []).append(message.data)
    return [np.concatenate(steps[step]) for step in sorted(steps)]


def _sums(recorded: Recorded, names: list[str], agreement: Agreement) -> list[Any]:
    """What the label holder has of the embeddings on the wire, step by step: their sum, or each one's side by side."""
    separate = agreement.network.merge == "concatenation"
    clear = SeparateEmbedding if separate else PartialEmbedding if len(names) == 2 else None
    sent = zip(*(_sent(recorded[name][names[0]], clear or MaskedEmbedding) for name in names[1:]), strict=True)
    if clear:
        return [np.hstack(one) if separate else one[0] for one in sent]
    sums = (np.sum(one, axis=0).astype(np.int64).astype(np.float64) for one in sent)
    return [np.ldexp(one, -agreement.encryption.embedding_bits) for one in sums]


def _over_the_same_rows(values: list[Any], plan: Sequence[Rows], n: int) -> Matrix:
    """Values (n, t) of rows: full ones side by side; those of mini-batches an epoch beside the other."""
    epochs: list[Matrix] = []
    times = np.zeros(n, np.int64)
    for one, batch in zip(values, plan, strict=False):  # a training may end before its plan, and embed no last time
        if times[batch[0]] == len(epochs):
            epochs.append(np.zeros((n, one.size // len(batch))))
        epochs[-1][batch] = one.reshape(len(batch), -1)
        times[batch] += 1
    return np.hstack(epochs) if epochs else np.empty((n, 0))
