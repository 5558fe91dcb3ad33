"""Scoring on request: the right scores in the order asked, no row twice over the network, and nobody cheated."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from parties.errors import LocalError, PeerAborted, ProtocolViolation, Refused
from parties.files import occupied
from parties.memory import make_agreement, outcomes
from parties.message import Message
from parties.party_file import Party
from parties.session import open_session
from tests.conftest import changed
from tests.training import agreed, altering, joined, sent, table, with_data, with_fields
from tests.world import Command, build, colonnade, customers, free_ports
from vfl.linear import VerticalLogisticRegression
from vfl.messages import MaskedEmbedding, PartialEmbedding
from vfl.preparation import fit
from vfl.scoring import answer, serve
from vfl.scoring_messages import ROWS, ScoreRequest
from vfl.serve import _in_words, _lines
from vfl.serve import serve as command

N = 40
TRAINING = "5c" * 32


def share(name: str, x: pd.DataFrame, outputs: int = 1, training: str = TRAINING) -> VerticalLogisticRegression:
    """A party's part of a model that nobody has trained: any weights will do."""
    weights = np.random.default_rng(sum(name.encode()))
    model = VerticalLogisticRegression()
    model.coef_, model.intercept_ = weights.normal(size=(outputs, x.shape[1])), np.zeros(outputs)
    if name == "bank":
        model.intercept_ = weights.normal(size=outputs)
    model.classes_ = np.arange(max(outputs, 2))
    model.feature_names_in_, model.n_iter_, model.converged_ = np.array(x.columns, dtype=object), 1, True
    model.training_, model.agreement_, model.party_ = training, "", name
    return model


