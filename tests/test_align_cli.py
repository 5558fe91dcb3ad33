"""The intersection as users run it: real processes, real files, evidence on disk, and the auditors' commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from parties.errors import LocalError
from parties.files import set_aside
from parties.identity import Identity
from parties.party_file import Party
from psi.job import offered
from tests.world import build, colonnade, customers, together
from vfl.job_input import prepare

TABLES = {name: table for name, table in customers(180).items() if name != "telco"}


def altered(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def settled(folder: Path, *changes: tuple[str, str], tables: Mapping[str, pd.DataFrame] = TABLES) -> dict[str, Path]:
    """Parties whose agreement is changed before they sign it."""
    paths = build(folder, dict(tables), sign=False)
    altered(folder / "agreement.toml", *changes)
    for path in paths.values():
        Party(path).sign()
    return paths


def key(text: Any) -> str:
    return str(text).strip().lower()


def common() -> set[str]:
    return set.intersection(*({key(one) for one in table["id"]} for table in TABLES.values()))


def verified(paths: Mapping[str, Path], folder: Path) -> str:
    reports = [folder / "out" / name / "psi_report.json" for name in paths]
    code, out, err = colonnade("verify", *reports, "--agreement", folder / "agreement.toml")
    assert code == 0, out + err
    return out


@pytest.mark.parametrize("result", ["rows", "rows to the label holder", "size"])
def test_align_finds_the_common_rows_and_gives_them_to_whom_it_may(tmp_path: Path, result: str) -> None:
    paths = settled(tmp_path, ("[intersection]", f'[intersection]\nresult = "{result}"\nbucket = 100'))
    for path in paths.values():  # neither label nor features are needed
        lines = [
            line for line in path.read_text().splitlines() if not line.startswith(("features", "label", "positive"))
        ]
        path.write_text("\n".join(lines) + "\n")
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    for name, table in TABLES.items():
        rows = tmp_path / "out" / name / "rows.csv"
        sees = result == "rows" or (result == "rows to the label holder" and name == "bank")
        assert rows.exists() == sees
        if sees:
            found = table.iloc[pd.read_csv(rows)["row"]]
            assert {key(one) for one in found["id"]} == common()
            assert rows.stat().st_mode & 0o777 == 0o600
        report = json.loads((tmp_path / "out" / name / "psi_report.json").read_text())
        assert report["size"] == len(common())
        assert all(size % 100 == 0 for size in report["steps"][0]["set_sizes"].values())
    verified(paths, tmp_path)
    if result != "rows":
        code, _, err = colonnade("run", paths["bank"])
        assert code in (2, 3)
        assert "features" in err or 'needs result = "rows"' in err


def test_a_rehearsal_uses_the_real_agreement_and_stands_in_the_next_report(tmp_path: Path) -> None:
    paths = settled(tmp_path)
    codes, errors = together({name: ["selftest", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    report = json.loads((tmp_path / "out" / "bank" / "psi_report.json").read_text())
    assert report["selftest"]["passed"] is True
    assert report["selftest"]["found"] == report["selftest"]["expected"] == 300
    assert "PASS    bank found: rehearsal on synthetic ids" in verified(paths, tmp_path)
    rehearsed = json.loads((tmp_path / "out" / "bank" / "selftest_psi_report.json").read_text())
    assert rehearsed["task"] == "selftest"
    assert rehearsed["agreement"] == report["agreement"]


def test_a_rehearsal_on_the_compliance_teams_own_files_knows_a_wrong_result(tmp_path: Path) -> None:
    paths = settled(tmp_path)
    for name in paths:
        ids = [f"test person {number}" for number in (range(60) if name == "bank" else range(20, 90))]
        pd.DataFrame({"id": ids}).to_csv(tmp_path / f"synthetic-{name}.csv", index=False)
    command = ["selftest", "--expect"]
    for expected, code in ((40, 0), (41, 2)):
        codes, errors = together(
            {
                name: [*command, expected, "--input", tmp_path / f"synthetic-{name}.csv", path]
                for name, path in paths.items()
            }
        )
        assert set(codes.values()) == {code}, errors
    assert "found 40 rows in common where 41 are known" in errors["bank"]
    code, _, err = colonnade("selftest", paths["bank"], "--expect", 3)
    assert code == 2 and "needs both --input FILE and --expect NUMBER" in err


@pytest.fixture(scope="module")
def escrowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A cascade whose keys are sealed to the bank's compliance team."""
    folder = tmp_path_factory.mktemp("escrow")
    tables = {}
    for name, table in TABLES.items():
        numbers = [f"{int(key(one)[-6:]):06d}" for one in table["id"]]
        spoilt = [n if place % 7 or name == "bank" else "" for place, n in enumerate(numbers)]
        tables[name] = table.assign(number=spoilt)
    fields = ("fields = { customer = \"text/1\" }", 'fields = { number = "digits/1", customer = "text/1" }\n'
              'keys = [["number"], ["customer"]]')  # fmt: skip
    paths = build(folder, tables, sign=False)
    altered(folder / "agreement.toml", fields)
    identity = Identity.generate("compliance")
    identity.save(folder / "compliance.key")
    (folder / "compliance.pub").write_text(f"{identity.public}\n")
    for name, path in paths.items():
        altered(
            path, ('id = "id"', 'id = { number = "number", customer = "id" }'), ("[table]", '[table]\nempty = "drop"')
        )
        if name == "bank":
            path.write_text(path.read_text() + '[policy]\nescrow = "compliance.pub"\n')
        altered(path, (", 'number']", "]"))
        Party(path).sign()
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    return folder, paths


