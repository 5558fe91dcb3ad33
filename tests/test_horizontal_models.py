"""The adapters: weights in and out, local training against the library alone, federated rounds through each of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import (
    ElasticNet,
    LogisticRegression,
    Perceptron,
    PoissonRegressor,
    Ridge,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.metrics import log_loss
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from parties.errors import LocalError
from vfl.horizontal.local import Correction, Objective, Plan, train
from vfl.horizontal.models import Estimator, FlowerClient, LinearModel, TorchModel, require_compatible
from vfl.horizontal.strategies import STRATEGIES, Part, Population, broadcast, client_round, server_round, strategy

PLAN = Plan(epochs=2, batch=16, rate=0.1)
CLASSES = (0, 1, 2)


def wine():
    x, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(x), y


def by_class():
    """Three clients: two classes, one class, no rows."""
    x, y = wine()
    return [(x[y < 2], y[y < 2]), (x[y == 2], y[y == 2]), (x[:0], y[:0])]


def federate(models, name="fedavg", rounds=3, plan=PLAN):
    """Rounds of a strategy over these clients' models; all end with the server's weights."""
    chosen, size = strategy(name), len(models[0].get())
    part, population = Part.whole(size), Population(len(models), max(1, sum(model.rows for model in models)))
    server, states = chosen.server(models[0].get()), [chosen.client(size) for _ in models]
    for number in range(rounds):
        received, total = broadcast(chosen, part, server), 0.0
        for k, model in enumerate(models):

            def fit(start, correction, model=model, seed=(number, k)):
                model.set(start)
                return model.fit_local(chosen.plan(plan), correction, seed)

            share = population.share(model.rows)
            message, states[k], _ = client_round(chosen, part, received, model.get(), states[k], share, fit)
            total = total + message
        server = server_round(chosen, part, server, total, population)
    for model in models:
        model.set(server["weights"])
    return server["weights"]


def test_the_linear_model_is_the_local_solver():
    x, y = wine()
    objective, weights = Objective("multinomial", 13, 3), np.linspace(-1, 1, 42)
    model = LinearModel(objective, x, y)
    model.set(weights)
    got = model.fit_local(PLAN, Correction(pull=0.5, anchor=weights), (1, 2))
    expected = train(objective, x, y, weights, PLAN, Correction(pull=0.5, anchor=weights), (1, 2))
    assert (got.weights == expected.weights).all() and (model.get() == got.weights).all()
    score = model.evaluate()
    assert score.loss == objective.value(got.weights, x, y)
    assert score.accuracy == np.mean(objective.scores(got.weights, x).argmax(axis=1) == y)
    assert LinearModel(objective, x[:0], y[:0]).evaluate().rows == 0
    yes = LinearModel(Objective("logistic", 13), x, (y == 0) * 1.0)
    yes.fit_local(PLAN, Correction(), (0,))
    assert yes.evaluate().accuracy > 0.9
    assert np.isnan(LinearModel(Objective("squared", 13), x, y).evaluate().accuracy)


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=5),
        LogisticRegression(max_iter=5, fit_intercept=False),
        SGDClassifier(loss="log_loss", random_state=0),
        Perceptron(),
        MLPClassifier((5,), random_state=0),
        SGDRegressor(),
        PoissonRegressor(max_iter=5),
        ElasticNet(alpha=0.01, max_iter=5),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_weights_go_in_and_out_and_mean_the_same(estimator):
    x, y = wine()
    classes = CLASSES if hasattr(estimator, "predict_proba") or isinstance(estimator, Perceptron) else ()
    one, other = Estimator(estimator, x, y, classes), Estimator(estimator, x, y, classes)
    one.fit_local(PLAN, Correction(), (1,))
    other.set(one.get())
    assert one.get().dtype == np.float64
    assert (other.get() == one.get()).all() and one.get().any()
    assert (other.estimator.predict(x) == one.estimator.predict(x)).all()
    assert one.evaluate() == other.evaluate()
    assert one.evaluate().rows == len(y)


def test_a_round_goes_on_where_scikit_learn_would():
    """fit with warm_start from given weights, and partial_fit twice, by the library alone."""
    x, y = wine()
    weights = np.linspace(-1, 1, 42)
    model = Estimator(LogisticRegression(max_iter=3), x, y, CLASSES)
    model.set(weights)
    alone = LogisticRegression(max_iter=3, warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone.fit(x, y)
        alone.coef_, alone.intercept_ = weights[:39].reshape(3, 13).copy(), weights[39:].copy()
        alone.fit(x, y)
    got = model.fit_local(PLAN, Correction(), (5,)).weights
    np.testing.assert_allclose(got, np.append(alone.coef_, alone.intercept_), rtol=0, atol=1e-12)

    model = Estimator(SGDClassifier(learning_rate="constant", eta0=0.01, shuffle=False), x, y, CLASSES)
    alone = SGDClassifier(learning_rate="constant", eta0=0.01, shuffle=False)
    for _ in range(2):
        alone.partial_fit(x, y, classes=CLASSES)
    got = model.fit_local(Plan(epochs=2), Correction(), (5,)).weights
    np.testing.assert_allclose(got, np.append(alone.coef_, alone.intercept_), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [LogisticRegression(max_iter=1), SGDClassifier(loss="log_loss")])
def test_clients_of_some_classes_learn_all_of_them(estimator):
    x, y = wine()
    models = [Estimator(estimator, *rows, CLASSES) for rows in by_class()]
    weights = federate(models, rounds=5)
    assert weights.shape == (42,)
    assert models[2].rows == 0 and models[2].evaluate().rows == 0
    final = models[2].estimator
    assert final.score(x, y) > 0.9
    np.testing.assert_allclose(
        models[0].evaluate().loss, log_loss(by_class()[0][1], final.predict_proba(by_class()[0][0]), labels=CLASSES)
    )
    again = [Estimator(estimator, *rows, CLASSES) for rows in by_class()]
    assert (federate(again, rounds=5) == weights).all()


def test_a_missing_class_changes_nothing_of_the_loss():
    x, y = wine()
    x, y = x[y < 2], y[y < 2]
    three = Estimator(LogisticRegression(tol=1e-10, max_iter=1000), x, y, CLASSES)
    three.fit_local(PLAN, Correction(), (1,))
    chances = three.estimator.predict_proba(x)
    assert chances[:, 2].max() < 1e-2
    oracle = LinearModel(Objective("multinomial", 13, 3, penalty=1 / len(y)), x, y)
    gradient = oracle.objective.gradient(three.get(), x, y)
    assert np.abs(gradient[:39]).max() < 1e-5


@pytest.mark.parametrize(
    ("estimator", "classes", "text"),
    [
        (Ridge(), (), "Ridge has neither partial_fit nor warm_start"),
        (GaussianNB(), CLASSES, "GaussianNB has no coef_"),
        (LogisticRegression(), (0, 1), "48 labels are none of the agreed classes"),
    ],
)
def test_an_estimator_that_cannot_is_refused(estimator, classes, text):
    with pytest.raises(LocalError, match=text):
        Estimator(estimator, *wine(), classes)


class Flower:
    """As written for flwr.client.NumPyClient: logistic regression by gradient descent, two arrays, one of float32."""

    def __init__(self, x, y):
        self.model = LinearModel(Objective("multinomial", 13, 3), x, y)
        self.seen, self.rounds = [], []

    def get_parameters(self, config):
        weights = self.model.get()
        return [weights[:39].reshape(3, 13).astype(np.float32), weights[39:]]

    def fit(self, parameters, config):
        self.seen.append([(one.shape, one.dtype) for one in parameters])
        self.rounds.append(config["server_round"])
        self.model.set(np.concatenate([one.ravel().astype(np.float64) for one in parameters]))
        self.model.fit_local(Plan(1, 0, config["rate"]), Correction(), (0,))
        return self.get_parameters(config), self.model.rows, {}

    def evaluate(self, parameters, config):
        self.model.set(np.concatenate([one.ravel().astype(np.float64) for one in parameters]))
        score = self.model.evaluate()
        return score.loss, score.rows, {"accuracy": score.accuracy}


def test_a_flower_client_runs_unchanged():
    data = by_class()[:2]
    flowers = [Flower(x, y) for x, y in data]
    models = [FlowerClient(flower, {"rate": 0.2}) for flower in flowers]
    got = federate(models, rounds=10)
    expected = federate(
        [LinearModel(Objective("multinomial", 13, 3), x, y) for x, y in data], rounds=10, plan=Plan(1, 0, 0.2)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)  # float32
    assert flowers[0].seen == [[((3, 13), np.float32), ((3,), np.float64)]] * 10
    assert flowers[0].rounds == list(range(1, 11))
    assert models[0].rows == 130
    assert models[0].evaluate().rows == 130 and models[0].evaluate().accuracy > 0.9

    class Wrong(Flower):
        def fit(self, parameters, config):
            return [parameters[0].T, parameters[1]], 130, {}

    with pytest.raises(LocalError, match="arrays of other shapes"):
        FlowerClient(Wrong(*data[0])).fit_local(PLAN, Correction(), (0,))


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_that_correct_need_a_model_that_can_be_corrected(name):
    x, y = wine()
    linear = LinearModel(Objective("multinomial", 13, 3), x, y)
    require_compatible(strategy(name), linear)
    for model in (Estimator(LogisticRegression(), x, y, CLASSES), FlowerClient(Flower(x, y), {"rate": 0.1})):
        if name in ("fedsgd", "fedprox", "feddyn", "scaffold"):
            with pytest.raises(LocalError, match="trains by itself"):
                require_compatible(strategy(name), model)
            with pytest.raises(LocalError, match="trains by itself"):
                model.fit_local(PLAN, Correction(pull=0.1), (0,))
        else:
            require_compatible(strategy(name), model)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_torch_module_is_trained_as_the_local_solver_trains(name):
    torch = pytest.importorskip("torch")
    plan, data = Plan(2, 0, 0.1), by_class()

    def module():
        linear = torch.nn.Linear(13, 3).double()
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.zero_()
        return linear

    loss = torch.nn.CrossEntropyLoss()
    torches = [TorchModel(module(), loss, x, y) for x, y in data]
    linears = [LinearModel(Objective("multinomial", 13, 3), x, y) for x, y in data]
    np.testing.assert_allclose(federate(torches, name, 3, plan), federate(linears, name, 3, plan), rtol=0, atol=1e-10)
    assert torches[0].evaluate().loss == pytest.approx(linears[0].evaluate().loss)
    assert torches[0].evaluate().accuracy == linears[0].evaluate().accuracy


def test_a_torch_body_that_is_frozen_does_not_travel():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(13, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    x, y = wine()
    model = TorchModel(module, torch.nn.CrossEntropyLoss(), x.astype(np.float32), y)
    assert len(model.get()) == 13 * 4 + 4 + 8 + 12 + 3
    assert model.coordinates("2.").sum() == 15
    with pytest.raises(LocalError, match="no parameter whose name begins with 'head'"):
        model.coordinates("head")
    for parameter in module[0].parameters():
        parameter.requires_grad_(False)
    body = module[0].weight.clone()
    assert len(model.get()) == 8 + 12 + 3
    model.set(np.full(23, 0.5))
    trained = model.fit_local(PLAN, Correction(free=model.coordinates("2.")), (1,))
    assert (trained.weights[:8] == 0.5).all() and (trained.weights[8:] != 0.5).any()
    assert (module[0].weight == body).all()
