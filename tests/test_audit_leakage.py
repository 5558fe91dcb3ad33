"""What a rehearsal before a release finds, what its command shows and keeps to itself, what the live meter counts."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from parties.agreement import Agreement
from parties.errors import LocalError, Refused
from parties.identity import Identity
from parties.leakage import Leakage
from parties.memory import make_agreement
from parties.party_file import Party
from tests.world import build
from vfl.audit import (
    COLUMN_ATTACKS,
    EXPLAINED,
    LABEL_ATTACKS,
    Audit,
    audit,
    columns_case,
    joint_case,
    known_rows,
    label_findings,
    labels_case,
)
from vfl.audit_run import run as audit_run
from vfl.console import out
from vfl.leakage.suite import Limits
from vfl.meter import Meter, reading_rows
from vfl.rehearsal import Seen, rehearse, rehearse_alignment

BANK, GROCER, MOBILE = NAMES = ("bank", "grocer", "mobile")
WORD, MARK = "zqmark", 31337.125


def agreed(**model: Any) -> Agreement:
    return make_agreement({name: Identity.generate(name) for name in NAMES[:2]}, model=model)


def data(rows: int = 240, width: int = 8) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """The label holder's two columns, labels that need all columns, the feature holder's columns."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=(rows, 2 + width))
    y = (generator.random(rows) < expit(x @ generator.normal(size=2 + width))).astype(float)
    frame = pd.DataFrame(x, columns=[f"c{number}" for number in range(2 + width)])
    return frame.iloc[:, :2], y, frame.iloc[:, 2:]


def verdicts(found: Audit) -> dict[str, str]:
    return {one.attack: one.verdict for one in found.verdicts}


# The rehearsal


@pytest.mark.parametrize(
    "model",
    [
        {"max_exchanges": 4},
        {"solver": "sgd", "epochs": 2, "batch_size": 80},
        {"solver": "proximal", "max_exchanges": 3, "allow_reconstruction": True},
    ],
    ids=["subspace", "sgd", "proximal"],
)
def test_a_rehearsal_records_what_the_roles_exchange(model):
    own, y, x = data()
    seen = rehearse({BANK: own, GROCER: x}, y, agreed(**model))
    rows, embeddings = seen.rows, seen.embeddings[seen.rows]
    inside = x.to_numpy()[rows] @ np.linalg.lstsq(x.to_numpy()[rows], embeddings, rcond=None)[0]
    if "batch_size" in model:
        assert seen.exchanges == 6
        assert (len(rows), embeddings.shape[1]) == (80, 2)
        assert not embeddings[:, 0].any()  # the first batch of all, with weights of zero
    else:
        assert len(rows) == len(y)
        assert np.abs(inside - embeddings).max() < 1e-5  # linear maps of these columns, to fixed point, row by row
    first = seen.aggregates[GROCER][:, 0]
    alone = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(own, y)  # where training begins
    gradient = x.to_numpy()[rows].T @ (alone.predict_proba(own)[:, 1] - y)[rows]
    assert np.abs(first - gradient).max() < 1e-4
    assert seen.shares[GROCER].shape == (len(y), 1)


def test_of_several_feature_holders_only_the_sum_is_seen():
    _, _, x = data()
    case = columns_case(x, GROCER, NAMES)
    made_up = case.parts[MOBILE].to_numpy()
    embeddings = rehearse(case.parts, case.y, agreed(max_exchanges=4)).embeddings
    both, alone = np.hstack([x.to_numpy(), made_up]), x.to_numpy()
    left = [embeddings - one @ np.linalg.lstsq(one, embeddings, rcond=None)[0] for one in (both, alone)]
    assert np.abs(left[0]).max() < 1e-5 < 1e-2 < np.abs(left[1]).max()


@pytest.mark.parametrize(
    ("result", "told"),
    [("rows", [True, True]), ("rows to the label holder", [True, False]), ("size", [False, False])],
)
def test_an_intersection_tells_of_rows_what_was_agreed(result, told):
    for (common, learnt), rows_told in zip(rehearse_alignment(result), told, strict=True):
        assert np.array_equal(learnt, common) == rows_told
        assert learnt.mean() == common.mean() == 0.5


