"""A party's own file (private): its key, its table and columns, its policy. Policy can only be stricter than the
agreement. Paths are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from parties.agreement import Agreement, parse_json, parse_toml
from parties.errors import LocalError, Refused
from parties.files import write_whole
from parties.identity import Identity

Count = Annotated[int, Meta(ge=0)]


class TableChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which columns of which file take part. `label` and `positive` at the label holder only."""

    path: str
    id: str
    features: Annotated[tuple[str, ...], Meta(min_length=1)]
    label: str = ""
    positive: str = ""
    separator: Annotated[str, Meta(min_length=1, max_length=1)] = ","


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What we refuse although the agreement would allow it."""

    minimum_intersection: Count = 0
    minimum_to_score: Count = 0
    minimum_key_bits: Count = 0
    maximum_exchanges: Annotated[int, Meta(ge=1)] = 1_000_000
    forbid: tuple[Literal["plaintext", "aggregate", "masked", "ciphertext"], ...] = ()


class PartyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `colonnade init` writes as NAME.toml."""

    agreement: str
    key: str
    output: str
    table: TableChoice
    policy: Policy = Policy()
    listen: str = ""


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
        if self.is_label_holder != bool(self.file.table.label):
            raise LocalError(f"{path}: the label holder, and nobody else, names a label in [table]")
        self._check_policy()

    def _check_policy(self) -> None:
        policy, agreement = self.file.policy, self.agreement
        if agreement.encryption.key_bits < policy.minimum_key_bits:
            raise Refused(f"our policy wants keys of {policy.minimum_key_bits} bits; the agreement has fewer")
        if agreement.model.max_exchanges > policy.maximum_exchanges:
            raise Refused(f"our policy allows {policy.maximum_exchanges} exchanges; the agreement allows more")

    def _at(self, name: str) -> Path:
        return self.path.parent / Path(name).expanduser()

    @property
    def table_path(self) -> Path:
        return self._at(self.file.table.path)

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
