"""A party's part of a model on disk: JSON, never an object that runs on loading."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec

from parties.errors import LocalError
from parties.files import write_whole
from parties.parsing import parse_json
from vfl.preparation import FittedColumns


class ModelShare(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One party's part of a model on disk (JSON). Shares of one model have the same `training`, its session."""

    colonnade_model: Literal[1] = 1
    party: str
    training: str
    agreement: str
    params: dict[str, float | int | bool | str]
    features: list[str]
    kind: str = "VerticalLogisticRegression"
    coef: list[list[float]]
    intercept: list[float]
    classes: list[bool | float | int | str]
    exchanges: int
    converged: bool
    prepared: FittedColumns | None = None

    def save(self, path: Path) -> None:
        """Whole or not at all, readable by us alone."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> ModelShare:
        """Raises LocalError when it is not a share, or its numbers do not fit its features."""
        share: ModelShare = parse_json(path, cls, "the model share")
        outputs = 1 if len(share.classes) <= 2 else len(share.classes)
        fits = {len(row) for row in share.coef} == {len(share.features)} and len(share.classes) != 1
        fits &= len(share.coef) == len(share.intercept) and (not share.classes or len(share.coef) == outputs)
        if share.prepared is not None and share.prepared.names != share.features:
            fits = False
        if not fits or not all(map(math.isfinite, [*chain(*share.coef), *share.intercept])):
            raise LocalError(f"{path} is damaged: its numbers do not fit its features")
        return share
