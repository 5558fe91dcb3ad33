"""Audits at our own premises: a sample that nobody chose finds foreign ids, and an escrowed key shows what was sent."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import hypergeom

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.identity import Identity
from parties.memory import play
from parties.party_file import Party
from parties.sealing import seal, unseal
from parties.session import Session
from parties.tables import Source
from psi.align import Alignment, align
from psi.audit import _reach, at_home, audit
from psi.audit import replay_run as replay
from psi.commitment import leaves, root, sample
from psi.escrow import ESCROW, Escrow, opening, sealed_escrow
from psi.identifiers import Identifiers, canonical
from psi.job import House as Premises
from psi.job import intersect, prepare
from psi.report import Check, Report, as_file, countersigned, make_report
from psi.verify import load_report
from tests.conftest import IDENTITIES, NAMES, Stream, agree, nonces, parties

COMPLIANCE = Identity._from_secrets("compliance", Stream("c/c")(32), Stream("c/s")(32))
Table = Mapping[str, Sequence[str]]
CUSTOMERS: dict[str, Table] = {
    "bank": {"customer": [*(f"Klant {number}" for number in range(40)), "klant 0", ""]},
    "grocer": {"customer": [f"klant {number}" for number in range(10, 60)]},
    "mill": {"customer": [f"KLANT {number}" for number in range(5, 45)]},
}
CASCADE = {"fields": {"number": "text/1", "name": "text/1", "born": "date/1"}, "keys": [["number"], ["name", "born"]]}
PEOPLE: dict[str, Table] = {  # numbers are common up to 7; names and dates find others
    name: {
        "number": [f"{n}" if n < 8 else ("" if n == 11 else f"{name} {n}") for n in who],
        "name": [f"N {n}" for n in who],
        "born": [f"19{n + 50}-01-01" for n in who],
    }
    for name, who in {"bank": range(12), "grocer": range(2, 14), "mill": range(1, 13)}.items()
}


@dataclass(frozen=True)
class House:
    """What one party has after a run."""

    ids: Identifiers
    alignment: Alignment
    report: Report

    @property
    def opening(self) -> bytes:
        return opening(self.alignment.secrets)

    @property
    def escrow(self) -> bytes:
        return sealed_escrow(COMPLIANCE.public, bytes.fromhex(self.report.session), self.alignment)


def read(agreement: Agreement, table: Table) -> Identifiers:
    return canonical(table, agreement.identifiers, duplicates="first", empty="drop")


def meet(agreement: Agreement, tables: Mapping[str, Table] = CUSTOMERS, seed: str = "run") -> dict[str, House]:
    names = [party.name for party in agreement.parties]

    def role(session: Session) -> House:
        ids = read(agreement, tables[session.name])
        alignment = align(session, ids, randomness=Stream(f"{seed}/{session.name}"))
        escrow = COMPLIANCE.public.fingerprint
        return House(ids, alignment, countersigned(session, make_report(session, alignment, ids, escrow=escrow)))

    roles, count = dict.fromkeys(names, role), len(names)
    return play(roles, agreement, identities=parties(count), nonces=nonces(count, seed))


AGREEMENT = agree(2)


@pytest.fixture(scope="module")
def houses() -> dict[str, House]:
    return meet(AGREEMENT)


@pytest.fixture(scope="module")
def bank(houses: dict[str, House]) -> House:
    return houses["bank"]


def statuses(checks: list[Check]) -> list[str]:
    return [check.status for check in checks]


def failed(checks: list[Check]) -> list[str]:
    return [check.name.split(": ", 1)[1] for check in checks if check.status == "FAIL"]


def changed(report: Report, *path: Any, to: Any) -> Report:
    plain = msgspec.to_builtins(report)
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return msgspec.convert(plain, Report)


KEPT = "the leaves kept are those committed to"
COUNTS = "our table gives the counts that the report states"
OPENED = "opened leaves are the salted ids of our table"
EXTRACT = "opened ids are in the auditor's extract"


# ---- a sample of the committed ids


@pytest.mark.parametrize("count", [1, 2, 39, 40, 41, 1000])
def test_an_honest_partys_leaves_open(count: int, houses: dict[str, House], tmp_path: Path) -> None:
    for name, house in houses.items():
        path = tmp_path / name
        path.write_bytes(house.opening)
        for given in (house.opening, path):
            checks = audit(house.report, given, house.ids, count, against=house.ids)
            assert statuses(checks) == ["PASS"] * 4
            kept = len(house.ids)
            assert checks[2].detail.startswith(f"{min(count, kept)} of {kept} leaves opened")


@pytest.mark.parametrize("agreement", [agree(3, identifiers=CASCADE), agree(2, intersection={"result": "size"})])
def test_every_key_of_a_row_is_committed_to(agreement: Agreement) -> None:
    for name, house in meet(agreement, PEOPLE if len(agreement.identifiers.fields) == 3 else CUSTOMERS).items():
        assert statuses(audit(house.report, house.opening, house.ids, 5, house.ids)) == ["PASS"] * 4
        if len(house.ids.keys) == 2:
            table = dict(PEOPLE[name]) | {"name": [*PEOPLE[name]["name"][:-1], "another"]}
            other = read(agreement, table)
            assert failed(audit(house.report, house.opening, other, 12)) == [OPENED]
            assert failed(audit(house.report, house.opening, house.ids, 12, other)) == [EXTRACT]


@pytest.mark.parametrize(
    ("count", "kept"), [(459, 100_000), (459, 10**7), (1, 3), (50, 40_000), (300, 300), (299, 300)]
)
def test_an_audit_says_what_a_sample_of_its_size_finds(count: int, kept: int, bank: House) -> None:
    """Against scipy's hypergeometric distribution; the text rounds down."""
    expected = 100 * hypergeom.sf(0, kept, math.ceil(kept / 100), count)
    text = _reach(count, kept)
    told = float(text.split()[-2])
    assert told <= expected + 1e-9
    assert expected - told < 0.1 + 1e-9
    if (count, kept) == (459, 100_000):
        assert text == "459 of 100,000 leaves opened; a deviation of 1 % would be found with 99.0 %"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:32] + bytes([data[32] ^ 1]) + data[33:],
        lambda data: data[:-1] + bytes([data[-1] ^ 128]),
        lambda data: data[:-32],
        lambda data: data + bytes(32),
        lambda data: data[:-1],
        lambda data: data[:32] + data[64:96] + data[32:64] + data[96:],
        lambda data: data[:32],
        lambda data: b"",
    ],
)
def test_altered_leaves_are_found(spoil: Callable[[bytes], bytes], bank: House) -> None:
    checks = audit(bank.report, spoil(bank.opening), bank.ids, 1)
    assert failed(checks) == [KEPT]
    assert statuses(checks) == ["FAIL", "PASS", "NOT RUN"]


