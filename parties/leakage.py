"""`[leakage]` of the agreement: what training may disclose before it must stop, and what an audit lets pass."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(gt=0, le=1)]
Area = Annotated[float, Meta(gt=0.5, lt=1)]


class Leakage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the stop rule in training and of `colonnade audit`. The same for all parties.

    most_exchanges_share: embeddings of the same rows, as a share of the independent directions of the feature holders'
        columns; never all of these, unless allow_reconstruction in [model] lifts the limit.
    leak_auc: AUC of the best attack on gradients a row, where the agreement allows these.
    norm_auc: the same of the attack that needs no known label, in an audit.
    above_model: audit: AUC by which labels may show above what any model of the same columns predicts.
    column_share: audit: share of a column's variance that the label holder may rebuild.
    """

    most_exchanges_share: Share = 1.0
    leak_auc: Area = 0.7
    norm_auc: Area = 0.6
    above_model: Annotated[float, Meta(ge=0, lt=0.5)] = 0.05
    column_share: Share = 0.99

    def most_embeddings(self, rank: int) -> int:
        """Of the same rows, for columns with `rank` independent directions, without consent to reconstruction."""
        return max(min(rank - 1, int(self.most_exchanges_share * rank)), 0)
