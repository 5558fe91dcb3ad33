"""A party's own file (private): its key, its table and columns, its policy. Policy can only be stricter than the
agreement. Paths are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from parties.agreement import Agreement, Result
from parties.errors import LocalError, Refused
from parties.files import read_bytes, write_whole
from parties.horizontal import Words
from parties.identity import Identity, PublicIdentity
from parties.parsing import parse_json, parse_toml
from parties.preparation import Preparation
from parties.tables import Source

Count = Annotated[int, Meta(ge=0)]
_REVEALED = get_args(Result)


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one peer may have of us in a period of so many days; 0 is no limit.

    `runs` is the most runs with a peer in it; `distinct_ids` the most distinct ids offered to a peer in it;
    `smallest_difference` the least number of ids in which an input differs from an earlier one, unless equal.
    """

    days: Annotated[int, Meta(ge=1)] = 30
    runs: Count = 0
    distinct_ids: Count = 0
    smallest_difference: Count = 0


class TableChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which columns of which table take part. `label`, `positive` and `weight` (of rows) at the label holder
    only. In a horizontal job the agreement names the columns: `columns` says which of ours they are
    (agreed = ours) where the names differ, `units` in what we measure them, `categories` which words may occur in those
    that the agreement calls categories.

    `path` is a CSV or Parquet file, a folder of Parquet files, an SQLite file, or postgresql://user@host/database; the
    last two with `sql_table`. `id` is our column of the agreement's one field, or a table of field = column.
    """

    path: str = ""
    id: str | dict[str, str] = ""
    features: tuple[str, ...] = ()
    label: str = ""
    positive: str = ""
    weight: str = ""
    separator: Annotated[str, Meta(min_length=1, max_length=1)] = ","
    sql_table: str = ""
    order_by: str = ""
    empty: Literal["fail", "drop"] = "fail"
    duplicates: Literal["fail", "first", "last", "aggregate"] = "fail"
    aggregate: dict[str, Literal["sum", "mean", "max", "count"]] = {}
    columns: dict[str, str] = {}
    units: dict[str, str] = {}
    categories: dict[str, Annotated[Words, Meta(min_length=1)]] = {}

    def __post_init__(self) -> None:
        if (self.duplicates == "aggregate") != bool(self.aggregate):
            raise ValueError('duplicates = "aggregate" goes with aggregate = {column = "sum"}: sum, mean, max or count')
        if self.aggregate and set(self.aggregate) != set(self.features):
            odd = min(set(self.aggregate) ^ set(self.features))
            raise ValueError(f"aggregate must say sum, mean, max or count for every feature, and no other: see {odd!r}")
        if self.weight and (self.aggregate or not self.label):
            raise ValueError('weight goes with a label, and not with duplicates = "aggregate"')
        if self.sql_table and self.duplicates in ("first", "last") and not self.order_by:
            raise ValueError(f"duplicates = {self.duplicates!r} needs order_by: a database gives its rows in any order")


Code = Annotated[str, Meta(pattern=r"^(.+\.py:\w+)?$")]


class OwnModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Our own code, "file.py:function". Of a network it builds a module of torch: `bottom`, below a feature holder's
    embedding, or `top`, at the label holder. Of a horizontal job with model = "own" `file` builds the model, and
    `public` is our copy of the public table of a distillation."""

    bottom: Code = ""
    top: Code = ""
    file: Code = ""
    public: str = ""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What we refuse although the agreement would allow it, and what we keep for our own auditors.

    `escrow` is the public key file of our compliance team (NAME.pub): the keys of every intersection are sealed to it.
    Of a horizontal job: `secure_aggregation` insists on it, `maximum_epsilon` on differential privacy (0: not),
    `minimum_clients` on a quorum, `maximum_rounds` on no more rounds.
    """

    minimum_intersection: Count = 0
    minimum_to_score: Count = 0
    minimum_key_bits: Count = 0
    scheme: Literal["", "paillier", "lattice"] = ""
    maximum_exchanges: Annotated[int, Meta(ge=1)] = 1_000_000
    forbid: tuple[Literal["plaintext", "aggregate", "masked", "ciphertext"], ...] = ()
    most_revealed: Result = "rows"
    escrow: str = ""
    budget: Budget | None = None
    secure_aggregation: bool = False
    maximum_epsilon: Annotated[float, Meta(ge=0)] = 0.0
    minimum_clients: Count = 0
    maximum_rounds: Annotated[int, Meta(ge=1)] = 1_000_000


class PartyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `colonnade init` writes as NAME.toml. `workers`: 0 for one process a core, or "dask://host:port"."""

    agreement: str
    key: str
    output: str
    table: TableChoice = TableChoice()
    model: OwnModel = OwnModel()
    prepare: Preparation = Preparation()
    policy: Policy = Policy()
    listen: str = ""
    workers: Annotated[int, Meta(ge=0, le=1024)] | Annotated[str, Meta(pattern="^dask://.+")] = 0

    def __post_init__(self) -> None:
        gaps = [name for name, column in self.prepare.numbers.items() if column.missing != "refuse"]
        if self.table.duplicates == "aggregate" and (self.prepare.categories or gaps):
            odd = min([*self.prepare.categories, *gaps])
            raise ValueError(f'duplicates = "aggregate" computes with numbers, none missing: see {odd!r} in [prepare]')


