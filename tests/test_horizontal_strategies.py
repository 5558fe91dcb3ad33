"""Every strategy against plain numpy written from its paper's algorithm box; the local solver against its formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.special import expit
from sklearn.datasets import load_wine
from sklearn.metrics import log_loss, mean_poisson_deviance
from sklearn.preprocessing import StandardScaler

from parties.errors import LocalError
from vfl.horizontal.local import Correction, Objective, Plan, train
from vfl.horizontal.partition import Partition
from vfl.horizontal.strategies import (
    STRATEGIES,
    Part,
    Population,
    broadcast,
    client_round,
    kept,
    server_round,
    strategy,
)

RATE, STEPS, PENALTY = 0.3, 3, 0.05
PLAN = Plan(epochs=STEPS, batch=0, rate=RATE)
MODEL = Objective("logistic", 3, penalty=PENALTY)


def clients(rows=(5, 9, 2, 7), seed=0):
    generator = np.random.default_rng(seed)
    return [
        (generator.normal(size=(n, 3)) + k, (generator.random(n) < 0.2 + 0.2 * k) * 1.0) for k, n in enumerate(rows)
    ]


def slope(w, x, y):
    """The gradient of mean log loss + penalty / 2 |coef|^2."""
    residual = expit(x @ w[:3] + w[3]) - y
    return np.append(x.T @ residual / len(y) + PENALTY * w[:3], residual.mean())


def descend(w, x, y, extra=lambda w: 0.0, scale=1.0):
    for _ in range(STEPS):
        w = w - RATE * (scale * slope(w, x, y) + extra(w))
    return w


def run(chosen, data, rounds, plan=PLAN, model=MODEL, part=None, present=None, start=None):
    """Server weights after every round, and what the clients sent last; `present` says who takes part in a round."""
    part = part or Part.whole(model.size)
    population = Population(len(data), sum(len(y) for _, y in data))
    server = chosen.server(np.zeros(model.size) if start is None else start)
    states, own = [chosen.client(model.size)] * len(data), [np.zeros(model.size)] * len(data)
    history, messages = [], []
    for number in range(rounds):
        received, messages = broadcast(chosen, part, server), []
        for k in present[number] if present else range(len(data)):
            x, y = data[k]

            def fit(start, correction, x=x, y=y, k=k, number=number):
                return train(model, x, y, start, chosen.plan(plan), correction, (7, number, k))

            message, states[k], trained = client_round(
                chosen, part, received, own[k], states[k], population.share(len(y)), fit
            )
            own[k] = trained.weights
            messages.append(message)
        server = server_round(chosen, part, server, np.sum(messages, axis=0), population)
        history.append(server["weights"])
    return history, messages, own


def mean_change(w, data, **how):
    rows = [len(y) for _, y in data]
    return np.average([descend(w, x, y, **how) - w for x, y in data], axis=0, weights=rows)


def reference_averaging(data, rounds, step, mu=0.0):
    w, state, out = np.zeros(4), {}, []
    for _ in range(rounds):
        anchor = w
        w = step(w, mean_change(w, data, extra=lambda v, anchor=anchor: mu * (v - anchor)), state)
        out.append(w)
    return out


def momentum(w, mean, state):
    state["v"] = 0.8 * state.get("v", 0) + mean
    return w + 0.7 * state["v"]


def adaptive(rule):
    def step(w, mean, state):
        b1, b2, tau = (0.0 if rule == "adagrad" else 0.6), 0.9, 0.01
        m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * mean
        v = state.get("v", np.full(4, tau**2))
        v = {
            "adagrad": v + mean**2,
            "adam": b2 * v + (1 - b2) * mean**2,
            "yogi": v - (1 - b2) * mean**2 * np.sign(v - mean**2),
        }[rule]
        state["v"] = v
        return w + 0.2 * m / (np.sqrt(v) + tau)

    return step


ADAPTIVE = {"rate": 0.2, "beta1": 0.6, "beta2": 0.9, "tau": 0.01}


@pytest.mark.parametrize(
    ("name", "parameters", "step", "mu"),
    [
        ("fedavg", {}, lambda w, mean, _: w + mean, 0.0),
        ("fedavgm", {"rate": 0.7, "momentum": 0.8}, momentum, 0.0),
        ("fedadagrad", {"rate": 0.2, "tau": 0.01}, adaptive("adagrad"), 0.0),
        ("fedadam", ADAPTIVE, adaptive("adam"), 0.0),
        ("fedyogi", ADAPTIVE, adaptive("yogi"), 0.0),
        ("fedprox", {"mu": 0.6}, lambda w, mean, _: w + mean, 0.6),
    ],
)
def test_the_averaging_family(name, parameters, step, mu):
    got, _, _ = run(strategy(name, parameters), clients(), 3)
    np.testing.assert_allclose(got, reference_averaging(clients(), 3, step, mu), rtol=0, atol=1e-12)


PRESENT = [[0, 1, 2, 3], [1, 3], [0, 2, 3]]


def test_feddyn():
    """Acar et al. 2021, algorithm 1, with clients absent in some rounds."""
    data, alpha = clients((6, 6, 6, 6)), 0.4
    w, h, gradients, expected = np.zeros(4), np.zeros(4), np.zeros((4, 4)), []
    for present in PRESENT:
        ends = {}
        for k in present:
            ends[k] = descend(w, *data[k], extra=lambda v, k=k, w=w: -gradients[k] + alpha * (v - w))
            gradients[k] -= alpha * (ends[k] - w)
        h = h - alpha / 4 * sum(end - w for end in ends.values())
        w = np.mean(list(ends.values()), axis=0) - h / alpha
        expected.append(w)
    got, _, _ = run(strategy("feddyn", {"alpha": alpha}), data, 3, present=PRESENT)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_feddyn_weights_unequal_clients_by_their_rows():
    """The paper's algorithm on share F instead of F; a client above the mean divides its loss by its share."""
    data, alpha = clients(), 0.4
    w, h, gradients, expected = np.zeros(4), np.zeros(4), np.zeros((4, 4)), []
    for _ in range(3):
        ends = []
        for k, (x, y) in enumerate(data):
            share = len(y) / np.mean([len(y) for _, y in data])
            much = max(share, 1.0)
            end = descend(w, x, y, lambda v, k=k, w=w, m=much: (alpha * (v - w) - gradients[k]) / m, share / much)
            gradients[k] -= alpha * (end - w)
            ends.append(end)
        h = h - alpha * (np.mean(ends, axis=0) - w)
        w = np.mean(ends, axis=0) - h / alpha
        expected.append(w)
    got, _, _ = run(strategy("feddyn", {"alpha": alpha}), data, 3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [(6, 6, 6, 6), (5, 9, 2, 7)])