def play(
    parties: int,
    requests: Callable[[], Iterable[Any]],
    *,
    outputs: int = 1,
    agreement: dict[str, Any] | None = None,
    maximum_rows: int | None = None,
    trainings: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What everybody ended with, and at "oracle" the scores of all rows by decision_function in the same session."""
    parts, _ = table(parties, N)
    models = {name: share(name, x, outputs, (trainings or {}).get(name, TRAINING)) for name, x in parts.items()}
    whole: dict[str, Any] = {}

    def bank(session: Any) -> list[Any]:
        if not options.get("tamper"):
            whole["oracle"] = models["bank"].decision_function(parts["bank"], session=session)
        return list(serve(session, models["bank"], parts["bank"], requests()))

    def holder(session: Any) -> int:
        if not options.get("tamper"):
            models[session.name].decision_function(parts[session.name], session=session)
        return answer(session, models[session.name], parts[session.name], maximum_rows)

    roles = {"bank": bank} | dict.fromkeys(list(parts)[1:], holder)
    ended = outcomes(roles, **agreed(list(parts), **(agreement or {})), **options)
    coef = np.hstack([model.coef_ for model in models.values()])
    return ended | whole | {"plain": joined(parts) @ coef.T + models["bank"].intercept_}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("parties", [2, 3, 4])
def test_every_request_gets_the_scores_of_decision_function_in_the_order_asked(parties, outputs):
    asked = [[3], [7, 1, 39, 0], [1, 1, 5, 3], [], [-1, 2, -1], np.arange(N)[::-1], [-1]]
    recorded: Any = {}
    ended = play(parties, lambda: asked, outputs=outputs, recorded=recorded)
    answers = ended["bank"]
    assert len(answers) == len(asked)
    for request, scores in zip(asked, answers, strict=True):
        request = np.array(request, int)
        oracle = np.where((request >= 0)[:, np.newaxis], ended["plain"][request], np.nan)
        np.testing.assert_allclose(scores.reshape(len(request), outputs), oracle, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(answers[5], ended["oracle"][::-1])
    for name in recorded["bank"]:
        requests = sent(recorded, "bank", name, ScoreRequest)
        assert [one.data.tolist() for one in requests[:3]] == [[3], [0, 1, 7, 39], [5]]  # sorted, each row once
        assert np.sort(np.concatenate([one.data for one in requests])).tolist() == list(range(N))
        assert [one.last for one in requests] == [False] * (len(requests) - 1) + [True]
        assert ended[name] == N


def test_customers_that_are_not_common_are_never_sent():
    recorded: Any = {}
    ended = play(2, lambda: [[-1, -1], []], recorded=recorded)
    assert np.isnan(ended["bank"][0]).all() and ended["bank"][1].shape == (0,)
    assert [len(one.data) for one in sent(recorded, "bank", "grocer", ScoreRequest)] == [0]
    assert ended["grocer"] == 0


def test_every_answer_has_masks_of_its_own():
    recorded: Any = {}
    play(3, lambda: [[0, 1], [2], [3, 4]], recorded=recorded)
    parts = sent(recorded, "grocer", "bank", MaskedEmbedding)[1:]  # the first is decision_function's
    assert [one.exchange for one in parts] == [0, 1, 2]
    words = np.concatenate([one.data for one in parts])
    assert len(np.unique(words)) == 5 and np.abs(words.astype(np.int64)).min() > 2**45  # 2^-19 by chance


def test_a_label_holder_with_nothing_to_ask_says_so_and_nobody_gives_up(identities):
    """Over real sockets: all deadlines pass twice before the first request."""
    parts, _ = table(2, N)
    deadlines = {"connect": 30.0, "message": 2.0, "silence": 2.0, "stall": 2.0}
    agreement = make_agreement({name: identities[name] for name in parts}, deadlines=deadlines)
    listed = zip(msgspec.to_builtins(agreement)["parties"], free_ports(2), strict=True)
    agreement = changed(agreement, parties=[one | {"endpoint": f"tcp://127.0.0.1:{port}"} for one, port in listed])

    def late() -> Iterable[Any]:
        for _ in range(45):
            time.sleep(0.1)
            yield None
        yield [1, 2]

    def role(name: str) -> Any:
        with open_session(identities[name], agreement) as session:
            if name == "bank":
                return list(serve(session, share(name, parts[name]), parts[name], late()))
            return answer(session, share(name, parts[name]), parts[name])

    with ThreadPoolExecutor() as threads:
        scores, answered = threads.map(role, parts)
    coef = np.hstack([share(name, x).coef_ for name, x in parts.items()])
    plain = joined(parts) @ coef[0] + share("bank", parts["bank"]).intercept_
    np.testing.assert_allclose(scores[0], plain[[1, 2]], rtol=0, atol=1e-9)
    assert answered == 2


def test_a_request_of_any_size_goes_in_messages_of_bounded_size(monkeypatch):
    monkeypatch.setattr("vfl.scoring.ROWS", 16)
    recorded: Any = {}
    ended = play(3, lambda: [np.arange(N)], recorded=recorded)
    np.testing.assert_array_equal(ended["bank"][0], ended["oracle"])
    assert [len(one.data) for one in sent(recorded, "bank", "mobile", ScoreRequest)] == [16, 16, 8, 0]


@pytest.mark.parametrize("request_", [[N], [-2], [0.5], [[1], [2]], ["a"]])
def test_a_position_that_does_not_exist_is_refused_before_it_is_sent(request_):
    recorded: Any = {}
    ended = play(2, lambda: [request_], recorded=recorded)
    assert isinstance(ended["bank"], LocalError) and isinstance(ended["grocer"], PeerAborted)
    assert sent(recorded, "bank", "grocer", ScoreRequest) == []


def test_other_columns_than_the_model_was_trained_on_are_refused():
    parts, _ = table(2, N)
    ended = outcomes(
        {
            "bank": lambda session: list(serve(session, share("bank", parts["bank"]), parts["bank"], [[1]])),
            "grocer": lambda session: answer(session, share("grocer", parts["grocer"]), parts["grocer"].iloc[:, ::-1]),
        },
        **agreed(list(parts)),
    )
    assert isinstance(ended["grocer"], LocalError) and "grocer_0, grocer_1" in str(ended["grocer"])


def test_shares_of_different_trainings_do_not_serve_together():
    ended = play(2, lambda: [[1]], trainings={"grocer": "11" * 32}, tamper=lambda a, b, head, data: (head, data))
    assert isinstance(ended["bank"], (Refused, PeerAborted)) and isinstance(ended["grocer"], (Refused, PeerAborted))
    assert any(isinstance(one, Refused) and "another training" in str(one) for one in ended.values())


def test_a_feature_holder_answers_no_more_rows_than_its_policy_allows():
    assert play(2, lambda: [[1, 2], [3, 1]], maximum_rows=3)["grocer"] == 3
    ended = play(2, lambda: [[1, 2], [3, 4]], maximum_rows=3)
    assert isinstance(ended["grocer"], Refused) and "policy answers, 3" in str(ended["grocer"])
    assert isinstance(ended["bank"], PeerAborted) and ended["bank"].exit_code == 3


# ---- who deviates


def first_as(kind: type[Message], holder: str, change: Callable[[Any], Any], at: int = 0) -> Any:
    return altering(holder, "bank", kind, change, at)


FALSE_ANSWERS = {
    "of another request": (2, first_as(PartialEmbedding, "grocer", with_fields(exchange=0), 1)),
    "masked, of another request": (3, first_as(MaskedEmbedding, "mobile", with_fields(exchange=0), 1)),
    "too long": (2, first_as(PartialEmbedding, "grocer", with_data(lambda x: np.append(x, 0.0)))),
    "too short": (3, first_as(MaskedEmbedding, "mobile", with_data(lambda x: x[:-1]))),
    "not a number": (2, first_as(PartialEmbedding, "grocer", with_data(lambda x: x * np.nan))),
    "infinite": (2, first_as(PartialEmbedding, "grocer", with_data(lambda x: x + np.inf))),
    "beyond any range": (2, first_as(PartialEmbedding, "grocer", with_data(lambda x: x + 2.0**46))),
}


@pytest.mark.parametrize("case", FALSE_ANSWERS)
def test_a_feature_holder_that_answers_wrongly_is_named(case):
    parties, tamper = FALSE_ANSWERS[case]
    ended = play(parties, lambda: [[1, 2], [3, 4]], tamper=tamper)
    cheater = "grocer" if parties == 2 else "mobile"
    assert isinstance(ended["bank"], ProtocolViolation) and ended["bank"].peer == cheater
    assert isinstance(ended["grocer"], PeerAborted)


def rows(*values: int) -> Callable[[Any], Any]:
    return with_data(lambda x: np.array(values, "<u4"))


FALSE_REQUESTS = {
    "a row that is not common": (rows(2, N), 0, "not common"),
    "a row again": (rows(1, 9), 1, "answered before"),
    "a row twice": (rows(5, 5), 0, "increase"),
    "rows in an order that says something": (rows(6, 5), 0, "increase"),
    "too many rows": (rows(*range(ROWS + 1)), 0, f"{ROWS} rows at most"),
    "another number": (with_fields(number=5), 1, "request 5 where 1 is due"),
    "an earlier number": (with_fields(number=0), 1, "request 0 where 1 is due"),
    "the last, with rows": (with_fields(last=True), 0, "the last none"),
}


@pytest.mark.parametrize("case", FALSE_REQUESTS)
def test_a_label_holder_that_asks_wrongly_is_named_and_gets_nothing(case):
    change, at, text = FALSE_REQUESTS[case]
    recorded: Any = {}
    tamper = altering("bank", "grocer", ScoreRequest, change, at)
    ended = play(2, lambda: [[1, 2], [3, 4]], tamper=tamper, recorded=recorded)
    assert isinstance(ended["grocer"], ProtocolViolation) and text in str(ended["grocer"])
    assert isinstance(ended["bank"], PeerAborted)
    assert len(sent(recorded, "grocer", "bank", PartialEmbedding)) == at


# ---- files and processes


def test_lines_are_read_whole_as_a_file_grows_and_the_last_without_its_end(tmp_path):
    path, ended = tmp_path / "requests", threading.Event()
    path.write_bytes(b"one\ntw")
    with path.open("rb") as file, path.open("ab", buffering=0) as writer:
        lines = _lines(file.fileno(), True, ended)
        assert (next(lines), next(lines)) == (b"one", None)
        writer.write(b"o\n\nthree")
        found = [line for line in (next(lines) for _ in range(4)) if line is not None]
        assert found == [b"two", b""]
        ended.set()
        assert list(lines) == []
    with path.open("rb") as file:
        whole = [line for line in _lines(file.fileno(), False, threading.Event()) if line is not None]
    assert whole == [b"one", b"two", b"", b"three"]


@pytest.fixture
def world(tmp_path):
    """Three organisations with shares of one model, and for every customer common to all the score it must get."""
    tables = customers(120)
    paths = build(tmp_path, tables, sign=False)
    agreement = tmp_path / "agreement.toml"
    agreement.write_text(agreement.read_text().replace("silence = 6", "silence = 4"))
    total: Any = 0.0
    for name, one in tables.items():
        party = Party(paths[name])
        party.sign()
        features = one[list(party.file.table.features)]
        fitted = fit(features, party.file.prepare, standardise=True, minimum=1)
        model = share(name, features)
        model.agreement_ = party.agreement.digest.hex()
        with occupied(party.output):
            model.save(party.output / "model.json", prepared=fitted)
        part = fitted.transform(features) @ model.coef_[0] + model.intercept_[0]
        total = total + pd.Series(part.to_numpy(), index=one["id"].str.strip().str.lower())
    return tmp_path, paths, expit(total.dropna()), total.index[total.isna()]


class Running:
    """Everybody's `colonnade serve`; nothing is left running."""

    def __init__(self, world: Any, *options: str) -> None:
        self.folder: Path = world[0]
        self.requests, self.scores = self.folder / "requests.jsonl", self.folder / "scores.csv"
        self.requests.touch()
        more = {"bank": ["--requests", str(self.requests), "--output", str(self.scores), *options]}
        self.processes = {
            name: Command("serve", path, *more.get(name, []), "--events", folder=self.folder / "streams" / name)
            for name, path in world[1].items()
        }

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()

    def answered(self, lines: int) -> pd.DataFrame:
        """Wait until the label holder has so many scores."""
        deadline = time.monotonic() + 60
        while not self.scores.exists() or len(self.scores.read_text().splitlines()) <= lines:
            assert time.monotonic() < deadline and self.processes["bank"].poll() is None
            time.sleep(0.05)
        return pd.read_csv(self.scores, dtype={"id": str})

    def end(self) -> tuple[dict[str, int | None], dict[str, str]]:
        codes = {name: process.wait(40) for name, process in self.processes.items()}
        return codes, {name: process.errors() for name, process in self.processes.items()}


def ask(running: Running, *requests: list[str]) -> None:
    with running.requests.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in requests)


