"""The model of a horizontal job on disk: JSON, never an object that runs on loading. Every party has all of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from parties.errors import LocalError
from parties.files import write_whole
from parties.parsing import parse_json
from vfl.horizontal.categories import encoder, expanded
from vfl.horizontal.newton import Exact


class Scaling(msgspec.Struct, forbid_unknown_fields=True):
    """What standardised the columns: (x - mean) / scale, over all clients' rows."""

    mean: list[float]
    scale: list[float]


class HorizontalModel(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A linear model (JSON). coef: (m, d), a column for each category; intercept: (m,); `training` is its session."""

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
    categories: dict[str, list[str]] = {}

    @classmethod
    def of(
        cls, fitted: Any, exact: Exact, features: list[str], rounds: int, agreement: str, training: str
    ) -> HorizontalModel:
        """From what training returned: scikit-learn's estimator, or a pipeline of encoder, scaler and estimator."""
        scaling, categories = None, {}
        *before, estimator = [one for _, one in fitted.steps] if hasattr(fitted, "steps") else [fitted]
        for step in before:
            if hasattr(step, "mean_"):
                scaling = Scaling(step.mean_.tolist(), step.scale_.tolist())
            else:
                coders = {name: one for name, one, _ in step.transformers_ if hasattr(one, "categories_")}
                categories = {name: one.categories_[0].tolist() for name, one in coders.items()}
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
            categories=categories,
        )

    def save(self, path: Path) -> None:
        """Whole or not at all, readable by us alone."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> HorizontalModel:
        """Raises LocalError when it is not such a model, or its numbers do not fit its features."""
        model: HorizontalModel = parse_json(path, cls, "the model")
        outputs, width = len(model.classes) if len(model.classes) > 2 else 1, len(model.columns)
        numbers = [*model.intercept, *(value for row in model.coef for value in row)]
        fits = len(model.intercept) == len(model.coef) == outputs and all(len(row) == width for row in model.coef)
        if model.scaler is not None:
            numbers += [*model.scaler.mean, *model.scaler.scale]
            fits &= len(model.scaler.mean) == len(model.scaler.scale) == width and all(model.scaler.scale)
        if not fits or not all(map(math.isfinite, numbers)):
            raise LocalError(f"{path} is damaged: its numbers do not fit its features")
        return model

    @property
    def columns(self) -> tuple[str, ...]:
        """As the linear model sees them."""
        return expanded(self.features, self.categories)

    def estimator(self) -> Any:
        """scikit-learn's fitted estimator, behind encoder and scaler where there are such."""
        exact = Exact(
            self.family,
            len(self.columns),
            tuple(self.classes),
            float(self.params["C"]),
            float(self.params["alpha"]),
            bool(self.params["fit_intercept"]),
        )
        weights = np.concatenate([np.ravel(self.coef), self.intercept if exact.fit_intercept else []])
        fitted = exact.estimator({"weights": weights, "rounds": np.array([float(self.rounds)])})
        steps = [encoder(self.features, self.categories)] if self.categories else []
        if self.scaler is not None:
            from sklearn.preprocessing import StandardScaler

            scaler = StandardScaler().fit(np.zeros((1, len(self.columns))))
            scaler.mean_, scaler.scale_ = np.array(self.scaler.mean), np.array(self.scaler.scale)
            scaler.var_ = scaler.scale_**2
            steps.append(scaler)
        if not self.categories:
            (steps[0] if steps else fitted).feature_names_in_ = np.asarray(self.features, object)
        if not steps:
            return fitted
        from sklearn.pipeline import make_pipeline

        return make_pipeline(*steps, fitted)
