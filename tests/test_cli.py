"""The command line as people use it: real files, real processes, exit codes, one-line errors."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from sklearn.linear_model import LogisticRegression

from tests.world import Command, build, colonnade, customers, edit, together
from vfl.linear import VerticalLogisticRegression


def key(value: str) -> str:
    return value.strip().lower()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of three parties in three processes, then a scoring run, shared by the tests below."""
    folder = tmp_path_factory.mktemp("world")
    tables = customers(220)
    paths = build(folder, tables, model="test_fraction = 0.25\nallow_reconstruction = true")
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(tables, 0), errors
    new = {name: table.drop(columns="bad", errors="ignore").iloc[:150] for name, table in tables.items()}
    for name, table in new.items():
        table.to_csv(folder / f"new_{name}.csv", index=False)
    commands = {name: ["predict", path, "--input", folder / f"new_{name}.csv"] for name, path in paths.items()}
    commands["bank"] += ["--output", folder / "scores.csv"]
    codes, errors = together(commands)
    assert codes == dict.fromkeys(tables, 0), errors
    return folder, tables, paths, new


def joined(tables):
    frames = [table.assign(id=table["id"].map(key)).set_index("id") for table in tables.values()]
    return frames[0].join(frames[1:], how="inner")


def test_run_trains_the_model_of_the_joined_table(finished):
    folder, tables, _, _ = finished
    rows = {name: pd.read_csv(folder / "out" / name / "rows.csv") for name in tables}
    aligned = {name: tables[name].reset_index(drop=True).iloc[rows[name]["row"]] for name in tables}
    ids = [aligned[name]["id"].map(key).tolist() for name in tables]
    assert ids[0] == ids[1] == ids[2]
    assert set(ids[0]) == set(joined(tables).index)
    train = (rows["bank"]["part"] == "train").to_numpy()
    x = pd.concat(
        [one.drop(columns=["id", "bad"], errors="ignore").reset_index(drop=True) for one in aligned.values()], axis=1
    )
    x = ((x - x[train].mean()) / x[train].std(ddof=0)).to_numpy()
    y = (aligned["bank"]["bad"] == "yes").to_numpy()
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x[train], y[train])
    shares = [VerticalLogisticRegression.load(folder / "out" / name / "model.json") for name in tables]
    ours = np.concatenate([share.coef_[0] for share in shares])
    assert np.abs(ours - oracle.coef_[0]).max() < 1e-3
    test_scores = rows["bank"]["score"][~train]
    assert np.abs(test_scores - oracle.predict_proba(x[~train])[:, 1]).max() < 1e-3


def test_every_party_keeps_its_share_report_ledger_and_log(finished):
    folder, tables, _, _ = finished
    for name in tables:
        files = {path.name for path in (folder / "out" / name).iterdir()}
        assert {"model.json", "psi_report.json", "ledger.jsonl", "log.txt", "rows.csv", "summary.json"} <= files
        summary = json.loads((folder / "out" / name / "summary.json").read_text())
        assert summary["converged"] and summary["key_bits"] == 2048 and summary["intersection"] == len(joined(tables))
        assert ("metrics" in summary) == (name == "bank")


def test_predict_scores_new_rows_at_the_label_holder_only(finished):
    folder, tables, _, new = finished
    scores = pd.read_csv(folder / "scores.csv")
    assert set(scores["id"].map(key)) == set(joined(new).index)
    assert scores["score"].between(0, 1).all()
    assert not list((folder / "out" / "grocer").glob("*scores*"))
    shares = {name: json.loads((folder / "out" / name / "model.json").read_text()) for name in tables}
    total = shares["bank"]["intercept"][0]
    for name, share in shares.items():
        table = (
            new[name].assign(id=new[name]["id"].map(key)).set_index("id").loc[scores["id"].map(key), share["features"]]
        )
        total = total + ((table - share["prepared"]["mean"]) / share["prepared"]["scale"]) @ share["coef"][0]
    assert np.abs(1 / (1 + np.exp(-total.to_numpy())) - scores["score"]).max() < 1e-9


