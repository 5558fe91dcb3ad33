"""Unmistakable ids, labels, values and secrets go in; nothing that leaves a party or its memory shows them."""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import StandardScaler
from zmq.utils import z85

import parties.memory
import vfl.exchange
from parties.errors import ColonnadeError
from parties.ledger import Ledger
from parties.memory import outcomes
from parties.party_file import Party
from parties.session import Session
from psi.job import House
from psi.report import as_file
from tests.world import build
from vfl import job
from vfl.job_input import prepare
from vfl.report import summarise, write_outcome

ROWS, MARKED = 130, 6
WORD = "zqmark"
MARKS = {"bank": 31337.125, "grocer": 41337.375, "telco": 51337.625}


def customers() -> dict[str, pd.DataFrame]:
    """The same customers everywhere, in other spellings and orders; six rows of each table hold a marked value."""
    generator = np.random.default_rng(4)
    x = 2e4 * generator.normal(size=(ROWS, 6))
    label = generator.random(ROWS) < 1 / (1 + np.exp(-(x @ generator.normal(size=6)) / 2e4))
    ids = [f"{WORD.capitalize()}-{number:05d}-ID" for number in range(ROWS)]
    tables = {}
    for place, (name, mark) in enumerate(MARKS.items()):
        own = x[:, 2 * place : 2 * place + 2].copy()
        own[:MARKED, 0] = mark + np.arange(MARKED)
        spelt = ids if name == "bank" else [f"  {one.upper()}" for one in ids]
        table = pd.DataFrame({"id": spelt, f"{name}_a": own[:, 0], f"{name}_b": own[:, 1]})
        if name == "bank":
            table["bad"] = np.where(label, f"{WORD}yes", f"{WORD}no")
        tables[name] = table.sample(frac=1, random_state=place)
    return tables


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Any]:
    """The job at three parties, and every text and byte that it left, by where."""
    folder = tmp_path_factory.mktemp("markers")
    tables = customers()
    paths = build(folder, tables, model="max_exchanges = 8\n")
    bank = paths["bank"]
    bank.write_text(bank.read_text().replace('positive = "yes"', f'positive = "{WORD}yes"'))
    members = {name: Party(path) for name, path in paths.items()}
    prepared = {name: prepare(party) for name, party in members.items()}
    for party in members.values():
        party.output.mkdir(parents=True)
    left: dict[str, bytes] = {}
    keys: list[Any] = []
    records: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(self.format(record) + repr(record.args))

    def show(where: str, *things: Any) -> None:
        left[where] = "\n".join(f"{thing!r}\n{thing}" for thing in things).encode()

    def role(session: Session) -> Any:
        name = session.name
        outcome = job.train(session, prepared[name], house=House(members[name]))
        show(f"reprs of {name}", session, session.me, session.me.public, session.ledger, *session.channels.values())
        show(f"data of {name}", prepared[name], prepared[name].table, prepared[name].ids, outcome, outcome.model)
        return outcome, session

    original, listener, logger = vfl.exchange.generate, Listen(logging.DEBUG), logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("", "colonnade")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parties.memory, "Ledger", lambda owner, _, allowed: Ledger(owner, folder / f"{owner.name}.jsonl", allowed)
        )
        patch.setattr(vfl.exchange, "generate", lambda bits: keys.append(original(bits)) or keys[-1])
        for name in levels:
            logging.getLogger(name).setLevel(logging.DEBUG)
        logger.addHandler(listener)
        recorded: Any = {}
        ended = outcomes(
            dict.fromkeys(members, role),
            members["bank"].agreement,
            {name: party.identity for name, party in members.items()},
            recorded=recorded,
        )
    assert all(isinstance(result, tuple) for result in ended.values()), ended
    for name, (outcome, session) in ended.items():
        party = members[name]
        write_outcome(party, job._closed(outcome, session), [])
        left[f"summary of {name}"] = json.dumps(summarise(party, outcome, [])).encode()
        left[f"report of {name}"] = as_file(outcome.psi_report)
        left[f"ledger of {name}"] = (folder / f"{name}.jsonl").read_bytes()
        for path in party.output.iterdir():
            left[f"{path.name} of {name}"] = path.read_bytes()
        for peer, link in recorded[name].items():
            left[f"frames from {name} to {peer}"] = b"\n".join(b"".join(frame) for frame in link.sent)
    logger.removeHandler(listener)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    left["log"] = "\n".join(records).encode()
    show("reprs of the secret key", *keys)
    return {"left": left, "tables": tables, "members": members, "prepared": prepared, "ended": ended, "keys": keys}


def forms(value: float) -> list[bytes]:
    """A number as it might stand in a file or a frame."""
    texts = [repr(float(value))] + ([f"{value:.6f}", f"{value:.6e}"] if abs(value) > 1000 else [])
    fixed = [int(np.rint(value * 2.0**bits)) for bits in (20, 40)]
    raw = [np.float64(value).tobytes(), np.float64(value).astype(">f8").tobytes()]
    raw += [number.to_bytes(8, "little", signed=True) for number in fixed if abs(number) > 2**33]
    return [text.encode() for text in texts] + raw


