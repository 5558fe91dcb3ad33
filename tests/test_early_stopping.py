"""Mini-batches that stop early: the weights of the best epoch, as a plain loop over the joined table finds them; and
rows that are held out count among the embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from parties.errors import LocalError, PeerAborted, ProtocolViolation
from parties.memory import make_agreement
from tests.training import altering, fit, sent, table, with_fields
from vfl import sgd
from vfl.messages import MaskedEmbedding, PartialEmbedding
from vfl.search_messages import EpochEnd

ROWS, HELD, SEED = 120, 40, 3
PARAMS: dict[str, Any] = {
    "solver": "sgd",
    "C": 2.0,
    "epochs": 30,
    "batch_size": 40,
    "learning_rate": 2.0,
    "early_stopping": True,
    "validation_fraction": 1 / 3,
    "n_iter_no_change": 3,
    "tol": 1e-3,
    "random_state": SEED,
}
CONSENT = {"allow_reconstruction": True, "max_exchanges": 200}


def plain_loop(parts: Any, y: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Weights, the intercept last, of the best epoch, and all validation losses: from the definitions, in numpy."""
    order = np.random.default_rng([SEED, 1]).permutation(ROWS)
    held, rest = order[:HELD], np.sort(order[HELD:])
    bank = parts["bank"].to_numpy()
    C = 2.0 * ROWS / len(rest)  # the penalty is that of all rows
    alone = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12).fit(bank[rest], y[rest])
    x = np.hstack([bank, *(np.rint(parts[name] * 2**20) / 2**20 for name in list(parts)[1:]), np.ones((ROWS, 1))])
    weights = np.zeros(x.shape[1])
    weights[: bank.shape[1]], weights[-1] = alone.coef_[0], alone.intercept_[0]
    penalty = np.append(np.full(x.shape[1] - 1, 1 / (2.0 * ROWS)), 0.0)
    best, losses, stale = weights, [], 0
    for batches in np.reshape(sgd.batches(len(rest), 40, 30, SEED), (30, 2, 40)):
        for rows in rest[batches]:
            residual = expit(x[rows] @ weights) - y[rows]
            weights = weights - 2.0 * (x[rows].T @ residual / len(rows) + penalty * weights)
        scores = x[held] @ weights
        loss = float(np.mean(np.logaddexp(0, np.where(y[held] == 1, -scores, scores))))
        better = loss < min(losses, default=np.inf) - 1e-3
        losses.append(loss)
        best, stale = (weights, 0) if better else (best, stale + 1)
        if stale == 3:
            break
    return best, losses


@pytest.mark.parametrize("parties", [2, 3])
def test_it_stops_where_a_plain_loop_does_with_the_weights_of_the_best_epoch(secret, parties):
    parts, y = table(parties, ROWS)
    recorded: Any = {}
    ended = fit(parts, y, secret, params=PARAMS, policy=CONSENT, recorded=recorded)
    weights, losses = plain_loop(parts, y)
    assert 3 < len(losses) < 30 and int(np.argmin(losses)) != len(losses) - 1
    bank = ended["bank"]
    np.testing.assert_allclose(bank.validation_losses_, losses, atol=1e-5)
    np.testing.assert_allclose(np.hstack([model.coef_[0] for model in ended.values()]), weights[:-1], atol=1e-5)
    assert bank.intercept_[0] == pytest.approx(weights[-1], abs=1e-5)
    assert {(model.n_iter_, model.converged_) for model in ended.values()} == {(2 * len(losses), True)}
    assert ended["grocer"].validation_losses_ == []  # the label holder's alone

    kind = PartialEmbedding if parties == 2 else MaskedEmbedding
    sizes = [len(one.data) for one in sent(recorded, "grocer", "bank", kind)]
    assert sizes == [40, 40, HELD] * len(losses)
    for model in ended.values():  # every row once an epoch, one that is held out too
        (reading,) = model.readings_
        assert set(reading.disclosed.values()) == {len(losses)}


def test_rows_that_are_held_out_count_against_the_limit(secret):
    """Six independent columns: four epochs and the scoring after them, in each of which every row is embedded once."""
    parts, y = table(2, ROWS, widths=(2, 6))
    slow = PARAMS | {"learning_rate": 0.01, "tol": 1e-9}
    ended = fit(parts, y, secret, params=slow, policy={"max_exchanges": 200})
    assert {len(ended["bank"].validation_losses_), ended["grocer"].n_iter_ // 2} == {4}
    assert not ended["bank"].converged_
    assert ended["bank"].readings_[-1].disclosed == {"grocer": 4}


@pytest.mark.parametrize("change", [{"exchange": 7}, {"exchange": 0}])
def test_a_label_holder_that_ends_another_epoch_is_named(secret, change):
    parts, y = table(2, ROWS)
    tamper = altering("bank", "grocer", EpochEnd, with_fields(**change))
    ended = fit(parts, y, secret, params=PARAMS | {"epochs": 2}, policy=CONSENT, tamper=tamper)
    assert isinstance(ended["grocer"], ProtocolViolation) and ended["grocer"].peer == "bank"


def test_a_class_that_is_held_out_altogether_is_refused_before_anything_is_sent(secret):
    parts, _ = table(2, ROWS)
    y = np.zeros(ROWS)
    y[np.random.default_rng([SEED, 1]).permutation(ROWS)[:5]] = 1
    ended = fit(parts, y, secret, params=PARAMS, policy=CONSENT)
    assert isinstance(ended["bank"], LocalError) and "held out" in str(ended["bank"])
    assert isinstance(ended["grocer"], PeerAborted)


@pytest.mark.parametrize(
    ("params", "text"), [({"solver": "subspace"}, "sgd"), ({"validation_fraction": 1.0}, "between 0 and 1")]
)
def test_what_cannot_stop_early_is_refused(secret, params, text):
    parts, y = table(2, ROWS)
    ended = fit(parts, y, secret, params=PARAMS | params)
    assert isinstance(ended["bank"], LocalError) and text in str(ended["bank"])


def test_an_agreement_says_it_for_the_solver_that_can(identities):
    two = {name: identities[name] for name in ("bank", "grocer")}
    assert make_agreement(two, model={"solver": "sgd", "early_stopping": True}).model.early_stopping
    for model in ({}, {"kind": "network classifier", "solver": "sgd"}):
        with pytest.raises(ValueError, match="early_stopping"):
            make_agreement(two, model=model | {"early_stopping": True})
