"""Ten hospitals with different patients: FedAvg against FedDyn against the exact method, and one picture.

Breast cancer (569 patients, 30 columns), dealt so that most hospitals see mostly one diagnosis. All three methods make
the same loss small; only the exact one ends where scikit-learn ends that has all rows.

Run it: python examples/hospitals/compare.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from parties.files import make_folder
from parties.horizontal import Horizontal
from vfl.horizontal.report import write_curves
from vfl.horizontal.simulate import deal, simulate
from vfl.horizontal.trainer import Data

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/hospitals")
make_folder(folder)

data = load_breast_cancer(as_frame=True)
x = StandardScaler().set_output(transform="pandas").fit_transform(data.data)  # standardise = true: by secure sums
hospitals = deal(Data(x.to_numpy(), data.target.to_numpy(), tuple(x.columns)), "dirichlet:0.2", 10, seed=3)
for number, one in enumerate(hospitals):
    print(f"hospital {number}: {len(one.y):3} patients, {np.mean(one.y == 0):4.0%} of them with cancer")

methods = {
    "FedAvg": Horizontal(strategy="fedavg", rounds=30, epochs=10, batch=0, rate=0.5),
    "FedDyn": Horizontal(strategy="feddyn", parameters={"alpha": 0.1}, rounds=30, epochs=10, batch=0, rate=0.5),
    "exact": Horizontal(strategy="exact", rounds=30),
}
optimum = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, data.target)
signs = np.where(data.target == 1, 1.0, -1.0)


def loss(model: LogisticRegression) -> float:
    """scikit-learn's objective on all rows, a row."""
    scores = model.decision_function(x)
    return float(np.logaddexp(0, -signs * scores).mean() + (model.coef_**2).sum() / 2 / len(x))


best, curves = loss(optimum), {}
print(f"\n{'':8}  rounds  loss above the optimum  largest coefficient difference  accuracy")
for name, settings in methods.items():
    outcome = simulate(settings, hospitals)  # with secure aggregation: every hospital is a role of its own
    curves[name] = outcome.facts()["rounds"]
    far, right = np.abs(outcome.model.coef_ - optimum.coef_).max(), outcome.model.score(x, data.target)
    print(f"{name:8}  {len(curves[name]):6}  {loss(outcome.model) - best:22.1e}  {far:30.1e}  {right:8.4f}")

if write_curves(folder / "loss.svg", {name: rounds[1:] for name, rounds in curves.items()}):
    print(f"\nthe picture is in {folder / 'loss.svg'}")