def test_our_own_auditor_opens_a_sample_and_replays_the_run(escrowed: tuple[Path, dict[str, Path]]) -> None:
    folder, paths = escrowed
    report = folder / "out" / "bank" / "psi_report.json"
    assert [step["size"] for step in json.loads(report.read_text())["steps"]][1] > 5
    own = ["verify", report, "--agreement", folder / "agreement.toml", "--party", paths["bank"]]
    code, out, err = colonnade(*own, "--sample", 50, "--replay", folder / "compliance.key")
    assert code == 0, out + err
    assert "50 of" in out
    assert (folder / "out" / "bank" / "psi_escrow.bin").stat().st_mode & 0o777 == 0o600
    assert not (folder / "out" / "grocer" / "psi_escrow.bin").exists()
    code, out, err = colonnade(*own, "--replay", folder / "bank.key")
    assert code == 2 and "FAIL" in out + err
    code, _, err = colonnade(*own, "--replay", folder / "compliance.pub")
    assert code == 2 and "compliance.pub is a public key" in err
    found = pd.read_csv(folder / "out" / "bank" / "rows.csv")
    steps = {step["key"]: step["size"] for step in json.loads(report.read_text())["steps"]}
    assert found["key"].value_counts().to_dict() == steps


def test_an_extract_that_lacks_our_ids_is_found(escrowed: tuple[Path, dict[str, Path]]) -> None:
    folder, paths = escrowed
    table = pd.read_csv(folder / "bank.csv", dtype=str)
    report = folder / "out" / "bank" / "psi_report.json"
    for name, share, expected in (("whole", 1.0, 0), ("half", 0.5, 2)):
        extract = folder / f"{name}.csv"  # of another tool: the separator differs from our table's
        table.sample(frac=share, random_state=1).to_csv(extract, index=False, sep=";")
        code, out, _ = colonnade("verify", report, "--party", paths["bank"], "--sample", 60, "--against", extract)
        assert code == expected, out


