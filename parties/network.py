"""`[network]` of the agreement: a split neural network, and what its parties consent to."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Width = Annotated[int, Meta(ge=1, le=4096)]


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first of `hidden` is the width of the embedding, the others are the label holder's layers above it. Batches,
    epochs and learning rate are those of [model].

    `open_gradients`: consent to `mode = "open"`, in which feature holders get gradients a row, under noise.
    `separate_embeddings`: consent to `merge = "concatenation"` of several feature holders, which no mask can hide.
    """

    hidden: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=8)] = (16,)
    optimiser: Literal["adam", "sgd"] = "adam"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    mode: Literal["encrypted", "open"] = "encrypted"
    merge: Literal["sum", "concatenation"] = "sum"
    defence: Literal["marvell", "max_norm"] = "marvell"
    early_stopping: bool = False
    open_gradients: bool = False
    separate_embeddings: bool = False

    def check(self, allow_reconstruction: bool, feature_holders: int) -> None:
        """Raises ValueError where rows travel in clear and the agreement does not consent."""
        consents = []
        if self.mode == "open":
            consents.append(("open_gradients", self.open_gradients, 'mode = "open"'))
        if self.merge == "concatenation" and feature_holders > 1:
            consents.append(("separate_embeddings", self.separate_embeddings, "concatenation of several embeddings"))
        for name, given, what in consents:
            if not (given and allow_reconstruction):
                raise ValueError(
                    f"{what} needs {name} = true in [network] and allow_reconstruction = true in [model]: rows travel "
                    "in clear"
                )
