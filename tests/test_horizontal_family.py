"""The rest of the family through whole jobs, against plain numpy: dropout, fine-tuning, who is asked in a round."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from parties.horizontal import Clients, Horizontal
from vfl.horizontal.federated import train
from vfl.horizontal.local import Correction, Plan, Trained
from vfl.horizontal.models import Score
from vfl.horizontal.round_messages import Task
from vfl.horizontal.rounds import Collected, Leader, Server, lead
from vfl.horizontal.settings import TAIL, Job, Schema, Spending
from vfl.horizontal.trainer import Data

COLUMNS, ROWS = 6, (40, 90, 150)
RATE, EPOCHS, C = 0.5, 2, 2.0


def parts() -> dict[str, Data]:
    """Three clients of unequal size."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)[:, :COLUMNS]
    names = tuple(f"x{place}" for place in range(COLUMNS))
    cuts = np.cumsum((0, *ROWS))
    return {f"c{i}": Data(x[a:b], y[a:b], names, (0, 1)) for i, (a, b) in enumerate(itertools.pairwise(cuts))}


def family(**given: Any) -> Horizontal:
    return Horizontal(strategy="fedavg", rate=RATE, epochs=EPOCHS, batch=0, C=C, **given)


def descend(weights: np.ndarray, data: Data, epochs: int) -> np.ndarray:
    """Logistic regression by gradient descent on all rows; the intercept is last and not penalised."""
    for _ in range(epochs):
        chances = 1 / (1 + np.exp(-(data.x @ weights[:-1] + weights[-1])))
        gap = chances - data.y
        gradient = np.append(gap @ data.x, gap.sum()) / len(data.y)
        gradient[:-1] += weights[:-1] / (C * sum(ROWS))
        weights = weights - RATE * gradient
    return weights


class Descent:
    """An own model in plain numpy."""

    corrects = False

    def __init__(self, data: Data) -> None:
        self.data, self.rows, self.weights = data, len(data.y), np.zeros(COLUMNS + 1)

    def get(self) -> np.ndarray:
        return self.weights

    def set(self, weights: np.ndarray) -> None:
        self.weights = weights.copy()

    def fit_local(self, plan: Plan, correction: Correction, seed: Any) -> Trained:
        self.weights = descend(self.weights, self.data, plan.epochs)
        return Trained(self.weights, self.rows)

    def evaluate(self) -> Score:
        return Score(self.rows, 0.0)