def test_a_missing_file_is_told_before_any_check_is_made(
    escrowed: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    folder, paths = escrowed
    report, nowhere = folder / "out" / "bank" / "psi_report.json", tmp_path / "nowhere"
    (tmp_path / "psi_report.json").write_bytes(report.read_bytes())
    own = ["--party", paths["bank"]]
    for arguments, missing in (
        ([report, nowhere], "nowhere"),
        ([report, *own, "--sample", 5, "--against", nowhere], "nowhere"),
        ([report, *own, "--sample", 5, "--input", nowhere], "nowhere"),
        ([report, *own, "--replay", nowhere], "nowhere"),
        ([tmp_path / "psi_report.json", *own, "--sample", 5], "psi_opening.bin"),
        ([tmp_path / "psi_report.json", *own, "--replay", folder / "compliance.key"], "psi_escrow.bin"),
    ):
        code, out, err = colonnade("verify", *arguments)
        assert (code, out) == (2, "") and missing in err


def test_audits_need_our_own_report_alone(escrowed: tuple[Path, dict[str, Path]]) -> None:
    folder, _ = escrowed
    code, _, err = colonnade("verify", folder / "out" / "bank" / "psi_report.json", "--sample", 5)
    assert code == 2 and "--party goes with --sample NUMBER or --replay KEY" in err


def test_a_budget_is_kept_across_runs_and_refuses_before_anything_is_sent(tmp_path: Path) -> None:
    paths = settled(tmp_path)
    paths["bank"].write_text(
        paths["bank"].read_text() + "[policy.budget]\ndays = 30\nruns = 1\nsmallest_difference = 5\n"
    )
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    report = json.loads((tmp_path / "out" / "bank" / "psi_report.json").read_text())
    assert [(use["peer"], use["runs"]) for use in report["budget"]] == [("grocer", 1)]
    assert report["budget"][0]["distinct_ids"] == len(TABLES["bank"])
    assert "PASS    bank found: every peer is within its budget" in verified(paths, tmp_path)
    code, _, err = colonnade("align", paths["bank"])  # at once: nobody is waited for
    assert code == 3 and "the budget for grocer is used up: 1 runs in 30 days allowed" in err
    assert colonnade("check", paths["bank"])[0] == 3
    altered(paths["bank"], ("runs = 1\n", "runs = 9\n"))
    TABLES["bank"].iloc[1:].to_csv(tmp_path / "bank.csv", index=False)
    code, _, err = colonnade("align", paths["bank"])
    assert code == 3 and "differs from an earlier one in 1 ids" in err


def test_offered_ids_count_every_key() -> None:
    from parties.agreement import Identifiers as Agreed
    from psi.identifiers import canonical

    agreed = Agreed(fields={"a": "text/1", "b": "text/1"}, keys=(("a",), ("b",)))
    ids = canonical({"a": ["1", "2", ""], "b": ["1", "", "3"]}, agreed, empty="drop")
    assert len(offered(bytes(32), ids)) == 4  # 1 and 2 as a, 1 and 3 as b


# ---- several rows a customer


def test_repeated_rows_are_aggregated_as_our_file_says(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    ids = [f" Client {number % 40} " if number % 3 else f"CLIENT {number % 40}" for number in range(140)]
    table = pd.DataFrame({"id": ids, "spend": generator.normal(size=140), "age": generator.normal(size=140),
                          "top": generator.normal(size=140), "visits": 1.0})  # fmt: skip
    paths = build(tmp_path, {"bank": TABLES["bank"], "shop": table})
    own = paths["shop"]
    altered(own, ("[table]", '[table]\nduplicates = "aggregate"\n'
                  'aggregate = { spend = "sum", age = "mean", top = "max", visits = "count" }'))  # fmt: skip
    prepared = prepare(Party(own))
    plain = table.assign(id=table["id"].map(key)).groupby("id", sort=False).agg(
        {"spend": "sum", "age": "mean", "top": "max", "visits": "count"}
    )  # fmt: skip
    assert len(prepared.features) == 40
    order = [key(ids[row]) for row in prepared.ids.rows]
    assert np.allclose(prepared.features.to_numpy(), plain.loc[order].to_numpy())


def test_rows_of_one_customer_with_different_labels_cannot_be_aggregated(tmp_path: Path) -> None:
    table = TABLES["bank"].reset_index(drop=True)
    other = table.iloc[:3].assign(bad=["yes" if one == "no" else "no" for one in table["bad"][:3]])
    table = pd.concat([table, other])
    paths = build(tmp_path, {"bank": table, "grocer": TABLES["grocer"]})
    altered(
        paths["bank"], ("[table]", '[table]\nduplicates = "aggregate"\naggregate = { income = "mean", years = "max" }')
    )
    with pytest.raises(LocalError, match="column 'bad': 3 ids have rows of different labels"):
        prepare(Party(paths["bank"]))


# ---- faults


def test_a_table_of_no_rows_or_one_row(tmp_path: Path) -> None:
    paths = settled(tmp_path, ("minimum = 10", "minimum = 1"))
    TABLES["bank"].iloc[:0].to_csv(tmp_path / "bank.csv", index=False)
    code, _, err = colonnade("align", paths["bank"])
    assert code == 2 and "bank.csv has no rows" in err
    one = TABLES["grocer"].iloc[:1]
    one.to_csv(tmp_path / "grocer.csv", index=False)
    both = TABLES["bank"].iloc[:1].assign(id=[one["id"].iloc[0].strip()])
    both.to_csv(tmp_path / "bank.csv", index=False)
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    assert pd.read_csv(tmp_path / "out" / "bank" / "rows.csv")["row"].tolist() == [0]


def test_an_id_of_a_megabyte_matches(tmp_path: Path) -> None:
    paths = settled(tmp_path, ("minimum = 10", "minimum = 1"))
    for name in paths:
        table = TABLES[name].copy()
        table.iloc[0, 0] = "x" * 2**20
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    assert 0 in pd.read_csv(tmp_path / "out" / "bank" / "rows.csv")["row"].tolist()


def many(tmp_path: Path, rows: int) -> dict[str, Path]:
    """Sets large enough for worker processes."""
    frames = {name: pd.DataFrame({"id": [f"{number:09d}" for number in range(start, start + rows)]})
              for name, start in (("bank", 0), ("grocer", rows // 2))}  # fmt: skip
    return settled(tmp_path, tables=frames)


def worker_processes(process: subprocess.Popen[str]) -> list[int]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [one.pid for one in family if "LokyProcess" in str(one.cmdline())]


@pytest.mark.parametrize(("what", "code"), [("a worker is killed", 2), ("interrupted", 130)])
def test_whatever_happens_to_workers_both_sides_end_with_one_line(tmp_path: Path, what: str, code: int) -> None:
    paths = many(tmp_path, 60_000)
    own = [sys.executable, "-m", "vfl", "align"]
    running = {name: subprocess.Popen([*own, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for name, path in paths.items()}  # fmt: skip
    until = time.monotonic() + 60
    while not (workers := worker_processes(running["bank"])) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    if what == "interrupted":
        running["bank"].send_signal(signal.SIGINT)
    else:
        os.kill(workers[0], signal.SIGKILL)
    ended = {name: process.communicate(timeout=60) for name, process in running.items()}
    assert {name: process.returncode for name, process in running.items()} == {"bank": code, "grocer": 4}, ended
    for _, err in ended.values():
        assert "Traceback" not in err, err
        assert len(err.strip().splitlines()) == 1, err


# ---- unusual files and agreements


def test_the_label_holder_may_stand_anywhere_in_the_agreement(tmp_path: Path) -> None:
    paths = build(tmp_path, {name: TABLES[name] for name in ("bank", "grocer")}, sign=False)
    common_file = tmp_path / "agreement.toml"
    head, bank, grocer = common_file.read_text().split("[[parties]]")
    grocer, rest = grocer.split("[identifiers]")
    common_file.write_text(f"{head}[[parties]]{grocer}[[parties]]{bank}[identifiers]{rest}")
    for path in paths.values():
        path.write_text(path.read_text() + "[policy.budget]\nruns = 5\n")
        Party(path).sign()
    codes, errors = together({name: ["align", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    assert "FAIL" not in verified(paths, tmp_path)


def test_a_report_under_invented_keys_does_not_pass_as_ours(
    escrowed: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """Everything in it is signed, by keys that it states itself: `--party` knows ours."""
    folder, _ = escrowed
    paths = settled(tmp_path)
    report = folder / "out" / "bank" / "psi_report.json"
    code, out, _ = colonnade("verify", report, "--party", paths["bank"], "--sample", 5)
    assert code == 2
    assert "FAIL    bank: is of the given agreement" in out
    code, out, _ = colonnade("verify", report)
    assert code == 0
    assert "NOT RUN bank: is of the given agreement" in out
    other = colonnade(
        "verify", report, "--agreement", folder / "agreement.toml", "--party", paths["bank"], "--sample", 5
    )
    assert other[0] == 2 and "is not the agreement that" in other[2]
    assert colonnade("verify", report, "--party", paths["bank"])[0] == 2


def test_a_rehearsal_after_a_failed_one_verifies(tmp_path: Path) -> None:
    paths = settled(tmp_path)
    for name in paths:
        pd.DataFrame({"id": [f"person {n}" for n in range(30)]}).to_csv(tmp_path / f"s-{name}.csv", index=False)
    for expected, code in ((31, 2), (30, 0)):
        codes, errors = together(
            {n: ["selftest", "--expect", expected, "--input", tmp_path / f"s-{n}.csv", p] for n, p in paths.items()}
        )
        assert set(codes.values()) == {code}, errors
    report = tmp_path / "out" / "bank" / "selftest_psi_report.json"
    assert colonnade("verify", report, "--agreement", tmp_path / "agreement.toml")[0] == 0
    (tmp_path / "out" / "bank" / "selftest.json").write_text("{}x")
    code, _, err = colonnade("align", paths["bank"])  # before anybody is waited for
    assert code == 2 and "selftest.json is not valid JSON" in err


def test_check_makes_no_file(tmp_path: Path) -> None:
    paths = settled(tmp_path)
    paths["bank"].write_text(paths["bank"].read_text() + "[policy.budget]\nruns = 5\n")
    assert colonnade("check", paths["bank"])[0] == 0
    assert not (tmp_path / "out").exists()


def test_a_rule_that_nobody_knows_is_not_signed(tmp_path: Path) -> None:
    paths = build(tmp_path, dict(TABLES), sign=False)
    altered(tmp_path / "agreement.toml", ("text/1", "txt/1"))
    code, _, err = colonnade("sign", paths["bank"])
    assert code == 2 and "txt/1" in err
    assert not (tmp_path / "agreement.bank.approval").exists()


def test_evidence_that_was_set_aside_is_never_overwritten(tmp_path: Path) -> None:
    for number in (2, 3):
        (tmp_path / "earlier" / str(number)).mkdir(parents=True)
    (tmp_path / "ledger.jsonl").write_text("newer")
    set_aside(tmp_path, ["ledger.jsonl"])
    assert (tmp_path / "earlier" / "4" / "ledger.jsonl").read_text() == "newer"


@pytest.mark.parametrize(("who", "what"), [("bank", "aggregate"), ("grocer", "masked")])
def test_a_policy_under_which_nothing_can_run_is_refused_by_check(tmp_path: Path, who: str, what: str) -> None:
    paths = settled(tmp_path)
    paths[who].write_text(paths[who].read_text() + f'[policy]\nforbid = ["{what}"]\n')
    code, _, err = colonnade("check", paths[who])
    assert code == 3 and f"[policy] forbids {what} messages" in err and "take it out of forbid" in err


def test_a_customer_with_several_rows_and_no_number_is_found_by_the_second_key() -> None:
    from parties.agreement import Identifiers as Agreed
    from psi.identifiers import canonical

    agreed = Agreed(fields={"number": "digits/1", "name": "text/1"}, keys=(("number",), ("name",)))
    columns = {"number": ["1", "1", "", "", ""], "name": ["a", "a", "b", "B ", "c"]}
    ids = canonical(columns, agreed, duplicates="first", empty="drop")
    assert ids.rows.tolist() == [0, 2, 4]
    assert ids.groups.tolist() == [0, 0, 1, 1, 2]
    assert ids.counts["duplicate"] == 2