# The verdicts


def test_an_unprotected_configuration_fails_and_half_the_columns_rank_passes():
    own, y, x = data()
    case = joint_case(own, y, x, (BANK, GROCER))
    unprotected = audit(case, agreed(max_exchanges=12, allow_reconstruction=True), Leakage())
    assert unprotected.embeddings >= x.shape[1]
    assert set(unprotected.failed) == set(COLUMN_ATTACKS)
    most = unprotected.harmless
    assert most < x.shape[1]
    for more, passes in ((0, True), (1, False)):
        found = audit(case, agreed(max_exchanges=most + more + 1, allow_reconstruction=True), Leakage())
        assert (found.embeddings, not found.failed) == (most + more, passes)
    ours = audit(case, agreed(max_exchanges=5), Leakage())
    assert not ours.failed
    assert ours.embeddings == ours.harmless == 4 == Leakage(most_exchanges_share=0.5).most_embeddings(x.shape[1])
    for found in (unprotected, ours):
        assert set(verdicts(found)) == set(EXPLAINED)
        assert all(one.metric and one.threshold is not None and not one.reason for one in found.verdicts)


def test_the_label_holder_audits_labels_and_the_feature_holder_columns():
    _, y, x = data()
    ours = audit(labels_case(x, y, NAMES, 10), agreed(max_exchanges=3), Leakage())
    theirs = audit(columns_case(x, GROCER, NAMES[:2]), agreed(max_exchanges=3), Leakage())
    for found, applies, not_applies in ((ours, LABEL_ATTACKS, COLUMN_ATTACKS), (theirs, COLUMN_ATTACKS, LABEL_ATTACKS)):
        assert set(verdicts(found)) == set(EXPLAINED)
        for one in found.verdicts:
            if one.attack in not_applies:
                assert (one.verdict, one.value, one.threshold) == ("NOT APPLICABLE", None, None)
                assert one.reason
            else:
                assert one.attack in {*applies, "membership"}
                assert (one.verdict == "PASS") == (one.value <= one.threshold)
    assert ours.harmless is None
    assert theirs.harmless == theirs.embeddings


def test_more_feature_holders_hide_more_of_each_ones_columns():
    _, _, x = data()
    spans = []
    for names in (NAMES[:2], NAMES):
        found = audit(columns_case(x, GROCER, names), agreed(max_exchanges=6), Leakage())
        spans += [one.value for one in found.verdicts if one.attack == "span of the embeddings"]
    assert spans[1] < spans[0]


def test_gradients_a_row_in_clear_fail():
    own, y, x = data()
    case = joint_case(own, y, x, (BANK, GROCER))
    gradients = np.outer(0.3 - y, [1.0, -2.0])
    rows = np.arange(len(y))
    nothing, share = np.zeros((x.shape[1], 1)), x.to_numpy()[:, :1]
    seen = Seen(np.empty((len(y), 0)), {GROCER: nothing}, {GROCER: share}, rows, 1, gradients={GROCER: [gradients]})
    failed = {one.attack for one in label_findings(case, seen, 40, Limits()) if not one.passed}
    assert {"gradient norm", "gradient direction", "gradient spectrum"} <= failed
    assert len(label_findings(case, seen, 40, Limits())) == len(LABEL_ATTACKS)


# Networks, and several classes


def of_network(network: dict[str, Any], count: int = 2, **model: Any) -> Agreement:
    settings = {"kind": "network classifier", "allow_reconstruction": True, "residual_range": 4.0, "batch_size": 80}
    identities = {name: Identity.generate(name) for name in NAMES[:count]}
    return make_agreement(identities, model=settings | model, network={"hidden": (3,)} | network)


