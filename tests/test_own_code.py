"""A party's own modules on the command line: real processes train with them, and scores are those that PyTorch computes
from the shares; what a file does wrong is said in one line."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from parties.errors import LocalError
from tests.world import build, colonnade, customers, together
from vfl.neural_share import NetworkShare, Tensor
from vfl.own_code import Own, load
from vfl.task import load_share

torch = pytest.importorskip("torch", reason="networks need the extra 'torch'")

WIDTH = 4
MODEL = """allow_reconstruction = true
kind = 'network classifier'
epochs = 2
batch_size = 64
residual_range = 4
learning_rate = 0.05
"""
CODE = {
    "encrypted": "torch.nn.Sequential(torch.nn.Linear(inputs, 5), torch.nn.Tanh())",  # frozen, a linear layer above it
    "open": "torch.nn.Sequential(torch.nn.Linear(inputs, 6), torch.nn.Tanh(), torch.nn.Linear(6, outputs))",
    "top": "torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(inputs, outputs))",
}


def write(path: Path, module: str) -> None:
    path.write_text(f"import torch\n\n\ndef build(inputs, outputs):\n    torch.manual_seed(1)\n    return {module}\n")


def organisations(folder: Path, mode: str) -> tuple[dict[str, pd.DataFrame], dict[str, Path]]:
    """The grocer and the bank have modules of their own; the telephone company has none."""
    held = customers(300)
    network = f"[network]\nhidden = [{WIDTH}]\nmode = '{mode}'\nopen_gradients = true\n[leakage]\nleak_auc = 0.9\n"
    paths = build(folder, held, model=MODEL, identifiers=network)
    for name, part, module in (("grocer", "bottom", CODE[mode]), ("bank", "top", CODE["top"])):
        write(folder / f"{part}.py", module)
        paths[name].write_text(paths[name].read_text() + f'[model]\n{part} = "{part}.py:build"\n')
    return held, paths


def module(folder: Path, inputs: int, outputs: int, share: dict[str, Any], part: str) -> Any:
    """The same code as PyTorch runs it, with a share's numbers where it has some."""
    made = runpy.run_path(str(folder / f"{part}.py"))["build"](inputs, outputs).double()
    state = {
        name.removeprefix(f"{part}."): torch.tensor(tensor["values"]).double().reshape(tensor["shape"])
        for name, tensor in share["tensors"].items()
        if name.startswith(f"{part}.")
    }
    if state:
        made.load_state_dict(state)
    return made.eval()


@pytest.mark.parametrize("mode", ["encrypted", "open"])
def test_deep_bottoms_and_a_top_train_and_score(tmp_path, mode):
    held, paths = organisations(tmp_path, mode)
    assert colonnade("check", paths["grocer"])[0] == 0
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    commands = {name: ["predict", path, "--input", tmp_path / f"{name}.csv"] for name, path in paths.items()}
    commands["bank"] += ["--output", tmp_path / "scores.csv"]
    codes, errors = together(commands)
    assert set(codes.values()) == {0}, errors

    shares = {name: json.loads((tmp_path / "out" / name / "model.json").read_text()) for name in held}
    tables = [held[name].set_index(held[name]["id"].str.strip().str.lower()) for name in held]
    scores = pd.read_csv(tmp_path / "scores.csv").set_index("id")["score"]
    merged = np.array(shares["bank"]["tensors"]["bias"]["values"])
    for (name, share), table in zip(shares.items(), tables, strict=True):
        prepared, rows = share["prepared"], table.loc[scores.index.str.lower()]
        x = torch.tensor((rows[list(prepared["columns"])].to_numpy() - prepared["mean"]) / prepared["scale"])
        if name == "grocer":
            bottom = module(tmp_path, x.shape[1], WIDTH, share, "bottom")
            with torch.no_grad():
                x = bottom(x)
            first = module(tmp_path, 2, WIDTH, {"tensors": {}}, "bottom")
            moved = [bool((a != b).any()) for a, b in zip(bottom.parameters(), first.parameters(), strict=True)]
            assert all(moved) if mode == "open" else not any(moved)  # the whole bottom learns, or it is frozen
        if "weights" in share["tensors"]:
            tensor = share["tensors"]["weights"]
            x = x @ torch.tensor(tensor["values"]).double().reshape(tensor["shape"])
        merged = merged + x.numpy()
    top = module(tmp_path, WIDTH, 2, shares["bank"], "top")
    with torch.no_grad():
        expected = torch.softmax(top(torch.tensor(merged)), dim=1)[:, 1].numpy()
    assert np.abs(scores.to_numpy() - expected).max() < 1e-6
    assert np.ptp(expected) > 0.1

    grocer = paths["grocer"].read_text()
    paths["grocer"].write_text(grocer.replace('bottom = "bottom.py:build"', ""))
    code, _, error = colonnade("predict", paths["grocer"], "--input", tmp_path / "grocer.csv")
    assert code == 2 and "was trained with a module of our own: name it under [model]" in error