def test_scaffold(rows):
    """Karimireddy et al. 2020, algorithm 1, option II, clients absent in some rounds; unequal ones count by rows."""
    data = clients(rows)
    w, c, controls, expected = np.zeros(4), np.zeros(4), np.zeros((4, 4)), []
    for present in PRESENT:
        moved, changed, old = [], [], c
        for k in present:
            end = descend(w, *data[k], extra=lambda v, k=k, c=old: c - controls[k])
            new = controls[k] - old + (w - end) / (STEPS * RATE)
            moved.append(end - w)
            changed.append(new - controls[k])
            controls[k] = new
        weights = [rows[k] for k in present]
        w = w + 0.9 * np.average(moved, axis=0, weights=weights)
        c = c + np.sum(weights) / np.sum(rows) * np.average(changed, axis=0, weights=weights)
        expected.append(w)
    got, _, _ = run(strategy("scaffold", {"rate": 0.9}), data, 3, present=PRESENT)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fedsgd", "fedavg"])
def test_gradient_descent_on_all_rows(name):
    """FedSGD, and FedAvg with one full-batch step, with every client present."""
    data, plan = clients(), Plan(1, 0, RATE)
    x, y = (np.concatenate(part) for part in zip(*data, strict=True))
    w, expected = np.zeros(4), []
    for _ in range(25):
        w = w - RATE * slope(w, x, y)
        expected.append(w)
    chosen = strategy(name, {"rate": RATE} if name == "fedsgd" else {})
    got, _, _ = run(chosen, data, 25, plan)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("skew", ["labels:1", "dirichlet:0.1"])
