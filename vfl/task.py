"""What the agreement's [model] means: which estimator, what kind of label, which figures, which scores a user gets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin

from parties.agreement import Agreement, Model
from parties.errors import LocalError
from parties.files import read_bytes
from parties.session import Session
from vfl.estimator import VerticalLinearModel
from vfl.evaluation import Evaluation, compare
from vfl.linear import VerticalLogisticRegression, VerticalPoissonRegressor, VerticalRidge
from vfl.losses import Matrix, Vector
from vfl.neural import VerticalMLPClassifier, VerticalMLPRegressor
from vfl.neural_estimator import VerticalMLP
from vfl.neural_share import NetworkShare
from vfl.own_code import Own

log = logging.getLogger("colonnade")
LabelUse = Literal["binary", "classes", "numbers"]


def estimator(agreement: Agreement) -> VerticalLinearModel | VerticalMLP:
    """The estimator that the agreement describes."""
    model, network = agreement.model, agreement.network
    if agreement.is_network:
        made = VerticalMLPClassifier if model.kind == "network classifier" else VerticalMLPRegressor
        return made(
            network.hidden,
            mode=network.mode,
            merge=network.merge,
            defence=network.defence,
            optimiser=network.optimiser,
            learning_rate=model.learning_rate,
            momentum=network.momentum,
            alpha=network.weight_decay,
            batch_size=model.batch_size,
            epochs=model.epochs,
            early_stopping=network.early_stopping,
            random_state=model.seed,
        )
    return linear(model)


def linear(model: Model) -> VerticalLinearModel:
    """The generalised linear model that the agreement describes."""
    common = {
        "l1_ratio": model.l1_ratio,
        "fit_intercept": model.fit_intercept,
        "solver": model.solver,
        "tol": model.tolerance,
        "max_iter": model.max_exchanges,
        "epochs": model.epochs,
        "learning_rate": model.learning_rate,
        "batch_size": model.batch_size,
        "early_stopping": model.early_stopping,
        "random_state": model.seed,
    }
    if model.kind == "linear regression":
        return VerticalRidge(model.alpha, **common)  # type: ignore[arg-type]
    if model.kind == "poisson regression":
        return VerticalPoissonRegressor(model.alpha, **common)  # type: ignore[arg-type]
    return VerticalLogisticRegression(model.C, **common)  # type: ignore[arg-type]


def label_use(model: Model, positive: str) -> LabelUse:
    """How the label's column is read. Classes come as text; without a positive value there may be several."""
    if model.kind not in ("logistic regression", "network classifier"):
        return "numbers"
    return "binary" if positive else "classes"


def classes_of(place: str, column: str, words: NDArray[Any]) -> NDArray[Any]:
    """The label as 0.0 and 1.0 if it has two values, else as it is written. Raises LocalError."""
    here = f"{place}, column {column!r}"
    empty = int((words == "").sum())
    if empty:
        raise LocalError(f"{here}: {empty} labels are missing; drop these rows")
    values = sorted(set(words))
    if len(values) > 2:
        return words
    numbers = dict(zip(values, pd.to_numeric(pd.Series(values), errors="coerce"), strict=True))
    if set(numbers.values()) != {0.0, 1.0}:
        what = "constant" if len(values) == 1 else "not 0 and 1; say which value is positive"
        raise LocalError(f"{here}: the label is {what}")
    return np.array([numbers[word] for word in words])


def outputs_for(model: Model, label: NDArray[Any] | None) -> int:
    """How many outputs a network has for these labels: one a class, or 1."""
    return 1 if label is None or model.kind == "network regressor" else len(np.unique(label))


def check_range(here: str, target: Any, agreed: float) -> None:
    """Refuse numbers whose residuals will exceed the agreed range, before anything is sent. Raises LocalError."""
    spread = float(np.abs(target - target.mean()).max())
    if spread > agreed:
        enough = 2 ** int(np.ceil(np.log2(2 * spread)))
        raise LocalError(f"{here}: residuals will exceed {agreed:g}; agree on residual_range = {enough} in [model]")


