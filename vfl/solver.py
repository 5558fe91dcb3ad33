"""What the solvers share: when to stop, what comes out, how long it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import LocalError, blame
from vfl.losses import Matrix, Vector
from vfl.search_messages import EpochEnd

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """When to stop: |gradient of F| (2-norm) at most `tolerance`; after `exchanges` encrypted gradients; or before the
    label holder has `embeddings` independent embeddings of the feature holders' columns."""

    tolerance: float
    exchanges: int
    embeddings: int


@dataclass(frozen=True)
class Result:
    """Our slice of the weights (d, m), and at the label holder the intercepts (m,); `objective` and `gradient_norm` are
    known to the label holder only (NaN elsewhere), so are the losses of `validation`, an epoch each."""

    weights: Matrix
    intercept: Vector
    exchanges: int
    converged: bool
    objective: float = np.nan
    gradient_norm: float = np.nan
    validation: tuple[float, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Mini-batches, the same at all parties: those of all epochs, `an_epoch` of them each; rows of `validation` (maybe
    none), embedded after every epoch; and after how many epochs without a loss smaller by `tolerance` to stop."""

    batches: Sequence[Rows]
    an_epoch: int
    validation: Rows
    patience: int
    tolerance: float

    def ends_epoch(self, done: int) -> bool:
        """Whether the batch after which `done` are done is an epoch's last."""
        return done % self.an_epoch == 0

    def step(self, done: int) -> int:
        """What the messages of the next batch are numbered, when `done` are done; a validation takes a number too."""
        return done + (done // self.an_epoch if len(self.validation) else 0)


@dataclass
class Patience:
    """When to stop early: after `patience` losses in a row of which none was below the least so far by more than
    `minimum_improvement`. Of a figure that is better when larger, give its negative.

    `losses`: so far. `improved`: whether the last one was; then its weights are the ones to keep.
    """

    patience: int
    minimum_improvement: float = 0.0
    losses: list[float] = field(default_factory=list, init=False)
    improved: bool = field(default=False, init=False)
    _stale: int = field(default=0, init=False)

    def should_stop(self, loss: float) -> bool:
        """To be called once for each loss, in order."""
        self.improved = loss < min(self.losses, default=math.inf) - self.minimum_improvement
        self._stale = 0 if self.improved else self._stale + 1
        self.losses.append(loss)
        return self._stale >= self.patience

    def resume(self, losses: Sequence[float]) -> None:
        """Go on where one stood that had seen these."""
        for loss in losses:
            self.should_stop(loss)


def verdict(channel: Channel, step: int) -> EpochEnd:
    """At a feature holder: what the label holder decides at the end of an epoch. Raises ProtocolViolation.

    Reveals:
        To the label holder: nothing; nothing is sent.
    """
    ended = channel.receive(EpochEnd)
    with blame(channel.peer):
        if ended.exchange != step:
            raise ValueError("the end of another epoch than is due")
    return ended


def check_finite(residual: Matrix, exchange: int) -> None:
    """Raises LocalError when training has exploded."""
    if not np.isfinite(residual).all():
        raise LocalError(f"the loss exploded in exchange {exchange + 1}; use a smaller learning_rate, or standardise")


def expected(first: float, now: float, exchange: int, limits: Limits) -> int:
    """How many exchanges it may take in all, for the progress bar: the gradient falls about geometrically."""
    if not 0 < limits.tolerance < now < first:
        return min(max(exchange + 2, 20), limits.exchanges)
    total = exchange * np.log(first / limits.tolerance) / np.log(first / now)
    return int(min(max(total + 1, exchange + 2), limits.exchanges))
