"""Own models on the command line: a party's own code, loaded from its own folder, checked before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression, SGDClassifier

from parties.errors import LocalError
from parties.horizontal import Array, Horizontal
from parties.memory import MemoryLink, play
from parties.message import name_of, parse_header
from parties.party_file import Party
from parties.session import Session
from tests.conftest import IDENTITIES, NAMES
from tests.test_horizontal_job import FEATURES, build, patients, said, simulated, star, summary
from tests.world import colonnade, together
from vfl.horizontal import job
from vfl.horizontal.distillation import PublicTable
from vfl.horizontal.layout import as_toml, frozen, layout, require_agreed
from vfl.horizontal.models import Estimator, TorchModel
from vfl.horizontal.own import adapt, own_model, save
from vfl.horizontal.trainer import Data, describe
from vfl.own_code import load

FLOWER = '''
import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss


class NumPyClient:
    """In place of flwr.client.NumPyClient, from which such a class inherits."""


def get_model_parameters(model):
    return [model.coef_, model.intercept_] if model.fit_intercept else [model.coef_]


def set_model_params(model, params):
    model.coef_ = params[0]
    if model.fit_intercept:
        model.intercept_ = params[1]
    return model


class PatientsClient(NumPyClient):
    def __init__(self, model, X_train, y_train):
        self.model, self.X_train, self.y_train = model, X_train, y_train

    def get_parameters(self, config):
        return get_model_parameters(self.model)

    def fit(self, parameters, config):
        set_model_params(self.model, parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few local iterations
            self.model.fit(self.X_train, self.y_train)
        print(f"Training finished for round {config['server_round']} of {config['rounds']}")
        return get_model_parameters(self.model), len(self.X_train), {}

    def evaluate(self, parameters, config):
        set_model_params(self.model, parameters)
        loss = log_loss(self.y_train, self.model.predict_proba(self.X_train))
        accuracy = self.model.score(self.X_train, self.y_train)
        return loss, len(self.X_train), {"accuracy": accuracy}


def build(x, y):
    model = LogisticRegression(max_iter=1, warm_start=True)
    model.classes_ = np.array(["no", "yes"])
    model.coef_, model.intercept_ = np.zeros((1, 3)), np.zeros(1)
    return PatientsClient(model, x, y)
'''
TWO_ARRAYS = (
    'arrays = [{ name = "0", shape = [1, 3], dtype = "float64" }, { name = "1", shape = [1], dtype = "float64" }]'
)
SGD = "from sklearn.linear_model import SGDClassifier\ndef build(x, y):\n    return SGDClassifier(loss='log_loss')\n"
COEF = as_toml(
    (Array(name="coef_", shape=(1, 3), dtype="float64"), Array(name="intercept_", shape=(1,), dtype="float64"))
)


def site(
    folder: Path, horizontal: str, code: str | dict[str, str], *, public: str = "", clients: int = 3, sign: bool = True
) -> dict[str, Path]:
    """A star whose parties bring own models: each its file, named in its own file."""
    paths = build(folder, patients(clients), horizontal=f'model = "own"\n{horizontal}', sign=False)
    for name, path in paths.items():
        (folder / f"{name}_model.py").write_text(code if isinstance(code, str) else code[name])
        model = f'[model]\nfile = "{name}_model.py:build"\n' + (f'public = "{public}"\n' if public else "")
        path.write_text(path.read_text() + "\n" + model)
        if sign:
            Party(path).sign()
    return paths


@pytest.mark.filterwarnings("ignore:lbfgs failed")  # one iteration a round
def test_a_client_written_for_flower_runs_over_real_processes_unchanged(tmp_path: Path) -> None:
    plan = f'strategy = "fedavg"\nrounds = 4\nconfig = {{ rounds = 4 }}\n{TWO_ARRAYS}'
    paths = site(tmp_path, plan, FLOWER)
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(paths, 0), errors
    found = [dict(np.load(tmp_path / "out" / name / "weights.npz")) for name in paths]
    coef, intercept = np.zeros((1, 3)), np.zeros(1)
    parts = [(table[list(FEATURES)].to_numpy(), table["ill"].to_numpy()) for table in patients(3).values()]
    for _ in range(4):
        ends = []
        for x, y in parts:
            model = LogisticRegression(max_iter=1, warm_start=True)
            model.classes_ = np.array(["no", "yes"])
            model.coef_, model.intercept_ = coef.copy(), intercept.copy()
            ends.append(model.fit(x, y))
        coef, intercept = (np.mean([getattr(end, name) for end in ends], axis=0) for name in ("coef_", "intercept_"))
    for one in found:
        np.testing.assert_allclose(one["0"], coef, rtol=0, atol=1e-8)
        np.testing.assert_allclose(one["1"], intercept, rtol=0, atol=1e-8)
    told = summary(tmp_path, "lead")
    assert told["model"] == "own" and told["evaluation"]["site1"]["after"]["accuracy"] > 0.5
    assert not (tmp_path / "out" / "lead" / "model.json").exists()


def test_a_distillation_in_the_session_ends_with_every_partys_own_model_and_a_student(tmp_path: Path) -> None:
    skops = pytest.importorskip("skops.io")
    public = PublicTable(np.random.default_rng(9).normal(size=(80, 3)), FEATURES)
    pd.DataFrame(public.x, columns=FEATURES).to_csv(tmp_path / "public.csv", index=False)
    kinds = {"lead": "linear_model.LogisticRegression", "site0": "tree.DecisionTreeClassifier"}
    kinds |= {"site1": "naive_bayes.GaussianNB", "site2": "linear_model.LogisticRegression"}
    code = {
        name: f"import sklearn.{kind.split('.')[0]}\n\ndef build(x, y):\n    return sklearn.{kind}()\n"
        for name, kind in kinds.items()
    }
    agreed = {"rows": 80, "digest": public.agreed.digest}
    plan = 'strategy = "distillation"\nrounds = 2\ntest_fraction = 0.2\n[horizontal.public]\n'
    plan += "\n".join(f"{key} = {json.dumps(value)}" for key, value in agreed.items())
    paths = site(tmp_path, plan, code, public="public.csv")
    shown = " ".join(colonnade("check", paths["site0"])[1].replace("│", " ").split())
    assert "predictions of 80 public rows" in shown
    ours: dict[str, Any] = {}
    for name, path in zip(NAMES, paths.values(), strict=True):
        data = job.prepare(Party(path))
        ours[name] = data, own_model(Party(path), data)
    agreement = star({"model": "own", "strategy": "distillation", "rounds": 2, "test_fraction": 0.2, "public": agreed})

    def role(session: Session) -> Any:
        data, model = ours[session.name]
        return job.train(session, data, model=model)

    recorded: dict[str, dict[str, MemoryLink]] = {}
    outcomes = play(dict.fromkeys(NAMES, role), agreement, identities=IDENTITIES, recorded=recorded)
    for name in NAMES[1:]:  # predictions leave under masks alone
        sent = {name_of(parse_header(head).kind) for head, _ in recorded[name]["bank"].sent}
        assert "MaskedInput" in sent and "Update" not in sent
    assert outcomes["bank"].clients["mill"].after.rows == 6
    fresh = np.random.default_rng(1).normal(size=(500, 3))
    truth = np.where(fresh @ [1.0, -1.0, 0.5] > 0, "yes", "no")
    for (_, model), kind in zip(ours.values(), kinds.values(), strict=True):
        data = (tmp_path / save(model, tmp_path)).read_bytes()
        unknown = skops.get_untrusted_types(data=data)
        assert set(unknown) <= {"sklearn.tree._tree.Tree"}
        kept = skops.loads(data, trusted=unknown)
        assert type(kept).__name__ == kind.split(".")[1]
        assert (kept.predict(fresh) == model.estimator.predict(fresh)).all()
    assert ours["bank"][1].estimator.score(fresh, truth) > 0.8
    file = tmp_path / "public.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    assert "has 79 rows and the digest" in said(2, "check", paths["site0"])


# ---- before anything is sent


def test_what_travels_is_shown_where_the_agreement_does_not_list_it_yet(tmp_path: Path) -> None:
    paths = site(tmp_path, 'strategy = "fedavg"', SGD, sign=False)
    for name in ("site0", "lead"):
        error = said(2, "check", paths[name])
        assert f"[horizontal] must list what travels; our model has {COEF}" in error
    agreement = tmp_path / "agreement.toml"
    agreement.write_text(agreement.read_text().replace('strategy = "fedavg"', f'strategy = "fedavg"\n{COEF}'))
    shown = " ".join(colonnade("check", paths["site0"])[1].replace("│", " ").split())
    assert "coef_ float64[1, 3], intercept_ float64[1]" in shown and "what travels of it is as agreed" in shown
    assert colonnade("sign", paths["lead"])[0] == 0
    model = own_model(Party(paths["site0"]), job.prepare(Party(paths["site0"])))
    assert isinstance(model, Estimator) and model.rows == 30


DIFFERENCES = {
    "shape": (
        'shape = [1, 3], dtype = "float64"',
        'shape = [1, 4], dtype = "float64"',
        "where the agreement has 'coef_', float64 of shape (1, 4)",
    ),
    "dtype": (
        'shape = [1], dtype = "float64"',
        'shape = [1], dtype = "float32"',
        "array 1 of our model is 'intercept_', float64",
    ),
    "name": ("coef_", "weights", "array 0 of our model is 'coef_'"),
    "fewer": (', { name = "intercept_", shape = [1], dtype = "float64" }', "", "the agreement lacks 'intercept_'"),
    "more": ("}]", '}, { name = "scale" }]', "our model lacks 'scale', float32 of shape ()"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_another_model_than_agreed_is_refused_by_name_before_anything_is_sent(what: str, tmp_path: Path) -> None:
    old, new, reason = DIFFERENCES[what]
    assert old in COEF
    paths = site(tmp_path, f'strategy = "fedavg"\n{COEF.replace(old, new)}', SGD)
    for command in ("check", "sign", "run"):
        assert reason in said(2, command, paths["site0"])
    assert not list(tmp_path.glob("out/*/ledger.jsonl"))


WRONG_CODE = {
    "raise ValueError('a secret of 31337')\n": "raised ValueError (site0_model.py, line 1)",
    "def build(x, y):\n    return 1 / 0\n": "raised ZeroDivisionError (site0_model.py, line 2)",
    "def make(x, y): ...\n": "has no function 'build'",
    "def build(x, y):\n    return 7\n": "our own model is a int; build returns a scikit-learn estimator",
    "import sklearn.linear_model as m\ndef build(x, y):\n    return m.Ridge()\n": "neither partial_fit nor warm_start",
    "import no_such_thing\n": "needs no_such_thing: install it",
    "def build(x, y:\n": "raised SyntaxError",
}


@pytest.mark.parametrize("code", WRONG_CODE)
def test_own_code_that_fails_is_said_in_one_line_without_its_text(code: str, tmp_path: Path) -> None:
    paths = site(
        tmp_path, f'strategy = "fedavg"\n{COEF}', dict.fromkeys(("lead", "site1", "site2"), SGD) | {"site0": code}
    )
    error = said(2, "check", paths["site0"])
    assert WRONG_CODE[code] in error and "31337" not in error


def test_a_party_says_where_its_model_is_when_own_ones_are_agreed_and_only_then(tmp_path: Path) -> None:
    paths = site(tmp_path, f'strategy = "fedavg"\n{COEF}', SGD)
    plain = paths["site0"].read_text()
    paths["site0"].write_text(plain.split("[model]")[0])
    assert 'goes with model = "own"' in said(2, "check", paths["site0"])
    paths["site0"].write_text(plain + 'public = "public.csv"\n')
    assert "goes with [horizontal.public]" in said(2, "check", paths["site0"])
    paths["site0"].write_text(plain.replace("site0_model.py", "elsewhere.py"))
    assert "elsewhere.py is no file" in said(2, "check", paths["site0"])
    linear = build(tmp_path / "linear", patients(3))
    linear["site0"].write_text(linear["site0"].read_text() + '[model]\nfile = "model.py:build"\n')
    assert 'goes with model = "own"' in said(2, "check", linear["site0"])


def test_strategies_that_correct_steps_are_refused_up_front_for_models_that_train_by_themselves() -> None:
    model = Estimator(SGDClassifier(), np.zeros((4, 3)), np.array([0, 1, 0, 1]), (0, 1))
    with pytest.raises(LocalError, match="this strategy cannot correct its steps"):
        describe(Horizontal(model="own", strategy="scaffold"), None, model)


# ---- torch modules


def test_a_torch_module_is_loaded_and_its_head_can_stay_personal(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def build(x, y):\n"
        "    torch.manual_seed(1)\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))\n"
        "    net[0].weight.requires_grad_(False)\n"
        "    return net\n"
    )
    make: Any = load("net.py:build", tmp_path)
    generator = np.random.default_rng(0)
    rows = Data(generator.normal(size=(20, 3)), np.array(["no", "yes"] * 10), FEATURES)
    plan: dict[str, Any] = {"model": "own", "strategy": "fedprox", "classes": ("no", "yes")}
    arrays = (Array(name="0.bias", shape=(4,)), Array(name="2.weight", shape=(2, 4)), Array(name="2.bias", shape=(2,)))
    with pytest.raises(LocalError, match=r'shape = \[2\], dtype = "float32" }\], frozen = "[0-9a-f]{64}"') as error:
        adapt(make, Horizontal(**plan), rows)
    plan["frozen"] = str(error.value)[-65:-1]
    with pytest.raises(LocalError, match=f"has the digest {plan['frozen']}, the agreement's 0{{64}}: another body"):
        adapt(make, Horizontal(**(plan | {"frozen": "0" * 64}), arrays=arrays), rows)
    model = adapt(make, Horizontal(**plan, arrays=arrays), rows)
    plan.pop("frozen")
    assert layout(Horizontal(**plan), model) == arrays
    digest = frozen(Horizontal(**plan), model)
    assert frozen(Horizontal(**plan, personal="0."), model) == ""
    plan["frozen"] = digest
    personal = Horizontal(**plan, arrays=arrays[:1], personal="2.")
    require_agreed(personal, adapt(make, personal, rows))
    logits = make(rows.x, rows.y)(torch.as_tensor(rows.x, dtype=torch.float32))
    expected = torch.nn.functional.cross_entropy(logits, torch.as_tensor([0, 1] * 10))
    assert model.evaluate().loss == pytest.approx(expected.item())
    with pytest.raises(LocalError, match="loss cross_entropy goes with classes"):
        adapt(make, Horizontal(**(plan | {"loss": "squared"}), arrays=arrays), rows)


@pytest.mark.parametrize("loss", ["squared", "poisson"])
def test_the_agreed_loss_of_a_torch_module_without_classes(loss: Any) -> None:
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    rows = Data(generator.normal(size=(20, 3)), generator.poisson(2.0, 20).astype(float), FEATURES)

    def make(x: Any, y: Any) -> Any:
        torch.manual_seed(1)
        return torch.nn.Linear(3, 1).double()

    arrays = tuple(
        Array(name=name, shape=shape, dtype="float64") for name, shape in (("weight", (1, 3)), ("bias", (1,)))
    )
    model = adapt(make, Horizontal(model="own", strategy="fedavg", loss=loss, arrays=arrays), rows)
    scores = make(0, 0)(torch.as_tensor(rows.x))[:, 0].detach().numpy()
    expected = np.mean((scores - rows.y) ** 2 if loss == "squared" else np.exp(scores) - rows.y * scores)
    assert model.evaluate().loss == pytest.approx(expected)


# ---- simulation


def test_own_models_and_distillation_are_simulated_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(SGD)
    sizes = Array(name="coef_", shape=(10, 64), dtype="float64"), Array(name="intercept_", shape=(10,), dtype="float64")
    head = '[horizontal]\nmodel = "own"\nsecure_aggregation = "none"\nrounds = 3\n'
    mine = ("--model", f"{tmp_path / 'model.py'}:build", "--clients", 5)
    found = simulated(tmp_path, f'{head}classes = {list(range(10))}\nstrategy = "fedavg"\n{as_toml(sizes)}', *mine)
    assert found["progress"][-1]["accuracy"] > 0.8 > found["progress"][0]["accuracy"]
    table = pd.concat(patients(4).values())
    table.to_csv(tmp_path / "all.csv", index=False)
    table[list(FEATURES)].iloc[:50].to_csv(tmp_path / "public.csv", index=False)
    public = PublicTable(table[list(FEATURES)].to_numpy()[:50], FEATURES).agreed
    head = f'[columns]\nfeatures = {list(FEATURES)}\nlabel = "ill"\n{head}classes = ["no", "yes"]\n'
    text = f'{head}strategy = "distillation"\n[horizontal.public]\nrows = 50\ndigest = "{public.digest}"\n'
    found = simulated(tmp_path, text, *mine, "--data", tmp_path / "all.csv", "--public", tmp_path / "public.csv")
    assert found["strategy"] == "distillation" and found["progress"][-1]["accuracy"] > 0.6
    for options, reason in ((mine, "a distillation --public too"), ((), "own models need --model")):
        assert reason in said(2, "simulate", tmp_path / "job.toml", "--out", tmp_path, *options)


def test_weights_are_written_under_any_name_and_never_pickled(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.file = torch.nn.Parameter(torch.arange(3.0))
            self.register_buffer("seen", torch.tensor(7))

    assert save(TorchModel(Scaled(), None, np.empty((0, 3)), np.empty(0)), tmp_path) == "weights.npz"
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as kept:
        assert sorted(kept) == ["file", "seen"] and kept["seen"] == 7
        np.testing.assert_array_equal(kept["file"], np.arange(3, dtype=np.float32))


def test_a_module_whose_numbers_numpy_lacks_is_our_own_error() -> None:
    torch = pytest.importorskip("torch")
    rows = Data(np.ones((4, 2)), np.arange(4.0), ("a", "b"))
    with pytest.raises(LocalError, match="our own model raised TypeError"):
        adapt(lambda x, y: torch.nn.Linear(2, 1).to(torch.bfloat16), Horizontal(model="own", strategy="fedavg"), rows)
