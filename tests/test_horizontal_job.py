"""The horizontal job as organisations run it: files, commands, real processes, and what stays with whom."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from sklearn.linear_model import LogisticRegression

from parties.agreement import Agreement
from parties.errors import LocalError, PeerAborted, Refused
from parties.horizontal import Horizontal
from parties.identity import Identity
from parties.ledger import Ledger, check_ledger
from parties.memory import MemoryLink, make_agreement, outcomes, play
from parties.message import name_of, parse_header
from parties.party_file import Party
from parties.session import Session
from tests.conftest import IDENTITIES, NAMES
from tests.world import Command, colonnade, free_ports, together
from vfl.horizontal import job, report
from vfl.horizontal.models import Score
from vfl.horizontal.newton import Exact
from vfl.horizontal.round_messages import Task
from vfl.horizontal.settings import Job, Schema
from vfl.horizontal.share import HorizontalModel
from vfl.horizontal.simulate import deal, simulate
from vfl.horizontal.simulation import digits
from vfl.horizontal.trainer import Data, Trainer

FEATURES = ("age", "dose", "weight")
MARK = 31337.125

AGREEMENT = """
title = "A horizontal test"
purpose = "to test"
legal_basis = "none needed"
expires = 2099-12-31
{parties}
[job]
mode = "horizontal"
[columns]
features = ["age", "dose", "weight"]
units = {{ age = "years" }}
label = "ill"
[horizontal]
classes = ["no", "yes"]
{horizontal}
[horizontal.clients]
deadline = {deadline}
{clients}
[deadlines]
connect = {connect}
silence = 4
"""


def patients(clients: int, rows: int = 30, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Site by site: three columns and a label that depends on them; every site has its own mean."""
    generator = np.random.default_rng(seed)
    tables = {}
    for number in range(clients):
        x = generator.normal(size=(rows, 3)) + generator.normal(size=3) / 2
        chance = 1 / (1 + np.exp(-(x @ [1.0, -1.0, 0.5])))
        table = pd.DataFrame(x, columns=FEATURES)
        table["ill"] = np.where(generator.random(rows) < chance, "yes", "no")
        table.loc[:1, "ill"] = ["yes", "no"]
        tables[f"site{number}"] = table
    return tables


