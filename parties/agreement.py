"""The job that all parties sign: one TOML file, the same for all.

Its canonical bytes are the JSON of its parsed values with sorted keys, so comments and layout do not matter and every
default is spelt out in what is signed.
"""

from __future__ import annotations

import hashlib
import math
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from parties.errors import LocalError, Refused
from parties.horizontal import Horizontal
from parties.identity import Identity, PublicIdentity, check_name
from parties.information import InformationValue
from parties.leakage import Leakage
from parties.network import Network
from parties.parsing import parse_toml
from parties.search import Search

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
FieldName = Annotated[str, Meta(min_length=1, max_length=64)]
Result = Literal["size", "rows to the label holder", "rows"]  # in the order of how much they reveal


class Party(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party as all see it. `endpoint` is where it listens (empty: it only connects); `columns` is the most that a
    feature holder may bring (0: no more than rows)."""

    name: str
    role: Literal["label holder", "feature holder", "coordinator", "client"]
    public_key: str
    endpoint: str = ""
    columns: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except LocalError as error:
            raise ValueError(str(error)) from None
        PublicIdentity.parse(self.public_key)
        if self.endpoint and not re.fullmatch(r"tcp://[^\s/]+:\d{1,5}", self.endpoint):
            raise ValueError(f"endpoint of {self.name}: write tcp://host:port")

    @property
    def identity(self) -> PublicIdentity:
        return PublicIdentity.parse(self.public_key)


class Identifiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What identifies a customer: named fields, each with the rule that makes two spellings of it equal, and the keys
    that are made of them.

    `keys` are tried in order, each on the rows still unmatched (a cascade); without them all fields make one key.
    """

    fields: Annotated[dict[FieldName, FieldName], Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: {"customer": "text/1"}
    )
    keys: Annotated[tuple[Annotated[tuple[FieldName, ...], Meta(min_length=1)], ...], Meta(max_length=8)] = ()

    def __post_init__(self) -> None:
        used = [name for key in self.keys for name in key]
        if unknown := sorted(set(used) - set(self.fields)):
            raise ValueError(f"keys name the field {unknown[0]!r}, which is not among the fields")
        if self.keys and set(used) != set(self.fields):
            raise ValueError(f"no key uses the field {min(set(self.fields) - set(used))!r}")
        if len({frozenset(key) for key in self.keys}) < len(self.keys) or any(len(set(k)) < len(k) for k in self.keys):
            raise ValueError("a key, or a field within a key, comes twice")

    @property
    def cascade(self) -> tuple[tuple[str, ...], ...]:
        """The keys in the order in which they are tried."""
        return self.keys or (tuple(sorted(self.fields)),)


class Intersection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Caps and result of the private set intersection. Below `minimum` common rows nobody learns the exact number but
    the hub; a `bucket` above 1 pads every announced set size to a multiple of it."""

    suite: Literal["curve25519_XMD:SHA-512_ELL2_RO_", "P256_XMD:SHA-256_SSWU_RO_"] = "curve25519_XMD:SHA-512_ELL2_RO_"
    result: Result = "rows"
    minimum: Annotated[int, Meta(ge=0)] = 100
    minimum_to_score: Annotated[int, Meta(ge=0)] = 1
    maximum_rows: Annotated[int, Meta(ge=1, le=1 << 31)] = 1_000_000
    decoys: Annotated[int, Meta(ge=64, le=65536)] = 64
    bucket: Annotated[int, Meta(ge=1, le=1 << 24)] = 1


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model and every hyper-parameter. `C` (logistic) and `alpha` (linear, Poisson) as in scikit-learn, so is
    `l1_ratio`. No residual, times its row's weight, may exceed `residual_range`: 1 is enough for classes without
    weights. `leave_out`: the held-out rows are also scored without each feature holder in turn, which tells the label
    holder that one's embedding of them."""

    kind: Literal[
        "logistic regression", "linear regression", "poisson regression", "network classifier", "network regressor"
    ] = "logistic regression"
    C: Positive = 1.0
    alpha: Annotated[float, Meta(ge=0)] = 1.0
    l1_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.0
    residual_range: Annotated[float, Meta(ge=1, le=1 << 30)] = 1.0
    fit_intercept: bool = True
    standardise: bool = True
    solver: Literal["subspace", "sgd", "proximal"] = "subspace"
    tolerance: Positive = 1e-6
    max_exchanges: Count = 100
    learning_rate: Positive = 0.1
    batch_size: Count = 256
    epochs: Count = 5
    early_stopping: bool = False
    test_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    seed: Annotated[int, Meta(ge=0)] = 0
    minimum_rows_off_mode: Annotated[int, Meta(ge=10)] = 10
    allow_reconstruction: bool = False
    leave_out: bool = False


class Encryption(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The additive scheme ("auto": the cheaper by rows, columns and residual columns, the same at all parties), the key
    length of Paillier, and the fixed-point scales (fractional bits). The lattice scheme takes fewer residual bits where
    sums need the room, and opens at most `numbers_per_key` sums under one key: more make training with many columns
    faster, and a feature holder that deviates stronger (docs/threats.md)."""

    scheme: Literal["auto", "paillier", "lattice"] = "auto"
    numbers_per_key: Annotated[int, Meta(ge=1, le=1 << 20)] = 32
    key_bits: Literal[2048, 3072, 4096] = 3072
    feature_bits: Annotated[int, Meta(ge=8, le=30)] = 20
    residual_bits: Annotated[int, Meta(ge=8, le=40)] = 30
    embedding_bits: Annotated[int, Meta(ge=16, le=48)] = 40


class Deadlines(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds. See docs/operations.md."""

    connect: Positive = 600.0
    silence: Positive = 15.0
    stall: Positive = 120.0
    message: Positive = 3600.0


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Vertical: the parties hold columns of the same rows. Horizontal: rows with the same columns; with
    `coordinator_trains` the coordinator has some too and is a client of its own."""

    mode: Literal["vertical", "horizontal"] = "vertical"
    coordinator_trains: bool = False


class Columns(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every client of a horizontal job brings: features in this order, the label, units where they matter.

    categories: the features that are words; which words may occur, every client declares in its own file.
    """

    features: Annotated[tuple[FieldName, ...], Meta(min_length=1)]
    label: FieldName
    units: dict[FieldName, str] = {}
    categories: tuple[FieldName, ...] = ()

    def __post_init__(self) -> None:
        if len({*self.features, self.label}) <= len(self.features):
            raise ValueError("a column comes twice; features and label must differ")
        if unknown := sorted(self.units.keys() - {*self.features, self.label}):
            raise ValueError(f"units name the column {unknown[0]!r}, which is neither feature nor label")
        if unknown := sorted({*self.categories} - {*self.features}):
            raise ValueError(f"categories name the column {unknown[0]!r}, which is no feature")


_BOTH = {"title", "purpose", "legal_basis", "expires", "parties", "job", "horizontal", "columns", "deadlines"}


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that the parties agree on before any data is read."""

    title: Annotated[str, Meta(min_length=1)]
    purpose: Annotated[str, Meta(min_length=1)]
    legal_basis: Annotated[str, Meta(min_length=1)]
    expires: date
    parties: Annotated[tuple[Party, ...], Meta(min_length=2, max_length=50)]
    job: Job = Job()
    identifiers: Identifiers = Identifiers()
    intersection: Intersection = Intersection()
    model: Model = Model()
    encryption: Encryption = Encryption()
    network: Network = Network()
    leakage: Leakage = Leakage()
    search: Search | None = None
    information: InformationValue | None = None
    horizontal: Horizontal | None = None
    columns: Columns | None = None
    deadlines: Deadlines = Deadlines()

    def __post_init__(self) -> None:
        for what in ("name", "public_key"):
            if len({getattr(party, what) for party in self.parties}) < len(self.parties):
                raise ValueError(f"two parties have the same {what}")
        endpoints = [party.endpoint for party in self.parties if party.endpoint]
        if len(set(endpoints)) < len(endpoints):
            raise ValueError("two parties have the same endpoint; each needs its own")
        (self._check_horizontal if self.is_horizontal else self._check_vertical)()
        if any(isinstance(x, float) and not math.isfinite(x) for x in flatten(self).values()):
            raise ValueError("a number is not finite")

    def _check_vertical(self) -> None:
        self._check_roles("label holder", "feature holder", most=16)
        if self.network != Network() and not self.is_network:
            raise ValueError('[network] needs kind = "network classifier" or "network regressor" in [model]')
        if self.model.early_stopping and (self.is_network or self.model.solver != "sgd"):
            raise ValueError('early_stopping of [model] needs solver = "sgd"; a network has its own in [network]')
        if self.search is not None:
            self.search.check(self.model.kind, self.model.solver, self.network.mode, self.model.allow_reconstruction)
        if self.information is not None:
            self.information.check(self.model.kind)
        self.network.check(self.model.allow_reconstruction, self.feature_holders)
        if self.horizontal or self.columns or self.job.coordinator_trains:
            raise ValueError('[horizontal], [columns] and coordinator_trains need mode = "horizontal" in [job]')
        if sum(not party.endpoint for party in self.parties) > 1:
            raise ValueError("two parties without an endpoint cannot reach each other; give one of them an endpoint")
        if len(self.identifiers.cascade) > 1 and self.intersection.result != "rows":
            raise ValueError('several keys need result = "rows": a step is over the rows that the last one left')

    def _check_horizontal(self) -> None:
        self._check_roles("coordinator", "client", most=50)
        plan = self.horizontal
        if plan is None or self.columns is None:
            raise ValueError("a horizontal job has the tables [horizontal] and [columns]")
        if not self.ring[0].endpoint:
            raise ValueError(f"the coordinator {self.ring[0].name} needs an endpoint: every client connects to it")
        if len(self.clients) < 2:
            raise ValueError("a horizontal job has two clients or more; with coordinator_trains the coordinator is one")
        plan.check(len(self.clients), self.job.coordinator_trains)
        alike = len({type(one) for one in plan.classes}) == 1
        listed = plan.model == "logistic" or (plan.model == "own" and plan.classes)
        if listed and not (alike and list(plan.classes) == sorted({*plan.classes})):
            raise ValueError("classes of [horizontal] must list the values of the label, all numbers or text, sorted")
        if self.deadlines.message <= plan.clients.longest:
            raise ValueError(
                f"message of [deadlines] must be more than {plan.clients.longest:g} seconds: so long is a round, by "
                "deadline and attempts of [horizontal.clients]"
            )
        if self.deadlines.stall <= plan.clients.deadline:
            raise ValueError("stall of [deadlines] must be more than deadline of [horizontal.clients]")
        for field in msgspec.structs.fields(self):
            if field.name not in _BOTH and getattr(self, field.name) != field.default:
                raise ValueError(f"a horizontal job has no [{field.name}]; take it out, [horizontal] says it all")

    def _check_roles(self, first: str, others: str, most: int) -> None:
        if sum(party.role == first for party in self.parties) != 1:
            raise ValueError(f"exactly one party is the {first}")
        if odd := [party.name for party in self.parties if party.role not in (first, others)]:
            raise ValueError(f"{odd[0]}: in a {self.job.mode} job a party is the {first} or a {others}")
        if len(self.parties) > most:
            raise ValueError(f"a {self.job.mode} job has at most {most} parties")

    @classmethod
    def load(cls, path: Path) -> Agreement:
        """Read an agreement file. Raises LocalError that names the field."""
        agreement: Agreement = parse_toml(path, cls, "the agreement")
        return agreement

    @property
    def canonical(self) -> bytes:
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(b"colonnade/agreement/1" + self.canonical).digest()

    @property
    def is_horizontal(self) -> bool:
        return self.job.mode == "horizontal"

    @property
    def ring(self) -> tuple[Party, ...]:
        """The label holder (the hub) or the coordinator first, then the others in the agreement's order."""
        return tuple(sorted(self.parties, key=lambda party: party.role not in ("label holder", "coordinator")))

    @property
    def is_network(self) -> bool:
        return self.model.kind.startswith("network")

    @property
    def feature_holders(self) -> int:
        return len(self.parties) - 1

    @property
    def clients(self) -> tuple[str, ...]:
        """Who trains in a horizontal job, in the agreement's order."""
        trains = ("client", "coordinator") if self.job.coordinator_trains else ("client",)
        return tuple(party.name for party in self.parties if party.role in trains)

    @property
    def quorum(self) -> int:
        """So many clients a horizontal job needs to begin."""
        plan = self.horizontal or Horizontal()
        return plan.needed(plan.clients.asked(len(self.clients)))

    def peers(self, name: str) -> tuple[Party, ...]:
        """Whom this party talks to, in the ring's order: everybody, or in a star of clients the coordinator alone."""
        others = tuple(party for party in self.ring if party.name != name)
        return others[:1] if self.is_horizontal and self.ring[0].name != name else others

    def party(self, name: str) -> Party:
        for party in self.parties:
            if party.name == name:
                return party
        raise LocalError(f"the agreement has no party named {name!r}")

    def listens(self, name: str, peer: str) -> bool:
        """Of two parties the earlier in the agreement that has an endpoint listens; a coordinator always does."""
        if self.is_horizontal:
            return name == self.ring[0].name
        first = next(party for party in self.parties if party.endpoint and party.name in (name, peer))
        return first.name == name

    def check_expiry(self, today: date | None = None) -> None:
        """Raises Refused once the last day has passed (UTC)."""
        if (today or datetime.now(UTC).date()) > self.expires:
            raise Refused(f"the agreement expired on {self.expires}; agree on a new one")

    def approve(self, identity: Identity) -> bytes:
        return identity.sign("approval", self.digest)

    def approved(self, name: str, signature: bytes) -> bool:
        return self.party(name).identity.signed("approval", self.digest, signature)


def flatten(agreement: Agreement) -> dict[str, Any]:
    """`{"model.C": 1.0, "parties.bank.role": ...}`: every field by its path."""
    plain = msgspec.to_builtins(agreement)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                name = inner.get("name", number) if isinstance(inner, dict) else number
                flat[f"{prefix}.{name}.place"] = number  # the order of the parties matters
                walk(f"{prefix}.{name}", inner)
        else:
            flat[prefix] = value

    walk("", plain)
    return flat


def differences(ours: Agreement, theirs: bytes) -> list[tuple[str, Any, Any]]:
    """Field by field: path, our value, theirs (from canonical bytes); None where a side lacks it.

    Raises:
        ValueError: the text is no agreement of this version; nothing unchecked is looked at.
    """
    try:
        other = msgspec.json.decode(theirs, type=Agreement)
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("the text of its agreement is not one of this version of Colonnade") from None
    left, right = flatten(ours), flatten(other)
    return [
        (path, left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    ]