def found(needles: list[bytes], run: dict[str, Any], where: Callable[[str], bool] = lambda _: True) -> list[str]:
    """Where any of the needles stands: as it is, in any case of letters, or as Python prints bytes."""
    needles = needles + [repr(needle)[2:-1].encode() for needle in needles]
    return [
        place
        for place, hay in run["left"].items()
        if where(place) and any(needle in hay or needle.lower() in hay.lower() for needle in needles)
    ]


def aligned_and_scaled(run: dict[str, Any], name: str) -> np.ndarray:
    """Our own recomputation of the values that training saw."""
    outcome = run["ended"][name][0]
    raw = run["prepared"][name].features.to_numpy()[outcome.rows]
    return StandardScaler().fit(raw[~outcome.test]).transform(raw)


def test_the_search_would_find_them(run):
    """The control: all needles are in what went in, in the forms that are looked for."""
    for name, mark in MARKS.items():
        assert WORD.encode() in (run["members"][name].source.path).read_bytes().lower()
        table = run["prepared"][name].table
        assert any(form in column.tobytes() for column in table.features.values() for form in forms(mark))
        assert any(form in run["members"][name].source.path.read_bytes() for form in forms(mark))
    run = run | {"left": {"a leak": b"... " + WORD.upper().encode() + b" ..."}}
    assert found([WORD.encode()], run) == ["a leak"]


def test_everything_was_searched(run):
    places = set(run["left"])
    for name in MARKS:
        assert {f"{what} of {name}" for what in ("reprs", "data", "summary", "report", "ledger")} <= places
        assert {f"{what} of {name}" for what in ("model.json", "rows.csv", "psi_report.json")} <= places
        assert sum(place.startswith(f"frames from {name}") for place in places) == 2
    assert all(len(run["left"][place]) > 20 for place in places if place != "log")
    assert b"few for up to" in run["left"]["log"]


def test_no_id_and_no_label_appears_anywhere(run):
    assert found([WORD.encode()], run) == []


def test_no_plain_hash_of_an_id_appears_anywhere_because_a_dictionary_could_be_tried_on_it(run):
    needles = []
    ids = run["prepared"]["bank"].ids
    for one in [value[4:] for value in ids.keys[0].take(ids.rows)] + ids.leaf_values(np.arange(len(ids))):
        for hashed in (hashlib.sha256, hashlib.sha512, hashlib.sha1, hashlib.md5):
            digest = hashed(one)
            needles += [digest.digest(), digest.hexdigest().encode()]
    assert found(needles, run) == []


def test_no_marked_value_appears_anywhere_raw_or_scaled(run):
    for name, mark in MARKS.items():
        needles = [form for step in range(MARKED) for form in forms(mark + step)]
        raw = run["prepared"][name].features.to_numpy()[run["ended"][name][0].rows]
        scaled = aligned_and_scaled(run, name)[(raw >= mark) & (raw <= mark + MARKED) & (raw % 1 == mark % 1)]
        assert len(scaled) == MARKED
        needles += [form for value in scaled for form in forms(value)]
        needles += [form for value in scaled for form in forms(np.rint(value * 2**20) / 2**20)]  # what is weighed
        assert found(needles, run) == []


def test_no_partial_embedding_of_the_trained_model_stands_in_a_frame(run):
    for name in ("grocer", "telco"):
        outcome = run["ended"][name][0]
        embedding = aligned_and_scaled(run, name) @ outcome.model.coef_[0]
        needles = [np.float64(value).tobytes() for value in embedding]
        needles += [int(np.rint(value * 2.0**40)).to_bytes(8, "little", signed=True) for value in embedding]
        assert found(needles, run, lambda place: place.startswith("frames")) == []


def test_our_coefficients_stand_in_our_model_share_and_nowhere_else(run):
    for name in MARKS:
        coef = run["ended"][name][0].model.coef_[0]
        needles = [form for value in coef for form in (repr(float(value))[:9].encode(), np.float64(value).tobytes())]
        assert set(found(needles, run)) == {f"model.json of {name}"}


def test_no_repr_dumps_an_array(run):
    for place in (f"{what} of {name}" for what in ("reprs", "data") for name in MARKS):
        assert b"array(" not in run["left"][place]
        assert b"DataFrame" not in run["left"][place]
        assert b"[1. 0." not in run["left"][place]


def test_no_secret_appears_anywhere(run):
    needles = []
    for party in run["members"].values():
        for secret in (party.identity.curve_secret, party.identity.sign_secret):
            needles += [secret, secret.hex().encode(), z85.encode(secret)]
    (key,) = run["keys"]
    for prime in (int(key._p.prime), int(key._q.prime)):
        needles += [prime.to_bytes(128, order) for order in ("little", "big")]
        needles += [str(prime).encode(), f"{prime:x}".encode()]
    assert found(needles, run) == []