def scores(model: VerticalLinearModel | VerticalMLP, x: pd.DataFrame, session: Session) -> Matrix | Vector | None:
    """What a user of the model wants of each row, at the label holder: the probability of the positive class (n,), of
    each of several classes (n, classes), or the prediction (n,). None at a feature holder.

    Reveals:
        What `decision_function` does.
    """
    if not isinstance(model, ClassifierMixin):
        return model.predict(x, session=session)  # type: ignore[no-any-return]
    both = model.predict_proba(x, session=session)
    return None if both is None else both[:, 1] if both.shape[1] == 2 else both


def expected(model: VerticalLinearModel | VerticalMLP, found: Matrix | Vector) -> Matrix | Vector:
    """The same of the scores of a scoring session (`vfl.scoring.serve`), NaN where these are."""
    if not isinstance(model, ClassifierMixin):
        return np.exp(found) if isinstance(model, VerticalPoissonRegressor) else found
    if found.ndim == 1:
        return np.asarray(expit(found))
    both = np.asarray(softmax(found, axis=1))
    return both[:, 1] if len(model.classes_) == 2 else both


def evaluate(
    model: VerticalLinearModel | VerticalMLP,
    y: NDArray[Any],
    joint: Matrix | Vector,
    x: Matrix,
    without: Mapping[str, Matrix | Vector],
) -> Evaluation:
    """Figures of the joint model beside those of the label holder alone, whose columns of the same rows are x, and of
    the joint model `without` each feature holder."""
    own, alone = x, getattr(model, "alone_", None) if x.shape[1] else None
    if not isinstance(model, ClassifierMixin):
        kind: Literal["poisson", "regression"] = (
            "poisson" if isinstance(model, VerticalPoissonRegressor) else "regression"
        )
        return compare(
            kind, y, {"joint": joint} | ({} if alone is None else {"alone": alone.predict(own)}) | dict(without)
        )
    known = np.isin(y, model.classes_)
    if not known.all():
        log.warning("%d held-out rows are of a class that no training row has: left out of the figures", (~known).sum())
        y, joint, own = y[known], joint[known], own[known]
        without = {name: one[known] for name, one in without.items()}
    both = None if alone is None else alone.predict_proba(own)
    if joint.ndim == 1:
        y = (y == model.classes_[1]).astype(np.float64)
        return compare("binary", y, {"joint": joint} | ({} if both is None else {"alone": both[:, 1]}) | dict(without))
    coded = np.searchsorted(model.classes_, y).astype(np.float64)
    names = [str(one) for one in model.classes_]
    scored = {"joint": joint} | ({} if both is None else {"alone": both}) | dict(without)
    return compare("multiclass", coded, scored, classes=names)


def load_share(path: Path, own: Own | None = None) -> VerticalLinearModel | VerticalMLP:
    """The estimator whose share `save` wrote, with our own module where it was trained with one. Raises LocalError."""
    start = read_bytes(path, "the model share")[:200]
    if b'"colonnade_network"' not in start:
        return VerticalLinearModel.load(path)
    kind = VerticalMLPClassifier if b"VerticalMLPClassifier" in start else VerticalMLPRegressor
    share = NetworkShare.load(path)
    if own is None and (share.own_top or share.own_bottom):
        raise LocalError(f"{path} was trained with a module of our own: name it under [model] in our own file")
    if own is not None and not (share.own_top if own.part == "top" else share.own_bottom):
        raise LocalError(f"{path} was trained without a {own.part} of our own: take it out of [model] in our own file")
    return kind.load(path, **({} if own is None else own.of_share(share)))


def shown(model: VerticalLinearModel | VerticalMLP, found: Matrix | Vector) -> dict[str, NDArray[Any]]:
    """Scores as columns of a file: `score`, or for several classes `predicted` and one probability each."""
    if found.ndim == 1:
        return {"score": found}
    names = [str(one) for one in model.classes_]
    predicted = model.classes_[found.argmax(axis=1)]
    return {"predicted": predicted} | {
        f"probability {name}": column for name, column in zip(names, found.T, strict=True)
    }
