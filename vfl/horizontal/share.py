"""The model of a horizontal job on disk: JSON, never an object that runs on loading. Every party has all of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from parties.agreement import parse_json
from parties.errors import LocalError
from parties.files import write_whole
from vfl.horizontal.newton import Exact


class Scaling(msgspec.Struct, forbid_unknown_fields=True):
    """What standardised the columns: (x - mean) / scale, over all clients' rows."""

    mean: list[float]
    scale: list[float]


class HorizontalModel(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A linear model (JSON). coef: (m, d), intercept: (m,); `training` is its session."""

    colonnade_horizontal_model: Literal[1] = 1
    agreement: str
    training: str
    family: Literal["logistic", "linear", "poisson"]
    params: dict[str, float | bool]
    features: list[str]
    classes: list[int | str]
    coef: list[list[float]]
    intercept: list[float]
    rounds: int
    scaler: Scaling | None = None

    @classmethod
    def of(
        cls, fitted: Any, exact: Exact, features: list[str], rounds: int, agreement: str, training: str
    ) -> HorizontalModel:
        """From what training returned: scikit-learn's estimator, or a pipeline of its scaler and the estimator."""
        scaling, estimator = None, fitted
        if hasattr(fitted, "steps"):
            (_, scaler), (_, estimator) = fitted.steps
            scaling = Scaling(scaler.mean_.tolist(), scaler.scale_.tolist())
        return cls(
            agreement=agreement,
            training=training,
            family=exact.family,  # type: ignore[arg-type]
            params={"C": exact.C, "alpha": exact.alpha, "fit_intercept": exact.fit_intercept},
            features=features,
            classes=list(exact.classes),
            coef=np.atleast_2d(estimator.coef_).tolist(),
            intercept=np.atleast_1d(estimator.intercept_).tolist(),
            rounds=rounds,
            scaler=scaling,
        )

    def save(self, path: Path) -> None:
        """Whole or not at all, readable by us alone."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> HorizontalModel:
        """Raises LocalError when it is not such a model, or its numbers do not fit its features."""
        model: HorizontalModel = parse_json(path, cls, "the model")
        outputs, width = len(model.classes) if len(model.classes) > 2 else 1, len(model.features)
        numbers = [*model.intercept, *(value for row in model.coef for value in row)]
        fits = len(model.intercept) == len(model.coef) == outputs and all(len(row) == width for row in model.coef)
        if model.scaler is not None:
            numbers += [*model.scaler.mean, *model.scaler.scale]
            fits &= len(model.scaler.mean) == len(model.scaler.scale) == width and all(model.scaler.scale)
        if not fits or not all(map(math.isfinite, numbers)):
            raise LocalError(f"{path} is damaged: its numbers do not fit its features")
        return model

    def estimator(self) -> Any:
        """scikit-learn's fitted estimator, behind its scaler if there is one."""
        exact = Exact(
            self.family,
            len(self.features),
            tuple(self.classes),
            float(self.params["C"]),
            float(self.params["alpha"]),
            bool(self.params["fit_intercept"]),
        )
        weights = np.concatenate([np.ravel(self.coef), self.intercept if exact.fit_intercept else []])
        state, names = {"weights": weights, "rounds": np.array([float(self.rounds)])}, self.features
        if self.scaler is None:
            return exact.estimator(state, names)
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(np.zeros((1, len(names))))
        scaler.mean_, scaler.scale_ = np.array(self.scaler.mean), np.array(self.scaler.scale)
        scaler.var_, scaler.feature_names_in_ = scaler.scale_**2, np.asarray(names, object)
        return make_pipeline(scaler, exact.estimator(state))