def test_swapped_salts_are_found(bank: House, houses: dict[str, House]) -> None:
    for salts in (bytes(32), houses["grocer"].opening[:32]):
        checks = audit(bank.report, salts + bank.opening[32:], bank.ids, 1)
        assert failed(checks) == [OPENED]
        assert "1 of 1 opened are not as committed; the first is row" in checks[2].detail


def test_anothers_commitment_is_found(bank: House, houses: dict[str, House]) -> None:
    assert failed(audit(houses["grocer"].report, bank.opening, bank.ids, 5)) == [KEPT, COUNTS]
    root_of_another = changed(bank.report, "input", "merkle_root", to=houses["grocer"].report.input.merkle_root)
    assert failed(audit(root_of_another, bank.opening, bank.ids, 5)) == [KEPT]


def test_another_table_is_found(bank: House) -> None:
    ids = [f"Klant {number}" for number in range(40)]
    other = read(AGREEMENT, {"customer": [*ids[:-1], "klant 99", "klant 0", ""]})
    checks = audit(bank.report, bank.opening, other, 40)
    assert failed(checks) == [OPENED]
    assert checks[2].detail == "1 of 40 opened are not as committed; the first is row 39 of our table, from 0"
    opened = set(sample(bytes.fromhex(bank.report.audit_seed), 40, 20).tolist())
    for number in (min(opened), min(set(range(40)) - opened)):  # a sample finds what it opens, and that alone
        swapped = [*ids[:number], "klant 99", *ids[number + 1 :], "klant 0" if number else "klant 1", ""]
        found = failed(audit(bank.report, bank.opening, read(AGREEMENT, {"customer": swapped}), 20))
        assert found == ([OPENED] if number in opened else [])
    moved = read(AGREEMENT, {"customer": [*ids[::-1], "klant 0", ""]})
    assert failed(audit(bank.report, bank.opening, moved, 40)) == [OPENED]
    fewer = audit(bank.report, bank.opening, read(AGREEMENT, {"customer": ids[:39]}), 40)
    assert failed(fewer) == [COUNTS]
    assert statuses(fewer)[2] == "NOT RUN"