def build(
    folder: Path,
    tables: dict[str, pd.DataFrame],
    *,
    horizontal: str = "",
    clients: str = "",
    connect: float = 60,
    deadline: float = 20,
    own: str = "",
    sign: bool = True,
) -> dict[str, Path]:
    """Coordinator `lead` and one client a table, on disk as users have them; the party files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    identities = {name: Identity.generate(name) for name in ["lead", *tables]}
    port = free_ports(1)[0]
    parties = "".join(
        f'[[parties]]\nname = "{name}"\nrole = "{"coordinator" if name == "lead" else "client"}"\n'
        f'public_key = "{identity.public}"\n' + (f'endpoint = "tcp://127.0.0.1:{port}"\n' if name == "lead" else "")
        for name, identity in identities.items()
    )
    text = AGREEMENT.format(parties=parties, horizontal=horizontal, clients=clients, connect=connect, deadline=deadline)
    (folder / "agreement.toml").write_text(text)
    paths = {}
    for name, identity in identities.items():
        identity.save(folder / f"{name}.key")
        paths[name] = folder / f"{name}.toml"
        table = ""
        if name in tables:
            tables[name].to_csv(folder / f"{name}.csv", index=False)
            table = f'[table]\npath = "{name}.csv"\n{own}'
        paths[name].write_text(f'agreement = "agreement.toml"\nkey = "{name}.key"\noutput = "out/{name}"\n{table}')
        if sign:
            Party(paths[name]).sign()
    return paths


def pooled(tables: dict[str, pd.DataFrame], C: float = 1.0) -> LogisticRegression:
    table = pd.concat(tables.values())
    x, y = table[list(FEATURES)].to_numpy(), table["ill"].to_numpy()
    return LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, y)


def said(code: int, *arguments: object) -> str:
    found, _, error = colonnade(*arguments)
    assert found == code and len(error.strip().splitlines()) == 1, error
    return error


def summary(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / name / "summary.json").read_text())
    return found


def star(horizontal: dict[str, Any] | None = None, **tables: Any) -> Agreement:
    fields: dict[str, Any] = {
        "horizontal": {"classes": ["no", "yes"], "clients": {"deadline": 2}} | (horizontal or {}),
        "columns": {"features": list(FEATURES), "label": "ill"},
        "deadlines": {"connect": 5.0, "stall": 5.0, "message": 60.0},
    }
    return make_agreement(IDENTITIES, **(fields | tables))


def held(tables: dict[str, pd.DataFrame]) -> dict[str, Data]:
    """The sites' rows as grocer, mill and press have them; of more sites the first is the coordinator's."""
    names = NAMES[-len(tables) :]
    return {
        name: Data(table[list(FEATURES)].to_numpy(), table["ill"].to_numpy(str), FEATURES, ("no", "yes"))
        for name, table in zip(names, tables.values(), strict=True)
    }


def role(data: dict[str, Data]) -> Callable[[Session], Any]:
    return lambda session: job.train(session, data.get(session.name))


# ---- real processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, pd.DataFrame], dict[str, Path]]:
    """One exact run of a coordinator and three clients, shared by the tests below."""
    folder, tables = tmp_path_factory.mktemp("star"), patients(3)
    tables["site0"].loc[2, "age"] = MARK / 1e4
    paths = build(folder, tables)
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(paths, 0), errors
    return folder, tables, paths


def test_every_party_ends_with_the_model_of_all_rows(finished: Any) -> None:
    folder, tables, paths = finished
    central = pooled(tables)
    for name in paths:
        model = HorizontalModel.load(folder / "out" / name / "model.json").estimator()
        assert type(model) is LogisticRegression
        np.testing.assert_allclose(model.coef_, central.coef_, atol=1e-5)
        np.testing.assert_allclose(model.intercept_, central.intercept_, atol=1e-5)
        assert list(model.classes_) == ["no", "yes"] and list(model.feature_names_in_) == list(FEATURES)


def test_the_report_tells_how_every_client_fares_before_and_after(finished: Any) -> None:
    folder, tables, _ = finished
    found = summary(folder, "lead")
    assert found["evaluation"].keys() == tables.keys()
    central = pooled(tables)
    penalty = float((central.coef_**2).sum()) / 2 / 90
    for name, table in tables.items():
        one = found["evaluation"][name]
        assert one["before"]["loss"] == pytest.approx(np.log(2))
        chances = central.predict_proba(table[list(FEATURES)].to_numpy())[:, 1]
        truth = table["ill"] == "yes"
        loss = -np.mean(np.log(np.where(truth, chances, 1 - chances)))
        assert one["after"]["loss"] == pytest.approx(loss + penalty, abs=1e-6)
        assert one["after"]["rows"] == len(table)
    worst = max(tables, key=lambda name: found["evaluation"][name]["after"]["loss"])
    page = (folder / "out" / "lead" / "report.html").read_text()
    assert found["worst"] == worst and f"serves <strong>{worst}</strong> worst" in page
    assert page.count("<svg") == 2 and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    own = summary(folder, "site1")
    assert own["evaluation"].keys() == {"site1"} and own["rows"] == 30
    assert "30, each with 3 columns" in report.closing_table(own).columns[1].cells


@pytest.mark.parametrize(("fraction", "rows"), [(0.0, "all rows"), (0.25, "the rows kept from training")])
def test_the_report_says_over_which_rows_a_loss_is(finished: Any, fraction: float, rows: str) -> None:
    folder, _, _ = finished
    agreement = Agreement.load(folder / "agreement.toml")
    found = summary(folder, "lead") | {"test_fraction": fraction}
    page = report.render(found, agreement.horizontal)
    assert page.count(f"with which each round began, over {rows}.") == 2
    assert ("on the rows kept from training" in page) == bool(fraction)
    assert any("held-out" in title for title, _ in report.training_rows(found)) == bool(fraction)


def test_ledgers_are_signed_and_say_who_countersigned(finished: Any) -> None:
    folder, tables, paths = finished
    for name, path in paths.items():
        ledger = folder / "out" / name / "ledger.jsonl"
        check_ledger(ledger, Party(path).identity.public)
        lines = [json.loads(line) for line in ledger.read_text().splitlines()]
        signed = {line["peer"] for line in lines if line.get("event") == "countersigned"}
        assert signed == (set(tables) if name == "lead" else {"lead"})
        assert {line["class"] for line in lines if "class" in line} <= {"control", "ciphertext", "masked", "aggregate"}


def test_no_row_label_or_coefficient_is_in_ledger_log_or_report(finished: Any) -> None:
    folder, tables, paths = finished
    texts = {
        (name, file): (folder / "out" / name / file).read_text()
        for name in paths
        for file in ("ledger.jsonl", "log.txt", "report.html", "summary.json")
    }
    model = HorizontalModel.load(folder / "out" / "lead" / "model.json")
    numbers = [*model.coef[0], *model.intercept, MARK / 1e4]
    numbers += [value for table in tables.values() for value in table[list(FEATURES)].to_numpy().ravel()]
    written = [form for number in map(abs, map(float, numbers)) for form in (f"{number:#.6g}", repr(number)[:8])]
    assert min(map(len, written)) >= 7  # shorter ones stand in a time by chance
    for where, text in texts.items():
        assert not [form for form in written if form in text], where
        assert "yes" not in text, where


def test_who_comes_with_another_agreement_is_shown_the_difference(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3), connect=20)
    other = (tmp_path / "agreement.toml").read_text().replace('purpose = "to test"', 'purpose = "to sell"')
    (tmp_path / "other.toml").write_text(other)
    paths["site1"].write_text(paths["site1"].read_text().replace("agreement.toml", "other.toml"))
    Party(paths["site1"]).sign()
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == {"lead": 3, "site0": 3, "site1": 3, "site2": 3}
    assert "purpose: ours 'to test', theirs 'to sell'" in errors["lead"]
    assert "purpose: ours 'to sell', theirs 'to test'" in errors["site1"]
    assert "lead stopped (its policy or agreement refuses)" in errors["site0"]
    assert all(len(text.splitlines()) == 1 for text in errors.values())


def test_without_its_quorum_the_coordinator_names_the_missing(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(4), connect=1, clients="quorum = 3")
    error = said(4, "run", paths["lead"])
    assert "0 of 4 clients came within 1 s, 3 are needed; missing: site0, site1, site2, site3" in error


def test_a_run_that_does_not_begin_leaves_the_checkpoint_where_it_is(tmp_path: Path) -> None:
    """Who forgot --resume while the job goes on is refused, and may try again with it."""
    paths = build(tmp_path, patients(3), connect=1)
    kept = tmp_path / "out" / "site0" / "client.checkpoint"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    said(4, "run", paths["site0"])
    assert kept.read_bytes() == b"kept"
    assert "is no checkpoint, or is damaged" in said(2, "run", "--resume", paths["site0"])


class Running:
    """Parties as processes, which a test may kill when they report a round."""

    def __init__(self, paths: dict[str, Path], *options: str) -> None:
        self.killed: set[str] = set()
        self.processes = {
            name: Command("run", "--events", *options, path, folder=path.parent / "streams" / name)
            for name, path in paths.items()
        }

    def run(self, kill: dict[str, int], seconds: float = 180) -> dict[str, int | None]:
        """Exit codes; `kill` says whom to kill at which round."""
        until = time.monotonic() + seconds
        try:
            while any(one.poll() is None for one in self.processes.values()) and time.monotonic() < until:
                for name in kill.keys() - self.killed:
                    if rounds_of(self.processes[name]) >= kill[name]:
                        self.killed.add(name)
                        self.processes[name].kill()
                time.sleep(0.01)
        finally:
            codes = {name: process.poll() for name, process in self.processes.items()}
            for process in self.processes.values():
                process.kill()
        self.errors = {name: process.errors() for name, process in self.processes.items()}
        return codes


def rounds_of(process: Command) -> int:
    """How many it has reported."""
    events = [json.loads(line) for line in process.output().splitlines(keepends=True) if line.endswith("\n")]
    return max((one["done"] for one in events if one["phase"] == "train"), default=0)


def test_ten_clients_finish_when_two_are_killed_in_the_third_round(tmp_path: Path) -> None:
    tables = patients(10, rows=12)
    paths = build(tmp_path, tables, horizontal='strategy = "fedavg"\nrounds = 12\nbatch = 0')
    running = Running(paths)
    codes = running.run({"site3": 2, "site7": 2})
    assert running.killed == {"site3", "site7"}
    assert {name: code for name, code in codes.items() if name not in running.killed} == dict.fromkeys(
        [name for name in paths if name not in running.killed], 0
    ), running.errors
    found = summary(tmp_path, "lead")
    assert len(found["progress"]) == 12 and not found["complete"]
    assert len(found["progress"][0]["clients"]) == 10
    assert set(found["progress"][-1]["clients"]) == set(tables) - running.killed
    lines = (tmp_path / "out" / "lead" / "ledger.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert {one["peer"] for one in entries if one.get("event") == "not countersigned"} == running.killed
    assert {one["peer"] for one in entries if one.get("event") == "countersigned"} == set(tables) - running.killed
    models = [(tmp_path / "out" / name / "model.json").read_bytes() for name in paths if name not in running.killed]
    assert len(set(models)) == 1


SUICIDE = """
import os, signal
from vfl import cli
from vfl.horizontal.trainer import Trainer
plain = Trainer.answer
def answer(self, task):
    if (task.stage, task.round) == ("train", 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, task)
