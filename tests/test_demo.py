"""The main job on real data: what the README promises of `make demo`."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests.world import colonnade


def test_the_demo_reaches_the_centralised_model(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vfl", "demo", "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["intersection"] == 490
    assert summary["rows_train"] + summary["rows_test"] == 490
    assert abs(summary["auc_joint"] - summary["auc_centralised"]) < 0.001
    assert summary["auc_joint"] - summary["auc_label_holder_alone"] >= 0.03
    assert summary["max_abs_coef_difference"] < 1e-3
    assert summary["relative_objective_gap"] < 1e-6
    assert summary["key_bits"] == 3072 and summary["scheme"] == "paillier"
    assert summary["parties"] == ["clinic", "laboratory", "imaging"]
    assert 0 < summary["seconds"] <= time.monotonic() - start
    assert set(summary["seconds_by_phase"]) == {"agree", "align", "report", "train", "score", "close"}
    for name in summary["parties"]:
        sent = summary["bytes_sent"][name]
        assert sent["MaskedPoints"] > 0 and ("SealedResidual" in sent) == (name == "clinic")
        assert "PartialEmbedding" not in sent  # two feature holders: never in clear
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"model.json", "ledger.jsonl", "psi_report.json", "log.txt"} <= files
        assert ("report.html" in files) == (name == "clinic")
    assert "AUC, joint model" in done.stdout and "3072 bit" in done.stdout


def test_the_demo_reaches_the_same_model_under_the_lattice_scheme(tmp_path):
    command = [sys.executable, "-m", "vfl", "demo", "--scheme", "lattice", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scheme"] == "lattice"
    assert summary["max_abs_coef_difference"] < 1e-3
    assert summary["relative_objective_gap"] < 1e-6
    assert "lattice, 128-bit security" in done.stdout
    predicted = summary["encryption"]["predicted"]
    assert 0 < predicted["lattice"]["seconds"] < predicted["paillier"]["seconds"]


def test_the_demo_refuses_an_unknown_scheme(tmp_path):
    code, _, error = colonnade("demo", "--scheme", "rot13", "--out", tmp_path)
    assert code == 2
    assert error.strip().splitlines()[-1].endswith("the scheme is paillier, lattice or auto, not 'rot13'")
