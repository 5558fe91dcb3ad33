"""Reports and their offline checks: what honest parties write passes, and no single change goes unseen."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.ledger import Ledger
from parties.memory import play
from parties.session import TRAIN, Session
from psi.align import align
from psi.budget import Limits, Use
from psi.identifiers import canonical as canonical_ids
from psi.record import check_record
from psi.report import (
    Check,
    Report,
    SelfTest,
    as_file,
    canonical,
    common_facts,
    countersigned,
    countersigned_statement,
    make_report,
    report_digest,
)
from psi.verify import each_check, load_report, verify
from tests.conftest import IDENTITIES, NAMES, Stream, agree, nonces, parties

Plain = dict[str, Any]
CUSTOMERS: dict[str, dict[str, list[str]]] = {
    "bank": {"customer": [*(f"Klant {number}" for number in range(40)), "klant 0", ""]},
    "grocer": {"customer": [f"klant {number}" for number in range(10, 60)]},
    "mill": {"customer": [f"KLANT {number}" for number in range(5, 45)]},
}
CASCADE = {"fields": {"number": "text/1", "name": "text/1", "born": "date/1"}, "keys": [["number"], ["name", "born"]]}
PEOPLE: dict[str, dict[str, list[str]]] = {  # everybody's numbers are gone from 8 on; names and dates find them
    name: {
        "number": [f"{n}" if n < 8 else f"{name} {n}" for n in who],
        "name": [f"N {n}" for n in who],
        "born": [f"19{n + 50}-01-01" for n in who],
    }
    for name, who in {"bank": range(12), "grocer": range(2, 14), "mill": range(1, 13)}.items()
}
RESULTS = ("rows", "rows to the label holder", "size")


def write_reports(
    folder: Path,
    agreement: Agreement,
    tables: Mapping[str, Mapping[str, Sequence[str]]] = CUSTOMERS,
    task: str = TRAIN,
    **given: Any,
) -> dict[str, Path]:
    """Run the parties, each replayable; each has a folder with its report and its ledger."""
    names = [party.name for party in agreement.parties]

    def role(session: Session) -> Report:
        ids = canonical_ids(tables[session.name], agreement.identifiers, duplicates="first", empty="drop")
        alignment = align(session, ids, randomness=Stream(session.name))
        facts = {what: fact(session) if callable(fact) else fact for what, fact in given.items()}
        return countersigned(session, make_report(session, alignment, ids, **facts))

    def ledger(owner: Any, path: None, allowed: frozenset[str]) -> Ledger:
        return Ledger(owner, folder / owner.name / "ledger.jsonl", allowed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parties.memory.Ledger", ledger)
        for name in names:
            (folder / name).mkdir(parents=True)
        roles = dict.fromkeys(names, role)
        found = play(roles, agreement, identities=parties(len(names)), nonces=nonces(len(names)), task=task)
    for name in names:
        (folder / name / "psi_report.json").write_bytes(as_file(found[name]))
    return {name: folder / name / "psi_report.json" for name in names}


AGREEMENTS = {count: agree(count) for count in (2, 3)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    return {count: write_reports(tmp_path_factory.mktemp("runs") / str(count), AGREEMENTS[count]) for count in (2, 3)}


@pytest.fixture
def run(written: dict[int, dict[str, Path]], tmp_path: Path) -> Callable[[int], dict[str, Path]]:
    """A copy of an honest run, to be spoilt."""

    def copied(count: int = 3) -> dict[str, Path]:
        for name, path in written[count].items():
            shutil.copytree(path.parent, tmp_path / name)
        return {name: tmp_path / name / "psi_report.json" for name in written[count]}

    return copied


def by_status(checks: list[Check], status: str) -> list[str]:
    return [check.name for check in checks if check.status == status]


def failed(paths: list[Path], agreement: Agreement | None = None) -> list[str]:
    return by_status(verify(paths, agreement), "FAIL")


def edit(path: Path, change: Callable[[Plain], object], sign: str = "", accomplices: Sequence[str] = ()) -> None:
    """Change a report and spell it as colonnade does; `sign` names the party that signs the changed one, and
    `accomplices` those that countersign it again."""
    plain = json.loads(path.read_bytes())
    change(plain)
    report = msgspec.convert(plain, Report)
    if sign:
        signature = IDENTITIES[sign].sign("psi-report", canonical(report)).hex()
        statement = countersigned_statement(
            bytes.fromhex(report.session), report.party, report_digest(report), common_facts(report)
        )
        again = {name: IDENTITIES[name].sign("psi-countersignature", statement).hex() for name in accomplices}
        countersignatures = report.countersignatures | again
        report = msgspec.structs.replace(report, signature=signature, countersignatures=countersignatures)
    path.write_bytes(as_file(report))


# ---- honest


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("count", [2, 3])
def test_honest_reports_of_every_mode_pass_alone_and_together(count: int, result: str, tmp_path: Path) -> None:
    agreement = agree(count, intersection={"result": result, "bucket": 100})
    paths = write_reports(tmp_path, agreement)
    for path in paths.values():
        assert failed([path]) == failed([path], agreement) == []
    together = verify(list(paths.values()), agreement)
    assert by_status(together, "FAIL") == []
    left = {name.split(": ", 1)[1] for name in by_status(together, "NOT RUN")}
    rows = {"all 64 canaries are in the intersection", "none of our decoys is in the intersection"}
    order = {f"row order equals that of {name}" for name in NAMES[:count]}
    always = {"rehearsal on synthetic ids with a known overlap", "every peer is within its budget"}
    assert left == always | (set() if result == "rows" else rows | order)
    assert sum("is what arrived" in check.name for check in together) == 2 * count * (count - 1)
    assert sum("ledger: every peer signed" in check.name for check in together) == count


@pytest.mark.parametrize("count", [2, 3])
def test_honest_reports_of_a_cascade_pass(count: int, tmp_path: Path) -> None:
    agreement = agree(count, identifiers=CASCADE)
    paths = write_reports(tmp_path, agreement, PEOPLE)
    report = load_report(paths["bank"])
    assert [step.size for step in report.steps] == [6, 4]
    assert failed(list(paths.values()), agreement) == []
    edit(paths["bank"], lambda plain: put(plain, ("steps", 1, "size"), 7), sign="bank")
    assert "bank: counts add up" in failed([paths["bank"]])


@pytest.mark.parametrize("intersection", [{"suite": "P256_XMD:SHA-256_SSWU_RO_"}, {"decoys": 100, "bucket": 7}])
def test_other_settings_pass(intersection: Plain, tmp_path: Path) -> None:
    agreement = agree(2, intersection=intersection)
    assert failed(list(write_reports(tmp_path, agreement).values()), agreement) == []


def test_lists_in_several_parts_pass(tmp_path: Path) -> None:
    tables = {"bank": {"customer": [f"{n}" for n in range(8100)]}, "grocer": {"customer": [f"{n}" for n in range(90)]}}
    paths = write_reports(tmp_path, AGREEMENTS[2], tables)
    assert traffic_of(json.loads(paths["bank"].read_bytes()), "MaskedPoints")["messages"] == 2
    assert failed(list(paths.values()), AGREEMENTS[2]) == []


def test_another_task_has_its_own_minimum(tmp_path: Path) -> None:
    agreement = agree(2, intersection={"minimum": 35, "minimum_to_score": 30})
    paths = write_reports(tmp_path, agreement, task="score with it")
    assert load_report(paths["bank"]).size == 30
    assert failed(list(paths.values()), agreement) == []
    edit(paths["bank"], lambda plain: plain.update(task="train"), sign="bank")
    assert "bank: counts add up" in failed([paths["bank"]])


def test_a_report_that_is_not_given_is_named(written: Any) -> None:
    checks = verify([written[3]["bank"], written[3]["mill"]])
    (check,) = (check for check in checks if check.name == "all reports: every party's is here")
    assert (check.status, check.detail) == ("NOT RUN", "not given: grocer")


def test_a_report_counts_what_was_read(written: Any) -> None:
    report = load_report(written[3]["bank"])
    rows = {"read": 42, "empty": 1, "invalid": 0, "duplicate": 1, "kept": 40}
    assert msgspec.to_builtins(report.input.rows) == rows
    assert report.size == 30
    assert report.steps[0].set_sizes == {"bank": 168, "grocer": 178, "mill": 168}


def test_no_id_and_no_secret_is_in_a_report_or_a_ledger_or_an_answer(written: Any) -> None:
    for path in written[3].values():
        answers = "".join(check.name + check.detail for check in verify([path]))
        for text in (answers, *(file.read_text() for file in path.parent.iterdir())):
            assert "klant" not in text.lower()
            for identity in IDENTITIES.values():
                assert identity.sign_secret.hex() not in text
                assert identity.curve_secret.hex() not in text


def budget(session: Session) -> list[Use]:
    limits = Limits(runs=3, distinct_ids=100)
    return [Use(peer=name, runs=3, distinct_ids=40, difference=None, limits=limits) for name in session.channels]


REHEARSAL = SelfTest(time="2026-01-02T03:04:05+00:00", session="ab" * 32, rows=40, expected=30, found=30, passed=True)


def test_budget_and_rehearsal_are_checked(tmp_path: Path) -> None:
    paths = write_reports(tmp_path, AGREEMENTS[3], budget=budget, selftest=REHEARSAL)
    checks = verify(list(paths.values()), AGREEMENTS[3])
    assert {check.status for check in checks} == {"PASS"}
    for field, value, question in (
        (("budget", 0, "runs"), 4, "every peer's use is within the stated limits"),
        (("budget", 1, "distinct_ids"), 101, "every peer's use is within the stated limits"),
        (("budget", 1, "peer"), "grocer", "every peer's use is within the stated limits"),
        (("budget", 1, "peer"), "press\x1b", "names, keys and digests are well formed"),
        (("budget", 1, "peer"), "bank", "names, keys and digests are well formed"),
        (("selftest", "found"), 29, "the rehearsal found what it had to"),
        (("selftest", "passed"), False, "the rehearsal found what it had to"),
        (("selftest", "time"), "2999-01-02T03:04:05+00:00", "the rehearsal found what it had to"),
        (("selftest", "time"), "\x1b[2J", "names, keys and digests are well formed"),
    ):
        kept = paths["bank"].read_bytes()
        edit(paths["bank"], lambda plain: put(plain, field, value), sign="bank")  # noqa: B023
        assert any(name.endswith(question) for name in failed([paths["bank"]])), (field, value)
        paths["bank"].write_bytes(kept)


def test_what_only_the_owner_knows_of_a_rehearsal_is_his_word(tmp_path: Path) -> None:
    path = write_reports(tmp_path, AGREEMENTS[2], selftest=REHEARSAL)["bank"]
    assert "bank states: the rehearsal found what it had to" in by_status(verify([path]), "PASS")


def test_a_budget_without_a_limit_proves_nothing(tmp_path: Path) -> None:
    unlimited = [Use(peer="grocer", runs=3, distinct_ids=40, difference=None, limits=Limits())]
    path = write_reports(tmp_path, AGREEMENTS[2], budget=lambda session: unlimited)["bank"]
    assert "bank: every peer's use is within the stated limits" in by_status(verify([path]), "NOT RUN")


def test_without_an_agreement_its_terms_are_only_the_reports_word(written: Any) -> None:
    checks = verify([written[2]["bank"]])
    (check,) = (check for check in checks if check.name == "bank: is of the given agreement")
    assert (check.status, check.detail) == (
        "NOT RUN",
        "none was given: keys, purpose, legal basis and limits only as the report states them",
    )
    given = verify([written[2]["bank"]], AGREEMENTS[2])
    assert "bank: is of the given agreement" in by_status(given, "PASS")


@pytest.mark.parametrize(
    ("task", "note"), [("train", ""), ("align", ""), ("selftest", "a rehearsal, not a run"), ("score with it", "")]
)
def test_the_first_line_says_which_run_it_was(task: str, note: str, tmp_path: Path) -> None:
    path = write_reports(tmp_path, AGREEMENTS[2], task=task)["bank"]
    report, first = load_report(path), verify([path], AGREEMENTS[2])[0]
    assert first.name == f"bank: task {task}, session {report.session[:8]}…, 30 rows in common"
    assert (first.status, first.detail) == ("PASS", note)


def test_what_failed_during_the_run_fails_here(run: Any) -> None:
    path = run(2)["bank"]
    names = [check.name for check in load_report(path).checks]
    place = names.index("row order equals that of grocer")
    edit(path, lambda plain: put(plain, ("checks", place, "status"), "FAIL"), sign="bank", accomplices=["grocer"])
    assert failed([path]) == ["bank found: row order equals that of grocer"]


CHECK_LISTS: dict[str, Callable[[list[Plain]], list[Plain]]] = {
    "none": lambda checks: [],
    "one missing": lambda checks: checks[1:],
    "one more": lambda checks: [*checks, {"name": "all is well", "status": "PASS", "detail": ""}],
    "one twice": lambda checks: [*checks, checks[-1]],
    "another name": lambda checks: [checks[0] | {"name": "all is well"}, *checks[1:]],
    "another order": lambda checks: [checks[1], checks[0], *checks[2:]],
}


@pytest.mark.parametrize("what", CHECK_LISTS)
def test_a_report_that_lists_other_checks_is_found(what: str, run: Any) -> None:
    path = run(2)["bank"]
    change = CHECK_LISTS[what]
    edit(path, lambda plain: plain.update(checks=change(plain["checks"])), sign="bank", accomplices=["grocer"])
    assert failed([path]) == ["bank: it lists the checks made during the run"]


# ---- files changed by somebody else


def flipped(data: bytes, unsigned: int) -> Iterator[bytes]:
    """Every byte changed in turn: in its lowest bit, in the bit that turns a letter's case, or dropped; from `unsigned`
    on, where no signature covers it, in each of these ways."""
    for place in range(len(data)):
        ways = (
            data[:place] + bytes([data[place] ^ 0x01]) + data[place + 1 :],
            data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :],
            data[:place] + data[place + 1 :],
        )
        yield from ways if place >= unsigned else ways[place % 3 : place % 3 + 1]


def seen(path: Path, agreement: Agreement | None = None) -> bool:
    try:
        return any(check.status == "FAIL" for check in each_check([path], agreement))
    except LocalError:
        return True


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest run: four rows at each of two parties."""
    tables = {name: {"customer": [f"{n}" for n in range(4)]} for name in NAMES[:2]}
    return write_reports(tmp_path_factory.mktemp("small") / "run", AGREEMENTS[2], tables)["grocer"]