def test_a_networks_rehearsal_records_embeddings_and_sums():
    """One step over all rows: how far the embeddings moved follows from the gradient alone."""
    pytest.importorskip("torch", reason="networks need the extra 'torch'")
    own, y, x = data()
    seen = rehearse({BANK: own, GROCER: x}, y, of_network({"optimiser": "sgd"}, epochs=1, batch_size=240))
    assert (seen.exchanges, seen.outputs, seen.width, len(seen.rows)) == (1, 3, 3, 240)
    moved = seen.embeddings - seen.shares[GROCER]
    assert np.abs(moved - 0.1 / len(y) * x.to_numpy() @ seen.aggregates[GROCER]).max() < 1e-6 < np.abs(moved).max()
    assert not seen.gradients


def test_side_by_side_every_feature_holders_embeddings_are_seen():
    pytest.importorskip("torch", reason="networks need the extra 'torch'")
    _, y, x = data()
    parts = {BANK: x.iloc[:, :0], GROCER: x.iloc[:, :3], MOBILE: x.iloc[:, 3:]}
    for merge, width in (("sum", 3), ("concatenation", 6)):
        seen = rehearse(parts, y, of_network({"merge": merge, "separate_embeddings": True}, count=3, epochs=2))
        assert (seen.embeddings.shape, seen.width, len(seen.rows)) == ((len(y), 2 * width), width, 80)
        first, columns = seen.embeddings[seen.rows, :3], parts[GROCER].to_numpy()[seen.rows]
        inside = columns @ np.linalg.lstsq(columns, first, rcond=None)[0]
        assert (np.abs(inside - first).max() < 1e-6) == (merge == "concatenation")


def test_an_audit_of_the_open_mode_attacks_gradients_a_row(monkeypatch):
    pytest.importorskip("torch", reason="networks need the extra 'torch'")
    own, y, x = data(600)
    y = (y * (np.arange(len(y)) % 4 == 0)).astype(float)  # the rarer label is the one that shows
    case = joint_case(own, y, x, (BANK, GROCER))
    network = {"mode": "open", "open_gradients": True, "hidden": (16,)}
    agreement = of_network(network, epochs=2, batch_size=200, learning_rate=0.01)
    guarded = {one.attack: one for one in audit(case, agreement, Leakage()).verdicts}
    monkeypatch.setattr("vfl.open_split.marvell", lambda gradients, *rest: gradients)
    unguarded = {one.attack: one for one in audit(case, agreement, Leakage()).verdicts}
    for attack in ("gradient direction", "gradient spectrum"):
        assert unguarded[attack].verdict == "FAIL"
        assert guarded[attack].value < 0.8 < 0.9 < unguarded[attack].value  # the guard aims at 0.7
    assert set(guarded) == set(EXPLAINED)
    assert guarded["solved residuals"].verdict == "NOT APPLICABLE"


@pytest.mark.parametrize("kind", ["logistic regression", "network classifier"])
def test_labels_of_several_classes_are_audited(kind):
    if kind.startswith("network"):
        pytest.importorskip("torch", reason="networks need the extra 'torch'")
    _, y, x = data()
    words = np.array(["high", "low", "middle"])[y.astype(int) + (np.arange(len(y)) % 4 == 0)]
    agreement = of_network({}, epochs=1) if kind.startswith("network") else agreed(max_exchanges=2)
    for columns in (x, x.iloc[:, :1]):  # with few columns, made-up ones stand in
        found = audit(labels_case(columns, words, NAMES, 10), agreement, Leakage())
        for one in found.verdicts:
            assert one.attack in COLUMN_ATTACKS or one.value is not None


def test_a_label_holder_with_one_column_gets_made_up_ones():
    own, y, _ = data()
    case = labels_case(own.iloc[:, :1], y, NAMES, 10)
    assert list(case.parts[BANK]) == ["c0"]
    told = [abs(np.corrcoef(column, y)[0, 1]) for column in case.parts[GROCER].to_numpy().T]
    assert told[0] > 0.5 > 0.2 > max(told[1:])


def test_columns_that_no_feature_holder_could_bring_are_not_lent():
    _, y, x = data()
    rare = pd.Series(np.arange(len(y)) < 5, dtype=float)
    case = labels_case(x.assign(rare=rare), y, NAMES, 10)
    assert "rare" in case.parts[BANK]
    assert {*case.parts[BANK], *case.parts[GROCER]} == {*x, "rare"}


