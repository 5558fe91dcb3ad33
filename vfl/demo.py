"""The main job on real data, for people who want to see it: three processes, the same code path as `colonnade run`.

Scikit-learn's breast cancer table (569 patients, 30 columns) is cut by columns over a clinic that knows the diagnosis,
a laboratory and an imaging centre. Each has its own subset of the patients, its own row order, and writes their numbers
in its own way. At the end, and only because this process holds all three tables, the joint model is compared with
scikit-learn on the joined table.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from parties.agreement import Agreement
from parties.errors import ColonnadeError, LocalError
from parties.files import make_folder, write_json, write_whole
from parties.identity import Identity
from parties.launch import launch
from parties.party_file import Party
from psi.rules import rule
from vfl.console import Bars, Watcher, err, out
from vfl.linear import VerticalLogisticRegression
from vfl.losses import Logistic, Vector
from vfl.metrics import measure
from vfl.report import encryption_rows, phase_rows

WEAK = ("mean texture", "mean smoothness", "mean symmetry", "mean fractal dimension")
DEADLINE = 600.0
LABEL_HOLDER = "clinic"


def run_demo(folder: Path, key_bits: int = 3072, scheme: str = "paillier") -> dict[str, Any]:
    """Set the three parties up in `folder`, run them, compare, write summary.json. Raises what a party ended with."""
    if key_bits not in (2048, 3072, 4096):
        raise LocalError(f"key_bits is 2048, 3072 or 4096, not {key_bits}")
    if scheme not in ("paillier", "lattice", "auto"):
        raise LocalError(f"the scheme is paillier, lattice or auto, not {scheme!r}")
    start = time.perf_counter()
    tables = write_parties(folder, key_bits, scheme)
    commands = {name: [sys.executable, "-m", "vfl", "run", str(folder / f"{name}.toml"), "--events"] for name in tables}
    errors: dict[str, list[str]] = {name: [] for name in tables}
    bars = Bars() if out.is_terminal else None
    watcher = Watcher()

    def show(name: str, line: str) -> None:
        event = json.loads(line)
        if bars is not None:
            bars.show(name, event["phase"], event["done"], event["total"])
        elif name == LABEL_HOLDER:
            watcher(event["phase"], event["done"], event["total"])

    if bars is not None:
        bars.start()
    try:
        codes = launch(
            commands, timeout=DEADLINE, on_output=show, on_error=lambda name, line: errors[name].append(line)
        )
    finally:
        if bars is not None:
            bars.stop()
    if any(codes.values()):
        for name, lines in errors.items():
            for line in lines:
                err.print(f"{name}: {line}")
        raise _failure(codes)
    summary = compare(folder, tables) | {"seconds": round(time.perf_counter() - start, 2)}
    write_json(folder / "summary.json", summary)
    out.print(closing_table(summary))
    out.print(f"everything is in {folder}; each party's own files in {folder}/<party>", soft_wrap=True)
    out.print(f"what joining brought, with curves: {folder / LABEL_HOLDER / 'report.html'}", soft_wrap=True)
    return summary


def _failure(codes: Mapping[str, int]) -> ColonnadeError:
    worst = max(codes, key=lambda name: codes[name] if codes[name] in (2, 3, 5) else 0)
    error = ColonnadeError(f"{worst} ended with exit code {codes[worst]}; its log says more")
    error.exit_code = codes[worst] if codes[worst] > 0 else 1
    return error


def write_parties(folder: Path, key_bits: int, scheme: str) -> dict[str, pd.DataFrame]:
    """Tables, keys, the agreement, the parties' own files and approvals, as three organisations would make them."""
    make_folder(folder)
    tables = split_columns()
    identities = {name: Identity.generate(name) for name in tables}
    ports = _free_ports(len(tables))
    parties = "".join(
        f'\n[[parties]]\nname = "{name}"\nrole = "{"label" if name == LABEL_HOLDER else "feature"} holder"\n'
        f'public_key = "{identity.public}"\nendpoint = "tcp://127.0.0.1:{port}"\n'
        + ("" if name == LABEL_HOLDER else f"columns = {tables[name].shape[1] - 1}\n")
        for (name, identity), port in zip(identities.items(), ports, strict=True)
    )
    expires = (datetime.now(UTC) + timedelta(days=1)).date()
    agreement = (
        'title = "Breast cancer demo"\npurpose = "To show what joining columns brings"\n'
        f'legal_basis = "public data (UCI), no persons"\nexpires = {expires}\n{parties}\n'
        '[identifiers]\nfields = { "patient number" = "text/1" }\n'
        "[model]\nC = 1.0\ntest_fraction = 0.3\n"
        f'[encryption]\nscheme = "{scheme}"\nkey_bits = {key_bits}\n'
        "[deadlines]\nconnect = 120\n"
    )
    write_whole(folder / "agreement.toml", agreement.encode())
    for name, table in tables.items():
        key = folder / f"{name}.key"
        key.unlink(missing_ok=True)  # the demo's own keys, fresh each time
        identities[name].save(key)
        file = f"{name}.parquet" if name == "imaging" else f"{name}.csv"
        if name == "imaging":
            table.to_parquet(folder / file, index=False)
        else:
            write_whole(folder / file, table.to_csv(index=False).encode())
        features = [column for column in table.columns if column not in ("patient", "benign")]
        label = 'label = "benign"\npositive = "1"\n' if name == LABEL_HOLDER else ""
        own = (
            f'agreement = "agreement.toml"\nkey = "{name}.key"\noutput = "{name}"\n\n[table]\n'
            f'path = "{file}"\nid = "patient"\nfeatures = {json.dumps(features)}\n{label}'
        )
        write_whole(folder / f"{name}.toml", own.encode())
        Party(folder / f"{name}.toml").sign()
    return tables