def test_every_flipped_byte_of_a_report_is_found(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small.parent, tmp_path / "run")
    path = tmp_path / "run" / "psi_report.json"
    whole = path.read_bytes()
    assert not seen(path)
    tried = unseen = 0
    with path.open("r+b", buffering=0) as file:  # one file for all: a new one for each takes most of the time
        for data in flipped(whole, whole.rindex(b'"signature"')):
            tried += data != whole
            file.seek(0)
            file.truncate(file.write(data))
            unseen += data != whole and not seen(path)
    assert tried > len(whole) - 100 > 3000
    assert unseen == 0


def test_every_flipped_byte_of_a_ledger_is_found(small: Path, tmp_path: Path) -> None:
    """Also behind the point at which the report was written. The report itself is checked once."""
    shutil.copytree(small.parent, tmp_path / "run")
    path, ledger = tmp_path / "run" / "psi_report.json", tmp_path / "run" / "ledger.jsonl"
    whole, report = ledger.read_bytes(), load_report(path)
    keys = {name: IDENTITIES[name].public for name in report.parties}
    assert not seen(path)
    tried = unseen = 0
    with ledger.open("r+b", buffering=0) as file:
        for data in flipped(whole, whole.rindex(b'"signature"')):
            tried += data != whole
            file.seek(0)
            file.truncate(file.write(data))
            unseen += data != whole and all(check.status != "FAIL" for check in check_record(path, report, keys))
    assert tried > len(whole) - 100 > 3000
    assert unseen == 0


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in nodes(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for number, inner in enumerate(value) for leaf in nodes(inner, (*path, number))]
    return [path]


