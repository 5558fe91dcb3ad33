"""One workload in three programs: scikit-learn's logistic regression at every client, averaged after every round.

    python benchmarks/horizontal_programs.py bare|ours|flower FOLDER ROUNDS
    python benchmarks/horizontal_programs.py alternate FOLDER ROUNDS REPEATS

The folder has x.npy, y.npy and each client's row numbers. Every client scores the weights that it receives, trains from
them and sends its own; a last score at the end. A program prints the norm of its weights, which all must share.

`alternate` runs the bare loop and ours in turn, in one process that has imported both, and prints the least CPU seconds
of each: whatever else the machine does lengthens a loop and never shortens it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 5  # of L-BFGS that a client takes in a round
CLASSES = list(range(10))
Parts = list[tuple[Any, Any]]


class Local:
    """A client of the bare loop and of Flower's: an estimator that goes on from the weights it is given."""

    def __init__(self, x: Any, y: Any) -> None:
        from sklearn.linear_model import LogisticRegression

        missing = [label for label in CLASSES if label not in y]  # rows of weight zero for classes it has not
        self.x, self.y = x, y
        self.padded = np.vstack([x, np.zeros((len(missing), x.shape[1]))]), np.append(y, missing)
        self.weight = np.repeat([1.0, 0.0], [len(y), len(missing)])
        self.model = LogisticRegression(max_iter=STEPS, warm_start=True)
        self.model.fit(np.zeros((10, x.shape[1])), CLASSES)  # every attribute

    def get(self) -> list[Any]:
        return [self.model.coef_, self.model.intercept_]

    def set(self, weights: list[Any]) -> None:
        self.model.coef_, self.model.intercept_ = (part.copy() for part in weights)

    def fit(self) -> None:
        self.model.fit(*self.padded, self.weight)

    def score(self) -> tuple[float, float]:
        right = float(np.mean(self.model.predict(self.x) == self.y))
        chances = self.model.predict_proba(self.x)[np.arange(len(self.y)), self.y]
        return float(-np.mean(np.log(np.maximum(chances, 1e-300)))), right


def start(columns: int) -> list[Any]:
    return [np.zeros((10, columns)), np.zeros(10)]


def norm(weights: list[Any]) -> float:
    return float(np.sqrt(sum((part**2).sum() for part in weights)))


def bare(parts: Parts, rounds: int) -> float:
    clients = [Local(*part) for part in parts]
    weights, scores = start(parts[0][0].shape[1]), []
    for number in range(rounds + 2):
        means, rows = [0.0, 0.0], 0
        for one in clients:
            one.set(weights)
            scores.append(one.score())
            if 0 < number <= rounds:  # before the first and after the last there is a score alone
                one.fit()
                means = [mean + len(one.y) * part for mean, part in zip(means, one.get(), strict=True)]
                rows += len(one.y)
        if rows:
            weights = [mean / rows for mean in means]
    return norm(weights)


def ours(parts: Parts, rounds: int) -> float:
    from sklearn.linear_model import LogisticRegression

    from parties.horizontal import Horizontal
    from vfl.horizontal.models import Estimator
    from vfl.horizontal.simulate import simulate

    models = [Estimator(LogisticRegression(max_iter=STEPS), x, y, CLASSES) for x, y in parts]
    settings = Horizontal(model="own", strategy="fedavg", rounds=rounds, secure_aggregation="none", checkpoint=False)
    return float(np.linalg.norm(simulate(settings, models).weights))


def flower(parts: Parts, rounds: int) -> float:
    import logging

    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)

    class Client(NumPyClient):  # type: ignore[misc]
        def __init__(self, part: tuple[Any, Any]) -> None:
            quiet()
            self.local = Local(*part)

        def fit(self, parameters: Any, config: Any) -> Any:
            self.local.set(parameters)
            self.local.fit()
            return self.local.get(), len(self.local.y), {}

        def evaluate(self, parameters: Any, config: Any) -> Any:
            self.local.set(parameters)
            loss, right = self.local.score()
            return loss, len(self.local.y), {"accuracy": right}

    class Kept(FedAvg):  # type: ignore[misc]
        def aggregate_fit(self, *given: Any) -> Any:
            found = super().aggregate_fit(*given)
            self.last = found[0]
            return found

    strategy = Kept(
        fraction_fit=1.0,
        fraction_evaluate=1.0,
        min_fit_clients=len(parts),
        min_available_clients=len(parts),
        initial_parameters=ndarrays_to_parameters(start(parts[0][0].shape[1])),
    )
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))
    run_simulation(
        ServerApp(server_fn=lambda context: components),
        ClientApp(client_fn=lambda context: Client(parts[int(context.node_config["partition-id"])]).to_client()),
        num_supernodes=len(parts),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return norm(parameters_to_ndarrays(strategy.last))


def quiet() -> None:
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)  # a few iterations a round are the plan


def alternate(parts: Parts, rounds: int, repeats: int) -> dict[str, float]:
    """The least CPU seconds of each loop; the first of each, which imports, counts for nothing."""
    found: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(repeats + 1):
        for program in (bare, ours) if number % 2 else (ours, bare):
            begin = time.process_time()
            program(parts, rounds)
            found[program.__name__].append(time.process_time() - begin)
    return {name: min(seconds[1:]) for name, seconds in found.items()}


def main() -> None:
    name, folder, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    parts = [(x[rows], y[rows]) for rows in json.loads((folder / "parts.json").read_text())]
    quiet()
    if name == "alternate":
        print(json.dumps(alternate(parts, rounds, int(sys.argv[4]))))
    else:
        print(json.dumps({"norm": {"bare": bare, "ours": ours, "flower": flower}[name](parts, rounds)}))


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # psi.py beside this file is not the package
    main()