def test_the_extract_may_have_other_rows_order_and_spelling(bank: House) -> None:
    rows = [f"KLANT   {number}" for number in range(100, -1, -1)]
    extract = read(AGREEMENT, {"customer": [*rows, "", "klant 3"]})
    checks = audit(bank.report, bank.opening, bank.ids, 40, extract)
    assert statuses(checks) == ["PASS"] * 4
    assert checks[3].detail == "103 rows of it"
    extract = read(AGREEMENT, {"customer": [row for row in rows if row not in ("KLANT   7", "KLANT   8")]})
    checks = audit(bank.report, bank.opening, bank.ids, 40, extract)
    assert failed(checks) == [EXTRACT]
    assert checks[3].detail == "2 of 40 opened are not in the extract; the first is row 7 of our table, from 0"


def test_an_extract_under_other_rules_and_an_empty_sample_are_refused(bank: House) -> None:
    other = canonical({"customer": ["0042"]}, agree(2, identifiers={"fields": {"customer": "digits/1"}}).identifiers)
    with pytest.raises(LocalError, match="other keys or rules"):
        audit(bank.report, bank.opening, bank.ids, 5, other)
    for count in (0, -1):
        with pytest.raises(LocalError, match="1 or more"):
            audit(bank.report, bank.opening, bank.ids, count)


def test_a_missing_or_empty_file_is_named(bank: House, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"nowhere.bin: No such file"):
        audit(bank.report, tmp_path / "nowhere.bin", bank.ids, 5)
    (tmp_path / "empty.bin").touch()
    with pytest.raises(LocalError, match=r"empty.bin: it is empty"):
        audit(bank.report, tmp_path / "empty.bin", bank.ids, 5)


def test_no_answer_holds_an_id(bank: House) -> None:
    extract = read(AGREEMENT, {"customer": ["nobody"]})
    table = read(AGREEMENT, {"customer": [f"other {number}" for number in range(40)]})
    checks = audit(bank.report, bank.opening, bank.ids, 40, extract)
    checks += audit(bank.report, bank.opening, table, 40)
    checks += replay(bank.report, bank.escrow, COMPLIANCE, table)
    assert failed(checks) == [EXTRACT, COUNTS, OPENED, COUNTS, POINTS]
    text = repr(checks).lower()
    assert "klant" not in text
    assert "nobody" not in text
    assert "other 1" not in text


# ---- ids that a party made up


def test_one_percent_of_foreign_ids_is_found_by_an_extract(tmp_path: Path) -> None:
    """The bank adds ten guessed ids to a thousand: a run that passes every other check."""
    own = [f"klant {number}" for number in range(990)]
    guessed = [f"guess {number}" for number in range(10)]
    mixed = [name for group in range(10) for name in (*own[group * 99 : (group + 1) * 99], guessed[group])]
    house = meet(AGREEMENT, {"bank": {"customer": mixed}, "grocer": {"customer": own}})["bank"]
    assert failed(audit(house.report, house.opening, house.ids, 459)) == []
    checks = audit(house.report, house.opening, house.ids, 459, read(AGREEMENT, {"customer": own}))
    assert failed(checks) == [EXTRACT]
    opened = sample(bytes.fromhex(house.report.audit_seed), 1000, 459)
    found = sum(mixed[number].startswith("guess") for number in opened.tolist())
    assert checks[3].detail.startswith(f"{found} of 459 opened are not in the extract; the first is row ")


