"""What the parties of a network agree on before anything moves: consents, batches, the terms of the exchanges."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.agreement import Agreement
from parties.errors import Refused
from parties.session import Session
from vfl.solver import Schedule
from vfl.training import Setup, agree, prepare, schedule

log = logging.getLogger("colonnade")
ADAM_BITS = 26  # it divides small gradients by their own size, and what is rounded off with them


@dataclasses.dataclass(frozen=True)
class Clauses:
    """What an agreement says of networks alone. The same at all parties, who compare it before anything moves.

    open_gradients: consent to the open mode: gradients a row, under noise, which tell something of labels.
    separate_embeddings: consent to concatenation of several feature holders, whose embeddings no mask can hide.
    leak_limit: open mode: the largest AUC that an attack on these gradients may reach.
    """

    open_gradients: bool = False
    separate_embeddings: bool = False
    leak_limit: float = 0.7

    @classmethod
    def of(cls, agreement: Agreement) -> Clauses:
        """What this agreement says."""
        network = agreement.network
        return cls(network.open_gradients, network.separate_embeddings, agreement.leakage.leak_auc)


def check_consent(session: Session, clauses: Clauses, mode: str, merge: str) -> None:
    """Raises Refused: the agreement does not consent to what this tells.

    Reveals:
        To nobody anything; nothing is sent.
    """
    consent = session.agreement.model.allow_reconstruction
    if mode == "open" and not (clauses.open_gradients and consent):
        raise Refused(
            "the open mode gives every row's gradient to the feature holders, and nothing bounds what a module's "
            "embeddings tell of its inputs: the agreement must consent with open_gradients and allow_reconstruction"
        )
    several = session.agreement.feature_holders > 1
    if merge == "concatenation" and several and not (clauses.separate_embeddings and consent):
        raise Refused(
            "side by side the label holder sees each feature holder's embedding, which no mask can hide: the agreement "
            "must consent with separate_embeddings and allow_reconstruction"
        )


def plan(
    session: Session,
    kind: str,
    params: Mapping[str, Any],
    clauses: Clauses,
    width: int,
    x: NDArray[np.float64],
    names: list[str],
) -> tuple[Schedule, Setup | None, dict[str, int]]:
    """What happens when, (encrypted) the terms of exchanges of this width, and how many independent columns each
    feature holder has (open: columns); all parties agree on it. `params` are the shared ones of an estimator of this
    kind.

    Without allow_reconstruction a row is embedded `width` times an epoch only while that stays below the rank of the
    feature holders' columns.

    Reveals:
        To all: numbers of rows and columns; encrypted: the feature holders' ranks and magnitudes.
    Raises:
        LocalError: our columns cannot be trained on. Refused, ProtocolViolation: a peer plans otherwise.
    """
    epochs, purpose = params["epochs"], f"fit {kind}"
    wanted = schedule(
        len(x),
        params["batch_size"],
        epochs,
        params["random_state"],
        session.agreement.model.max_exchanges,
        held=params["validation_fraction"] if params["early_stopping"] else 0.0,
        patience=params["n_iter_no_change"],
        tolerance=params["tol"],
    )
    compared, setup = {**params, **dataclasses.asdict(clauses)}, None
    if params["mode"] == "open":
        plans = agree(session, purpose, compared, x.reshape(len(x), math.prod(x.shape[1:])))
        ranks = {name: one.columns for name, one in plans.items() if name != session.label_holder}
    else:
        setup = prepare(
            session,
            purpose,
            compared,
            x,
            names,
            tolerance=params["tol"],
            exchanges=len(wanted.batches),
            batches=wanted.batches,
            epochs=epochs,
            outputs=width,
            bounded=False,
        )
        if setup.terms.width != width:
            raise Refused(
                f"{session.label_holder} plans with embeddings of width {setup.terms.width}, not {width}",
                peer=session.label_holder,
            )
        if len(setup.batches) < len(wanted.batches):
            log.warning(
                "training is for %d of %d epochs: with more the label holder could rebuild the feature holders' "
                "columns; allow_reconstruction in the agreement lifts this",
                len(setup.batches) // wanted.an_epoch,
                epochs,
            )
        wanted, ranks = dataclasses.replace(wanted, batches=setup.batches), setup.ranks
        finest = min(scales.residual_bits for scales in setup.terms.scales.values())
        if params["optimiser"] == "adam" and finest < ADAM_BITS:
            log.warning(
                "residuals have %d bits after the point: adam needs %d to follow the joined network; use smaller "
                "batches, or agree on more residual_bits or a smaller residual_range",
                finest,
                ADAM_BITS,
            )
    return wanted, setup, ranks
