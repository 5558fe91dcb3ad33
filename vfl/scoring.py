"""A scoring session: aligned once, then request after request until the label holder ends it.

    G -> k   which rows, of those that G has not asked for before
    k -> G   X_k W_k of these rows, or what a network's bottom makes of them; masked where there are several k
             (a network that merges side by side: in clear)
    G        adds its own part, keeps the scores, and answers in the order asked

Under one model a row has one sum, so each row goes over the network once a session, and k refuses it a second time.
While G has nothing to ask, it says so now and then: both sides' deadlines go on running.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError, Refused, blame
from parties.session import Session
from vfl.estimator import VerticalLinearModel
from vfl.losses import Matrix, Vector
from vfl.neural_estimator import VerticalMLP
from vfl.scoring_messages import ROWS, ScoreRequest, request
from vfl.secure_sum import Contribution
from vfl.split import collect, contribute
from vfl.training import agree

Positions = Sequence[int] | NDArray[np.int64]


def serve(
    session: Session,
    model: VerticalLinearModel | VerticalMLP,
    X: Any,
    requests: Iterable[Positions | None],
) -> Iterator[Vector | Matrix]:
    """As the label holder, with X (n, d) of the common rows: for every request the scores that
    `model.decision_function` gives, or the outputs of a network's top, (rows,) or (rows, m), in the order asked. The
    session ends when `requests` does; take every answer.

    A request is positions 0 .. n-1 in the common order, as often and in any order, or -1 for a customer who is not
    common: nothing is sent of it, and its score is NaN. While there is nothing to score, `requests` yields None every
    second or so: a `requests` that blocks for longer than the agreement's deadline `stall` looks like a program that
    hangs. A peer that is lost while we are idle is noticed within twice the deadline `silence`.

    Reveals:
        To us: per row that we ask for, the sum over the feature holders of their partial embeddings; with one, or a
        network that merges side by side, each one's.
        That is one equation a row and output for each model scored with: several models over the same rows add up as
        exchanges of training do (docs/threats.md), and nothing here counts them.
        To a feature holder: which of the common rows are scored, and when each was first asked for; not the requests
        themselves. `decision_function` over all rows hides which ones matter.
    Raises:
        LocalError: a position beyond X, before anything of that request is sent. PeerLost, PeerAborted,
        ProtocolViolation: the session is over.
    """
    ours, merge, head = _embeddings(session, model, X), model.merge_of(session.agreement), model.head()
    rows, width = len(ours), head(np.zeros((1, merge.width))).shape[1]
    scores = np.full((rows + 1, width), np.nan)  # the last is of position -1
    number, spoken = count(), time.monotonic()
    deadlines = session.agreement.deadlines
    interval = min(deadlines.silence, deadlines.stall / 2, deadlines.message / 2)
    for asked in requests:
        if time.monotonic() - spoken >= interval:
            session.broadcast(request(next(number)))
            spoken = time.monotonic()
        if asked is None:
            continue
        wanted = _checked(asked, rows)
        new = np.unique(wanted[np.isnan(scores[wanted, 0]) & (wanted >= 0)])
        for start in range(0, len(new), ROWS):
            part, exchange = new[start : start + ROWS], next(number)
            session.broadcast(request(exchange, part))
            scores[part] = head(collect(session, merge, ours[part], exchange))
            spoken = time.monotonic()
        session.advance(rows - int(np.isnan(scores[:rows, 0]).sum()), rows)
        yield scores[wanted, 0] if width == 1 else scores[wanted]
    session.broadcast(request(next(number), last=True))


def answer(session: Session, model: VerticalLinearModel | VerticalMLP, X: Any, maximum_rows: int | None = None) -> int:
    """As a feature holder, with X (n, d), or what a network's `bottom` takes, of the common rows: answer until the
    label holder ends the session. How many rows were answered; more than `maximum_rows` (our policy) are refused.

    Reveals:
        To the label holder: per row that it asks for, our partial embedding, summed with the other feature holders';
        as the only one, our own. Each row once. To the other feature holders: a fresh key for the masks.
    Raises:
        Refused: more rows than our policy allows. ProtocolViolation: a row that does not exist or was answered before,
        a request out of turn. PeerLost: no sign of the label holder within the agreement's deadlines.
    """
    ours, merge = _embeddings(session, model, X), model.merge_of(session.agreement)
    contribution, answered = Contribution(session), np.zeros(len(ours), bool)
    label_holder = session.channels[session.label_holder]
    for number in count():
        asked = label_holder.receive(ScoreRequest)
        rows = asked.data
        with blame(label_holder.peer):
            if asked.number != number:
                raise ValueError(f"request {asked.number} where {number} is due")
            if len(rows) and rows[-1] >= len(ours):
                raise ValueError("a request for a row that is not common")
            if answered[rows].any():
                raise ValueError("a request for a row that was answered before")
        if asked.last:
            break
        if not len(rows):
            continue
        answered[rows] = True
        if maximum_rows is not None and answered.sum() > maximum_rows:
            raise Refused(f"{label_holder.peer} asks for more rows than our policy answers, {maximum_rows}")
        chosen = sha256(rows.astype("<u4").tobytes()).digest()
        contribute(session, merge, contribution, ours[rows], number, chosen)
        session.advance(int(answered.sum()), len(ours))
    return int(answered.sum())


def _embeddings(session: Session, model: VerticalLinearModel | VerticalMLP, X: Any) -> Matrix:
    """Our part of every row's score, once all parties agree that they serve the same model over as many rows."""
    x = model.inputs(X, session)
    agree(session, f"serve {model.training_}", {}, x.reshape(len(x), math.prod(x.shape[1:])))
    return model.embed(x)


def _checked(asked: Positions, rows: int) -> NDArray[np.int64]:
    positions = np.asarray(asked if len(asked) else np.empty(0, np.int64))
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise LocalError("a request is a list of positions in the common order, whole numbers")
    wrong = int(((positions < -1) | (positions >= rows)).sum())
    if wrong:
        raise LocalError(f"a request has {wrong} positions beyond the {rows} common rows; -1 says not common")
    return positions.astype(np.int64)