def test_a_sample_of_459_finds_one_percent_in_99_of_100_audits(bank: House) -> None:
    """A large input, and seeds as sessions would draw them: the misses are as many as the binomial says."""
    size, rng = 10_000, np.random.default_rng(1)
    foreign = rng.choice(size, size // 100, replace=False)
    wrong = np.zeros(size, np.bool_)
    wrong[foreign] = True
    tries = 2000
    misses = sum(not wrong[sample(Stream(f"seed {number}")(32), size, 459)].any() for number in range(tries))
    odds = hypergeom.pmf(0, size, size // 100, 459)
    assert odds < 0.01
    assert abs(misses - tries * odds) < 4 * math.sqrt(tries * odds)

    names = [f"guess {number}" if odd else f"klant {number}" for number, odd in enumerate(wrong.tolist())]
    ids, key = read(AGREEMENT, {"customer": names}), bytes(range(32))
    tree = leaves(key, 0, ids.leaf_values(np.arange(size)))
    extract = read(AGREEMENT, {"customer": [name for name in names if name.startswith("klant")]})
    report = changed(bank.report, "input", "rows", to=ids.counts)
    report = changed(report, "input", "merkle_root", to=root(tree).hex())
    for number in range(8):
        seed = Stream(f"seed {number}")(32)
        report = changed(report, "audit_seed", to=seed.hex())
        checks = audit(report, key + tree.tobytes(), ids, 459, extract)
        assert failed(checks) == ([EXTRACT] if wrong[sample(seed, size, 459)].any() else [])


# ---- what we sent, computed again

OPENS = "the escrow opens with the compliance key that the report names"
SESSION = "the escrow is of this session"
SIZE = "step 1: our set is as large as announced"
POINTS = "step 1: we sent the points that the escrowed key makes of our table"


@pytest.mark.parametrize(
    "agreement",
    [
        *(agree(k, intersection={"result": result}) for k in (2, 3) for result in ("rows", "size")),
        agree(3, intersection={"result": "rows to the label holder", "bucket": 100}),
        agree(2, intersection={"suite": "P256_XMD:SHA-256_SSWU_RO_"}),
    ],
    ids=["2 rows", "2 size", "3 rows", "3 size", "3 label holder", "P-256"],
)
def test_an_honest_run_replays(agreement: Agreement, tmp_path: Path) -> None:
    for name, house in meet(agreement).items():
        (tmp_path / name).write_bytes(house.escrow)
        for sealed in (house.escrow, tmp_path / name):
            checks = replay(house.report, sealed, COMPLIANCE, house.ids)
            assert statuses(checks) == ["PASS"] * 5
        assert checks[3].detail.startswith(f"{len(house.ids)} ids, 64 canaries, ")


@pytest.mark.parametrize("count", [2, 3])
def test_every_step_of_a_cascade_replays(count: int) -> None:
    houses = meet(agree(count, identifiers=CASCADE), PEOPLE)
    for house in houses.values():
        assert [step.size for step in house.report.steps] == [6, 4]
        checks = replay(house.report, house.escrow, COMPLIANCE, house.ids)
        assert statuses(checks) == ["PASS"] * 8
        assert len({check.name for check in checks}) == 8
    bank = houses["bank"]
    plain = msgspec.msgpack.decode(unseal(COMPLIANCE, bank.escrow, ESCROW), type=Escrow)
    entries = np.frombuffer(plain.steps[0].matched, "<u4")
    assert sorted(entries.tolist()) == [2, 3, 4, 5, 6, 7]
    assert plain.steps[1].matched == b""
    for matched in (entries[:-1], np.array([0, *entries[1:]]), np.array([2, 2, *entries[2:]]), entries + 1000):
        step = msgspec.structs.replace(plain.steps[0], matched=matched.astype("<u4").tobytes())
        lie = msgspec.structs.replace(plain, steps=[step, plain.steps[1]])
        again = seal(COMPLIANCE.public, msgspec.msgpack.encode(lie), ESCROW)
        assert failed(replay(bank.report, again, COMPLIANCE, bank.ids))


def test_rows_that_were_not_offered_in_a_step_cannot_have_been_matched_in_it() -> None:
    """Row 11 of the bank has no number. A list that claims it leaves it out of the second step, where it was."""
    bank = meet(agree(2, identifiers=CASCADE), PEOPLE)["bank"]
    plain = msgspec.msgpack.decode(unseal(COMPLIANCE, bank.escrow, ESCROW), type=Escrow)
    entries = np.frombuffer(plain.steps[0].matched, "<u4")
    assert PEOPLE["bank"]["number"][11] == "" and 11 not in entries
    assert replay(bank.report, bank.escrow, COMPLIANCE, bank.ids)[5].name.endswith(LEFT_OUT)
    lie = np.array([11, *entries[1:]]).astype("<u4").tobytes()
    step = msgspec.structs.replace(plain.steps[0], matched=lie)
    again = seal(
        COMPLIANCE.public, msgspec.msgpack.encode(msgspec.structs.replace(plain, steps=[step, plain.steps[1]])), ESCROW
    )
    assert LEFT_OUT in failed(replay(bank.report, again, COMPLIANCE, bank.ids))


LEFT_OUT = "step 1: what later steps leave out is what was common"


def test_another_compliance_key_does_not_open(bank: House) -> None:
    checks = replay(bank.report, bank.escrow, IDENTITIES["mill"], bank.ids)
    assert failed(checks) == [OPENS]
    assert len(checks) == 1
    assert "does not open with the key" in checks[0].detail


def test_an_escrow_for_another_key_than_the_report_names_is_found(bank: House) -> None:
    session = bytes.fromhex(bank.report.session)
    sealed = sealed_escrow(IDENTITIES["mill"].public, session, bank.alignment)
    assert failed(replay(bank.report, sealed, IDENTITIES["mill"], bank.ids)) == [OPENS]


@pytest.mark.parametrize("place", [0, 31, 32, 100, -17, -1])
def test_a_tampered_escrow_does_not_open(place: int, bank: House) -> None:
    sealed = bytearray(bank.escrow)
    sealed[place] ^= 1
    assert failed(replay(bank.report, bytes(sealed), COMPLIANCE, bank.ids)) == [OPENS]
    assert failed(replay(bank.report, b"", COMPLIANCE, bank.ids)) == [OPENS]


def test_a_missing_escrow_is_named(bank: House, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot read the escrow .*nowhere"):
        replay(bank.report, tmp_path / "nowhere.bin", COMPLIANCE, bank.ids)


def sealed_with(house: House, **facts: Any) -> bytes:
    """An escrow that its owner made up."""
    plain = msgspec.msgpack.decode(unseal(COMPLIANCE, house.escrow, ESCROW), type=Escrow)
    step = {key: value for key, value in facts.items() if key in ("mask", "shuffle", "decoys")}
    whole = {key: value for key, value in facts.items() if key not in step}
    lie = msgspec.structs.replace(plain, steps=[msgspec.structs.replace(plain.steps[0], **step)])
    return seal(COMPLIANCE.public, msgspec.msgpack.encode(msgspec.structs.replace(lie, **whole)), ESCROW)


@pytest.mark.parametrize("size", [0, 31, 32, 33])
@pytest.mark.parametrize("secret", ["mask", "shuffle", "decoys"])
def test_other_secrets_in_the_escrow_are_found(secret: str, size: int, bank: House) -> None:
    assert failed(replay(bank.report, sealed_with(bank), COMPLIANCE, bank.ids)) == []
    sealed = sealed_with(bank, **{secret: b"\x07" * size})
    assert failed(replay(bank.report, sealed, COMPLIANCE, bank.ids)) == [POINTS]


def test_the_escrow_of_another_session_is_found(bank: House) -> None:
    again = meet(AGREEMENT, seed="again")["bank"]
    assert failed(replay(bank.report, again.escrow, COMPLIANCE, bank.ids)) == [SESSION]
    assert failed(replay(bank.report, sealed_with(bank, session=b""), COMPLIANCE, bank.ids)) == [SESSION]
    assert failed(replay(bank.report, sealed_with(bank, steps=[]), COMPLIANCE, bank.ids)) == [SESSION]
    garbage = seal(COMPLIANCE.public, b"\xc1 nothing", ESCROW)
    checks = replay(bank.report, garbage, COMPLIANCE, bank.ids)
    assert (failed(checks), checks[0].detail) == ([OPENS], "its content is not an escrow of this version")


def test_another_table_does_not_replay(bank: House) -> None:
    ids = [f"Klant {number}" for number in range(40)]
    other = read(AGREEMENT, {"customer": [*ids[:-1], "klant 99", "klant 0", ""]})
    assert failed(replay(bank.report, bank.escrow, COMPLIANCE, other)) == [POINTS]
    fewer = read(AGREEMENT, {"customer": ids[:-1]})
    assert failed(replay(bank.report, bank.escrow, COMPLIANCE, fewer)) == [COUNTS, SIZE, POINTS]


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("steps", 0, "decoys"), 65, [SIZE, POINTS]),
        (("steps", 0, "set_sizes", "bank"), 169, [SIZE]),
        (("flows", 0, "digest"), "00" * 32, [POINTS]),
        (("flows", 0, "owner"), "grocer", [POINTS]),
        (("keys", "escrow"), "", [OPENS]),
        (("input", "rows", "read"), 43, [COUNTS]),
    ],
)
def test_a_report_that_states_other_than_was_sent_is_found(
    path: tuple[Any, ...], value: Any, found: list[str], bank: House
) -> None:
    assert (bank.report.flows[0].direction, bank.report.flows[0].what) == ("sent", "points")
    assert failed(replay(changed(bank.report, *path, to=value), bank.escrow, COMPLIANCE, bank.ids)) == found


