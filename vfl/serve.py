"""`colonnade serve`: a scoring session at one party, from its files; at the label holder from requests to a CSV file.

A request is a line: a JSON list of ids as our table has them, ["C-17", "C-4"]; of several id columns, in the order of
the agreement's fields, [["Ann", "1970-01-01"]]. Only models need what is imported within functions.
"""

from __future__ import annotations

import csv
import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import pyarrow as pa
import typer
from numpy.typing import NDArray

from parties.errors import LocalError, Refused
from parties.files import check_writable, occupied
from parties.party_file import Party
from parties.session import Progress, Session
from parties.tables import Source
from psi import job as psi_job
from psi.identifiers import rules_of
from vfl.console import Watcher, logging_to, out

if TYPE_CHECKING:
    import pandas as pd

    from vfl.estimator import VerticalLinearModel
    from vfl.job_input import Prepared
    from vfl.neural_estimator import VerticalMLP

log = logging.getLogger("colonnade")
EVIDENCE = tuple(f"serve_{name}" for name in psi_job.EVIDENCE)
PAUSE = 0.2  # seconds between two looks for a request
READ = 1 << 20
Id = tuple[str | None, ...]  # canonical, a value a field


def serve(
    path: Annotated[Path, typer.Argument(help="Our own file, for example bank.toml.", metavar="PARTY.toml")],
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Our table of customers; by default that of our own file.")
    ] = None,
    requests_file: Annotated[
        Path | None,
        typer.Option("--requests", help="Label holder: a JSON list of ids a line; - is standard input."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Label holder: scores as CSV, written as they come.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Label holder: wait for more requests at the end of the file.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Our model share; by default model.json in our output folder.")
    ] = None,
    maximum_rows: Annotated[
        int | None, typer.Option(help="Feature holder: answer for at most so many rows.", min=0)
    ] = None,
    events: Annotated[
        bool, typer.Option("--events", hidden=True, help="Progress as JSON lines, for a launching process.")
    ] = False,
) -> None:
    """Score on request, for as long as the label holder asks: every party runs this. Scores stay with the label holder.

    The label holder's session ends, for all, with its requests: at their end or, with --follow, at Ctrl-C or SIGTERM.
    """
    party = Party(path)
    if party.agreement.is_horizontal:
        raise LocalError("serve is for vertical jobs; a horizontal model is every party's own: load it in Python")
    if party.is_label_holder != (requests_file is not None and output_file is not None):
        remedy = "give --requests and --output" if party.is_label_holder else "leave --requests and --output out"
        raise LocalError(f"the label holder asks and has the scores: {remedy}")
    if maximum_rows is not None and party.is_label_holder:
        raise LocalError("the label holder asks, feature holders answer: leave --maximum-rows out")
    if output_file is not None:
        if output_file.exists():
            raise LocalError(f"{output_file} exists; name another, nothing is overwritten")
        check_writable(output_file)
    source = party.source if input_file is None else replace(party.source, path=input_file)
    share = model or party.output / "model.json"
    with (
        occupied(party.output),
        logging_to(party.output / "serve_log.txt"),
        Watcher(events) as watcher,
        _opened(requests_file) as requests,
    ):
        if not events:
            out.print(f"{party.name}: waiting for the others", soft_wrap=True)
        shown = _in_words(watcher)
        answered = run(party, source, share, shown, log.warning, requests, output_file, follow, maximum_rows)
        log.info("%d %s answered", answered, "requests" if party.is_label_holder else "rows")
    if not events:
        where = f"requests answered in {output_file}" if output_file else "of our rows answered for the label holder"
        out.print(f"{answered:,} {where}", soft_wrap=True)


def _in_words(watcher: Watcher) -> Progress:
    """A session ends when the requests do, not when every common row was asked for: no bar is to look unfinished."""
    return lambda phase, *count: watcher("common rows asked for so far" if phase == "serve" else phase, *count)