def split_columns(seed: int = 11) -> dict[str, pd.DataFrame]:
    """The three tables: 490 patients common to all, others at one or two; ids in three spellings; shuffled rows."""
    data = load_breast_cancer(as_frame=True)
    rng = np.random.default_rng(seed)
    rest = [name for name in data.data.columns if name not in WEAK]
    columns = {LABEL_HOLDER: list(WEAK), "laboratory": rest[::2], "imaging": rest[1::2]}
    patients = rng.permutation(len(data.data))
    common, others = patients[:490], patients[490:]
    spell = {
        LABEL_HOLDER: lambda number: f"Patient {number:05d}",
        "laboratory": lambda number: f"  patient {number:05d}" if number % 3 else f"PATIENT   {number:05d} ",
        "imaging": lambda number: f"PATIENT {number:05d}" if number % 2 else f"Ｐatient {number:05d}",
    }
    tables = {}
    for place, (name, names) in enumerate(columns.items()):
        rows = rng.permutation(np.concatenate([common, others[(np.arange(len(others)) + place) % 3 > 0]]))
        table = data.data.loc[rows, names].reset_index(drop=True)
        table.insert(0, "patient", [spell[name](10_000 + 7 * int(row)) for row in rows])
        if name == LABEL_HOLDER:
            table["benign"] = data.target.to_numpy()[rows]
        tables[name] = table
    return tables


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def compare(folder: Path, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Join the three tables in the clear, fit scikit-learn on the same training rows, and compare everything."""
    agreement = Agreement.load(folder / "agreement.toml")
    own = {name: json.loads((folder / name / "summary.json").read_text()) for name in tables}
    rows = {name: pd.read_csv(folder / name / "rows.csv") for name in tables}
    joined = {
        name: table.iloc[rows[name]["row"]].reset_index(drop=True).drop(columns="patient")
        for name, table in tables.items()
    }
    text = rule("text/1")
    order = [[text(value) for value in tables[name]["patient"].iloc[rows[name]["row"]]] for name in tables]
    expected = set.intersection(*({text(value) for value in table["patient"]} for table in tables.values()))
    if any(one != order[0] for one in order) or set(order[0]) != expected:
        raise ColonnadeError("the parties' rows are not the plain join")  # cannot be: the protocol has checked it
    y = joined[LABEL_HOLDER].pop("benign").to_numpy(np.float64)
    test = (rows[LABEL_HOLDER]["part"] == "test").to_numpy()
    x = pd.concat(joined.values(), axis=1)
    scaler = StandardScaler().fit(x[~test])
    scaled = pd.DataFrame(scaler.transform(x), columns=x.columns)
    c = agreement.model.C
    central = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(scaled[~test], y[~test])
    shares = {name: VerticalLogisticRegression.load(folder / name / "model.json") for name in tables}
    ours = np.concatenate([shares[name].coef_[0] for name in tables])
    intercept = float(shares[LABEL_HOLDER].intercept_[0])
    metrics = own[LABEL_HOLDER]["metrics"]

    def objective(weights: Vector, offset: float) -> float:
        scores = scaled[~test].to_numpy() @ weights + offset
        return float(Logistic().values(scores[:, np.newaxis], y[~test][:, np.newaxis]).mean()) + float(
            weights @ weights
        ) / (2 * c * int((~test).sum()))

    best = objective(central.coef_[0], float(central.intercept_[0]))
    return {
        "rows": {name: len(table) for name, table in tables.items()},
        "intersection": own[LABEL_HOLDER]["intersection"],
        "rows_train": own[LABEL_HOLDER]["rows_train"],
        "rows_test": own[LABEL_HOLDER]["rows_test"],
        "auc_label_holder_alone": metrics["alone"]["auc"],
        "auc_joint": metrics["joint"]["auc"],
        "auc_centralised": measure("binary", y[test], central.predict_proba(scaled[test])[:, 1])[0]["auc"],
        "max_abs_coef_difference": float(
            max(np.abs(ours - central.coef_[0]).max(), abs(intercept - float(central.intercept_[0])))
        ),
        "relative_objective_gap": (objective(ours, intercept) - best) / best,
        "exchanges": own[LABEL_HOLDER]["exchanges"],
        "seconds_by_phase": own[LABEL_HOLDER]["seconds_by_phase"],
        "bytes_by_phase": {
            phase: sum(summary["bytes_by_phase"].get(phase, 0) for summary in own.values())
            for phase in own[LABEL_HOLDER]["bytes_by_phase"]
        },
        "bytes_sent": {
            name: {kind: _total(summary["bytes_sent"], kind) for kind in _kinds(summary["bytes_sent"])}
            for name, summary in own.items()
        },
        "key_bits": agreement.encryption.key_bits,
        "scheme": own[LABEL_HOLDER]["scheme"],
        "encryption": own[LABEL_HOLDER]["encryption"],
        "parties": [party.name for party in agreement.ring],
        "agreement": agreement.digest.hex(),
        "session": own[LABEL_HOLDER]["session"],
        "notes": sorted({note for summary in own.values() for note in summary["notes"]}),
    }


def _kinds(sent: dict[str, dict[str, int]]) -> list[str]:
    return sorted({kind for kinds in sent.values() for kind in kinds})


def _total(sent: dict[str, dict[str, int]], kind: str) -> int:
    return sum(kinds.get(kind, 0) for kinds in sent.values())


def closing_table(summary: dict[str, Any]) -> Table:
    """What the demo showed, at a glance."""
    table = Table(title="Breast cancer, columns of three parties", show_header=False, title_justify="left")
    held = ", ".join(f"{name} {rows}" for name, rows in summary["rows"].items())
    table.add_row("rows", f"{held}; in common {summary['intersection']}")
    table.add_row("train / test", f"{summary['rows_train']} / {summary['rows_test']}")
    table.add_row("AUC, label holder alone", f"{summary['auc_label_holder_alone']:.4f}")
    table.add_row("AUC, joint model", Text(f"{summary['auc_joint']:.4f}", "bold"))
    table.add_row("AUC, centralised scikit-learn", f"{summary['auc_centralised']:.4f}")
    table.add_row("largest coefficient difference", f"{summary['max_abs_coef_difference']:.1e}")
    table.add_row("relative objective gap", f"{summary['relative_objective_gap']:.1e}")
    table.add_row("encrypted exchanges", str(summary["exchanges"]))
    for row in phase_rows(summary):
        table.add_row(*row)
    for name, kinds in summary["bytes_sent"].items():
        most = sorted(kinds, key=lambda kind: -kinds[kind])[:2]
        listed = ", ".join(f"{kind} {decimal(kinds[kind])}" for kind in most)
        table.add_row(f"sent by {name}", f"{decimal(sum(kinds.values()))} ({listed}, ...)")
    for note in summary["notes"]:
        table.add_row("note", note)
    for row in encryption_rows(summary["encryption"]):
        table.add_row(*row)
    return table