def test_decoys_beyond_the_agreed_number_are_found(bank: House) -> None:
    """One id fewer and one decoy more: the sum is right, and so are the points; the agreement has no such decoys."""
    table = read(AGREEMENT, {"customer": CUSTOMERS["bank"]["customer"][:39]})
    report = changed(bank.report, "steps", 0, "decoys", to=65)
    assert SIZE in failed(replay(report, bank.escrow, COMPLIANCE, table))


# ---- as a party's files have it

FILES = """
agreement = "agreement.toml"
key = "{name}.key"
output = "out/{name}"
workers = 1
[table]
path = "{name}.csv"
id = "client"
empty = "drop"
duplicates = "first"
[policy]
escrow = "compliance.pub"
"""


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parties' folders after a run, each with what `psi.job` keeps for auditors."""
    folder = tmp_path_factory.mktemp("premises")
    tables = [
        f'[[parties]]\nname = "{one.name}"\nrole = "{one.role}"\npublic_key = "{one.public_key}"\n'
        f'endpoint = "{one.endpoint}"\n'
        for one in AGREEMENT.parties
    ]
    job = 'title = "t"\npurpose = "p"\nlegal_basis = "l"\nexpires = 2999-12-31\n'
    (folder / "agreement.toml").write_text(job + "".join(tables) + "[intersection]\nminimum = 1\n")
    (folder / "compliance.pub").write_text(f"{COMPLIANCE.public}\n")
    COMPLIANCE.save(folder / "compliance.key")
    homes = {}
    for name, identity in parties(2).items():
        identity.save(folder / f"{name}.key")
        (folder / f"{name}.csv").write_text("client,x\n" + "".join(f"{one},1\n" for one in CUSTOMERS[name]["customer"]))
        (folder / f"{name}.toml").write_text(FILES.format(name=name))
        (folder / "out" / name).mkdir(parents=True)
        homes[name] = Party(folder / f"{name}.toml")

    def role(session: Session) -> None:
        party = homes[session.name]
        intersect(session, prepare(party), house=Premises(party))

    play(dict.fromkeys(homes, role), homes["bank"].agreement, identities=parties(2))
    return folder


