"""Training from Python: all roles in this process, over links in memory; the model is scikit-learn's own.

    model = FederatedLogisticRegression(C=1.0).fit({"north": (x1, y1), "south": (x2, y2), "west": (x3, y3)})

Each client's rows stay in its thread; messages, masks and checks are those of a real job.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost
from parties.horizontal import Horizontal
from parties.identity import Identity
from parties.ledger import Ledger
from parties.memory import MemoryLink, links
from parties.message import CLASSES
from vfl.horizontal.categories import from_frame
from vfl.horizontal.client import take_part
from vfl.horizontal.coordinator import coordinate
from vfl.horizontal.models import Model
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.settings import made_up_names
from vfl.horizontal.trainer import Data

Part = Data | Model | tuple[Any, Any]
HUB = "coordinator"


def train(
    clients: Mapping[str, Part],
    settings: Horizontal,
    *,
    start: Any = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Outcome:
    """Train with these clients: rows, as `Data` or as x and y, or an own model each, which has the weights afterwards.

    start: the first weights of an own model, (size,). Raises what `coordinate` does, or the first client's own error.
    """
    session = secrets.token_bytes(32)
    star = {name: links([HUB, name]) for name in clients}  # a mesh of 1,000 clients has a million ends
    identities = {name: Identity.generate(name) for name in (HUB, *clients)}
    public = {name: identity.public for name, identity in identities.items()}
    roll = {name: public[name] for name in clients}
    failed: list[Exception] = []

    def channel(me: str, peer: str) -> Channel:
        link: MemoryLink = star[peer if me == HUB else me][me][peer]
        ledger = Ledger(identities[me], None, frozenset(CLASSES))
        made = Channel(link, peer=peer, our_id=public[me].key_id, peer_id=public[peer].key_id, ledger=ledger)
        made.session = session
        return made

    def run(name: str) -> None:
        hub = channel(name, HUB)
        try:
            rows, model = _rows_and_model(clients[name])
            take_part(hub, identities[name], roll, session, settings, rows, model=model)
        except Exception as error:  # a thread's exception belongs to its caller, whatever it is
            failed.append(error)
            hub.abort(error.kind if isinstance(error, ColonnadeError) and error.kind != "aborted" else "error")
        finally:
            star[name][name][HUB].leave()

    threads = [threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in clients]
    for thread in threads:
        thread.start()
    channels = {name: channel(HUB, name) for name in clients}
    try:
        return coordinate(channels, identities[HUB], roll, session, settings, start=start, progress=progress)
    except (PeerAborted, PeerLost) as error:
        first = next((own for own in failed if not isinstance(own, (PeerAborted, PeerLost))), error)
        raise first from first.__cause__  # where an own model's code failed
    finally:
        for name in clients:
            channels[name].abort("error")  # who still listens need not wait; who is done does not
            star[name][HUB][name].leave()
        for thread in threads:
            thread.join()


def _rows_and_model(part: Part) -> tuple[Data | None, Model | None]:
    if isinstance(part, Data):
        return part, None
    if isinstance(part, tuple):
        if hasattr(part[0], "columns"):
            x, names, categories = from_frame(part[0])
            return Data(x, np.asarray(part[1]), names, categories=categories), None
        x = np.ascontiguousarray(part[0], np.float64)
        return Data(x, np.asarray(part[1]), made_up_names(x.shape[-1])), None
    return None, part


@dataclass
class FederatedLogisticRegression:
    """scikit-learn's LogisticRegression on all clients' rows, which nobody puts together; with secure aggregation."""

    C: float = 1.0
    _: KW_ONLY
    fit_intercept: bool = True
    standardise: bool = False
    rounds: int = 50
    classes: tuple[int | str, ...] = ()
    secure_aggregation: Any = "on"
    outcome_: Outcome | None = field(default=None, init=False, repr=False)

    def fit(self, parts: Mapping[str, Part]) -> Any:
        """A plain fitted LogisticRegression, behind a StandardScaler if so asked. Raises what `train` does."""
        self.outcome_ = train(parts, Horizontal(model="logistic", **_parameters(self)))
        return self.outcome_.model


@dataclass
class FederatedLinearRegression:
    """scikit-learn's LinearRegression on all clients' rows, or Ridge for an alpha above 0."""

    alpha: float = 0.0
    _: KW_ONLY
    fit_intercept: bool = True
    standardise: bool = False
    rounds: int = 50
    secure_aggregation: Any = "on"
    outcome_: Outcome | None = field(default=None, init=False, repr=False)

    def fit(self, parts: Mapping[str, Part]) -> Any:
        """A plain fitted estimator. Raises what `train` does."""
        self.outcome_ = train(parts, Horizontal(model="linear", **_parameters(self)))
        return self.outcome_.model


@dataclass
class FederatedPoissonRegressor:
    """scikit-learn's PoissonRegressor on all clients' rows."""

    alpha: float = 1.0
    _: KW_ONLY
    fit_intercept: bool = True
    standardise: bool = False
    rounds: int = 50
    secure_aggregation: Any = "on"
    outcome_: Outcome | None = field(default=None, init=False, repr=False)

    def fit(self, parts: Mapping[str, Part]) -> Any:
        """A plain fitted PoissonRegressor. Raises what `train` does."""
        self.outcome_ = train(parts, Horizontal(model="poisson", **_parameters(self)))
        return self.outcome_.model


def _parameters(estimator: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(estimator).items() if not name.endswith("_")}
