"""Reports and their offline checks: what honest parties write passes, and no single change goes unseen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.ledger import Ledger
from parties.memory import play
from parties.session import Session
from psi.align import align
from psi.identifiers import canonical as canonical_ids
from psi.report import canonical, make_report
from psi.verify import load_report, verify
from tests.conftest import IDENTITIES, agree, parties

TABLES = {
    "bank": [f"Klant {number}" for number in range(40)] + ["klant 0", ""],
    "grocer": [f"klant {number}" for number in range(10, 60)],
    "mill": [f"KLANT {number}" for number in range(5, 45)],
}
Report = dict[str, Any]


def write_reports(folder: Path, agreement: Agreement) -> dict[str, Path]:
    """Run the parties; each has a folder with its report and its ledger."""
    names = [party.name for party in agreement.parties]

    def role(session: Session) -> Report:
        ids = canonical_ids(TABLES[session.name], "text/1", duplicates="first", empty="drop")
        return make_report(session, align(session, ids.values), ids.counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "parties.memory.Ledger",
            lambda owner, path, allowed: Ledger(owner, folder / owner.name / "ledger.jsonl", allowed),
        )
        for name in names:
            (folder / name).mkdir(parents=True)
        found = play(dict.fromkeys(names, role), agreement, identities=parties(len(names)))
    for name in names:
        (folder / name / "psi_report.json").write_text(json.dumps(found[name], indent=2))
    return {name: folder / name / "psi_report.json" for name in names}


AGREEMENTS = {count: agree(count) for count in (2, 3)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    return {count: write_reports(tmp_path_factory.mktemp("runs") / str(count), AGREEMENTS[count]) for count in (2, 3)}


@pytest.fixture
def run(written: dict[int, dict[str, Path]], tmp_path: Path) -> Callable[[int], dict[str, Path]]:
    """A copy of an honest run, to be spoilt."""

    def copied(count: int = 3) -> dict[str, Path]:
        paths = {}
        for name, path in written[count].items():
            (tmp_path / name).mkdir()
            for file in path.parent.iterdir():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
            paths[name] = tmp_path / name / path.name
        return paths

    return copied


def failed(paths: list[Path], agreement: Agreement | None = None) -> list[str]:
    return [check.name for check in verify(paths, agreement) if check.passed is False]


def edit(path: Path, change: Callable[[Report], object], sign: str = "") -> None:
    """Change a report; `sign` names the party that signs the changed one."""
    report = json.loads(path.read_text())
    change(report)
    if sign:
        report["signature"] = IDENTITIES[sign].sign("psi-report", canonical(report)).hex()
    path.write_text(json.dumps(report))


# ---- honest


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("given", [False, True], ids=["keys as stated", "agreement given"])
def test_honest_reports_pass_alone_and_together(count: int, given: bool, written: Any) -> None:
    agreement = AGREEMENTS[count] if given else None
    for path in written[count].values():
        assert failed([path], agreement) == []
    together = verify(list(written[count].values()), agreement)
    assert all(check.passed for check in together)
    assert sum("is what arrived" in check.name for check in together) == count * (count - 1)
    assert sum("ledger" in check.name for check in together) == count


def test_a_report_that_is_not_given_is_named(written: Any) -> None:
    checks = verify([written[3]["bank"], written[3]["mill"]])
    assert [check.detail for check in checks if check.name == "every party's report is here"] == ["not given: grocer"]


def test_a_report_counts_what_was_read(written: Any) -> None:
    report = load_report(written[3]["bank"])
    assert msgspec.to_builtins(report.our_rows) == {"read": 42, "empty": 1, "invalid": 0, "duplicate": 1, "kept": 40}
    assert report.intersection == 30
    assert report.set_sizes == {"bank": 168, "grocer": 178, "mill": 168}


def test_no_id_and_no_secret_is_in_a_report_or_a_ledger(written: Any) -> None:
    for path in written[3].values():
        for file in path.parent.iterdir():
            text = file.read_text()
            assert "klant" not in text.lower()
            for identity in IDENTITIES.values():
                assert identity.sign_secret.hex() not in text
                assert identity.curve_secret.hex() not in text


# ---- a report changed by somebody else


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for number, inner in enumerate(value) for leaf in leaves(inner, (*path, number))]
    return [path]


def put(report: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        report = report[key]
    report[path[-1]] = value


def other(value: Any) -> Any:
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    return value + 1


@pytest.mark.parametrize("given", [False, True], ids=["keys as stated", "agreement given"])
def test_every_single_changed_value_is_found(given: bool, run: Any) -> None:
    path = run()["bank"]
    report = json.loads(path.read_text())
    paths = leaves(report)
    assert len(paths) > 60
    unseen = []
    for leaf in paths:
        changed = copy.deepcopy(report)
        value = changed
        for key in leaf:
            value = value[key]
        put(changed, leaf, other(value))
        path.write_text(json.dumps(changed))
        try:
            names = failed([path], AGREEMENTS[3] if given else None)
        except LocalError:
            names = ["format"]
        if not any(
            word in name for name in names for word in ("signature", "well formed", "format", "given agreement")
        ):
            unseen.append(leaf)
    assert unseen == []


def test_every_dropped_or_added_field_is_found(run: Any) -> None:
    path = run()["bank"]
    report = json.loads(path.read_text())
    for name in report:
        path.write_text(json.dumps({key: value for key, value in report.items() if key != name}))
        if name == "signature":
            assert failed([path]) == ["bank: signature"]
        else:
            with pytest.raises(LocalError, match=name):
                verify([path])
    path.write_text(json.dumps(report | {"remark": "fine"}))
    with pytest.raises(LocalError, match="remark"):
        verify([path])


def test_the_signature_of_another_party_does_not_count(run: Any) -> None:
    path = run()["bank"]
    edit(path, lambda report: None, sign="grocer")
    assert failed([path]) == ["bank: signature"]


def test_layout_and_order_of_fields_do_not_matter(run: Any) -> None:
    path = run()["bank"]
    report = json.loads(path.read_text())
    path.write_text(json.dumps(dict(sorted(report.items(), reverse=True)), indent=7))
    assert failed([path]) == []


@pytest.mark.parametrize(
    "text", [b"", b"not json", b"[]", b"7", b'"text"', b"\xff\xfe", b"{}", b'{"colonnade_psi_report": 2}']
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


def smaller(report: Report) -> None:
    """One row fewer, wherever it is counted."""
    report["intersection"] -= 1
    for flow in report["flows"]:
        flow["count"] -= flow["what"] == "positions"


def larger_set(report: Report) -> None:
    report["set_sizes"]["grocer"] += 1
    for flow in report["flows"]:
        flow["count"] += flow["what"] != "positions" and flow["owner"] == "grocer"


def flow_of(report: Report, direction: str = "sent") -> dict[str, Any]:
    return next(flow for flow in report["flows"] if flow["direction"] == direction and flow["peer"] == "grocer")


TOLD_ALONE: dict[str, tuple[Callable[[Report], object], str]] = {
    "size": (lambda report: put(report, ("intersection",), 29), "as many entries as announced"),
    "impossible size": (lambda report: put(report, ("intersection",), 41), "counts add up"),
    "negative size": (lambda report: put(report, ("intersection",), -1), "counts add up"),
    "rows read": (lambda report: put(report, ("our_rows", "read"), 43), "counts add up"),
    "rows kept": (lambda report: put(report, ("our_rows", "kept"), 41), "counts add up"),
    "own set": (lambda report: put(report, ("set_sizes", "bank"), 169), "counts add up"),
    "another's set": (lambda report: put(report, ("set_sizes", "mill"), 169), "as many entries as announced"),
    "length of a list": (lambda report: flow_of(report).update(count=3), "as many entries as announced"),
    "agreement": (lambda report: put(report, ("agreement",), "00" * 32), "approved the agreement"),
    "approval missing": (lambda report: put(report, ("parties", "mill", "approval"), ""), "approved the agreement"),
    "approval of another": (
        lambda report: put(report, ("parties", "mill", "approval"), report["parties"]["grocer"]["approval"]),
        "approved the agreement",
    ),
    "party dropped": (lambda report: report["parties"].pop("mill"), "well formed"),
    "ledger's hash": (lambda report: put(report, ("ledger", "head"), "00" * 32), "ledger"),
    "ledger's length": (lambda report: put(report, ("ledger", "entries"), 3), "ledger"),
}


@pytest.mark.parametrize("what", TOLD_ALONE)
def test_an_inconsistent_report_is_found_alone_although_its_owner_signed_it(what: str, run: Any) -> None:
    change, name = TOLD_ALONE[what]
    path = run()["bank"]
    edit(path, change, sign="bank")
    names = failed([path])
    assert any(name in check for check in names), names
    assert "bank: signature" not in names


TOLD_TOGETHER: dict[str, tuple[Callable[[Report], object], str]] = {
    "session": (lambda report: put(report, ("session",), "00" * 32), "same session"),
    "size": (smaller, "same size of the intersection"),
    "set size": (larger_set, "same set sizes"),
    "suite": (lambda report: put(report, ("terms", "suite"), "another"), "same terms"),
    "role": (lambda report: put(report, ("parties", "mill", "role"), "label holder"), "same parties"),
    "sent list": (lambda report: flow_of(report).update(digest="00" * 32), "what bank sent to grocer"),
    "received list": (lambda report: flow_of(report, "received").update(digest="00"), "what grocer sent to bank"),
    "owner of a list": (lambda report: flow_of(report).update(what="tokens"), "what bank sent to grocer"),
    "list dropped": (lambda report: report["flows"].remove(flow_of(report)), "what bank sent to grocer"),
    "list invented": (
        lambda report: report["flows"].append(flow_of(report) | {"digest": "11" * 32}),
        "what bank sent to grocer",
    ),
}


@pytest.mark.parametrize("what", TOLD_TOGETHER)
def test_a_false_report_is_found_by_comparison_although_its_owner_signed_it(what: str, run: Any) -> None:
    change, name = TOLD_TOGETHER[what]
    paths = run()
    edit(paths["bank"], change, sign="bank")
    assert failed([paths["bank"]]) == []
    names = failed(list(paths.values()))
    assert any(name in check for check in names), names


def test_reports_of_two_sessions_under_one_agreement_do_not_pass_together(written: Any, tmp_path: Path) -> None:
    again = write_reports(tmp_path / "again", AGREEMENTS[2])
    names = failed([written[2]["bank"], again["grocer"]])
    assert "all reports: same session" in names
    assert any("what bank sent to grocer" in name for name in names)


def test_reports_under_two_agreements_do_not_pass_together(written: Any) -> None:
    assert "all reports: same agreement" in failed([written[2]["bank"], written[3]["grocer"]])


def test_one_report_given_twice_does_not_stand_for_two_parties(written: Any) -> None:
    assert "all reports: each of another party" in failed([written[2]["bank"], written[2]["bank"]])


def test_a_report_under_another_agreement_is_found(written: Any) -> None:
    assert failed([written[2]["bank"]], agree(2, title="another"))[0] == "bank: is of the given agreement"


def test_a_report_under_an_agreement_without_one_of_its_parties_is_told_so(written: Any) -> None:
    assert "bank: is of the given agreement" in failed([written[3]["bank"]], AGREEMENTS[2])


def test_a_report_forged_from_fresh_keys_is_found_with_the_agreement(written: Any, tmp_path: Path) -> None:
    """All signatures fit the keys that it states; only the agreement says that they are not the bank's."""
    path = tmp_path / "psi_report.json"
    path.write_bytes(written[2]["bank"].read_bytes())

    def forge(report: Report) -> None:
        digest = bytes.fromhex(report["agreement"])
        for name, forger in zip(report["parties"], ("mill", "press"), strict=True):
            report["parties"][name] |= {
                "public_key": str(IDENTITIES[forger].public),
                "fingerprint": IDENTITIES[forger].public.fingerprint,
                "approval": IDENTITIES[forger].sign("approval", digest).hex(),
            }

    edit(path, forge, sign="mill")
    assert failed([path]) == []
    assert failed([path], AGREEMENTS[2]) == ["bank: is of the given agreement"]