def test_a_party_audits_and_replays_its_own_report(premises: Path) -> None:
    extract = premises / "extract.csv"
    extract.write_text("client,since\n" + "".join(f" KLANT {number} ,1\n" for number in range(60)) + ",2\nklant 1,3\n")
    for name in ("bank", "grocer"):
        party, path = Party(premises / f"{name}.toml"), premises / "out" / name / "psi_report.json"
        checks = at_home(party, path, sample=12, against=extract, replay=premises / "compliance.key")
        assert statuses(checks) == ["PASS"] * 9
        assert checks[3].detail == "62 rows of it"
        assert len(at_home(party, path, sample=12)) == 3
        assert len(at_home(party, path, replay=premises / "compliance.key")) == 5
        checks = at_home(party, path, replay=premises / f"{name}.key")
        assert failed(checks) == [OPENS]


def test_what_cannot_be_audited_is_refused(premises: Path, tmp_path: Path) -> None:
    party, path = Party(premises / "bank.toml"), premises / "out" / "bank" / "psi_report.json"
    with pytest.raises(LocalError, match="is not a report of bank"):
        at_home(party, premises / "out" / "grocer" / "psi_report.json", sample=5)
    with pytest.raises(LocalError, match="give --sample NUMBER too"):
        at_home(party, path, against=premises / "bank.csv")
    for name in ("psi_report.json", "renamed.json"):
        (tmp_path / name).write_bytes(path.read_bytes())
        with pytest.raises(LocalError, match=r"there is no psi_opening.bin beside"):
            at_home(party, tmp_path / name, sample=5)
        with pytest.raises(LocalError, match=r"there is no psi_escrow.bin beside"):
            at_home(party, tmp_path / name, replay=premises / "compliance.key")
    (tmp_path / "extract.csv").write_text("customer\nklant 1\n")
    with pytest.raises(LocalError, match=r"extract.csv.*'client'"):
        at_home(party, path, sample=5, against=tmp_path / "extract.csv")


