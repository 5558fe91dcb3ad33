"""Training in memory, for the tests of models: tables, oracles independent of ours, frames and how to alter them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from parties.agreement import Agreement
from parties.errors import LocalError, PeerAborted, ProtocolViolation
from parties.identity import Identity
from parties.memory import MemoryLink, Tamper, make_agreement, outcomes
from parties.message import Message, decode, encode, name_of, parse_header
from parties.session import Session
from vfl.encryption.paillier import SecretKey
from vfl.linear import VerticalLogisticRegression
from vfl.messages import Plan
from vfl.resume import Checkpoints
from vfl.training import agree

NAMES = ("bank", "grocer", "mobile", "clinic")
WIDTHS = (2, 3, 4, 3)
Parts = dict[str, pd.DataFrame]
Recorded = dict[str, dict[str, MemoryLink]]
M = TypeVar("M", bound=Message)


def table(parties: int, rows: int = 100, seed: int = 1, widths: tuple[int, ...] = WIDTHS) -> tuple[Parts, np.ndarray]:
    """Correlated columns split over the first `parties` names, and 0/1 labels that need all of them."""
    generator = np.random.default_rng(seed)
    width = sum(widths[:parties])
    x = generator.normal(size=(rows, width)) + 0.7 * generator.normal(size=(rows, 1))
    y = (generator.random(rows) < expit(x @ generator.normal(size=width) + 0.4)).astype(int)
    cuts = np.cumsum((0, *widths[:parties]))
    parts = {
        name: pd.DataFrame(x[:, low:high], columns=[f"{name}_{j}" for j in range(high - low)])
        for name, low, high in zip(NAMES, cuts, cuts[1:], strict=False)
    }
    return parts, y


def joined(parts: Parts) -> np.ndarray:
    return np.hstack([part.to_numpy() for part in parts.values()])


def centralised(parts: Parts, y: np.ndarray, C: float = 1.0, fit_intercept: bool = True) -> LogisticRegression:
    """scikit-learn on the joined table, to the last digit."""
    oracle = LogisticRegression(C=C, fit_intercept=fit_intercept, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    return oracle.fit(joined(parts), y)


def objective(x: np.ndarray, y: np.ndarray, coef: np.ndarray, intercept: float, C: float) -> float:
    """Mean log loss + |w|^2 / (2 C n), y in {0, 1}."""
    scores = x @ coef + intercept
    return float(np.mean(np.logaddexp(0, np.where(y == 1, -scores, scores))) + coef @ coef / (2 * C * len(y)))


def agreed(names: list[str], **tables: Any) -> dict[str, Any]:
    """Identities and an agreement on the shortest key that is allowed, as keyword arguments of `outcomes`."""
    identities = {name: Identity.generate(name) for name in names}
    tables = {"encryption": {"scheme": "paillier", "key_bits": 2048}, "deadlines": {"message": 60.0}} | tables
    agreement: Agreement = make_agreement(identities, **tables)
    return {"identities": identities, "agreement": agreement}


def fit(
    parts: Parts,
    y: Any,
    secret: SecretKey,
    *,
    params: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Mapping[str, Any] | None = None,
    then: Callable[[VerticalLogisticRegression, Session], Any] | None = None,
    roles: Mapping[str, Callable[[Session], Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train over the parts; what each party ended with: its model (or `then(model, session)`), or its exception.

    `policy` changes the agreement's [model], unchecked; `own` are one party's hyper-parameters, `labels` what it gives
    as y, `roles` replace a party altogether.
    """
    names = list(parts)

    def role(name: str) -> Callable[[Session], Any]:
        def run(session: Session) -> Any:
            model = VerticalLogisticRegression(**{**(params or {}), **(own or {}).get(name, {})})
            given = (labels or {}).get(name, y if name == names[0] else None)
            model.fit(parts[name], given, session=session, secret=secret if session.is_label_holder else None)
            return model if then is None else then(model, session)

        return run

    if "agreement" not in options:
        options = agreed(names) | options
    if policy:
        old = options["agreement"]
        options["agreement"] = msgspec.structs.replace(old, model=msgspec.structs.replace(old.model, **policy))
    return outcomes({name: role(name) for name in names} | dict(roles or {}), **options)


def planned(session: Session, x: pd.DataFrame, **params: Any) -> dict[str, Plan]:
    """As the label holder, agree to `fit`; everybody's plan."""
    model = VerticalLogisticRegression(**params)
    purpose = "fit VerticalLogisticRegression"
    return agree(session, purpose, model._plain_params(), x.to_numpy(), outputs=1)


def kinds(recorded: Recorded, sender: str, receiver: str) -> list[str]:
    """Names of the messages that went one way, in order."""
    return [name_of(parse_header(head).kind) for head, _ in recorded[sender][receiver].sent]


def sent(recorded: Recorded, sender: str, receiver: str, expected: type[M]) -> list[M]:
    """The messages of a kind that went one way, in order."""
    headers = [(parse_header(head), payload) for head, payload in recorded[sender][receiver].sent]
    return [decode(header, payload, expected) for header, payload in headers if header.kind == expected.kind]


def altering(sender: str, receiver: str, expected: type[M], change: Callable[[M], M], at: int = 0) -> Tamper:
    """A sender that deviates: its `at`-th message of a kind is changed, and well framed again."""
    seen = 0

    def tamper(source: str, target: str, head: bytes, payload: bytes) -> tuple[bytes, bytes]:
        nonlocal seen
        header = parse_header(head)
        if (source, target, header.kind) != (sender, receiver, expected.kind):
            return head, payload
        seen += 1
        if seen != at + 1:
            return head, payload
        message = change(decode(header, payload, expected))
        new_head, data = encode(message, header.session, header.sender, header.receiver, header.number)
        return new_head, bytes(data)

    return tamper


class Dies(Checkpoints):
    """A party's checkpoints in a folder of its own; killed after `stop_at` exchanges, the last `written` or not."""

    def __init__(self, folder: Path, stop_at: int | None = None, every: int = 1, written: bool = True) -> None:
        super().__init__(folder, b"j" * 32, every)
        folder.mkdir(parents=True, exist_ok=True)
        self._stop_at, self._written = stop_at, written

    def keep(self, exchanges: int, arrays: Any) -> None:
        stops = self._stop_at is not None and exchanges >= self._stop_at
        if self._written or not stops:
            super().keep(exchanges, arrays)
        if stops:
            raise LocalError("killed")


def with_fields(**fields: Any) -> Callable[[M], M]:
    """Change a message's fields. A party that deviates is not held back by what a message refuses to be built with."""

    def change(message: M) -> M:
        changed = copy.copy(message)
        for name, value in fields.items():
            object.__setattr__(changed, name, value)
        return changed

    return change


def with_data(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[M], M]:
    """Change a message's array."""
    return lambda message: with_fields(data=change(message.data.copy()))(message)  # type: ignore[attr-defined]


def violation_at(ended: dict[str, Any], who: str, peer: str) -> str:
    """What a party says of a peer that breaks the protocol; the peer has ended, too."""
    assert isinstance(ended[who], ProtocolViolation), ended[who]
    assert ended[who].peer == peer
    assert isinstance(ended[peer], (PeerAborted, ProtocolViolation))
    assert "record of this session" not in str(ended[who])  # at its step, not only when transcripts are compared
    return str(ended[who])