# ---- the ledger beside the report


def changed_line(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"control"', b'"masked"', 1).replace(b"bank", b"mill", 1) + b" ", *lines[2:]]


LEDGERS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "line changed": changed_line,
    "line dropped": lambda lines: lines[:3] + lines[4:],
    "first line dropped": lambda lines: lines[1:],
    "lines swapped": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "line repeated": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "line added after the seal": lambda lines: [*lines, lines[3]],
    "seal cut off": lambda lines: lines[:-1],
    "end cut off": lambda lines: lines[:6],
    "last line cut": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "seal of nobody": lambda lines: [*lines[:-1], lines[-1].replace(b'"signature":"', b'"signature":"00')],
    "empty": lambda lines: [],
    "not JSON": lambda lines: [b"nothing", *lines[1:]],
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
    (check,) = [check for check in verify([path]) if not check.passed]
    assert check.name.startswith("bank: ledger chain")
    assert "ledger.jsonl" in check.detail


def test_another_partys_ledger_is_found(run: Any) -> None:
    paths = run(2)
    paths["bank"].with_name("ledger.jsonl").write_bytes(paths["grocer"].with_name("ledger.jsonl").read_bytes())
    assert failed([paths["bank"]]) == ["bank: ledger chain, its signature, and that it holds this report's point"]


def test_our_own_sealed_ledger_of_another_session_is_found(run: Any, tmp_path: Path) -> None:
    path = run(2)["bank"]
    again = write_reports(tmp_path / "again", AGREEMENTS[2])["bank"]
    path.with_name("ledger.jsonl").write_bytes(again.with_name("ledger.jsonl").read_bytes())
    assert failed([path]) == ["bank: ledger chain, its signature, and that it holds this report's point"]


# ---- hostile reports


HOSTILE: dict[str, Callable[[Report], object]] = {
    "field missing": lambda report: report["terms"].pop("suite"),
    "session missing": lambda report: report.pop("session"),
    "flow without direction": lambda report: flow_of(report).pop("direction"),
    "flow with a list": lambda report: flow_of(report).update(digest=[]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_report_is_refused_although_its_owner_signed_it(what: str, run: Any) -> None:
    paths = run()
    edit(paths["bank"], HOSTILE[what], sign="bank")
    with pytest.raises(LocalError, match=r"psi_report\.json"):
        verify(list(paths.values()))


def test_a_deeply_nested_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "psi_report.json"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(LocalError):
        verify([path])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("terms", "minimum"), 50),
        (("terms", "decoys"), 63),
        (("terms", "identifiers", "rule"), "email/1"),
        (("terms", "identifiers", "type"), "household"),
        (("terms", "title"), "another"),
        (("parties", "mill", "role"), "label holder"),
        (("terms", "suite"), "another"),
    ],
)
def test_terms_that_the_agreement_does_not_have_are_found(field: tuple[str, ...], value: Any, run: Any) -> None:
    path = run()["bank"]

    def change(report: Report) -> None:
        put(report, field, value)
        if field == ("terms", "decoys"):  # keep the sums right
            report["canaries"] += 1
            for flow in report["flows"]:
                flow["count"] += flow["what"] == "positions"

    edit(path, change, sign="bank")
    assert failed([path], AGREEMENTS[3])


def test_a_fingerprint_that_is_not_that_of_its_key_is_found(run: Any) -> None:
    path = run()["bank"]
    edit(path, lambda report: put(report, ("parties", "mill", "fingerprint"), "0000-" * 7 + "0000"), sign="bank")
    assert failed([path])