def test_known_rows_have_both_labels_and_leave_enough_of_each():
    y = np.array([1.0] * 8 + [0.0] * 100)
    known = known_rows(y, 40)
    assert y[known].sum() == 3
    assert len(known) == 23
    assert len(set(known.tolist())) == 23


# The command


def run(path: Path, **options: Any) -> str:
    """What it printed."""
    shown = io.StringIO()
    given: dict[str, Any] = {"known": 40, "exchanges": None, "rows": 2000, "other": None, "label": ""} | options
    with contextlib.redirect_stdout(shown):
        audit_run(Party(path), **given)
    return shown.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """Two parties whose ids, labels and some of whose values nobody could mistake."""
    folder = tmp_path_factory.mktemp("audit")
    own, y, x = data(200, 6)
    ids = [f"{WORD}-{number:04d}" for number in range(len(y))]
    own, x = 1e5 * own, 1e5 * x
    x.iloc[:20, 0] = MARK + np.arange(20)
    bank, grocer = own.copy(), x.copy()
    bank.insert(0, "id", ids)
    grocer.insert(0, "id", [one.upper() for one in ids])
    bank["bad"] = np.where(y == 1, "yes", "no")
    paths = build(folder, {BANK: bank, GROCER: grocer.sample(frac=0.9, random_state=1)})
    bank.assign(bad=y).to_csv(folder / "label_side.csv", index=False)
    return folder, paths


def test_the_command_keeps_values_ids_and_labels_to_itself(world):
    folder, paths = world
    for name, path in paths.items():
        shown = run(path, exchanges=3)
        written = (folder / "out" / name / "audit.json").read_text()
        assert "PASS" in shown and "FAIL" not in shown
        for text in (shown, written):
            assert WORD not in text.lower()
            assert not any(str(MARK + row)[:5] in text for row in range(20))
            assert "yes" not in text
        for attack in EXPLAINED:
            assert f"{attack}: we tried to" in shown


def test_a_terminal_of_80_columns_shows_it_without_cutting_a_word(world, monkeypatch):
    _, paths = world
    monkeypatch.setattr(out, "width", 80)
    shown = run(paths[GROCER], exchanges=3)
    assert max(map(len, shown.splitlines()[:-1])) <= 80  # the last is the path of audit.json
    table, words = shown[: shown.index("we tried to")].split(), " ".join(shown.split())
    assert "…" not in shown
    assert {"labels", "columns", "variance)", "placed", "above", "at", "most", "verdict", "n/a"} <= set(table)
    assert all(text in words for one in EXPLAINED.values() for text in (one.tried, one.means, one.protects))


def test_the_json_has_a_stable_schema(world):
    folder, paths = world
    run(paths[GROCER], exchanges=3)
    found = json.loads((folder / "out" / GROCER / "audit.json").read_text())
    assert list(found) == [
        "schema", "party", "role", "agreement", "passed",
        "note", "rows", "known", "exchanges", "embeddings", "harmless", "verdicts",
    ]  # fmt: skip
    assert (found["schema"], found["party"], found["passed"], found["rows"]) == (1, GROCER, True, 180)
    for one in found["verdicts"]:
        assert list(one) == [
            "attack", "by", "on", "verdict", "metric", "value", "baseline", "threshold", "reason", "explained",
        ]  # fmt: skip
        assert list(one["explained"]) == ["tried", "means", "protects"]
        assert one["verdict"] in ("PASS", "FAIL", "NOT APPLICABLE")
    assert [one["attack"] for one in found["verdicts"]] == [*EXPLAINED, "membership"]


def test_where_attacks_succeed_the_command_refuses_and_says_which(world):
    folder, paths = world
    text = (folder / "agreement.toml").read_text()
    (folder / "agreement.toml").write_text(text.replace("[model]", "[model]\nallow_reconstruction = true"))
    try:
        with pytest.raises(Refused, match="span of the embeddings, rebuilt from known rows") as refusal:
            run(paths[GROCER], exchanges=9)
    finally:
        (folder / "agreement.toml").write_text(text)
    assert refusal.value.exit_code == 3
    found = json.loads((folder / "out" / GROCER / "audit.json").read_text())
    assert not found["passed"]
    assert found["harmless"] < 6