def test_verify_accepts_the_reports_and_names_what_was_changed(finished, tmp_path):
    folder, tables, _, _ = finished
    reports = [folder / "out" / name / "psi_report.json" for name in tables]
    code, out, _ = colonnade("verify", *reports, "--agreement", folder / "agreement.toml")
    assert code == 0 and "FAIL" not in out
    forged = reports[0].read_text().replace('"size": ', '"size": 1', 1)
    (tmp_path / "psi_report.json").write_text(forged)
    code, out, err = colonnade("verify", tmp_path / "psi_report.json")
    assert code == 2 and "FAIL    bank: its owner's signature" in out and "Traceback" not in err


def test_no_id_label_or_secret_is_in_any_log_ledger_or_report(finished):
    folder, tables, _, _ = finished
    secrets = [value for name in tables for value in json.loads((folder / f"{name}.key").read_text()).values()]
    markers = {key(one) for table in tables.values() for one in table["id"]} | {
        str(one).lower() for one in secrets[2::4]
    }
    for path in (folder / "out").rglob("*"):
        if path.is_file():
            text = path.read_bytes().lower()
            assert not any(marker.encode() in text for marker in markers), path.name


def test_keygen_init_check_sign_lead_a_newcomer(tmp_path):
    assert colonnade("keygen", "bank", "--folder", tmp_path)[0] == 0
    assert (tmp_path / "bank.key").stat().st_mode & 0o777 == 0o600
    code, _, err = colonnade("keygen", "bank", "--folder", tmp_path)
    assert code == 2 and "never overwritten" in err
    assert colonnade("init", "--name", "bank", "--folder", tmp_path)[0] == 0
    assert colonnade("init", "--name", "bank", "--folder", tmp_path)[0] == 2
    for command in ("check", "sign", "run"):  # the template still has to be filled in
        code, _, err = colonnade(command, tmp_path / "bank.toml")
        assert code == 2 and "'legal_basis'; it is empty: fill it in" in err
    edit(tmp_path / "agreement.toml", 'legal_basis = ""', 'legal_basis = "a contract"')
    code, _, err = colonnade("check", tmp_path / "bank.toml")
    assert code == 2 and "not a public key" in err


def test_check_shows_rows_and_costs_and_writes_nothing(tmp_path):
    paths = build(tmp_path, customers(120))
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = colonnade("check", paths["grocer"])
    assert code == 0 and "108 of 108" in out and "exchanges" in out and "Nothing was sent" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_check_cuts_nothing_on_a_terminal_of_80_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("vfl.console.out.width", 80)
    paths = build(tmp_path, customers(120))
    code, out, _ = colonnade("check", paths["grocer"])
    assert code == 0 and "…" not in out
    assert {"108", "empty", "refused", "distinct", "letters"} <= set(re.findall(r"\w+", out))
    assert all(len(line) == 80 for line in out.splitlines() if line.startswith(("│", "┃")))


def test_check_tells_how_far_training_may_go_why_and_what_raises_it(tmp_path):
    tables = customers(120)
    paths = build(tmp_path, {name: tables[name] for name in ("bank", "grocer")})
    agreement = tmp_path / "agreement.toml"

    def told(name: str) -> str:
        return " ".join(colonnade("check", paths[name])[1].replace("│", " ").split())

    assert "at most 2 of the 100 in [model]" in told("grocer") and "grocer 2 (ours)" in told("grocer")
    assert "allow_reconstruction = true in [model] allow more" in told("grocer")
    assert "a guess: the agreement has none" in told("bank")
    text = agreement.read_text().replace('role = "feature holder"', 'role = "feature holder"\ncolumns = 7')
    agreement.write_text(text)
    assert "at most 7 of the 100" in told("bank") and "grocer 7 at most, as agreed" in told("bank")
    agreement.write_text(text.replace("[model]", "[model]\nallow_reconstruction = true\nmax_exchanges = 30"))
    assert "at most 30, by max_exchanges in [model]" in told("bank")


def test_what_is_predicted_is_said_of_all_parties_with_what_it_assumes(tmp_path):
    tables = customers(120)
    paths = build(tmp_path, {name: tables[name].iloc[:100] for name in tables})
    agreement = tmp_path / "agreement.toml"
    agreement.write_text(agreement.read_text().replace('"feature holder"', '"feature holder"\ncolumns = 2'))
    shown = [" ".join(colonnade("check", path)[1].replace("│", " ").split()) for path in paths.values()]
    amounts = [re.findall(r"s(?: of one core each)?, ([\d.]+ [kM]?B)", one) for one in shown]
    assert len(amounts[0]) == 4 and amounts == [amounts[0]] * 3  # every party has the agreed columns, and equal rows
    assert all("100 rows at every party" in one for one in shown)