Trainer.answer = answer
cli.main()
"""


def test_a_killed_client_comes_back_and_a_killed_job_is_resumed_to_the_same_model(tmp_path: Path) -> None:
    """First a client, while the others wait for it, then the coordinator; SCAFFOLD's clients remember more than the
    weights, and all three are needed in every round."""
    tables = patients(3, rows=12)
    paths = build(tmp_path, tables, horizontal='strategy = "scaffold"\nrounds = 16\nbatch = 0', clients="quorum = 3")
    mortal = subprocess.Popen([sys.executable, "-c", SUICIDE, "run", str(paths["site1"])], stdout=subprocess.DEVNULL)
    first = Running({name: path for name, path in paths.items() if name != "site1"})
    assert mortal.wait(180) == -signal.SIGKILL
    again = Running({"site1": paths["site1"]}, "--resume")
    codes = first.run({"lead": 8}) | again.run({})
    assert first.killed == {"lead"} and {codes[name] for name in tables} == {4}, (codes, first.errors, again.errors)
    second = Running(paths, "--resume")
    assert set(second.run({}).values()) == {0}, second.errors
    agreement = star({"strategy": "scaffold", "rounds": 16, "batch": 0})
    undisturbed = play(dict.fromkeys(NAMES, role(held(tables))), agreement, identities=IDENTITIES)["bank"].model
    model = HorizontalModel.load(tmp_path / "out" / "lead" / "model.json").estimator()
    assert model.coef_.tolist() == undisturbed.coef_.tolist()
    assert model.intercept_.tolist() == undisturbed.intercept_.tolist()
    rounds = summary(tmp_path, "lead")["progress"]
    assert [(one["number"], one["clients"]) for one in rounds] == [(n, sorted(tables)) for n in range(16)]
    assert summary(tmp_path, "site1")["earlier"] == 16 - len(summary(tmp_path, "site1")["progress"]) >= 7


# ---- one process: our own file and policy


def test_check_and_sign_show_what_an_owner_approves(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3), horizontal="rounds = 9", sign=False)
    code, shown, _ = colonnade("check", paths["site0"])
    flat = " ".join(shown.replace("│", " ").split())
    assert code == 0 and "not approved by us" in flat.replace(" ", "").replace("notapprovedbyus", "not approved by us")
    code, shown, _ = colonnade("sign", paths["site0"])
    flat = " ".join(shown.replace("│", " ").split())
    for part in ("age (years), dose, weight", "no, yes", "at most 9 rounds", "3 of 3 clients", "Secure aggregation on"):
        assert part in flat
    assert Party(paths["site0"]).approval
    assert colonnade("sign", paths["lead"])[0] == 0  # it has no table, and needs none


@pytest.mark.parametrize("minimum", ["", "minimum_rows = 1", "minimum_classes = 2"])
def test_a_site_without_rows_takes_part_unless_the_agreed_minimum_refuses_it(minimum: str, tmp_path: Path) -> None:
    tables = patients(4)
    tables["site1"] = tables["site1"].iloc[:0]
    paths = build(tmp_path, tables, clients=minimum)
    if minimum:
        for command in ("check", "sign", "run"):
            assert "than the agreed minimum" in said(3, command, paths["site1"])
        return
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(paths, 0), errors
    model = HorizontalModel.load(tmp_path / "out" / "site1" / "model.json").estimator()
    np.testing.assert_allclose(model.coef_, pooled(tables).coef_, atol=1e-5)


COLUMN_FAULTS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "missing": (lambda table: table.drop(columns="dose"), "'dose'"),
    "not a number": (lambda table: table.assign(dose="much"), "'dose' 30 not numbers"),
    "with gaps": (lambda table: table.assign(dose=table["dose"].where(table["dose"] > 0)), "'dose'"),
    "another class": (lambda table: table.assign(ill="perhaps"), "30 labels are none of the 2 agreed classes"),
}


OPEN = 'strategy = "fedavg"\nsecure_aggregation = "none"\n'
WRONG_PLANS = {
    "unknown compression 'gzip'": OPEN + 'compression = "gzip"',
    "fedavg does not know all of: mu": OPEN + "parameters = { mu = 1.0 }",
    '"exact" has no parameters': "parameters = { mu = 1.0 }",
    "krum withstands 1 poisoned clients among at least 5, and there are 3": OPEN + 'robust = "krum"\npoisoned = 1',
}


@pytest.mark.parametrize("reason", WRONG_PLANS)
def test_a_plan_that_cannot_be_carried_out_is_refused_before_anything_is_sent(reason: str, tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3), horizontal=WRONG_PLANS[reason])
    for command, name in product(("check", "sign", "run"), ("site0", "lead")):
        assert reason in said(2, command, paths[name])
    assert not list((tmp_path / "out").glob("*/ledger.jsonl"))


def test_rows_of_a_coordinator_that_does_not_train_are_not_left_out_in_silence(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3))
    paths["lead"].write_text(paths["lead"].read_text() + '[table]\npath = "site0.csv"\n')
    for command in ("check", "sign", "run"):
        assert "agree on coordinator_trains = true in [job]" in said(2, command, paths["lead"])


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
def test_a_table_that_differs_is_refused_before_anything_is_sent(fault: str, tmp_path: Path) -> None:
    change, named = COLUMN_FAULTS[fault]
    paths = build(tmp_path, patients(3))
    table = pd.read_csv(tmp_path / "site0.csv")
    change(table).to_csv(tmp_path / "site0.csv", index=False)
    for command in ("check", "sign", "run"):
        error = said(2, command, paths["site0"])
        assert named in error and "prepare" not in error  # there is none in a horizontal job
    assert not list((tmp_path / "out").glob("*/ledger.jsonl"))


def test_columns_of_other_names_are_mapped_and_units_compared(tmp_path: Path) -> None:
    own = 'columns = { dose = "mg", ill = "sick" }\nunits = { age = "years" }\n'
    tables = {name: table.rename(columns={"dose": "mg", "ill": "sick"}) for name, table in patients(3).items()}
    paths = build(tmp_path, tables, own=own)
    data = job.prepare(Party(paths["site0"]))
    assert data is not None and data.names == FEATURES
    np.testing.assert_allclose(data.x[:, 1], tables["site0"]["mg"])
    assert data.y.tolist() == tables["site0"]["sick"].tolist()
    paths["site0"].write_text(paths["site0"].read_text().replace('age = "years"', 'age = "months"'))
    assert "our 'age' is in 'months', the agreement's in 'years'" in said(3, "check", paths["site0"])


POLICIES = {
    "secure_aggregation = true": ('secure_aggregation = "none"', "does without"),
    "maximum_epsilon = 2.0": ("", "no differential privacy"),
    "minimum_clients = 4": ("", "a quorum of 3"),
    "maximum_rounds = 10": ("rounds = 11", "the agreement has 11"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_our_policy_refuses_with_its_reason(policy: str, tmp_path: Path) -> None:
    horizontal, reason = POLICIES[policy]
    paths = build(tmp_path, patients(3), horizontal=horizontal, sign=False)
    paths["site0"].write_text(paths["site0"].read_text() + f"[policy]\n{policy}\n")
    assert reason in said(3, "sign", paths["site0"])


def test_init_writes_files_that_are_right_but_for_the_keys(tmp_path: Path) -> None:
    assert colonnade("init", "--horizontal", "--name", "harbour", "--folder", tmp_path)[0] == 0
    text = (tmp_path / "agreement.toml").read_text().replace('legal_basis = ""', 'legal_basis = "a contract"')
    for name in ("registry", "harbour", "south", "west"):
        text = text.replace("colonnade1:REPLACE", str(Identity.generate(name).public), 1)
    (tmp_path / "agreement.toml").write_text(text)
    agreement = Agreement.load(tmp_path / "agreement.toml")
    assert agreement.clients == ("harbour", "south", "west") and agreement.quorum == 3
    spelt_out = text.replace("\n# ", "\n").replace("# [", "[")  # the defaults and examples are right, too
    spelt_out = "\n".join(line for line in spelt_out.splitlines() if "=" in line.split("#")[0] or line.startswith("["))
    options = "parameters = { mu = 0.1 }"
    (tmp_path / "spelt.toml").write_text(spelt_out.replace(options, "").replace('level = "client"', 'level = "none"'))
    assert Agreement.load(tmp_path / "spelt.toml").horizontal == agreement.horizontal


def test_what_is_not_of_a_horizontal_job_says_so(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3))
    for command in ("align", "selftest"):
        assert "vertical jobs" in said(2, command, paths["site0"])
    plain = paths["site0"].read_text()
    for more, reason in (
        ('features = ["age"]\n', "the agreement names features"),
        ('columns = { height = "cm" }\n', "'height', which is no column"),
        ('[prepare.numbers.age]\nmissing = "median"\n', "[prepare] is for vertical jobs"),
    ):
        paths["site0"].write_text(plain + more)
        assert reason in said(2, "check", paths["site0"])
    paths["site0"].write_text(plain.replace('path = "site0.csv"', ""))
    assert "where our table is" in said(2, "run", paths["site0"])
    assert "not approved" in said(3, "run", build(tmp_path / "unsigned", patients(3), sign=False)["site0"])


# ---- conversations in memory


def test_a_coordinator_with_rows_is_a_client_too() -> None:
    tables = patients(4)
    agreement = star(job={"mode": "horizontal", "coordinator_trains": True})
    results = play(dict.fromkeys(NAMES, role(held(tables))), agreement, identities=IDENTITIES)
    for one in results.values():
        np.testing.assert_allclose(one.model.coef_, pooled(tables).coef_, atol=1e-5)


def test_clients_talk_to_the_coordinator_only_and_send_no_update_in_clear() -> None:
    recorded: dict[str, dict[str, MemoryLink]] = {}
    ledgers: dict[str, Ledger] = {}
    data = held(patients(3))
    play(dict.fromkeys(NAMES, role(data)), star(), identities=IDENTITIES, recorded=recorded, ledgers=ledgers)
    for name in NAMES[1:]:
        assert {peer for peer, link in recorded[name].items() if link.sent} == {"bank"}
        kinds = {name_of(parse_header(head).kind) for head, _ in recorded[name]["bank"].sent}
        assert {"Hello", "Joining", "MaskedInput", "Closing"} <= kinds and "Update" not in kinds
        wire = b"".join(head + bytes(body) for head, body in recorded[name]["bank"].sent)
        assert not [value for value in data[name].x.ravel() if value.tobytes() in wire]


def test_a_client_whose_columns_differ_is_refused_with_the_difference() -> None:
    data = held(patients(3))
    odd = data["mill"]
    data["mill"] = Data(odd.x, odd.y, ("age", "dosage", "weight"), odd.classes)
    results = outcomes(dict.fromkeys(NAMES, role(data)), star(), IDENTITIES)
    assert isinstance(results["bank"], Refused) and "mill" in str(results["bank"])
    assert "dosage" in str(results["bank"]) or "'dose'" in str(results["bank"])
    assert all(isinstance(results[name], (PeerAborted, Refused)) for name in NAMES[1:])


def test_a_client_that_vanishes_is_left_out_and_the_others_finish() -> None:
    data = held(patients(4))
    agreement = star(
        {"strategy": "fedavg", "rounds": 4, "batch": 0},
        job={"mode": "horizontal", "coordinator_trains": True},
    )

    def vanish(session: Session) -> None:
        def stop(phase: str, done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        session.progress = stop
        job.train(session, data["mill"])

    results = outcomes(dict.fromkeys(NAMES, role(data)) | {"mill": vanish}, agreement, IDENTITIES)
    if isinstance(results["bank"], BaseException):
        raise results["bank"]
    assert ["mill" in one.clients for one in results["bank"].rounds] == [True, True, False, False]
    assert results["bank"].gone == ("mill",)


def test_who_is_late_at_the_end_has_no_model_and_is_told_that_it_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.score

    def late(trainer: Trainer, task: Task) -> Score:
        time.sleep(0.8 * (threading.current_thread().name == "mill" and task.round == 1))
        return plain(trainer, task)

    monkeypatch.setattr(Trainer, "score", late)
    plan = {"strategy": "fedavg", "rounds": 1, "batch": 0, "clients": {"deadline": 0.4, "quorum": 3}}
    results = outcomes(dict.fromkeys(NAMES, role(held(patients(3)))), star(plan), IDENTITIES)
    assert results["bank"].gone == ("mill",)
    assert isinstance(results["mill"], PeerAborted) and results["mill"].reason == "lost"


def test_privacy_is_paid_from_one_file_beside_the_key_or_not_at_all(tmp_path: Path) -> None:
    private = {"strategy": "fedavg", "rounds": 1, "privacy": {"level": "client", "rows": 90}}
    results = outcomes(dict.fromkeys(NAMES, role(held(patients(3)))), star(private), IDENTITIES)
    assert all(isinstance(results[name], LocalError) for name in NAMES[1:])
    assert "the file that keeps what earlier jobs have cost" in str(results["mill"])
    paths = build(tmp_path, patients(3), sign=False)
    before = job.budget_path(Party(paths["site0"]))
    paths["site0"].write_text(paths["site0"].read_text().replace("out/site0", "elsewhere"))
    assert job.budget_path(Party(paths["site0"])) == before == tmp_path / "site0.privacy.json"


def test_what_noise_has_cost_is_reported_and_a_later_job_stops_when_it_is_used_up(tmp_path: Path) -> None:
    """Two rounds and one repeat are paid for. One job takes two of the three, so a second one fails in its round 1."""
    plan = "rounds = 2\nprivacy = { level = 'client', epsilon = 3.0, delta = 1e-5, rows = 90, repeats = 1 }"
    paths = build(tmp_path, patients(3), horizontal=f'strategy = "fedavg"\n{plan}')
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(paths, 0), errors
    told = summary(tmp_path, "site0")["epsilon"]
    accountant, settings = PLDAccountant(), job.agreed(Party(paths["site0"]).agreement)[0]
    multiplier = Job(
        settings, Schema(model="logistic", columns=FEATURES, classes=settings.classes), 3
    ).mechanism.multiplier
    spent = accountant.compose(GaussianDpEvent(multiplier), 2).get_epsilon(1e-5)
    assert (told["spent"], told["allowed"]) == (pytest.approx(spent, rel=0.01), 3.0)
    assert accountant.compose(GaussianDpEvent(multiplier)).get_epsilon(1e-5) == pytest.approx(3.0, rel=0.01)
    page = (tmp_path / "out" / "site0" / "report.html").read_text()
    assert f"epsilon {told['spent']:.4g} of 3 at delta 1e-05" in page
    assert summary(tmp_path, "lead")["epsilon"] is None  # it adds no noise
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == {"lead": 4, "site0": 3, "site1": 3, "site2": 3}
    assert "round 1, train: 0 clients are left" in errors["lead"]
    assert "the privacy budget for to test is used up: epsilon 3 at delta 1e-05 allowed" in errors["site0"]


# ---- the model's file


@pytest.mark.parametrize("family", ["logistic", "multinomial", "linear", "poisson"])
@pytest.mark.parametrize("standardise", [False, True])
def test_a_model_file_gives_back_the_same_estimator(family: str, standardise: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(size=(60, 3)) * [1.0, 5.0, 0.2] + [0.0, 3.0, 1.0]
    y = {
        "logistic": generator.integers(0, 2, 60),
        "multinomial": np.array(["a", "b", "c"])[generator.integers(0, 3, 60)],
        "linear": generator.normal(size=60),
        "poisson": generator.poisson(2.0, 60).astype(float),
    }[family]
    name: Any = "logistic" if family == "multinomial" else family
    plan = Horizontal(model=name, secure_aggregation="none", standardise=standardise)
    parts = [Data(x[at::3], y[at::3], FEATURES) for at in range(3)]
    fitted = simulate(plan, parts).model
    classes = tuple(np.unique(y).tolist()) if name == "logistic" else ()
    exact = Exact(name, 3, classes, plan.C, plan.alpha)
    HorizontalModel.of(fitted, exact, list(FEATURES), 5, "a", "s").save(tmp_path / "model.json")
    again = HorizontalModel.load(tmp_path / "model.json").estimator()
    table = pd.DataFrame(x, columns=FEATURES)
    assert type(again) is type(fitted)
    ask = "predict_proba" if name == "logistic" else "predict"
    np.testing.assert_allclose(getattr(again, ask)(table), getattr(fitted, ask)(table))
    assert not classes or again.classes_.tolist() == list(classes)
    damaged = (tmp_path / "model.json").read_text().replace('"dose",', "")
    (tmp_path / "damaged.json").write_text(damaged)
    with pytest.raises(LocalError, match="do not fit its features"):
        HorizontalModel.load(tmp_path / "damaged.json")


# ---- simulation


def simulated(folder: Path, text: str, *options: object) -> dict[str, Any]:
    (folder / "job.toml").write_text(text)
    code, _, error = colonnade("simulate", folder / "job.toml", "--out", folder / "out", "--workers", 1, *options)
    assert code == 0, error
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return found


def test_simulate_learns_from_one_table_dealt_to_many(tmp_path: Path) -> None:
    text = '[horizontal]\nstrategy = "fedavg"\nsecure_aggregation = "none"\nrounds = 5\nbatch = 0\nrate = 1.0\n'
    found = simulated(tmp_path, text, "--clients", 40, "--partition", "dirichlet:0.5")
    losses = [one["loss"] for one in found["progress"]]
    assert found["clients"] == 40 and found["rows"] == 1797 and len(losses) == 5
    assert losses[0] == pytest.approx(np.log(10)) and losses == sorted(losses, reverse=True)
    for name in ("loss.svg", "accuracy.svg"):
        assert "<polyline" in (tmp_path / "out" / name).read_text()


def test_simulate_tells_what_compression_saves_and_what_it_costs(tmp_path: Path) -> None:
    """Against the same two runs by hand, and the last models' accuracy by scikit-learn."""
    whole, text = digits(), 'strategy = "fedavg"\nsecure_aggregation = "none"\nrounds = 3\nbatch = 0\nrate = 1.0\n'
    found = simulated(tmp_path, f'[horizontal]\n{text}compression = "topk:0.05"\n', "--clients", 8)
    plan = {"strategy": "fedavg", "secure_aggregation": "none", "rounds": 3, "batch": 0, "rate": 1.0}
    parts = deal(whole, "iid", 8, 0)
    runs = [simulate(Horizontal(**plan, **more), parts) for more in ({"compression": "topk:0.05"}, {})]  # type: ignore[arg-type]
    table = pd.DataFrame(whole.x, columns=whole.names)
    packed, plain = (run.model.score(table, whole.y) for run in runs)
    assert packed < plain
    told = found["compression"]
    assert told["accuracy_lost"] == pytest.approx(plain - packed)
    dense, sparse = 3 * 8 * 8 * (650 + 5), 3 * 8 * 8 * (33 + 5)  # rounds, clients, bytes; weight and scores travel too
    assert told["bytes"] == sparse and told["saved"] == pytest.approx(1 - sparse / dense)
    assert [one["saved"] for one in found["progress"]] == [(dense - sparse) // 3] * 3


def test_the_report_tells_what_compression_saved(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3), horizontal=OPEN + 'rounds = 2\ncompression = "8bit"')
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(paths, 0), errors
    saved, dense = 2 * 3 * (4 * 8 - (4 + 4)), 2 * 3 * 8 * (4 + 5)  # of four weights: one scale and a byte each
    page = (tmp_path / "out" / "lead" / "report.html").read_text()
    assert f"{saved} bytes of the clients&#39; {dense} bytes, {saved / dense:.0%}" in page