class _Approval(msgspec.Struct, forbid_unknown_fields=True):
    party: str
    agreement: str
    signature: str


class Party:
    """Everything of ours, loaded and checked against the agreement before any data is read or sent."""

    def __init__(self, path: Path) -> None:
        """Raises LocalError or Refused."""
        self.path = path
        self.file: PartyFile = parse_toml(path, PartyFile, "the party's file")
        self.agreement_path = self._at(self.file.agreement)
        self.agreement = Agreement.load(self.agreement_path)
        self.identity = Identity.load(self._at(self.file.key))
        self.name = self.identity.name
        if self.agreement.party(self.name).identity != self.identity.public:
            raise Refused(
                f"the agreement lists another key for {self.name} than {self.file.key} holds; ours has the "
                f"fingerprint {self.identity.public.fingerprint}"
            )
        self.is_label_holder = self.agreement.party(self.name).role == "label holder"
        self.trains = self.name in self.agreement.clients
        if not self.file.table.path and (self.trains or not self.agreement.is_horizontal):
            raise LocalError(f"{path}: [table] must say in path where our table is")
        if self.file.table.path and not self.trains and self.agreement.is_horizontal:
            raise LocalError(
                f"{path}: [table] has rows, and the agreement has the coordinator train on none; agree on "
                "coordinator_trains = true in [job], or take [table] out"
            )
        self.id_columns: dict[str, str] = {}
        if self.agreement.is_horizontal:
            self._check_horizontal()
            return
        if self.file.table.columns or self.file.table.units or self.file.table.categories:
            raise LocalError(f"{path}: columns, units and categories in [table] are for horizontal jobs; name features")
        if self.file.table.label and not self.is_label_holder:
            raise LocalError(f"{path}: the label holder, and nobody else, names a label in [table]")
        part, other = ("top", "bottom") if self.is_label_holder else ("bottom", "top")
        wrong = getattr(self.file.model, other) or self.file.model.file or self.file.model.public
        if wrong or (getattr(self.file.model, part) and not self.agreement.is_network):
            raise LocalError(f"{path}: [model] names our own {part} of a network, and nothing else")
        self.id_columns = self._id_columns()
        self._check_policy()

    def _check_horizontal(self) -> None:
        """Our table and our policy against the agreement's columns and plan."""
        policy, choice, agreed, plan = (
            self.file.policy,
            self.file.table,
            self.agreement.columns,
            self.agreement.horizontal,
        )
        if agreed is None or plan is None:
            raise ValueError("a horizontal agreement has columns and a plan")
        named = {*agreed.features, agreed.label}
        if self.file.prepare != Preparation():
            raise LocalError(f"{self.path}: [prepare] is for vertical jobs; standardise = true in [horizontal] scales")
        if choice.features or choice.label:
            raise LocalError(f"{self.path}: the agreement names features and label; say columns = {{ agreed = ours }}")
        if unknown := sorted((choice.columns.keys() | choice.units.keys()) - named):
            raise LocalError(f"{self.path}: [table] speaks of {unknown[0]!r}, which is no column of the agreement")
        if choice.path and (odd := sorted(choice.categories.keys() ^ {*agreed.categories})):
            raise LocalError(
                f"{self.path}: [table] lists categories of the columns that the agreement names, and of no other: see "
                f"{odd[0]!r}"
            )
        for name, unit in choice.units.items():
            if name in agreed.units and unit != agreed.units[name]:
                raise Refused(f"{self.path}: our {name!r} is in {unit!r}, the agreement's in {agreed.units[name]!r}")
        if bool(self.file.model.file) != (plan.model == "own"):
            raise LocalError(f'{self.path}: [model] with file = "model.py:build" goes with model = "own", and only so')
        if bool(self.file.model.public) != (plan.public is not None):
            raise LocalError(f"{self.path}: public in [model] goes with [horizontal.public] of the agreement")
        if policy.secure_aggregation and not plan.secure:
            raise Refused("our policy wants secure aggregation; the agreement does without")
        epsilon = plan.privacy.epsilon if plan.privacy.level != "none" else None
        if policy.maximum_epsilon and (epsilon is None or epsilon > policy.maximum_epsilon):
            has = "no differential privacy" if epsilon is None else f"epsilon {epsilon:g}"
            raise Refused(f"our policy wants an epsilon of at most {policy.maximum_epsilon:g}; the agreement has {has}")
        if self.agreement.quorum < policy.minimum_clients:
            has = f"a quorum of {self.agreement.quorum}"
            raise Refused(f"our policy wants {policy.minimum_clients} clients in every sum; the agreement has {has}")
        if plan.rounds > policy.maximum_rounds:
            raise Refused(f"our policy allows {policy.maximum_rounds} rounds; the agreement has {plan.rounds}")

    def _check_policy(self) -> None:
        policy, agreement = self.file.policy, self.agreement
        if agreement.encryption.key_bits < policy.minimum_key_bits:
            raise Refused(f"our policy wants keys of {policy.minimum_key_bits} bits; the agreement has fewer")
        if policy.scheme and agreement.encryption.scheme != policy.scheme:
            raise Refused(f"our policy wants scheme = {policy.scheme!r}; the agreement has another")
        if agreement.model.max_exchanges > policy.maximum_exchanges:
            raise Refused(f"our policy allows {policy.maximum_exchanges} exchanges; the agreement allows more")

        if _REVEALED.index(policy.most_revealed) < _REVEALED.index(agreement.intersection.result):
            agreed = agreement.intersection.result
            raise Refused(f"our policy reveals {policy.most_revealed!r} at most; the agreement says {agreed!r}")

    def _id_columns(self) -> dict[str, str]:
        """Our column of every field of the agreement."""
        fields, chosen = sorted(self.agreement.identifiers.fields), self.file.table.id
        columns = dict.fromkeys(fields[:1], chosen) if isinstance(chosen, str) else chosen
        if sorted(columns) != fields or not all(columns.values()):
            form = '"our column"' if len(fields) == 1 else f"{{ {', '.join(f'{name!r} = ...' for name in fields)} }}"
            raise LocalError(f"{self.path}: [table] must name our column of each agreed field: id = {form}")
        return {field: columns[field] for field in self.agreement.identifiers.fields}

    def _at(self, name: str) -> Path:
        return self.path.parent / Path(name).expanduser()

    @property
    def source(self) -> Source:
        """Where our table is."""
        choice = self.file.table
        place: str | Path = choice.path if "://" in choice.path else self._at(choice.path)
        return Source(place, choice.separator, choice.sql_table, choice.order_by)

    @property
    def public_source(self) -> Source:
        """Where our copy of the public table is."""
        return Source(self._at(self.file.model.public), self.file.table.separator)

    @property
    def escrow(self) -> PublicIdentity | None:
        """The compliance team's public key, if our policy names one. Raises LocalError when it cannot be read."""
        if not self.file.policy.escrow:
            return None
        path = self._at(self.file.policy.escrow)
        try:
            return PublicIdentity.parse(read_bytes(path, "the compliance key").decode().strip())
        except ValueError:
            raise LocalError(f"{path} is not a public key as 'colonnade keygen' writes it into NAME.pub") from None

    @property
    def output(self) -> Path:
        return self._at(self.file.output)

    @property
    def approval_path(self) -> Path:
        return self.agreement_path.with_suffix(f".{self.name}.approval")

    def sign(self) -> Path:
        """Approve the agreement as it stands: writes our signature beside it."""
        self.agreement.check_expiry()
        approval = _Approval(self.name, self.agreement.digest.hex(), self.agreement.approve(self.identity).hex())
        write_whole(self.approval_path, msgspec.json.format(msgspec.json.encode(approval), indent=2) + b"\n")
        return self.approval_path

    @property
    def approval(self) -> bytes:
        """Our signature under the agreement. Raises Refused when there is none or the agreement has changed since."""
        self.agreement.check_expiry()
        if not self.approval_path.exists():
            raise Refused(f"{self.agreement_path} is not approved by us; read it and run 'colonnade sign {self.path}'")
        approval: _Approval = parse_json(self.approval_path, _Approval, "our approval")
        try:
            signature = bytes.fromhex(approval.signature)
        except ValueError:
            signature = b""
        if not self.agreement.approved(self.name, signature):
            raise Refused(f"{self.agreement_path} has changed since we approved it; read it and sign it again")
        return signature