@pytest.mark.parametrize("mode", ["encrypted", "open"])
def test_an_audit_rehearses_with_our_own_modules(tmp_path, mode):
    _, paths = organisations(tmp_path, mode)
    for name in ("grocer", "bank"):
        code, _, error = colonnade("audit", paths[name])
        assert code in (0, 3), error
        found = json.loads((tmp_path / "out" / name / "audit.json").read_text())
        assert found["embeddings"] == 2 * WIDTH  # two epochs
        assert ("frozen module" in found["note"]) == (name == "grocer" and mode == "encrypted")
        verdicts = {one["attack"]: one["verdict"] for one in found["verdicts"]}
        assert (verdicts["gradient norm"] == "NOT APPLICABLE") == (name == "grocer")
        assert (verdicts["span of the embeddings"] == "NOT APPLICABLE") == (name == "bank")


FAULTS = {
    "no file": ("bottom = 'nowhere.py:build'", None, "nowhere.py is no file"),
    "no function": ("bottom = 'bottom.py:other'", None, "has no function 'other'"),
    "no place": ("bottom = 'bottom.py'", None, "bottom"),
    "a fault of its own": ("", "1 / (inputs - inputs)", "our bottom raised ZeroDivisionError (bottom.py, line 6)"),
    "another width": ("", "torch.nn.Linear(inputs, outputs + 1)", "the bottom does not make 4 numbers"),
    "other columns": ("", "torch.nn.Linear(inputs + 1, outputs)", "the bottom does not make 4 numbers"),
    "no module": ("", "len", "the bottom is a torch.nn.Module"),
    "the label holder's": ("top = 'bottom.py:build'", None, "[model] names our own bottom of a network"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_our_own_code_does_wrong_is_one_line_before_anything_is_sent(tmp_path, case):
    named, code, expected = FAULTS[case]
    _, paths = organisations(tmp_path, "open")
    if code is not None:
        write(tmp_path / "bottom.py", code)
    if named:
        paths["grocer"].write_text(paths["grocer"].read_text().replace('bottom = "bottom.py:build"', named))
    exit_code, _, error = colonnade("run", paths["grocer"])
    assert exit_code == 2 and expected in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out" / "grocer" / "ledger.jsonl").exists()


def test_a_file_that_fails_is_named_and_its_words_are_not_repeated(tmp_path):
    (tmp_path / "one.py").write_text("raise ValueError('customer-17')\n")
    with pytest.raises(LocalError, match=r"one.py raised ValueError \(one.py, line 1\)") as caught:
        load("one.py:build", tmp_path)
    assert "customer-17" not in str(caught.value)
    (tmp_path / "two.py").write_text("import no_such_module\n")
    with pytest.raises(LocalError, match="needs no_such_module: install it"):
        load("two.py:build", tmp_path)
    (tmp_path / "three.py").write_text("def build():\n    return 3\n")
    assert load("three.py:build", tmp_path)() == 3


def test_a_share_that_had_no_module_of_our_own_is_refused_with_what_to_do(tmp_path):
    """Such as another party's, which holds none of the numbers that ours needs."""
    share = NetworkShare(
        kind="VerticalMLPClassifier",
        party="grocer",
        training="",
        agreement="",
        params={"hidden_layer_sizes": [4]},
        features=["a"],
        tensors={"weights": Tensor([1, 4], [0.0] * 4)},
        classes=[],
        epochs=1,
        own_top=False,
        own_bottom=True,
    )
    share.save(tmp_path / "model.json")
    with pytest.raises(LocalError, match="without a top of our own: take it out"):
        load_share(tmp_path / "model.json", Own("top", lambda inputs, outputs: None, b""))