def test_feddyn_and_scaffold_beat_fedavg_under_label_skew(skew):
    x, y = load_wine(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    data = [(x[rows], y[rows]) for rows in Partition.parse(skew).deal(y, 6, seed=3)]
    model = Objective("multinomial", 13, 3, penalty=1 / len(y))
    plan = Plan(10, 16, 0.1)
    losses = {
        name: model.value(run(strategy(name), data, 20, plan, model)[0][-1], x, y)
        for name in ("fedavg", "feddyn", "scaffold")
    }
    assert losses["feddyn"] < losses["fedavg"]
    assert losses["scaffold"] < losses["fedavg"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_message_is_the_weighted_parts_and_the_weight(name):
    chosen = strategy(name)
    _, messages, _ = run(chosen, clients(), 2)
    assert {len(message) for message in messages} == {chosen.vectors * 4 + 1}
    assert [message[-1] for message in messages] == ([1] * 4 if name in ("feddyn", "distillation") else [5, 9, 2, 7])
    assert all(values.shape == (4,) for values in [*chosen.server(np.ones(4)).values(), *chosen.client(4).values()])


@pytest.mark.parametrize("name", STRATEGIES)
def test_clients_without_rows_or_of_one_class_are_welcome(name):
    data, empty = clients(), (np.empty((0, 3)), np.empty(0))
    data[1] = (data[1][0], np.zeros(9))
    without, _, _ = run(strategy(name), data, 3)
    got, messages, _ = run(strategy(name), [*data, empty], 3)
    assert np.isfinite(got).all()
    assert not messages[-1][:-1].any()
    if name != "feddyn":  # whose server counts heads
        np.testing.assert_allclose(got, without, rtol=0, atol=1e-12)


def test_a_round_without_any_row_stops():
    with pytest.raises(LocalError, match="no client of this round has a row"):
        run(strategy("fedavg"), [*clients(), (np.empty((0, 3)), np.empty(0))], 1, present=[[4]])


@pytest.mark.parametrize("name", STRATEGIES)
def test_federated_dropout_trains_the_smaller_model(name):
    """A round without column 1 is, for the rest, a round of a model that never had it."""
    data = clients()
    part = Part(np.ones(4, bool), MODEL.columns != 1)
    start = np.array([0.3, -2.0, 0.1, 0.4])
    got, messages, _ = run(strategy(name), data, 3, part=part, start=start)
    small = [(x[:, [0, 2]], y) for x, y in data]
    expected, fewer, _ = run(
        strategy(name), small, 3, model=Objective("logistic", 2, penalty=PENALTY), start=start[[0, 2, 3]]
    )
    np.testing.assert_allclose(np.array(got)[:, [0, 2, 3]], expected, rtol=0, atol=1e-12)
    assert (np.array(got)[:, 1] == -2.0).all()
    np.testing.assert_allclose(messages, fewer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_local_head_never_travels(name):
    chosen, part = strategy(name), Part(MODEL.columns >= 0, np.ones(4, bool))
    got, messages, own = run(chosen, clients(), 3, part=part)
    assert {len(message) for message in messages} == {chosen.vectors * 3 + 1}
    assert (np.array(got)[:, 3] == 0).all()
    assert len({weights[3] for weights in own}) == 4


def test_personalised_fedavg():
    """Coefficients averaged, every client its own intercept (Arivazhagan et al. 2019, algorithm 1)."""
    data, heads, coef = clients(), np.zeros(4), np.zeros(3)
    for _ in range(3):
        ends = [descend(np.append(coef, heads[k]), x, y) for k, (x, y) in enumerate(data)]
        heads = np.array([end[3] for end in ends])
        coef = np.average([end[:3] for end in ends], axis=0, weights=[5, 9, 2, 7])
    got, _, own = run(strategy("fedavg"), data, 3, part=Part(MODEL.columns >= 0, np.ones(4, bool)))
    np.testing.assert_allclose(got[-1][:3], coef, rtol=0, atol=1e-12)
    np.testing.assert_allclose([weights[3] for weights in own], heads, rtol=0, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 4), st.floats(0.01, 1), st.integers(0, 2**32))
def test_dropout_keeps_whole_columns_as_many_as_agreed(features, outputs, keep, seed):
    columns = Objective("multinomial" if outputs > 1 else "squared", features, outputs).columns
    mask = kept(columns, keep, (seed, 3))
    assert len(set(columns[mask]) - {-1}) == int(np.ceil(keep * features))
    assert mask[columns < 0].all()
    assert not set(columns[mask]) & set(columns[~mask])
    assert (mask == kept(columns, keep, (seed, 3))).all()


@given(st.sampled_from(["logistic", "multinomial", "squared", "poisson"]), st.booleans(), st.integers(0, 2**32))
def test_losses_and_their_gradients(loss, intercept, seed):
    generator = np.random.default_rng(seed)
    outputs = 4 if loss == "multinomial" else 1
    model = Objective(loss, 3, outputs, 0.2, intercept)
    x, w = generator.normal(size=(8, 3)), generator.normal(size=model.size)
    y = {
        "logistic": np.array([0.0, 1.0] * 4),
        "multinomial": np.array([0, 1, 2, 3] * 2),
        "squared": generator.normal(size=8),
        "poisson": generator.poisson(2.0, 8) * 1.0,
    }[loss]
    numeric = approx_fprime(w, model.value, 1e-7, x, y)
    np.testing.assert_allclose(model.gradient(w, x, y), numeric, rtol=1e-4, atol=1e-4)
    scores = model.scores(w, x)
    penalty = 0.1 * (w[: 3 * outputs] ** 2).sum()
    if loss == "logistic":
        expected = log_loss(y, expit(scores[:, 0]))
    elif loss == "multinomial":
        expected = log_loss(y, np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True))
    elif loss == "squared":
        expected = np.mean((scores[:, 0] - y) ** 2) / 2
    else:  # half the deviance is the loss less that of a perfect fit
        perfect = Objective("poisson", 1, intercept=False)
        best = [perfect.value(np.log([max(v, 1e-300)]), np.ones((1, 1)), np.array([v])) for v in y]
        expected = mean_poisson_deviance(y, np.exp(scores[:, 0])) / 2 + np.mean(best)
    assert model.value(w, x, y) == pytest.approx(expected + penalty, rel=1e-9)


def test_mini_batches_with_every_part_of_a_correction():
    (x, y), linear, anchor = clients((11,))[0], np.array([0.1, -0.2, 0.3, 0.0]), np.array([1.0, 0.0, -1.0, 0.5])
    free = np.array([True, True, False, True])
    got = train(MODEL, x, y, anchor, Plan(2, 4, RATE), Correction(0.5, linear, 0.7, anchor, free), (1, 2, 3))
    w, generator, order = anchor.copy(), np.random.default_rng((1, 2, 3)), np.arange(11)
    for _ in range(2):
        order = order[generator.permutation(11)]
        for batch in (order[:4], order[4:8], order[8:]):
            w = w - RATE * free * (0.5 * slope(w, x[batch], y[batch]) + linear + 0.7 * (w - anchor))
    np.testing.assert_allclose(got.weights, w, rtol=0, atol=1e-12)
    assert (got.rows, got.steps, got.length) == (11, 6, pytest.approx(6 * RATE))
    again = train(MODEL, x, y, anchor, Plan(2, 4, RATE), Correction(0.5, linear, 0.7, anchor, free), (1, 2, 3))
    assert (again.weights == got.weights).all()


@pytest.mark.parametrize(
    ("attempt", "text"),
    [
        (lambda: strategy("fedavgg"), "unknown strategy 'fedavgg'; known: fedsgd, fedavg"),
        (lambda: strategy("fedavg", {"mu": 1.0}), "strategy fedavg does not know all of: mu"),
        (lambda: strategy("feddyn", {"alpha": 0.0}), "feddyn: alpha must be positive"),
        (lambda: strategy("fedavgm", {"momentum": 1.0}), r"momentum must be in \[0, 1\)"),
        (lambda: strategy("fedadam", {"rate": float("nan")}), "rate must be positive"),
        (lambda: Population(3, 0), "no client has a row"),
        (lambda: Plan(epochs=0), "1 epoch or more"),
        (lambda: Plan(rate=float("inf")), "a positive rate"),
        (lambda: Objective("hinge", 3), "unknown loss 'hinge'"),
        (lambda: Objective("multinomial", 3), "two outputs or more"),
        (lambda: Objective("squared", 0), "one column or more"),
        (lambda: kept(np.arange(3), 0.0, (1,)), "a fraction above 0"),
    ],
)
def test_what_cannot_be_is_refused(attempt, text):
    with pytest.raises(LocalError, match=text):
        attempt()


@pytest.mark.parametrize("name", ["feddyn", "scaffold"])
def test_corrected_clients_of_unequal_size_meet_at_the_optimum_over_all_rows(name):
    """Where FedAvg with several local steps stays away from it."""
    data = clients()
    x, y = (np.concatenate(part) for part in zip(*data, strict=True))
    far = run(strategy("fedavg"), data, 1000)[0][-1]
    assert np.abs(slope(far, x, y)).max() > 1e-3
    near = run(strategy(name), data, 1000)[0][-1]
    assert np.abs(slope(near, x, y)).max() < 1e-7