def test_simulate_takes_a_table_and_an_agreement_as_it_is(tmp_path: Path) -> None:
    tables = patients(5)
    pd.concat(tables.values()).to_csv(tmp_path / "all.csv", index=False)
    build(tmp_path / "agreed", tables)
    text = (tmp_path / "agreed" / "agreement.toml").read_text()
    found = simulated(tmp_path, text, "--clients", 5, "--data", tmp_path / "all.csv")
    table = pd.concat(tables.values())
    chances = pooled(tables).predict_proba(table[list(FEATURES)].to_numpy())[:, 1]
    loss = -np.mean(np.log(np.where(table["ill"] == "yes", chances, 1 - chances)))
    penalty = float((pooled(tables).coef_ ** 2).sum()) / 2 / len(table)
    assert found["progress"][-1]["loss"] == pytest.approx(loss + penalty, rel=1e-4)


WRONG_SIMULATIONS: dict[str, Sequence[object]] = {
    "rows cannot be dealt": ("--clients", 5000),
    "unknown partition": ("--partition", "fair"),
    "has no [columns]": ("--data", "x.csv"),
}


@pytest.mark.parametrize("reason", WRONG_SIMULATIONS)
def test_simulate_says_what_is_wrong_in_one_line(reason: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('[horizontal]\nstrategy = "fedavg"\nsecure_aggregation = "none"\n')
    assert reason in said(2, "simulate", tmp_path / "job.toml", "--out", tmp_path, *WRONG_SIMULATIONS[reason])