@pytest.mark.parametrize("secure", ["on", "none"])
def test_federated_dropout(secure: Any) -> None:
    """Caldas et al. 2018: every round all clients train the same smaller model; the columns left out stay."""
    outcome = train(parts(), family(keep=0.5, rounds=6, seed=4, secure_aggregation=secure))
    weights, seen = np.zeros(COLUMNS + 1), set()
    for number in range(6):
        some = np.sort(np.random.default_rng((4, number)).permutation(COLUMNS)[: COLUMNS // 2])
        seen |= set(some)
        travels = np.append(some, COLUMNS)
        ends = []
        for data in parts().values():
            small = Data(data.x[:, some], data.y, tuple(data.names[place] for place in some))
            ends.append(descend(weights[travels], small, EPOCHS))
        weights[travels] = np.average(ends, axis=0, weights=ROWS)
    assert seen == set(range(COLUMNS))
    np.testing.assert_allclose(outcome.weights, weights, rtol=0, atol=1e-8)
    assert outcome.rounds[0].bytes == 3 * 8 * (COLUMNS // 2 + 1 + 1 + 4)  # weights, intercept, rows, the score


@pytest.mark.parametrize("secure", ["on", "none"])
def test_fine_tuning(secure: Any) -> None:
    """Epochs of each client's own after the last round; the server's weights are without them."""
    weights = np.zeros(COLUMNS + 1)
    for _ in range(3):
        weights = np.average([descend(weights, data, EPOCHS) for data in parts().values()], axis=0, weights=ROWS)
    tuned = [descend(weights, data, 5) for data in parts().values()]
    models = {name: Descent(data) for name, data in parts().items()}
    agreed = {"rounds": 3, "epochs": EPOCHS, "fine_tune": 5, "secure_aggregation": secure}
    outcome = train(models, Horizontal(model="own", strategy="fedavg", **agreed), start=np.zeros(COLUMNS + 1))
    np.testing.assert_allclose(outcome.weights, weights, rtol=0, atol=1e-8)
    np.testing.assert_allclose([model.weights for model in models.values()], tuned, rtol=0, atol=1e-7)
    linear = train(parts(), family(rounds=3, fine_tune=5, secure_aggregation=secure))
    np.testing.assert_allclose(linear.weights, weights, rtol=0, atol=1e-8)


# ---- who is asked


class Crowd:
    """Clients that answer every task within the seconds given; None: never."""

    def __init__(self, seconds: dict[str, float | None], length: int) -> None:
        self.seconds, self.length, self.asked = seconds, length, []

    def collect(self, task: Task, names: Sequence[str]) -> Collected:
        if task.stage == "rows":
            return Collected(np.array([100.0]), tuple(names))
        self.asked.append(set(names))
        known = {name: took for name in names if (took := self.seconds[name]) is not None}
        total = np.zeros(self.length)
        total[-TAIL - 1] = 1.0  # a row that changes nothing
        return Collected(total, tuple(known), seconds=known)

    def confirm(self, collected: Collected) -> None: ...

    def scores(self, task: Task) -> dict[str, Score]:
        return {}

    def finish(self, task: Task) -> None: ...


def test_the_fastest_are_asked_once_all_are_known_and_who_does_not_answer_is_the_slowest() -> None:
    clients = Clients(fraction=0.5, selection="speed")
    settings = Horizontal(strategy="fedavg", rounds=4, clients=clients, classes=(0, 1))
    job = Job(settings, Schema(model="logistic", columns=("a", "b"), classes=(0, 1)), 6)
    seconds = {"c0": 3.0, "c1": None, "c2": 1.0, "c3": 4.0, "c4": 2.0, "c5": 5.0}
    crowd = Crowd(seconds, job.length("train", 0))
    lead(Leader(job, tuple(seconds), crowd, Server(job)), Spending(job))
    assert crowd.asked == [{"c0", "c1", "c2"}, {"c3", "c4", "c5"}, {"c0", "c2", "c4"}, {"c0", "c2", "c4"}]


def test_clients_are_asked_as_often_as_they_have_rows() -> None:
    """One of four a round: a share of the rounds like its share of the rows, within four standard deviations."""
    rows, rounds = np.array([10, 20, 30, 140]), 4000
    settings = Horizontal(clients=Clients(fraction=0.25, selection="rows"))
    job = Job(settings, Schema(model="logistic", columns=("a",), classes=(0, 1)), 4)
    chosen = np.array([job.choose(number, rows.tolist(), []) for number in range(rounds)])
    assert chosen.shape == (rounds, 1)
    share = rows / rows.sum()
    gap = np.bincount(chosen[:, 0], minlength=4) / rounds - share
    assert (np.abs(gap) < 4 * np.sqrt(share * (1 - share) / rounds)).all()


def test_a_fraction_is_asked_at_random_but_never_fewer_than_the_minimum() -> None:
    schema = Schema(model="logistic", columns=("a",), classes=(0, 1))
    for fraction, minimum, asked in ((0.25, 1, 3), (0.25, 5, 5), (1.0, 1, 10), (0.01, 20, 10)):
        job = Job(Horizontal(clients=Clients(fraction=fraction, minimum=minimum)), schema, 10)
        rounds = [job.choose(number, [], []) for number in range(200)]
        assert all(len(set(one)) == asked and one == sorted(one) for one in rounds)
        assert {name for one in rounds for name in one} == set(range(10))