def test_rows_of_one_party_are_told_to_itself_only(run):
    """`rows.csv` stays at home; a report or ledger says how many, never which."""
    for name in MARKS:
        order = run["ended"][name][0].rows
        needles = [json.dumps(order[:8].tolist())[1:-1].encode(), order[:4].astype("<u8").tobytes()]
        needles += [order[:8].astype("<u4").tobytes()]
        assert found(needles, run, lambda place: not place.startswith("rows.csv")) == []


def test_the_model_share_holds_coefficients_and_preparation_and_nothing_else(run):
    for name in MARKS:
        share = json.loads(run["left"][f"model.json of {name}"])
        model = run["ended"][name][0].model
        assert set(share) == {
            "colonnade_model",
            "kind",
            "party",
            "training",
            "agreement",
            "params",
            "features",
            "coef",
            "intercept",
            "classes",
            "exchanges",
            "converged",
            "prepared",
        }
        assert share["coef"] == model.coef_.tolist()
        assert share["features"] == [f"{name}_a", f"{name}_b"]
        number = {"type": "number", "fill": None, "indicator": False, "edges": []}
        assert share["prepared"].pop("columns") == {f"{name}_a": number, f"{name}_b": number}
        assert {what: len(values) for what, values in share["prepared"].items()} == {"mean": 2, "scale": 2}
        assert share["params"] == model.get_params()
        assert share["classes"] == ([0.0, 1.0] if name == "bank" else [])


# Error texts


def spoil(column: str, values: list[Any]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype({column: object})
        table.iloc[: len(values), table.columns.get_loc(column)] = values
        return table

    return change


def rare(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(grocer_a=[MARKS["grocer"] + (number < 3) for number in range(len(table))])


BAD = {
    "text in a feature": ("grocer", spoil("grocer_a", [f"{WORD} 1", f"{WORD} 2"]), ["'grocer_a'", "2"]),
    "missing feature": ("grocer", spoil("grocer_b", [None] * 3), ["'grocer_b'", "3"]),
    "infinite feature": ("grocer", spoil("grocer_b", ["inf", "-inf"]), ["'grocer_b'", "2"]),
    "duplicate ids": ("grocer", spoil("id", [f"{WORD}-x"] * 4), ["'id'", "3"]),
    "empty ids": ("grocer", spoil("id", ["", " "]), ["'id'", "2"]),
    "ids that a spreadsheet rounded": ("grocer", spoil("id", ["4.13E+10", "4.13E+11"]), ["'id'", "2"]),
    "rare column": ("grocer", rare, ["grocer_a (3)"]),
    "three labels": ("bank", spoil("bad", [f"{WORD}maybe"]), ["'bad'", "3"]),
    "constant label": ("bank", lambda table: table.assign(bad=f"{WORD}yes"), ["'bad'", "constant"]),
    "missing label": ("bank", spoil("bad", ["", ""]), ["'bad'", "2"]),
    "another positive label": ("bank", lambda table: table.replace(f"{WORD}yes", f"{WORD}si"), ["'bad'"]),
    "missing column": ("grocer", lambda table: table.drop(columns="grocer_a"), ["'grocer_a'"]),
    "unnamed column": ("grocer", lambda table: table.assign(**{" ": WORD}), ["1 columns"]),
    "too few rows": ("grocer", lambda table: table.iloc[:2], ["2 rows", "2 columns"]),
    "no rows": ("grocer", lambda table: table.iloc[:0], ["no rows"]),
}


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    paths = build(folder, customers())
    bank = paths["bank"]
    bank.write_text(bank.read_text().replace('positive = "yes"', f'positive = "{WORD}yes"'))
    return paths


def refusal(path: Path) -> str:
    """The refusal with its traceback, as a log or a ticket would hold it."""
    with pytest.raises(ColonnadeError) as caught:
        prepare(Party(path))
    assert "\n" not in str(caught.value)
    return str(caught.value) + "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("what", BAD)
def test_a_refused_table_is_named_by_file_and_count_and_never_quoted(members, what):
    who, change, named = BAD[what]
    path = Party(members[who]).source.path
    change(customers()[who]).to_csv(path, index=False)
    text = refusal(members[who])
    first = text.splitlines()[0]
    assert WORD not in text.lower()
    assert not any(form.decode("latin-1") in text for mark in MARKS.values() for form in forms(mark))
    assert "4.13E" not in text
    assert f"{who}.csv" in first
    assert all(word in first for word in named), first


def test_a_table_in_another_encoding_is_refused_without_a_quotation(members):
    path = Party(members["grocer"]).source.path
    path.write_bytes(customers()["grocer"].to_csv(index=False).replace(WORD.upper(), f"{WORD}é").encode("latin-1"))
    text = refusal(members["grocer"])
    assert WORD not in text.lower()
    assert "not UTF-8" in text