def run(
    party: Party,
    source: Source,
    share: Path,
    progress: Progress,
    note: Callable[[str], None],
    requests: int = -1,
    output: Path | None = None,
    follow: bool = False,
    maximum_rows: int | None = None,
) -> int:
    """Everything at one party, over the network: align the rows of `source` afresh, then score on request. The label
    holder reads the descriptor `requests` and writes `output`. How many requests, or rows, were answered."""
    from vfl.job_input import prepare
    from vfl.own_code import own_module
    from vfl.scoring import answer
    from vfl.task import load_share

    model = load_share(share, own_module(party))
    if model.agreement_ != party.agreement.digest.hex() or model.party_ != party.name:
        raise Refused(f"{share} was trained under another agreement or by another party; train again")
    if model.prepared_ is None:
        raise LocalError(f"{share} was saved without the preparation of its columns; give it to save as `prepared`")
    approval, house = party.approval, psi_job.House(party, "serve_")
    prepared = prepare(party, source=source, trained=model.prepared_)
    house.check_budget(prepared.ids)
    task = f"score requests with {model.training_[:32]}"
    with psi_job.meeting(house, approval, task, EVIDENCE, progress, note) as session:
        alignment, _ = psi_job.intersect(session, prepared, party.file.policy.minimum_to_score, house)
        if alignment.rows is None:
            raise Refused('the agreement keeps the common rows from us: a model needs result = "rows"')
        common = alignment.rows
        columns = prepared.fitted.transform(prepared.features.iloc[common].reset_index(drop=True))
        with session.phase("serve"):
            session.advance(0, len(common))
            if output is None:
                return answer(session, model, columns, maximum_rows)
            places = _places(party, prepared, common)
            with _until_interrupted() as ended:
                lines = _lines(requests, follow, ended)
                return _serve(session, model, columns, places, lines, list(party.id_columns.values()), output)


def _serve(
    session: Session,
    model: VerticalLinearModel | VerticalMLP,
    columns: pd.DataFrame,
    place: Callable[[Sequence[str]], int],
    lines: Iterator[bytes | None],
    names: list[str],
    output: Path,
) -> int:
    """One line a customer asked for, as soon as the request is answered; the score is empty where it is not common."""
    from vfl.scoring import serve as score_requests
    from vfl.task import expected

    asked: deque[tuple[int, list[list[str]]]] = deque()

    def positions() -> Iterator[list[int] | None]:
        number = 0
        for line in lines:
            number += line is not None
            ids = None if line is None or not line.strip() else _ids(line, len(names), number)
            if ids is not None:
                asked.append((number, ids))
            yield None if ids is None else [place(one) for one in ids]

    answered, classes = 0, list(getattr(model, "classes_", ()))
    titles = [f"score {name}" for name in classes] if len(classes) > 2 else ["score"]
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["request", *names, *titles])
            for scores in score_requests(session, model, columns, positions()):
                number, ids = asked.popleft()
                found = expected(model, scores).reshape(len(ids), len(titles))
                for one, values in zip(ids, found.tolist(), strict=True):
                    table.writerow([number, *one, *("" if np.isnan(value) else value for value in values)])
                file.flush()
                answered += 1
            os.fsync(descriptor)
    except OSError as error:
        raise LocalError(f"cannot go on from the requests to {output}: {error.strerror}") from None
    return answered


def _places(party: Party, prepared: Prepared, common: NDArray[np.int64]) -> Callable[[Sequence[str]], int]:
    """From an id, in any spelling that its rule takes for the same, to its position among the common rows, or -1."""
    rules = list(rules_of(party.agreement.identifiers).values())

    def canonical(one: Sequence[str]) -> Id:
        return tuple(rule(value) for rule, value in zip(rules, one, strict=True))

    rows = pa.array(prepared.ids.rows[common])
    written = [prepared.table.ids[column].take(rows).to_pylist() for column in party.id_columns.values()]
    places = {canonical(one): position for position, one in enumerate(zip(*written, strict=True))}
    return lambda one: places.get(canonical(one), -1)


def _ids(line: bytes, columns: int, number: int) -> list[list[str]] | None:
    """The ids of a request, a list of their values each; None, and a warning, for a line that is no request."""
    try:
        if columns == 1:
            return [[one] for one in msgspec.json.decode(line, type=list[str])]
        ids = msgspec.json.decode(line, type=list[list[str]])
        if all(len(one) == columns for one in ids):
            return ids
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    form = "of ids" if columns == 1 else f"of ids of {columns} values each"
    log.warning("line %d of the requests is no JSON list %s, in quotes; it is passed over", number, form)
    return None


def _lines(descriptor: int, follow: bool, ended: threading.Event) -> Iterator[bytes | None]:
    """Whole lines as they come, None while there is none; the last may lack its end when no more can follow."""
    rest = b""
    while not ended.is_set():
        ready, _, _ = select.select([descriptor], [], [], PAUSE)
        piece = os.read(descriptor, READ) if ready else b""
        *whole, rest = (rest + piece).split(b"\n")
        if ready and not piece:
            if not follow:
                yield rest
                return
            time.sleep(PAUSE)
        for line in whole or (None,):
            if not ended.is_set():
                yield line


@contextmanager
def _opened(path: Path | None) -> Iterator[int]:
    """The descriptor of the requests: 0 for "-", -1 where there are none. Raises LocalError."""
    if path is None or str(path) == "-":
        yield -1 if path is None else 0
        return
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise LocalError(f"cannot read the requests {path}: {error.strerror}") from None
    with file:
        yield file.fileno()


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM ends the requests, hence the session in good order; a second one breaks it off."""
    ended = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, end)
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