def put(plain: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        plain = plain[key]
    plain[path[-1]] = value


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return 7 if value is None else value * 2 + 1


@pytest.mark.parametrize("given", [False, True], ids=["keys as stated", "agreement given"])
def test_every_single_changed_value_is_found(given: bool, run: Any) -> None:
    path = run()["bank"]
    plain = json.loads(path.read_bytes())
    paths = nodes(plain)
    assert len(paths) > 250
    unseen = []
    for leaf in paths:
        changed = copy.deepcopy(plain)
        value = changed
        for key in leaf:
            value = value[key]
        put(changed, leaf, other(value))
        path.write_bytes(msgspec.json.format(json.dumps(changed).encode(), indent=2) + b"\n")
        if not seen(path, AGREEMENTS[3] if given else None):
            unseen.append(leaf)
    assert unseen == []


def test_every_dropped_or_added_field_is_found(run: Any) -> None:
    path = run()["bank"]
    plain = json.loads(path.read_bytes())
    for name in plain:
        path.write_text(json.dumps({key: value for key, value in plain.items() if key != name}))
        assert seen(path), name
        if name not in ("signature", "countersignatures"):
            with pytest.raises(LocalError, match=name):
                verify([path])
    path.write_text(json.dumps(plain | {"remark": "fine"}))
    with pytest.raises(LocalError, match="remark"):
        verify([path])


def test_the_signature_of_another_party_does_not_count(run: Any) -> None:
    path = run()["bank"]
    edit(path, lambda plain: None, sign="grocer")
    assert failed([path]) == ["bank: its owner's signature stands under it"]


def test_hex_has_one_spelling(run: Any) -> None:
    paths = run()
    for field in ("signature", "countersignatures"):
        path = paths["bank"]
        plain = json.loads(path.read_bytes())
        value = plain[field]
        upper = value.upper() if isinstance(value, str) else {name: text.upper() for name, text in value.items()}
        path.write_bytes(as_file(msgspec.convert(plain | {field: upper}, Report)))
        assert len(failed([path])) == 1
        path.write_bytes(as_file(msgspec.convert(plain, Report)))


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: json.dumps(json.loads(text), indent=7),
        lambda text: text + "\n",
        lambda text: text.rstrip("\n"),
        lambda text: text.replace('"size"', '"siz\\u0065"', 1),
        lambda text: text.replace('"canaries": 64', '"canaries": 64,\n  "canaries": 64'),
        lambda text: text.replace('"session": "', '"session": "00",\n  "session": "', 1),
        lambda text: text.replace("e-15", "E-15"),
        lambda text: "\ufeff" + text,
    ],
)
def test_a_report_has_one_spelling(spell: Callable[[str], str], run: Any) -> None:
    path = run()["bank"]
    text = path.read_text()
    assert spell(text) != text
    path.write_text(spell(text))
    assert seen(path)