def reported(path: Path, task: str, folder: Path) -> Path:
    """The same run's evidence, under another task; nobody looks at signatures here."""
    shutil.copytree(path.parent, folder)
    plain = msgspec.to_builtins(load_report(path)) | {"task": task}
    (folder / path.name).write_bytes(as_file(msgspec.convert(plain, Report)))
    return folder / path.name


def test_a_rehearsal_is_not_audited(premises: Path, tmp_path: Path) -> None:
    party, path = Party(premises / "bank.toml"), premises / "out" / "bank" / "psi_report.json"
    with pytest.raises(LocalError, match="is the report of a rehearsal: its ids were made up"):
        at_home(party, reported(path, "selftest", tmp_path / "rehearsal"), sample=5)


def test_a_scoring_is_audited_against_the_file_that_was_scored(premises: Path, tmp_path: Path) -> None:
    party, path = Party(premises / "bank.toml"), premises / "out" / "bank" / "psi_report.json"
    scored = reported(path, "score with it", tmp_path / "scored")
    (tmp_path / "other.csv").write_text("client,x\nklant 1,1\n")
    assert statuses(at_home(party, scored, sample=40, source=Source(premises / "bank.csv"))) == ["PASS"] * 3
    checks = at_home(party, scored, sample=40, source=Source(tmp_path / "other.csv"))
    assert failed(checks) == [COUNTS]
    assert checks[1].detail.endswith("; a scoring took --input FILE: give the same")
    assert "--input" not in at_home(party, path, sample=40, source=Source(tmp_path / "other.csv"))[1].detail


def test_secrets_are_in_no_plain_file(bank: House) -> None:
    for step in bank.alignment.secrets.steps:
        for secret in step:
            assert secret not in bank.escrow
            assert secret not in bank.opening
            assert secret.hex() not in repr(bank.report)
    assert NAMES[0] == bank.report.party