def test_progress_speaks_of_rows_asked_for_so_far_and_not_of_an_unfinished_task():
    heard: list[tuple[str, int, int]] = []
    show = _in_words(lambda *told: heard.append(told))
    show("align", 5, 5)
    show("serve", 2, 10)
    assert heard == [("align", 5, 5), ("common rows asked for so far", 2, 10)]


def test_requests_of_a_file_are_answered_in_order_and_then_all_end(world):
    folder, paths, expected, unknown = world
    common, spelt = list(expected.index), [one.upper() + " " for one in expected.index]
    asked = [common[4:7], [], [spelt[5], unknown[0], "stranger", common[9], common[9]], common]
    (folder / "requests.jsonl").write_text(
        "\n".join([json.dumps(asked[0]), '{"not": "a request"}', *map(json.dumps, asked[1:])])
    )
    with Running(world) as running:
        codes, errors = running.end()
    assert codes == dict.fromkeys(paths, 0), errors
    scores = pd.read_csv(folder / "scores.csv", dtype={"id": str})
    assert list(scores["id"]) == [one for request in asked for one in request]
    assert list(scores["request"]) == [1] * 3 + [4] * 5 + [5] * len(common)
    assert scores["score"].isna().tolist() == [one in (unknown[0], "stranger") for one in scores["id"]]
    known = scores.dropna()
    np.testing.assert_allclose(known["score"], expected[known["id"].str.strip().str.lower()], rtol=0, atol=1e-9)
    assert "line 2 of the requests is no JSON list" in errors["bank"] and "Traceback" not in "".join(errors.values())
    assert (folder / "scores.csv").stat().st_mode & 0o777 == 0o600
    told = b"".join(path.read_bytes() for path in (folder / "out").rglob("serve_*") if path.is_file())
    assert b"customer-" not in told.lower() and b"stranger" not in told
    for name in ("grocer", "telco"):
        assert not list((folder / "out" / name).glob("*scores*"))
    reports = [folder / "out" / name / "serve_psi_report.json" for name in paths]
    assert colonnade("verify", *reports, "--agreement", folder / "agreement.toml")[0] == 0
    asks = [json.loads(line) for line in (folder / "out" / "bank" / "serve_ledger.jsonl").read_text().splitlines()]
    assert sum(one.get("kind") == "ScoreRequest" for one in asks) >= 2 * 4  # three with rows, one the last; two peers