def test_check_says_plainly_what_one_feature_holder_gives_away(tmp_path):
    tables = customers(120)
    paths = build(tmp_path, {name: tables[name] for name in ("bank", "grocer")})
    for path in paths.values():
        assert "rebuild these columns" in " ".join(colonnade("check", path)[1].replace("│", " ").split())


def spoil(column, change):
    def act(folder: Path) -> None:
        table = pd.read_csv(folder / "grocer.csv", dtype=str, keep_default_na=False)
        table[column] = change(table[column])
        table.to_csv(folder / "grocer.csv", index=False)

    return act


def bank_label(values):
    def act(folder: Path) -> None:
        table = pd.read_csv(folder / "bank.csv", dtype=str)
        table["bad"] = [values[i % len(values)] for i in range(len(table))]
        table.to_csv(folder / "bank.csv", index=False)

    return act


BAD_INPUT = {
    "duplicate ids": ("grocer", spoil("id", lambda c: [c[0], *c[:-1]]), r"grocer.csv, column 'id': 1 duplicate"),
    "empty ids": ("grocer", spoil("id", lambda c: ["", " ", *c[2:]]), r"grocer.csv, column 'id': 2 empty"),
    "rounded ids": ("grocer", spoil("id", lambda c: ["1.23E+10", *c[1:]]), r"column 'id': 1 ids look like"),
    "ids read as floats": ("grocer", spoil("id", lambda c: [f"{i}.0" for i in range(len(c))]), r"'id'.*floats"),
    "a gap": ("grocer", spoil("baskets", lambda c: ["", *c[1:]]), r"grocer.csv.*'baskets' 1 missing"),
    "infinity": ("grocer", spoil("returns", lambda c: ["inf", "-inf", *c[2:]]), r"grocer.csv.*'returns' 2 infinite"),
    "text": ("grocer", spoil("returns", lambda c: ["many", *c[1:]]), r"'returns' 1 not numbers"),
    "rare column": ("grocer", spoil("returns", lambda c: ["1", *["0"] * (len(c) - 1)]), r"returns \(1\)"),
    "missing column": ("grocer", lambda f: edit(f / "grocer.toml", "baskets", "basket"), r"lacks the columns 'basket'"),
    "unnamed column": ("grocer", lambda f: edit(f / "grocer.csv", "returns", ""), r"1 columns without a name"),
    "three labels": ("bank", bank_label(["yes", "no", "perhaps"]), r"bank.csv, column 'bad'.*3 values"),
    "constant label": ("bank", bank_label(["yes"]), r"bank.csv, column 'bad'.*constant"),
    "missing label": ("bank", bank_label(["yes", "no", ""]), r"'bad': \d+ labels are missing"),
    "few rows": ("grocer", lambda f: (f / "grocer.csv").write_text("id,baskets,returns\na,1,2\nb,2,3\n"), r"2 rows"),
    "empty file": ("grocer", lambda f: (f / "grocer.csv").write_text(""), r"grocer.csv is empty"),
    "no rows": ("grocer", lambda f: (f / "grocer.csv").write_text("id,baskets,returns\n"), r"grocer.csv has no rows"),
    "not UTF-8": ("grocer", lambda f: (f / "grocer.csv").write_bytes(b"id,baskets,returns\n\xff\xfe,1,2\n"), r"UTF-8"),
    "no file": ("grocer", lambda f: (f / "grocer.csv").unlink(), r"grocer.csv does not exist"),
    "no key": ("grocer", lambda f: (f / "grocer.key").unlink(), r"grocer.key"),
    "a key for all to read": ("grocer", lambda f: (f / "grocer.key").chmod(0o644), r"chmod 600"),
    "a damaged key": ("grocer", lambda f: (f / "grocer.key").write_text("{}"), r"not a key file"),
    "a misspelt field": ("grocer", lambda f: edit(f / "grocer.toml", "features", "feature"), r"grocer.toml.*feature"),
    "no TOML": ("grocer", lambda f: (f / "grocer.toml").write_text("]["), r"not valid TOML"),
    "a label at a feature holder": ("grocer", lambda f: edit(f / "grocer.toml", "id =", "label = 'x'\nid ="), r"label"),
    "no way to write": ("grocer", lambda f: (f / "out").write_text("a file"), r"cannot create the folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_anything_is_sent(tmp_path, case):
    party, spoiled, expected = BAD_INPUT[case]
    paths = build(tmp_path, customers(60), connect=1)
    spoiled(tmp_path)
    code, out, err = colonnade("run", paths[party])
    assert code == 2, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("colonnade: ")
    assert re.search(expected, lines[0]), lines[0]
    assert "Traceback" not in err + out and "customer-" not in err.lower() and "1.23E+10," not in err
    assert not (tmp_path / "out" / party / "ledger.jsonl").exists() if (tmp_path / "out").is_dir() else True


def test_a_port_in_use_is_named(tmp_path):
    paths = build(tmp_path, customers(60), connect=1)
    port = int(re.findall(r"127\.0\.0\.1:(\d+)", (tmp_path / "agreement.toml").read_text())[0])
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", port))
        busy.listen()
        code, _, err = colonnade("run", paths["bank"])
    assert code == 2 and str(port) in err and "another program" in err


REFUSALS = {
    "expired": (lambda f: edit(f / "agreement.toml", "2099-12-31", "2020-01-01"), "expired"),
    "unsigned": (lambda f: (f / "agreement.grocer.approval").unlink(), "colonnade sign"),
    "changed since signed": (lambda f: edit(f / "agreement.toml", "to test", "to sell"), "changed since we approved"),
    "policy on keys": (
        lambda f: edit(f / "grocer.toml", "[table]", "[policy]\nminimum_key_bits = 3072\n[table]"),
        "3072",
    ),
    "policy on exchanges": (
        lambda f: edit(f / "grocer.toml", "[table]", "[policy]\nmaximum_exchanges = 5\n[table]"),
        "5 exchanges",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_have_exit_code_3_and_send_nothing(tmp_path, case):
    change, expected = REFUSALS[case]
    paths = build(tmp_path, customers(60), connect=1)
    change(tmp_path)
    code, _, err = colonnade("run", paths["grocer"])
    assert code == 3 and expected in err and len(err.strip().splitlines()) == 1


def test_a_peer_that_never_comes_is_named_with_exit_code_4(tmp_path):
    paths = build(tmp_path, customers(60), connect=2)
    start = time.monotonic()
    code, _, err = colonnade("run", paths["telco"])
    assert code == 4 and time.monotonic() - start < 20
    assert ("bank" in err or "grocer" in err) and "2 s" in err


def test_a_differing_agreement_is_shown_field_by_field_to_both(tmp_path):
    paths = build(tmp_path, customers(60), connect=20)
    other = tmp_path / "other.toml"
    other.write_text((tmp_path / "agreement.toml").read_text().replace("[model]", "[model]\nC = 5.0"))
    edit(paths["telco"], 'agreement = "agreement.toml"', 'agreement = "other.toml"')
    assert colonnade("sign", paths["telco"])[0] == 0
    start = time.monotonic()
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == {"bank": 3, "grocer": 3, "telco": 3} and time.monotonic() - start < 30
    assert "model.C: ours 1.0, theirs 5.0" in errors["bank"]
    assert "model.C: ours 5.0, theirs 1.0" in errors["telco"]


def test_below_the_minimum_all_stop_and_nothing_is_revealed(tmp_path):
    paths = build(tmp_path, customers(60), minimum=5000)
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert set(codes.values()) == {3}
    assert all("below the agreed minimum of 5000" in text for text in errors.values())
    assert not list(tmp_path.glob("out/*/rows.csv"))


def test_one_feature_holder_stops_in_time_and_says_why(tmp_path):
    tables = customers(150)
    paths = build(tmp_path, {name: tables[name] for name in ("bank", "grocer")})
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    for name in ("bank", "grocer"):
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert summary["exchanges"] == 2 and not summary["converged"]  # the grocer has two columns
        assert "use it if its figures suffice" in summary["notes"][-1]
        assert "allow_reconstruction = true in [model]" in summary["notes"][-1]
        assert "rebuild these columns" in summary["notes"][0]
        assert "training stopped after 2 exchanges" in errors[name]


def test_policy_can_forbid_plaintext(tmp_path):
    tables = customers(150)
    paths = build(tmp_path, {name: tables[name] for name in ("bank", "grocer")})
    edit(paths["grocer"], "[table]", '[policy]\nforbid = ["plaintext"]\n[table]')
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes["grocer"] == 3 and "PartialEmbedding is plaintext" in errors["grocer"]
    assert codes["bank"] == 3 and "grocer stopped" in errors["bank"]


def test_a_killed_peer_ends_the_others_with_exit_code_4(tmp_path):
    paths = build(tmp_path, customers(400), model="tolerance = 1e-12")
    log = tmp_path / "bank.events"
    command = [sys.executable, "-m", "vfl", "run"]
    others = {}
    with log.open("w") as events:
        for name in ("bank", "grocer", "telco"):
            others[name] = subprocess.Popen(
                [*command, str(paths[name]), "--events"],
                stdout=events if name == "bank" else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
    try:
        deadline = time.monotonic() + 60
        while '"train"' not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        others["telco"].send_signal(signal.SIGKILL)
        start = time.monotonic()
        codes = {name: others[name].wait(timeout=40) for name in ("bank", "grocer")}
        assert time.monotonic() - start < 30
        assert codes == {"bank": 4, "grocer": 4}
        errors = others["bank"].stderr.read() + others["grocer"].stderr.read()
        assert "telco" in errors and "Traceback" not in errors
    finally:
        for process in others.values():
            process.kill()
            process.wait()
            process.stderr.close()
    assert not [one for one in psutil.Process(os.getpid()).children() if "-m vfl" in " ".join(one.cmdline())]


def test_help_is_complete():
    for command in ("demo", "keygen", "init", "check", "sign", "run", "predict", "verify"):
        code, out, _ = colonnade(command, "--help")
        assert code == 0 and "Usage" in out and "--help" in out


def test_a_second_start_does_not_touch_the_evidence_of_the_first(finished):
    folder, _, paths, _ = finished
    ledger = folder / "out" / "bank" / "ledger.jsonl"
    before = ledger.read_bytes()
    with (folder / "out" / "bank" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = colonnade("run", paths["bank"])
    assert code == 2 and "another run writes to" in err
    assert ledger.read_bytes() == before


def test_a_run_that_never_began_leaves_the_earlier_one_verifiable(finished):
    folder, _, paths, _ = finished
    text = (folder / "agreement.toml").read_text()
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("127.0.0.1", int(re.findall(r"127\.0\.0\.1:(\d+)", text)[0])))
        busy.listen()
        assert colonnade("run", paths["bank"])[0] == 2
    assert colonnade("verify", folder / "out" / "bank" / "psi_report.json")[0] == 0


def test_reports_of_a_scoring_run_verify_too(finished):
    folder, tables, _, _ = finished
    reports = [folder / "out" / name / "score_psi_report.json" for name in tables]
    code, out, err = colonnade("verify", *reports, "--agreement", folder / "agreement.toml")
    assert code == 0, out + err
    assert "ledger: its chain and its seal hold" in out and "FAIL" not in out


def test_what_could_not_be_checked_is_not_called_ok(finished, tmp_path):
    folder, _, _, _ = finished
    alone = tmp_path / "psi_report.json"
    alone.write_bytes((folder / "out" / "bank" / "psi_report.json").read_bytes())
    code, out, _ = colonnade("verify", alone, folder / "out" / "grocer" / "psi_report.json")
    assert code == 0
    assert "NOT RUN bank: ledger: its chain" in out and "PASS    grocer: ledger: its chain" in out
    assert "NOT RUN all reports: every party's is here" in out and "telco" in out


def test_a_later_run_sets_the_earlier_ones_files_aside(tmp_path):
    tables = customers(120)
    paths = build(tmp_path, {name: tables[name] for name in ("bank", "grocer")})
    for _ in range(2):
        codes, errors = together({name: ["run", path] for name, path in paths.items()})
        assert set(codes.values()) == {0}, errors
    for name in paths:
        now, earlier = tmp_path / "out" / name, tmp_path / "out" / name / "earlier" / "1"
        assert colonnade("verify", now / "psi_report.json")[0] == 0
        assert colonnade("verify", earlier / "psi_report.json")[0] == 0
        assert (earlier / "model.json").exists() and (earlier / "report.html").exists() == (name == "bank")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_party_tells_the_others_and_seals_its_ledger(tmp_path, number):
    paths = build(
        tmp_path, customers(400), model="solver = 'sgd'\nepochs = 500\nmax_exchanges = 500\nallow_reconstruction = true"
    )
    running = {name: Command("run", path, "--events", folder=tmp_path / name) for name, path in paths.items()}
    try:
        while '"train"' not in running["bank"].output():
            assert running["bank"].poll() is None
            time.sleep(0.01)
        running["bank"].send_signal(number)
        codes = {name: process.wait(40) for name, process in running.items()}
        errors = {name: process.errors() for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    assert codes["bank"] == 130 and "interrupted" in errors["bank"]
    assert "Traceback" not in "".join(errors.values())
    for name in ("grocer", "telco"):
        assert codes[name] == 4 and "bank stopped (somebody interrupted it)" in errors[name]
        assert json.loads((tmp_path / "out" / name / "ledger.jsonl").read_text().splitlines()[-1])["event"] == "sealed"
        assert (tmp_path / "out" / name / "psi_report.json").exists()  # rows were known: so is the evidence
    assert "interrupted" in (tmp_path / "out" / "bank" / "log.txt").read_text()


def test_scores_that_could_not_be_written_are_refused_before_the_session(finished, tmp_path):
    folder, _, paths, _ = finished
    code, _, err = colonnade(
        "predict", paths["bank"], "--input", folder / "new_bank.csv", "--output", tmp_path / "nowhere" / "scores.csv"
    )
    assert code == 2 and "cannot write" in err and "nowhere" in err


@pytest.mark.parametrize(
    "options", [("--name", "telco", "--no-label-holder"), ("--name", "registry", "--horizontal"), ("--name", "mill")]
)
def test_init_names_no_party_twice(tmp_path, options):
    assert colonnade("init", *options, "--folder", tmp_path)[0] == 0
    names = re.findall(r'^name = "(\w+)"', (tmp_path / "agreement.toml").read_text(), re.M)
    assert options[1] in names and len(set(names)) == len(names)


def test_init_keeps_an_agreement_that_came_from_the_others(tmp_path):
    (tmp_path / "agreement.toml").write_text("theirs")
    assert colonnade("init", "--name", "grocer", "--no-label-holder", "--folder", tmp_path)[0] == 0
    assert (tmp_path / "agreement.toml").read_text() == "theirs"
    assert 'key = "grocer.key"' in (tmp_path / "grocer.toml").read_text()


def test_the_tutorials_script_works_over_the_network(tmp_path):
    paths = build(tmp_path, customers(150))
    page = (Path(__file__).resolve().parents[1] / "docs" / "tutorial.md").read_text()
    script = re.search(r"```python\n(.*?)```", page, re.S)[1]
    for name in paths:
        own = script.replace('"bank.toml"', f'"{name}.toml"').replace('"model.json"', f'"{name}.json"')
        own = own if name == "bank" else own.replace("prepared.label[rows]", "None")
        (tmp_path / f"{name}.py").write_text(own)
    running = {
        name: subprocess.Popen([sys.executable, f"{name}.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for name in paths
    }
    try:
        errors = {name: process.communicate(timeout=60)[1] for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    assert {process.returncode for process in running.values()} == {0}, errors
    shares = {name: VerticalLogisticRegression.load(tmp_path / f"{name}.json") for name in paths}
    assert len({share.training_ for share in shares.values()}) == 1
    assert list(shares["grocer"].feature_names_in_) == ["baskets", "returns"]


def test_no_common_customer_is_said_so(tmp_path):
    tables = customers(60)
    tables["telco"]["id"] = [f"other-{number}" for number in range(len(tables["telco"]))]
    paths = build(tmp_path, tables, minimum=0)
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert set(codes.values()) == {3}
    assert "no customer is common" in errors["bank"]
