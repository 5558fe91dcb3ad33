"""How good a model is, at the label holder; scikit-learn computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from vfl.losses import Vector


def evaluate(y: Vector, probability: Vector) -> dict[str, float]:
    """AUC, log loss, Brier score and accuracy at 0.5; AUC is NaN where only one class occurs."""
    both: Any = np.unique(y).size == 2
    return {
        "auc": float(roc_auc_score(y, probability)) if both else float("nan"),
        "log_loss": float(log_loss(y, probability, labels=[0, 1])),
        "brier": float(brier_score_loss(y, probability)) if both else float("nan"),
        "accuracy": float(accuracy_score(y, probability > 0.5)),
    }
