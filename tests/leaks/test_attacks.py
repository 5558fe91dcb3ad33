"""The label and column attacks of the literature: they work on plain split learning and fail on the exchange.

Plain split learning is played here in numpy: a linear bottom at the feature holder, a small network at the label
holder, one gradient a row in clear. `open` is the same with Marvell's noise. What the encrypted exchange gives is
recorded from the protocol itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from parties.errors import LocalError
from tests.training import fit, kinds, sent, table
from vfl import subspace
from vfl.inputs import rank
from vfl.leakage.defences import marvell, max_norm, sum_kl_within
from vfl.leakage.labels import completion, directions, leak_auc, norms, residuals
from vfl.leakage.meter import Reading, gradient_leak, stop
from vfl.leakage.suite import audit_columns, audit_labels, audit_membership
from vfl.messages import MaskedEmbedding, OpenedGradient, PartialEmbedding, SealedResidual

BANK = Path(__file__).resolve().parents[3] / "shared/data/bank/bank-full.csv.gz"
EPOCHS, BATCH, RATE, WIDTH = 10, 512, 0.3, 8
Defence = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Split:
    """Rows to train on and to test on: the label holder's columns, the feature holder's columns, the labels."""

    own: tuple[np.ndarray, np.ndarray]
    x: tuple[np.ndarray, np.ndarray]
    y: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What the feature holder saw in each epoch, a gradient (n, k) a row; its embeddings; the AUC of the test rows."""

    epochs: list[np.ndarray]
    share: np.ndarray
    task_auc: float


def bank() -> Split:
    if not BANK.exists():
        pytest.skip("the bank marketing table is not here")
    joined = pd.read_csv(BANK, sep=";")
    y = (joined.pop("y") == "yes").to_numpy(float)

    def prepared(part: pd.DataFrame) -> np.ndarray:
        text = list(part.select_dtypes(exclude="number"))
        encoder = OneHotEncoder(drop="first", sparse_output=False)
        return StandardScaler().fit_transform(
            make_column_transformer((encoder, text), remainder="passthrough").fit_transform(part)
        )

    return parted(prepared(joined.iloc[:, :8]), prepared(joined.iloc[:, 8:]), y)


def synthetic() -> Split:
    """One label in ten, which the columns of both predict about as well as the bank's."""
    generator = np.random.default_rng(11)
    x = generator.normal(size=(20_000, 20))
    y = (generator.random(len(x)) < expit(1.3 * x[:, :2].sum(axis=1) + x[:, 8:12].sum(axis=1) - 4.3)).astype(float)
    return parted(x[:, :8], x[:, 8:], y)


def parted(own: np.ndarray, x: np.ndarray, y: np.ndarray) -> Split:
    cut: Any = train_test_split(own, x, y, test_size=0.2, random_state=1, stratify=y)
    return Split((cut[0], cut[1]), (cut[2], cut[3]), (cut[4], cut[5]))


