"""What only networks send: per-row matrices in clear, where the agreement consents."""

from __future__ import annotations

from dataclasses import dataclass

from parties.message import Array, kind
from vfl.messages import _bounded, _Step


@kind(230, "plaintext", "<f8", 2)
@dataclass(frozen=True, eq=False)
class OpenGradient(_Step):
    """G -> k, open mode: the loss's derivative at k's embedding, a row of the batch each, under noise."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self.data)


@kind(231, "plaintext", "<f8", 2)
@dataclass(frozen=True, eq=False)
class SeparateEmbedding(_Step):
    """k -> G, concatenation: k's embedding, a row of the batch each; no mask could hide whose it is."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounded(self.data)