def test_a_label_holder_that_follows_a_file_is_ended_by_an_interrupt_in_good_order(world):
    folder, paths, expected, _ = world
    ids = list(expected.index)
    with Running(world, "--follow") as running:
        for number in (1, 2, 3):
            ask(running, ids[number : 2 * number])
            scores = running.answered(number * (number + 1) // 2)
        running.processes["bank"].send_signal(signal.SIGINT)
        codes, errors = running.end()
    assert codes == dict.fromkeys(paths, 0), errors
    np.testing.assert_allclose(scores["score"], expected[scores["id"]], rtol=0, atol=1e-9)
    for name in paths:
        last = json.loads((folder / "out" / name / "serve_ledger.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "sealed"


def test_a_party_that_is_killed_while_nobody_asks_ends_the_others(world):
    with Running(world, "--follow") as running:
        ask(running, [world[2].index[0]])
        running.answered(1)
        running.processes["telco"].kill()
        codes, errors = running.end()
    assert codes == {"bank": 4, "grocer": 4, "telco": -signal.SIGKILL}
    assert "telco" in errors["bank"] and "Traceback" not in "".join(errors.values())
    assert len(pd.read_csv(running.scores)) == 1


def test_what_cannot_be_served_is_refused_before_anybody_is_met(world):
    folder, paths, _, _ = world
    requests, scores, other = (folder / name for name in ("requests.jsonl", "scores.csv", "other.json"))
    model = (folder / "out" / "bank" / "model.json").read_text()
    other.write_text(model.replace('"agreement": "', '"agreement": "00'))
    scores.touch()
    refused: dict[str, Callable[[], None]] = {
        "give --requests and --output": lambda: command(paths["bank"]),
        "leave --requests and --output out": lambda: command(paths["grocer"], None, requests, folder / "new.csv"),
        "nothing is overwritten": lambda: command(paths["bank"], None, requests, scores),
        "cannot read the requests": lambda: command(paths["bank"], None, requests, folder / "new.csv"),
        "leave --maximum-rows out": lambda: command(paths["bank"], None, requests, scores, maximum_rows=3),
        "under another agreement": lambda: command(paths["grocer"], model=other),
        "does not exist": lambda: command(paths["grocer"], folder / "nowhere.csv"),
    }
    for text, act in refused.items():
        with pytest.raises((LocalError, Refused), match=text):
            act()
    assert not list((folder / "out").rglob("*ledger*")) and not (folder / "new.csv").exists()