def test_test_data_of_the_other_side_is_joined_by_id(world):
    folder, paths = world
    run(paths[GROCER], exchanges=3, other=folder / "label_side.csv", label="bad")
    found = json.loads((folder / "out" / GROCER / "audit.json").read_text())
    assert found["rows"] == 180
    assert "NOT APPLICABLE" not in {one["verdict"] for one in found["verdicts"]}
    (told,) = (one for one in found["verdicts"] if one["attack"] == "solved residuals")
    assert told["baseline"] > 0.7  # labels of the right rows: in another order the columns would predict nothing


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"label": "bad"}, "given as --with"),
        ({"other": "label_side.csv"}, "--label NAME"),
        ({"other": "nowhere.csv", "label": "bad"}, "cannot be read"),
        ({"other": "label_side.csv", "label": "c0"}, "does not hold two numbers"),
    ],
)
def test_what_the_command_cannot_use_it_refuses(world, options, complaint):
    folder, paths = world
    other = options.get("other")
    with pytest.raises(LocalError, match=complaint):
        run(paths[GROCER], **options | {"other": other and folder / other})


# The live meter


def test_the_meter_counts_embeddings_of_the_same_rows():
    meter = Meter({GROCER: 6}, 10, Leakage(), allow_reconstruction=False)
    for batch in (np.arange(5), np.arange(5, 10)):
        meter.embedded(np.ones((5, 2)), batch)
    assert meter.read(2) is None
    meter.embedded(np.ones((10, 2)))
    halted = meter.read(2)
    assert halted is not None and GROCER in halted.reason
    assert [reading.disclosed for reading in meter.readings] == [{GROCER: 2}, {GROCER: 4}]


def test_sums_are_held_against_the_rank_of_all_columns_together():
    together = Meter({GROCER: 2, MOBILE: 3}, 4, Leakage(), allow_reconstruction=False)
    apart = Meter({GROCER: 2, MOBILE: 3}, 4, Leakage(), allow_reconstruction=False, separate=True)
    for meter in (together, apart):
        meter.embedded(np.ones((4, 1)))
    assert together.read(1) is None
    assert together.readings[0].ranks == {"grocer + mobile": 5}
    assert apart.read(1) is not None


@pytest.mark.parametrize(("share", "most"), [(1.0, 9), (0.5, 5), (0.05, 0)])
def test_the_agreed_share_stops_training_and_consent_lifts_it(share, most):
    leakage = Leakage(most_exchanges_share=share)
    assert leakage.most_embeddings(10) == most
    stopped = []
    for consent in (False, True):
        meter, got = Meter({GROCER: 10}, 4, leakage, allow_reconstruction=consent), 0
        while meter.read(1) is None and got < 20:
            meter.embedded(np.ones((4, 1)))
            got += 1
        stopped.append(got)
    assert stopped == [most, 20]


def test_the_meter_reads_correlation_and_leak_and_stops_above_the_agreed_auc():
    generator = np.random.default_rng(1)
    y = generator.normal(size=50)
    meter = Meter({GROCER: 9}, 50, Leakage(leak_auc=0.65), allow_reconstruction=True, y=y)
    meter.embedded(2 * y[:, None] + 1)
    assert meter.read(1, leak_auc=0.64) is None
    meter.embedded(generator.normal(size=(50, 1)))
    halted = meter.read(1, leak_auc=0.66)
    assert halted is not None and "0.660" in halted.reason
    first, second = reading_rows(meter.readings)
    assert first == {
        "reading": 1,
        "columns of": GROCER,
        "embeddings": 1,
        "independent columns": 9,
        "correlation with the label": 1.0,
        "leak AUC": 0.64,
    }
    assert second["embeddings"] == 2 and second["correlation with the label"] < 0.5


def test_a_feature_holders_meter_knows_no_label():
    meter = Meter({GROCER: 9}, 5, Leakage(), allow_reconstruction=False)
    meter.embedded(np.ones((5, 1)))
    meter.read(1)
    assert reading_rows(meter.readings)[0]["correlation with the label"] is None