def split_learning(data: Split, defence: Defence | None = None) -> Run:
    """Embeddings E = X B; scores = relu([E, X0] H + h) t + c; the gradient dL/dE of every row goes to the bottom."""
    generator = np.random.default_rng(0)
    own, x, y = data.own[0], data.x[0], data.y[0]
    inputs = WIDTH + own.shape[1]
    bottom = generator.normal(size=(x.shape[1], WIDTH)) / np.sqrt(x.shape[1])
    hidden, bias = generator.normal(size=(inputs, 16)) / np.sqrt(inputs), np.zeros(16)
    top, constant = generator.normal(size=16) / 40, np.log(y.mean() / (1 - y.mean()))
    epochs = []
    for _ in range(EPOCHS):
        seen = np.zeros((len(y), WIDTH))
        for rows in np.array_split(generator.permutation(len(y)), len(y) // BATCH):
            both = np.hstack([x[rows] @ bottom, own[rows]])
            active = np.maximum(both @ hidden + bias, 0)
            residual = expit(active @ top + constant) - y[rows]
            back = np.outer(residual, top) * (active > 0)
            gradients = back @ hidden[:WIDTH].T
            seen[rows] = gradients if defence is None else defence(gradients, y[rows])
            hidden -= RATE * both.T @ back / len(rows)
            bias -= RATE * back.mean(axis=0)
            top -= RATE * active.T @ residual / len(rows)
            constant -= RATE * residual.mean()
            bottom -= RATE * x[rows].T @ seen[rows] / len(rows)
        epochs.append(seen)
    test = np.maximum(np.hstack([data.x[1] @ bottom, data.own[1]]) @ hidden + bias, 0) @ top + constant
    return Run(epochs, x @ bottom, float(roc_auc_score(data.y[1], test)))


@pytest.fixture(scope="module", params=[synthetic, bank], ids=["synthetic", "bank"])
def data(request) -> Split:
    return request.param()


@pytest.fixture(scope="module")
def plain(data) -> Run:
    return split_learning(data)


def attacked(gradients: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """AUC of the norm attack, and of the direction attack with ten known positives."""
    known = np.flatnonzero(y == 1)[:10]
    rest = np.setdiff1d(np.arange(len(y)), known)
    return (
        leak_auc(norms(gradients[rest]), y[rest]),
        leak_auc(directions(gradients[rest], gradients[known]), y[rest]),
    )


# Labels, from gradients


def test_plain_split_learning_gives_labels_away_by_norm_and_direction(data, plain):
    norm, direction = attacked(plain.epochs[-1], data.y[0])
    assert norm > 0.9
    assert direction > 0.9
    assert gradient_leak(plain.epochs[-1], data.y[0]) > 0.9
    halted = stop(
        Reading({}, {}, gradient_leak(plain.epochs[0], data.y[0])), width=1, allow_reconstruction=True, leak_limit=0.7
    )
    assert halted is not None  # the meter stops it after the first epoch


def test_open_with_marvell_hides_labels_even_over_all_epochs_at_little_loss(data, plain):
    """The noise of an epoch is such that all epochs together stay within an AUC of 0.7."""
    random = np.random.default_rng(7).bytes
    allowed = sum_kl_within(0.7, EPOCHS)
    run = split_learning(data, lambda gradients, y: marvell(gradients, y, allowed, random))
    for seen in (*run.epochs, np.mean(run.epochs, axis=0)):
        norm, direction = attacked(seen, data.y[0])
        assert norm < 0.6
        assert direction < 0.7
        assert gradient_leak(seen, data.y[0]) < 0.7
    assert plain.task_auc - run.task_auc < 0.02


def test_open_with_max_norm_hides_the_norm_and_not_all_of_the_direction(data, plain):
    """Noise along the gradient itself leaves its line, and more often than not its sign: prefer Marvell."""
    random = np.random.default_rng(7).bytes
    run = split_learning(data, lambda gradients, y: max_norm(gradients, random))
    assert max(attacked(seen, data.y[0])[0] for seen in run.epochs) < 0.6
    assert 0.6 < max(gradient_leak(seen, data.y[0]) for seen in run.epochs) < 0.8
    assert plain.task_auc - run.task_auc < 0.02


def test_not_caught_noise_that_is_drawn_afresh_averages_out_over_epochs(data):
    """Why the noise must be shared out over the epochs: 0.7 in each of them is more in all."""
    random = np.random.default_rng(7).bytes
    run = split_learning(data, lambda gradients, y: marvell(gradients, y, sum_kl_within(0.7), random))
    assert max(gradient_leak(seen, data.y[0]) for seen in run.epochs) < 0.7
    assert gradient_leak(np.mean(run.epochs, axis=0), data.y[0]) > 0.7


def test_an_aggregate_gradient_has_nothing_per_row_and_tells_no_more_than_any_model(data):
    own, x, y = (part[0][:8000] for part in (data.own, data.x, data.y))
    alone = LogisticRegression(max_iter=1000).fit(own, y)  # where the exchange begins
    aggregate = x.T @ (expit(alone.decision_function(own)) - y)
    findings = audit_labels(x, y, np.arange(40), aggregates=aggregate[:, None])
    assert {finding.attack: finding.value for finding in findings[:3]} == {
        "gradient norm": 0.5,
        "gradient direction": 0.5,
        "gradient spectrum": 0.5,
    }
    assert findings[3].attack == "solved residuals"
    assert findings[3].value < findings[3].baseline + 0.01
    against_chance = np.random.default_rng(5).permutation(y)  # residuals that the columns do not explain
    told = -residuals(x, (x.T @ (y.mean() - against_chance))[:, None])[:, 0]
    assert abs(leak_auc(told, against_chance) - 0.5) < 0.05


def test_what_the_feature_holder_is_sent_is_ciphertext_a_row_and_a_sum_an_exchange(secret, monkeypatch):
    parts, y = table(2, 300)
    opened: list[np.ndarray] = []
    honest = subspace.weigh_gradient

    def weigh(*arguments: Any) -> np.ndarray:
        opened.append(honest(*arguments))
        return opened[-1]

    monkeypatch.setattr(subspace, "weigh_gradient", weigh)
    recorded: Any = {}
    ended = fit(parts, y, secret, params={"max_iter": 3}, policy={"allow_reconstruction": True}, recorded=recorded)
    x = parts["grocer"].to_numpy()
    assert [gradient.size for gradient in opened] == [x.shape[1]] * 3
    assert set(kinds(recorded, "bank", "grocer")) == {
        "Hello",
        "Plan",
        "SchemeKey",
        "SealedResidual",
        "OpenedGradient",
        "Direction",
        "Weights",
        "Closing",
    }
    assert all(len(message.data) == 1 for message in sent(recorded, "bank", "grocer", OpenedGradient))
    for message in sent(recorded, "bank", "grocer", SealedResidual):
        per_row = message.data.view(np.uint8).reshape(len(y), -1).astype(float) - 127.5
        known = np.flatnonzero(y == 1)[:10]
        rest = np.setdiff1d(np.arange(len(y)), known)
        for scores in (norms(per_row[rest]), directions(per_row[rest], per_row[known])):
            assert 0.3 < leak_auc(scores, y[rest]) < 0.7  # 5.9 deviations
    findings = audit_labels(x, y.astype(float), np.arange(40), aggregates=np.column_stack(opened))
    assert [finding.value for finding in findings[:3]] == [0.5] * 3
    assert all(finding.passed for finding in findings)
    assert ended["bank"].n_iter_ == 3


def test_rows_fewer_than_columns_would_give_every_label_and_are_refused(secret):
    parts, y = table(2, 30, widths=(2, 31))
    x = parts["grocer"].to_numpy()
    told = -residuals(x, (x.T @ (0.5 - y))[:, None])[:, 0]
    assert leak_auc(told, y) == 1.0
    ended = fit(parts, y, secret, params={"max_iter": 1})
    assert isinstance(ended["grocer"], LocalError)
    assert "the gradient would determine every row's residual" in str(ended["grocer"])


# Labels, from a trained share


def test_not_caught_a_trained_share_predicts_as_well_as_any_model_of_its_columns(data):
    """With 40 labels a feature holder uses what training gave it: by design its weights predict, protected or not."""
    own, x, y = (part[0][:8000] for part in (data.own, data.x, data.y))
    joint = LogisticRegression(max_iter=1000).fit(np.hstack([own, x]), y)
    share = x @ joint.coef_[0, own.shape[1] :]
    known = np.concatenate([np.flatnonzero(y == label)[:20] for label in (0, 1)])
    completed, clustered = audit_labels(x, y, known, share=share[:, None])
    assert completed.value > completed.baseline + 0.02  # better than 40 rows of its own columns
    assert completed.passed  # not better than a model of these columns on rows it has not seen
    assert clustered.passed
    unseen = data.x[1] @ joint.coef_[0, own.shape[1] :]
    both = np.concatenate([share[known], unseen])[:, None]
    there = completion(both, np.arange(len(known)), y[known])[len(known) :]
    assert abs(completed.value - leak_auc(there, data.y[1])) < 0.03  # rows trained on do not stand out


# Columns and membership


def test_the_span_gives_the_columns_from_their_rank_on_and_the_stop_rule_fires_before(secret):
    parts, y = table(2, 100, widths=(2, 10))
    x, recorded = parts["grocer"].to_numpy(), {}
    params, consent = {"max_iter": 12, "tol": 1e-12}, {"allow_reconstruction": True}
    fit(parts, y, secret, params=params, policy=consent, recorded=recorded)
    seen = np.column_stack([message.data for message in sent(recorded, "grocer", "bank", PartialEmbedding)])
    known, columns = np.arange(30), rank(x)
    for disclosed in range(1, columns + 1):
        findings = audit_columns(x, seen[:, :disclosed], known)
        assert all(finding.value > 1 - 1e-6 for finding in findings) == (disclosed >= columns)
    rule = [
        stop(Reading({"grocer": t}, {"grocer": columns}), width=1, allow_reconstruction=False, leak_limit=1.0)
        for t in range(columns)
    ]
    allowed = [halted is not None for halted in rule].index(True)
    assert allowed == columns - 1
    recorded = {}
    fit(parts, y, secret, params=params, recorded=recorded)
    assert len(sent(recorded, "grocer", "bank", PartialEmbedding)) == allowed  # the protocol keeps the same rule


def test_one_masked_embedding_tells_nothing_of_one_feature_holders_columns(secret):
    parts, y = table(3, 400)
    recorded: Any = {}
    fit(parts, y, secret, params={"max_iter": 4}, recorded=recorded)
    known = np.arange(100)
    for name in ("grocer", "mobile"):
        x = parts[name].to_numpy()
        masked = [message.data for message in sent(recorded, name, "bank", MaskedEmbedding)]
        seen = np.column_stack(masked).astype(np.int64) / 2.0**63
        for finding in audit_columns(x, seen, known):
            assert finding.value < 0.15
        plain = x @ np.random.default_rng(1).normal(size=(x.shape[1], x.shape[1]))
        assert not any(finding.passed for finding in audit_columns(x, plain, known))


def test_membership_shows_where_rows_are_given_and_not_from_the_size():
    common = np.random.default_rng(1).random(500) < 0.3
    assert audit_membership(common, common.astype(float)).value == pytest.approx(common.mean())
    assert audit_membership(common, np.full(500, common.mean())).passed
