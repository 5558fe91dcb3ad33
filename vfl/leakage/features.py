"""Attacks on columns, at the label holder, from embeddings X p; and what an intersection tells of a party's own rows.

Embeddings are linear maps of the columns behind them, so all that counts is their span: once it holds a column, as many
known rows as there are embeddings rebuild that column everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfl.losses import Matrix, Vector


def explained(x: Matrix, guess: Matrix) -> Vector:
    """Per column, the share (d,) of the variance of x (n, d) that a guess gets right: 1 all, 0 no more than the mean.

    A constant column has nothing to guess: 0.
    """
    missed, spread = np.square(x - guess).sum(axis=0), np.square(x - x.mean(axis=0)).sum(axis=0)
    out: Vector = np.maximum(1 - np.divide(missed, spread, where=spread > 0, out=np.ones_like(spread)), 0)
    return out


def spanned(seen: Matrix, x: Matrix) -> Vector:
    """Per column, the share (d,) of the variance of x (n, d) in the span of what was seen (n, t).

    1 from rank(x) independent embeddings on. The most that a linear attack can reach, whatever rows it knows; it takes
    x, so that only its owner can tell.
    """
    return rebuilt_from(seen, np.arange(len(x)), x)


def rebuilt_from(seen: Matrix, known: NDArray[np.intp], x: Matrix) -> Vector:
    """Per column, the share (d,) of the variance of x (n, d) that the label holder rebuilds from `known` rows of x.

    The attack is least squares from what was seen (n, t) to these rows; it is judged on all others, if there are any.
    """
    with_one = np.column_stack([seen, np.ones(len(seen))])
    guess = with_one @ np.linalg.lstsq(with_one[known], x[known], rcond=None)[0]
    others = np.setdiff1d(np.arange(len(x)), known)
    judged = others if len(others) else known
    return explained(x[judged], guess[judged])


def membership(common: NDArray[np.bool_], told: Vector) -> float:
    """How many more of its own rows a party places right, in common or not, than from the number in common alone.

    common (n,): the truth; told (n,): what the party learnt of each row, from 0 to 1. The result is a share of n: 0
    where it learnt the size only; 1 - max(s, 1 - s), s the share in common, where it learnt which rows these are.
    """
    right, inside = int(((told > 0.5) == common).sum()), int(common.sum())
    return (right - max(inside, len(common) - inside)) / len(common)
