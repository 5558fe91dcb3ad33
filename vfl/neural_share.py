"""A party's part of a network on disk: numbers with names and shapes in JSON, never an object that runs on loading."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from parties.errors import LocalError
from parties.files import write_whole
from parties.parsing import parse_json
from vfl.bottoms import Tensors
from vfl.preparation import FittedColumns


class Tensor(msgspec.Struct, forbid_unknown_fields=True):
    """An array, row by row."""

    shape: list[int]
    values: list[float]


class NetworkShare(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Shares of one network have the same `training`, its session. `own_top`, `own_bottom`: whether there is a module
    that loading must be given; its numbers are here, its code is not."""

    colonnade_network: Literal[1] = 1
    kind: str
    party: str
    training: str
    agreement: str
    params: dict[str, Any]
    features: list[str]
    tensors: dict[str, Tensor]
    classes: list[bool | float | int | str]
    epochs: int
    own_top: bool
    own_bottom: bool
    prepared: FittedColumns | None = None

    def save(self, path: Path) -> None:
        """Whole or not at all, readable by us alone."""
        write_whole(path, msgspec.json.encode(self) + b"\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> NetworkShare:
        """Raises LocalError when it is not a share, or its numbers do not fit their shapes."""
        share: NetworkShare = parse_json(path, cls, "the network share")
        for tensor in share.tensors.values():
            fits = all(size >= 0 for size in tensor.shape) and math.prod(tensor.shape) == len(tensor.values)
            if not fits or not all(map(math.isfinite, tensor.values)):
                raise LocalError(f"{path} is damaged: its numbers do not fit their shapes")
        return share

    def arrays(self) -> Tensors:
        return {name: np.array(one.values, np.float64).reshape(one.shape) for name, one in self.tensors.items()}


def plain(tensors: Tensors) -> dict[str, Tensor]:
    return {name: Tensor(list(one.shape), one.ravel().tolist()) for name, one in tensors.items()}