@pytest.mark.parametrize("field", ["parties", "roots", "transcripts"])
def test_the_order_of_the_ring_is_seen(field: str, run: Any) -> None:
    """What is signed has its fields sorted, so that the order of these is checked by itself."""
    path = run()["bank"]
    plain = json.loads(path.read_bytes())
    plain[field] = dict(reversed(plain[field].items()))
    path.write_bytes(as_file(msgspec.convert(plain, Report)))
    assert seen(path)
    plain = json.loads(path.read_bytes())
    for step in plain["steps"]:
        step["set_sizes"] = dict(reversed(step["set_sizes"].items()))
    path.write_bytes(as_file(msgspec.convert(plain, Report)))
    assert seen(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"not json", b"[]", b"7", b'"text"', b"\xff\xfe", b"{}", b'{"colonnade_psi_report": 2}', b"[" * 100_000],
)
def test_what_is_not_a_report_is_refused_with_its_name(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "psi_report.json"
    path.write_bytes(text)
    with pytest.raises(LocalError, match=r"psi_report\.json"):
        verify([path])


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot read the report .*nowhere"):
        verify([tmp_path / "nowhere.json"])


# ---- a party that signs something else than it saw


def smaller(plain: Plain) -> None:
    """One row fewer, wherever it is counted."""
    plain["size"] -= 1
    plain["steps"][0]["size"] -= 1
    for flow in plain["flows"]:
        flow["count"] -= flow["what"] == "positions"
    lists: dict[tuple[str, str], int] = {}
    for flow in plain["flows"]:
        if flow["direction"] == "sent" and flow["what"] == "positions":
            lists[flow["peer"], "Positions"] = lists.get((flow["peer"], "Positions"), 0) + 1
    for one in plain["traffic"]:
        if (one["to"], one["kind"]) in lists:
            one["predicted"] -= 4 * lists[one["to"], one["kind"]]


def flow_of(plain: Plain, direction: str = "sent") -> Plain:
    return next(flow for flow in plain["flows"] if flow["direction"] == direction and flow["peer"] == "grocer")


def at(*path: Any, to: Any) -> Callable[[Plain], None]:
    return lambda plain: put(plain, path, to)


def traffic_of(plain: Plain, kind: str) -> Plain:
    return next(one for one in plain["traffic"] if one["kind"] == kind)


def negative_drops(plain: Plain) -> None:
    plain["input"]["rows"] |= {"empty": -1, "invalid": 2}


COUNTS, FOLLOWS, LISTS = "counts add up", "what is stated follows", "every list that must have passed"
FORMED, SENT = "well formed", "what left is as long"
TOLD_ALONE: dict[str, tuple[Callable[[Plain], object], str]] = {
    "size": (at("size", to=29), FOLLOWS),
    "size of the step": (at("steps", 0, "size", to=29), LISTS),
    "impossible size": (at("steps", 0, "size", to=41), COUNTS),
    "negative size": (at("steps", 0, "size", to=-1), COUNTS),
    "below our own minimum": (at("input", "minimum", to=31), COUNTS),
    "rows read": (at("input", "rows", "read", to=43), COUNTS),
    "rows kept": (at("input", "rows", "kept", to=41), COUNTS),
    "rows dropped against the policy": (at("input", "duplicates", to="fail"), COUNTS),
    "empties against the policy": (at("input", "empty", to="fail"), COUNTS),
    "unknown policy": (at("input", "duplicates", to="most"), COUNTS),
    "negative drops": (
        negative_drops,
        COUNTS,
    ),
    "own set": (at("steps", 0, "set_sizes", "bank", to=169), COUNTS),
    "decoys": (at("steps", 0, "decoys", to=65), COUNTS),
    "too small a set": (at("steps", 0, "set_sizes", "mill", to=127), COUNTS),
    "another's set": (at("steps", 0, "set_sizes", "mill", to=169), LISTS),
    "length of a list": (lambda plain: flow_of(plain).update(count=3), LISTS),
    "a list's owner": (lambda plain: flow_of(plain).update(owner="mill"), LISTS),
    "a list's peer": (lambda plain: flow_of(plain).update(peer="mill"), LISTS),
    "a list's step": (lambda plain: flow_of(plain).update(step=1), LISTS),
    "a list dropped": (lambda plain: plain["flows"].remove(flow_of(plain)), LISTS),
    "a list twice": (lambda plain: plain["flows"].append(flow_of(plain)), LISTS),
    "no lists": (lambda plain: plain.update(flows=[]), LISTS),
    "canaries": (at("canaries", to=63), FOLLOWS),
    "who sees rows": (at("rows_revealed", to=False), FOLLOWS),
    "bound on false matches": (at("false_match_bound", to=1e-20), FOLLOWS),
    "suite": (at("software", "suite", to="P256_XMD:SHA-256_SSWU_RO_"), FOLLOWS),
    "separation tag": (at("software", "separation_tag", to="another"), FOLLOWS),
    "keys": (at("keys", "created", to=2), FOLLOWS),
    "own root": (at("input", "merkle_root", to="00" * 32), FOLLOWS),
    "columns": (at("input", "columns", to={"phone": "tel"}), FOLLOWS),
    "another step": (lambda plain: plain["steps"].append(plain["steps"][0]), FORMED),
    "no steps": (at("steps", to=[]), FORMED),
    "predicted bytes": (at("traffic", 3, "predicted", to=1), SENT),
    "bytes": (lambda plain: plain["traffic"][-1].update(bytes=0), SENT),
    "traffic twice": (lambda plain: plain["traffic"].append(plain["traffic"][0]), SENT),
    "a message less": (lambda plain: traffic_of(plain, "SetSize").update(messages=2), SENT),
    "a long message": (lambda plain: traffic_of(plain, "Gate").update(bytes=3000), SENT),
    "a list in more parts": (lambda plain: traffic_of(plain, "Positions").update(messages=9), SENT),
    "class": (lambda plain: traffic_of(plain, "SetSize").update(ledger_class="masked"), "of its class"),
    "unknown kind": (lambda plain: traffic_of(plain, "SetSize").update(kind="Weather"), "of its class"),
    "key of the escrow": (at("keys", "escrow", to="our own"), FOLLOWS),
    "agreement": (at("agreement", to="00" * 32), "approved the agreement"),
    "approval missing": (at("parties", "mill", "approval", to=""), "approved the agreement"),
    "fingerprint": (at("parties", "mill", "fingerprint", to="0000-" * 7 + "0000"), "fingerprints"),
    "expired": (at("governance", "expires", to="2020-12-31"), "had not expired"),
    "no date": (at("governance", "expires", to="soon"), FORMED),
    "no time": (at("time", to="2026-11-21 18:00"), FORMED),
    "time elsewhere": (at("time", to="2026-11-21T18:00:00+01:00"), FORMED),
    "before the session": (at("time", to="2026-01-01T00:00:00+00:00"), "time lies between"),
    "after the session": (at("time", to="2998-01-01T00:00:00+00:00"), "time lies between"),
    "a task of another kind": (at("task", to="train\x1b[2J"), FORMED),
    "rows beyond counting": (at("input", "rows", "kept", to=2**63), FORMED),
    "a set beyond counting": (at("steps", 0, "set_sizes", "mill", to=10**400), FORMED),
    "party dropped": (lambda plain: plain["parties"].pop("mill"), FORMED),
    "not a party": (at("party", to="press"), FORMED),
    "no key": (at("parties", "mill", "public_key", to="colonnade1:"), FORMED),
    "two label holders": (at("parties", "mill", "role", to="label holder"), FORMED),
    "a peer's root missing": (lambda plain: plain["roots"].pop("mill"), FORMED),
    "seed is no digest": (at("audit_seed", to="AB" * 32), FORMED),
    "a terminal's escape": (at("checks", 0, "name", to="\x1b[2J"), FORMED),
    "ledger's hash": (at("ledger", "head", to="00" * 32), "ledger"),
    "ledger's length": (at("ledger", "entries", to=3), "ledger"),
    "ledger's length is negative": (at("ledger", "entries", to=-1), "ledger"),
    "our transcript": (at("transcripts", "mill", "sent", to="00" * 32), "give the transcripts"),
    "small traffic left out": (lambda plain: plain["traffic"].pop(), "records the traffic"),
    "a message more": (lambda plain: plain["traffic"][-1].update(messages=2), "records the traffic"),
    "task": (at("task", to="predict"), "opens with this session"),
    "session": (at("session", to="00" * 32), "opens with this session"),
}


@pytest.mark.parametrize("what", TOLD_ALONE)
def test_a_report_that_contradicts_itself_is_found_although_all_signed_it(what: str, run: Any) -> None:
    """All parties help: signature and countersignatures stand, and the facts alone give it away."""
    change, question = TOLD_ALONE[what]
    path = run()["bank"]
    edit(path, change, sign="bank", accomplices=["grocer", "mill"])
    names = failed([path])
    assert any(question in name for name in names), names
    assert "bank: its owner's signature stands under it" not in names
    assert "bank: every peer countersigned it at the end of the run" not in names


def test_the_approval_of_another_does_not_count(run: Any) -> None:
    path = run()["bank"]
    approval = json.loads(path.read_bytes())["parties"]["grocer"]["approval"]
    edit(path, at("parties", "mill", "approval", to=approval), sign="bank", accomplices=["grocer", "mill"])
    assert failed([path]) == ["bank: every party approved the agreement"]


def _row_read(plain: Plain) -> None:
    plain["input"]["rows"]["read"] += 1
    plain["input"]["rows"]["invalid"] += 1


LIES: dict[str, Callable[[Plain], object]] = {
    "rows dropped": _row_read,
    "time": at("time", to="2026-01-01T00:00:00+00:00"),
    "another's root": at("roots", "mill", to="00" * 32),
    "seed": at("audit_seed", to="00" * 32),
    "escrow": at("keys", "escrow", to="0000-" * 7 + "0000"),
    "digest of a list": lambda plain: flow_of(plain).update(digest="00" * 32),
    "what a peer sent": at("transcripts", "mill", "received", to="00" * 32),
    "package": at("software", "packages", "numpy", to="0.1"),
    "seconds": at("seconds", "agree", to=0.5),
    "column": at("input", "columns", "customer", to="client"),
    "smaller": smaller,
}


@pytest.mark.parametrize("what", LIES)
def test_facts_changed_and_signed_anew_are_not_what_the_peers_countersigned(what: str, run: Any) -> None:
    path = run()["bank"]
    edit(path, LIES[what], sign="bank")
    first, *others = (check for check in verify([path]) if check.status == "FAIL")
    assert (first.name, first.detail) == ("bank: every peer countersigned it at the end of the run", "grocer, mill")
    told = ["bank: ledger: the report's time lies between the lines around it"] if what == "time" else []
    assert [check.name for check in others] == told


@pytest.mark.parametrize("spoil", ["dropped", "of another report", "by another", "own"])
def test_every_countersignature_is_needed(spoil: str, run: Any) -> None:
    paths = run()

    def change(plain: Plain) -> None:
        signatures = plain["countersignatures"]
        if spoil == "dropped":
            del signatures["mill"]
        elif spoil == "of another report":
            theirs = json.loads(paths["grocer"].read_bytes())["countersignatures"]
            signatures["mill"] = theirs["mill"]
        elif spoil == "by another":
            signatures["mill"] = signatures["grocer"]
        else:
            signatures["mill"] = plain["signature"]

    edit(paths["bank"], change)
    (check,) = (check for check in verify([paths["bank"]]) if check.status == "FAIL")
    assert (check.name, check.detail) == ("bank: every peer countersigned it at the end of the run", "mill")


TOLD_TOGETHER: dict[str, tuple[Callable[[Plain], object], str]] = {
    "smaller": (smaller, "same keys, set sizes and results"),
    "root": (at("roots", "mill", to="00" * 32), "same committed inputs"),
    "seed": (at("audit_seed", to="00" * 32), "same seed"),
    "sent list": (lambda plain: flow_of(plain).update(digest="00" * 32), "what bank sent to grocer is what arrived"),
    "received list": (
        lambda plain: next(f for f in plain["flows"] if f["direction"] == "received").update(digest="00" * 32),
        "sent to bank is what arrived",
    ),
    "received": (
        at("transcripts", "grocer", "received", to="00" * 32),
        "what grocer sent to bank is what arrived, mess",
    ),
    "purpose": (at("governance", "purpose", to="another"), "same governance"),
    "session": (at("session", to="00" * 32), "same session"),
    "task": (at("task", to="predict"), "same task"),
}


@pytest.mark.parametrize("what", TOLD_TOGETHER)
def test_a_false_report_is_found_by_comparison_although_all_signed_it(what: str, run: Any) -> None:
    change, question = TOLD_TOGETHER[what]
    paths = run()
    edit(paths["bank"], change, sign="bank", accomplices=["grocer", "mill"])
    paths["bank"].with_name("ledger.jsonl").unlink()
    assert failed([paths["bank"]]) == []
    names = failed(list(paths.values()))
    assert any(question in name for name in names), names


def test_a_countersignature_by_a_key_that_is_not_the_peers_own_is_found(run: Any) -> None:
    """The bank states another key for the mill, and signs with it what the mill never saw."""
    paths = run()
    forger = IDENTITIES["press"]

    def forge(plain: Plain) -> None:
        approval = forger.sign("approval", bytes.fromhex(plain["agreement"])).hex()
        plain["parties"]["mill"] |= {
            "public_key": str(forger.public),
            "fingerprint": forger.public.fingerprint,
            "approval": approval,
        }

    edit(paths["bank"], forge, sign="bank", accomplices=["grocer"])
    report = load_report(paths["bank"])
    statement = countersigned_statement(
        bytes.fromhex(report.session), "bank", report_digest(report), common_facts(report)
    )
    mine = forger.sign("psi-countersignature", statement).hex()
    edit(paths["bank"], lambda plain: plain["countersignatures"].update(mill=mine))
    paths["bank"].with_name("ledger.jsonl").unlink()
    assert failed([paths["bank"]]) == []
    assert failed([paths["bank"]], AGREEMENTS[3]) == ["bank: is of the given agreement"]
    names = failed(list(paths.values()))
    assert "all reports: same parties, keys and approvals" in names
    assert "mill countersigned the report of bank with the key of its own report" in names
    assert "grocer countersigned the report of bank with the key of its own report" not in names


def test_reports_of_two_sessions_under_one_agreement_do_not_pass_together(written: Any, tmp_path: Path) -> None:
    again = write_reports(tmp_path / "again", AGREEMENTS[2], task="score with it")
    names = failed([written[2]["bank"], again["grocer"]])
    assert {"all reports: same session", "what bank sent to grocer is what arrived"} <= set(names)


def test_reports_under_two_agreements_do_not_pass_together(written: Any) -> None:
    assert "all reports: same agreement" in failed([written[2]["bank"], written[3]["grocer"]])
    assert "all reports: same agreement" in failed([written[2]["bank"], written[3]["mill"]])


def test_one_report_given_twice_does_not_stand_for_two_parties(written: Any) -> None:
    checks = verify([written[2]["bank"], written[2]["bank"]])
    assert by_status(checks, "FAIL") == ["all reports: each of another party"]
    assert "all reports: every party's is here" in by_status(checks, "NOT RUN")


def test_a_malformed_report_does_not_hide_the_others(run: Any) -> None:
    paths = run()
    edit(paths["grocer"], at("audit_seed", to="none"), sign="grocer")
    checks = verify(list(paths.values()))
    assert [name.split(": ")[1] for name in by_status(checks, "FAIL")] == ["names, keys and digests are well formed"]
    assert "mill: counts add up" in by_status(checks, "PASS")


@pytest.mark.parametrize(
    "tables",
    [
        {"title": "another"},
        {"purpose": "another"},
        {"intersection": {"minimum": 2}},
        {"intersection": {"suite": "P256_XMD:SHA-256_SSWU_RO_"}},
        {"identifiers": {"fields": {"customer": "email/1"}}},
        {"model": {"C": 2.0}},
    ],
)
def test_a_report_under_another_agreement_is_found(tables: Plain, written: Any) -> None:
    names = failed([written[2]["bank"]], agree(2, **tables))
    assert names == ["bank: is of the given agreement"]


def test_a_report_under_an_agreement_without_one_of_its_parties_is_told_so(written: Any) -> None:
    assert failed([written[3]["bank"]], AGREEMENTS[2]) == ["bank: is of the given agreement"]


def test_governance_that_the_agreement_does_not_have_is_found(run: Any) -> None:
    path = run()["bank"]
    edit(path, at("governance", "legal_basis", to="none"), sign="bank", accomplices=["grocer", "mill"])
    assert failed([path]) == []
    (check,) = (check for check in verify([path], AGREEMENTS[3]) if check.status == "FAIL")
    assert (check.name, check.detail) == ("bank: is of the given agreement", "legal_basis")


HOSTILE = (-1, 0, 2**62, 2**63, 10**400, 1e308, True, None, "", "\x1b[2J", "ü", "00" * 32, "ff" * 64, [], {}, ["rows"])


def test_a_hostile_report_that_is_signed_gets_an_answer(run: Any) -> None:
    """Whatever a party writes and signs, the checks end in answers or in one line, not in a traceback."""
    paths = run(2)
    plain = json.loads(paths["bank"].read_bytes())
    answered, honest = 0, msgspec.convert(plain, Report)
    for number, leaf in enumerate([*nodes(plain), *((name,) for name in plain)]):
        for value in HOSTILE[number % 3 :: 3]:
            lie = copy.deepcopy(plain)
            put(lie, leaf, value)
            try:
                report = msgspec.convert(lie, Report)
            except msgspec.ValidationError:
                continue
            try:
                signature = IDENTITIES["bank"].sign("psi-report", canonical(report)).hex()
                report = msgspec.structs.replace(report, signature=signature)
                paths["bank"].write_bytes(as_file(report))
            except OverflowError:  # a number that colonnade itself cannot write
                paths["bank"].write_text(json.dumps(lie))
            checks = verify([paths["bank"], paths["grocer"]], AGREEMENTS[2] if number % 2 else None)
            assert "FAIL" in {check.status for check in checks} or report == honest
            assert all(check.name.isprintable() and check.detail.isprintable() for check in checks)
            answered += 1
    assert answered > 200


# ---- the ledger beside the report


CHAIN = "bank: ledger: its chain and its seal hold, and this report was written at a point of it"


def changed_line(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"control"', b'"masked"', 1).replace(b"bank", b"mill", 1) + b" ", *lines[2:]]


LEDGERS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "line changed": changed_line,
    "line dropped": lambda lines: lines[:3] + lines[4:],
    "first line dropped": lambda lines: lines[1:],
    "lines swapped": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "line added after the seal": lambda lines: [*lines, lines[3]],
    "seal cut off": lambda lines: lines[:-1],
    "seal of nobody": lambda lines: [*lines[:-1], lines[-1].replace(b'"signature":"', b'"signature":"00')],
    "empty": lambda lines: [],
    "not a table": lambda lines: [b"[]", *lines[1:]],
}


@pytest.mark.parametrize("what", LEDGERS)
def test_a_changed_ledger_is_found(what: str, run: Any) -> None:
    path = run(2)["bank"]
    ledger = path.with_name("ledger.jsonl")
    lines = ledger.read_bytes().splitlines()
    spoilt = LEDGERS[what](lines)
    assert spoilt != lines
    ledger.write_bytes(b"".join(line + b"\n" for line in spoilt))
    (check,) = (check for check in verify([path]) if check.status == "FAIL")
    assert check.name == CHAIN
    assert "ledger.jsonl" in check.detail


def test_another_partys_ledger_is_found(run: Any) -> None:
    paths = run(2)
    shutil.copy(paths["grocer"].with_name("ledger.jsonl"), paths["bank"].with_name("ledger.jsonl"))
    assert failed([paths["bank"]]) == [CHAIN]


def test_our_own_sealed_ledger_of_another_session_is_found(run: Any, tmp_path: Path) -> None:
    path = run(2)["bank"]
    again = write_reports(tmp_path / "again", AGREEMENTS[2], task="score with it")["bank"]
    shutil.copy(again.with_name("ledger.jsonl"), path.with_name("ledger.jsonl"))
    assert failed([path]) == [CHAIN]


def test_without_a_ledger_the_check_is_not_run(run: Any) -> None:
    path = run(2)["bank"]
    path.with_name("ledger.jsonl").unlink()
    assert CHAIN in by_status(verify([path]), "NOT RUN")
    assert failed([path.rename(path.with_name("renamed.json"))]) == []


def sealed_again(path: Path, change: Callable[[list[Plain]], list[Plain]]) -> None:
    """The bank writes its ledger anew: same chain, same seal, other facts; and its report with the new point."""
    ledger, head = path.with_name("ledger.jsonl"), hashlib.sha256(b"colonnade/ledger/1").hexdigest()
    heads, out = [head], []
    entries = change([json.loads(line) for line in ledger.read_bytes().splitlines()])
    for number, entry in enumerate(entries):
        fact = {key: value for key, value in entry.items() if key != "signature" or entry.get("event") != "sealed"}
        fact |= {"entry": number, "previous": heads[-1]}
        if entry.get("event") == "sealed":
            statement = json.dumps(fact, separators=(",", ":")).encode()
            fact["signature"] = IDENTITIES["bank"].sign("ledger", statement).hex()
        line = json.dumps(fact, separators=(",", ":")).encode()
        heads.append(hashlib.sha256(line).hexdigest())
        out.append(line + b"\n")
    ledger.write_bytes(b"".join(out))
    point = json.loads(path.read_bytes())["ledger"]["entries"]
    edit(path, at("ledger", "head", to=heads[point]), sign="bank", accomplices=["grocer"])


def line_with(number: int, **facts: Any) -> Callable[[list[Plain]], list[Plain]]:
    return lambda lines: [line | facts if place == number else line for place, line in enumerate(lines)]


REWRITTEN: dict[str, tuple[Callable[[list[Plain]], list[Plain]], list[str]]] = {
    "nothing": (lambda lines: lines, []),
    "digest of a message": (line_with(5, digest="00" * 32), ["its messages give", "every peer signed"]),
    "bytes": (line_with(5, bytes=7), ["it records the traffic"]),
    "class": (line_with(5, **{"class": "plaintext"}), ["only aggregate, control, masked", "each line"]),
    "class of another kind": (line_with(5, **{"class": "aggregate"}), ["each line"]),
    "an event that is a message": (line_with(5, event="pause"), ["each line"]),
    "an event that was sent": (line_with(1, to="grocer"), ["each line"]),
    "nobody's message": (line_with(16, to="mill"), ["each line", "every peer signed"]),
    "a later message's class": (line_with(16, **{"class": "masked"}), ["each line"]),
    "a later message's kind": (line_with(16, kind="Gate"), ["each line"]),
    "a later message's size": (line_with(16, bytes=4000), ["each line"]),
    "opened later": (line_with(1, time="2999-01-01T00:00:00.000+00:00"), ["the report's time"]),
    "opened at no time": (line_with(1, time="noon"), ["the report's time"]),
    "session": (line_with(1, session="00" * 32), ["it opens with this session"]),
    "task": (line_with(1, task="score with it"), ["it opens with this session"]),
    "a later message": (line_with(16, digest="00" * 32), ["every peer signed"]),
    "bytes as text": (line_with(5, bytes="7"), ["its chain"]),
    "no opening": (line_with(1, event="begun"), ["it opens with this session", "the report's time"]),
}


@pytest.mark.parametrize("what", REWRITTEN)
def test_a_ledger_that_its_owner_wrote_anew_is_found(what: str, run: Any) -> None:
    change, questions = REWRITTEN[what]
    path = run(2)["bank"]
    sealed_again(path, change)
    names = failed([path])
    assert len(names) == len(questions)
    assert all(f"ledger: {question}" in name for question, name in zip(questions, names, strict=True)), names


@pytest.mark.parametrize("field", ["signature", "sent", "received"])
def test_a_forged_closing_is_found(field: str, run: Any) -> None:
    path = run(2)["bank"]

    def change(lines: list[Plain]) -> list[Plain]:
        assert sum(line.get("event") == "countersigned" for line in lines) == 1
        forged = {field: "00" * (64 if field == "signature" else 32)}
        return [line | forged if line.get("event") == "countersigned" else line for line in lines]

    sealed_again(path, change)
    assert failed([path]) == ["bank: ledger: every peer signed for all that it records"]


def test_a_session_that_did_not_close_is_told(run: Any) -> None:
    path = run(2)["bank"]
    sealed_again(path, lambda lines: [line for line in lines if line.get("event") != "countersigned"])
    checks = verify([path])
    assert by_status(checks, "FAIL") == []
    assert {SIGNED_FOR, LATER} <= set(by_status(checks, "NOT RUN"))
    (check,) = (check for check in checks if check.name == SIGNED_FOR)
    assert check.detail == (
        "the session did not close: a later step of it failed, or a peer left; not signed by grocer"
    )


SIGNED_FOR = "bank: ledger: every peer signed for all that it records"
LATER = "bank: ledger: classes of the messages that left after this report"


def test_a_session_that_we_stopped_is_told(run: Any) -> None:
    path = run(2)["bank"]

    def stopped(lines: list[Plain]) -> list[Plain]:
        """After the countersignature, and an abort in place of the close."""
        last = [line | {"kind": "Abort"} if line.get("kind") == "Closing" else line for line in lines]
        return [line for line in last if line.get("event") != "countersigned"]

    sealed_again(path, stopped)
    checks = verify([path])
    assert by_status(checks, "FAIL") == []
    (check,) = (check for check in checks if check.name == SIGNED_FOR)
    assert (check.status, check.detail) == (
        "NOT RUN",
        "the session did not close: we stopped it; not signed by grocer",
    )


def later(path: Path) -> tuple[str, str]:
    (check,) = (check for check in verify([path]) if check.name == LATER)
    return check.status, check.detail


def test_what_left_after_the_report_is_named_by_class(run: Any) -> None:
    """The digest of our report, the peer's countersignature and the close; kinds that are not loaded are no proof."""
    path = run(2)["bank"]
    assert later(path) == ("PASS", "3 control")
    sealed_again(path, line_with(16, kind="Forecast", **{"class": "ciphertext"}))
    assert failed([path]) == []
    assert later(path) == ("NOT RUN", "1 ciphertext, 2 control; 1 of their kinds not known here")
    sealed_again(path, line_with(16, **{"class": "secret"}))
    assert failed([path]) == ["bank: ledger: each line is an event, or a message that was due, of its class"]
