"""A party's part of a model on disk: JSON, never an object that runs on loading."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from parties.agreement import parse_json
from parties.errors import LocalError
from parties.files import write_whole


class Scaling(msgspec.Struct, forbid_unknown_fields=True):
    """What standardised our columns: (x - mean) / scale."""

    mean: list[float]
    scale: list[float]


class ModelShare(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One party's part of a model on disk (JSON). Shares of one model have the same `training`, its session."""

    colonnade_model: Literal[1] = 1
    party: str
    training: str
    agreement: str
    params: dict[str, float | int | bool | str]
    features: list[str]
    coef: list[float]
    intercept: float
    classes: list[bool | float | int | str]
    exchanges: int
    converged: bool
    scaler: Scaling | None = None

    def save(self, path: Path) -> None:
        """Whole or not at all, readable by us alone."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> ModelShare:
        """Raises LocalError when it is not a share, or its numbers do not fit its features."""
        share: ModelShare = parse_json(path, cls, "the model share")
        numbers, lengths = [*share.coef, share.intercept], {len(share.features), len(share.coef)}
        if share.scaler is not None:
            numbers += [*share.scaler.mean, *share.scaler.scale]
            numbers += [1 / one if one else math.inf for one in share.scaler.scale]
            lengths |= {len(share.scaler.mean), len(share.scaler.scale)}
        if len(lengths) != 1 or len(share.classes) not in (0, 2) or not all(map(math.isfinite, numbers)):
            raise LocalError(f"{path} is damaged: its numbers do not fit its features")
        return share
