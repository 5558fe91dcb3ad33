"""What travels of an own model, so that all parties agree on it before training."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from parties.errors import LocalError
from parties.horizontal import Array, Horizontal
from vfl.horizontal.distillation import Distilled
from vfl.horizontal.local import Mask
from vfl.horizontal.models import Model
from vfl.losses import Vector


def shared(settings: Horizontal, model: Model) -> Mask:
    """(size,): which weights travel; the others are personal. Raises LocalError when a model cannot tell them apart."""
    if not settings.personal:
        return np.ones(len(model.get()), np.bool_)
    if not hasattr(model, "coordinates"):
        raise LocalError(f"{type(model).__name__} has no named parameters, so none of them can stay personal")
    return ~np.asarray(model.coordinates(settings.personal), np.bool_)


def with_shared(settings: Horizontal, model: Model, own: Vector, received: Vector) -> Vector:
    """Weights (size,) as received, and our own where they are personal."""
    travels, weights = shared(settings, model), own.copy()
    weights[travels] = received[: np.count_nonzero(travels)]
    return weights


def layout(settings: Horizontal, model: Model) -> tuple[Array, ...]:
    """The arrays that travel, as the agreement lists them. Raises LocalError for a model without arrays."""
    if not hasattr(model, "arrays"):
        raise LocalError(f"{type(model).__name__} has no arrays to agree on")
    named = {name: one for name, one in model.arrays().items() if not _personal(settings, name)}
    return tuple(Array(name=name, shape=one.shape, dtype=one.dtype.name) for name, one in named.items())


def frozen(settings: Horizontal, model: Model) -> str:
    """The digest of what a torch module does not train, but for what is personal; empty where that is nothing."""
    named = model.frozen() if hasattr(model, "frozen") else {}
    named = {name: one for name, one in named.items() if not _personal(settings, name)}
    digest = hashlib.sha256(b"colonnade/frozen/1")
    for name, one in named.items():
        digest.update(
            msgspec.json.encode([name, one.dtype.name, one.shape]) + one.astype(one.dtype.newbyteorder("<")).tobytes()
        )
    return digest.hexdigest() if named else ""


def _personal(settings: Horizontal, name: str) -> bool:
    return bool(settings.personal) and name.startswith(settings.personal)


def require_agreed(settings: Horizontal, model: Model) -> None:
    """Raises LocalError: the public table, an array of the model or its frozen body is not the agreed one; the text has
    the difference.

    Where the agreement lists no arrays, only their size is compared, with the other parties'.
    """
    if settings.public is not None:
        if not isinstance(model, Distilled):
            raise LocalError(
                f"a distillation trains scikit-learn estimators behind Distilled, not {type(model).__name__}"
            )
        model.public.require(settings.public)
    if not settings.arrays:
        return
    ours = layout(settings, model)
    for place, (mine, agreed) in enumerate(zip(ours, settings.arrays, strict=False)):
        if mine != agreed:
            raise LocalError(
                f"array {place} of our model is {_shown(mine)} where the agreement has {_shown(agreed)}; align them"
            )
    if len(ours) != len(settings.arrays):
        more = (ours if len(ours) > len(settings.arrays) else settings.arrays)[min(len(ours), len(settings.arrays))]
        who = "the agreement lacks" if len(ours) > len(settings.arrays) else "our model lacks"
        raise LocalError(f"{who} {_shown(more)}: {len(ours)} arrays of ours, {len(settings.arrays)} agreed; align them")
    if settings.frozen != (digest := frozen(settings, model)):
        theirs = settings.frozen or "none"
        raise LocalError(
            f"what our model does not train has the digest {digest or 'none'}, the agreement's {theirs}: another body; "
            "take the same one"
        )


def as_toml(arrays: tuple[Array, ...], body: str = "") -> str:
    """What [horizontal] says of them, and of a frozen body with this digest, as an inline table has it."""
    each = (f'{{ name = "{one.name}", shape = {list(one.shape)}, dtype = "{one.dtype}" }}' for one in arrays)
    return f"arrays = [{', '.join(each)}]" + (f', frozen = "{body}"' if body else "")


def _shown(one: Array) -> str:
    return f"{one.name!r}, {one.dtype} of shape {tuple(one.shape)}"
