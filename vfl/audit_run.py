"""`colonnade audit`: offline, at one party; figures and explanations, never a value."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from parties.errors import LocalError, Refused
from parties.files import make_folder, write_json
from parties.party_file import Party
from parties.preparation import Preparation
from parties.tables import Source, read_table
from psi.identifiers import Identifiers, canonical
from vfl.audit import Audit, Case, audit, columns_case, joint_case, labels_case
from vfl.console import out
from vfl.job_input import Prepared, exchanged, prepare
from vfl.losses import Vector
from vfl.preparation import fit

COLOURS = {"PASS": "green", "FAIL": "bold red", "NOT APPLICABLE": "yellow"}
SCHEMA = 1


def run(party: Party, known: int, exchanges: int | None, rows: int, other: Path | None, label: str) -> Path:
    """Rehearse, attack, show and write `audit.json`; returns its path.

    Raises:
        LocalError: the agreement is of another kind, or a table cannot be used. Refused: an attack succeeds.
    """
    if party.agreement.is_horizontal:
        raise LocalError("audit is for vertical jobs; a horizontal one is protected by secure aggregation and privacy")
    make_folder(party.output)
    with _quiet():
        case = _with_own(party, prepare(party), rows, other, label)
        agreed = party.agreement
        if exchanges is not None:
            settings = msgspec.structs.replace(agreed.model, max_exchanges=exchanges)
            agreed = msgspec.structs.replace(agreed, model=settings)
        found = audit(case, agreed, agreed.leakage, known)
        written = party.output / "audit.json"
        write_json(written, summarise(party, found))
    _show(party, found)
    out.print(f"wrote {written}", soft_wrap=True)
    if found.failed:
        raise Refused(f"{len(found.failed)} attacks succeed: {', '.join(found.failed)}; see what protects above")
    return written


@contextmanager
def _quiet() -> Iterator[None]:
    """A rehearsal's warnings are about a rehearsal: `check` and `run` give those that matter."""
    log = logging.getLogger("colonnade")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def summarise(party: Party, found: Audit) -> dict[str, Any]:
    """audit.json: names, counts and figures over all rows; no value, id or label."""
    agreement = party.agreement
    return {
        "schema": SCHEMA,
        "party": party.name,
        "role": agreement.party(party.name).role,
        "agreement": agreement.digest.hex(),
        "passed": not found.failed,
        **msgspec.to_builtins(found),
    }


def _with_own(party: Party, ours: Prepared, most: int, other: Path | None, label: str) -> Case:
    """The case, with our own module of a network. What a frozen one makes of our columns stands for them."""
    own, columns = ours.own, ours.fitted.transform(ours.features)
    if own is None or own.part == "top" or party.agreement.network.mode == "open":
        return replace(_case(party, ours, columns, most, other, label), own=own)
    case = _case(party, ours, exchanged(columns, ours, party.agreement), most, other, label)
    return replace(case, note=f"{case.note}; columns are what our frozen module makes of ours")


def _case(party: Party, ours: Prepared, columns: pd.DataFrame, most: int, other: Path | None, label: str) -> Case:
    """What can be rehearsed with what we have, our columns as they are exchanged, on at most so many rows."""
    columns, y = columns.reset_index(drop=True), ours.label
    settings, draw = party.agreement.model, np.random.default_rng(0)
    names = [one.name for one in party.agreement.ring]
    if other is None:
        if label:
            raise LocalError("--label names a column of the file given as --with")
        kept = np.sort(draw.permutation(len(columns))[:most])
        columns = columns.iloc[kept].reset_index(drop=True)
        if y is not None:
            return labels_case(columns, y[kept], names, settings.minimum_rows_off_mode)
        return columns_case(columns, party.name, names)
    if (y is None) != bool(label):
        raise LocalError("--label NAME says where a feature holder finds the label in the file given as --with")
    pairs, theirs, told = _joined(party, ours, other, label)
    pairs = pairs[np.sort(draw.permutation(len(pairs))[:most])]
    own = columns.iloc[pairs[:, 0]].reset_index(drop=True)
    opposite = fit(theirs.iloc[pairs[:, 1]], Preparation(), standardise=settings.standardise)
    theirs = opposite.transform(theirs.iloc[pairs[:, 1]].reset_index(drop=True))
    if y is not None:
        return joint_case(own, y[pairs[:, 0]], theirs, (names[0], names[1]))
    return joint_case(theirs, told[pairs[:, 1]], own, (names[0], party.name))


def _joined(party: Party, ours: Prepared, path: Path, label: str) -> tuple[Any, pd.DataFrame, Vector]:
    """Pairs (n, 2) of rows, ours and theirs, with equal ids under the first key; their features, their label as 0/1."""
    ids, source = list(party.id_columns.values()), Source(path, party.file.table.separator)
    try:
        header = list(pd.read_csv(path, sep=source.separator, nrows=0).columns)
    except (OSError, ValueError):
        raise LocalError(f"{path} cannot be read as CSV; give the other side's table with our id columns") from None
    features = [name for name in header if name not in ids]
    table = read_table(source, ids, features)
    theirs = pd.DataFrame(table.features, copy=False)
    told = np.empty(0)
    if label:
        if label not in theirs or theirs[label].nunique() != 2:
            raise LocalError(f"{path}: the column {label!r} does not hold two numbers; name the label with --label")
        told = (theirs[label] == theirs[label].max()).to_numpy(np.float64)
        theirs = theirs.drop(columns=label)
    columns = {field: table.ids[column] for field, column in party.id_columns.items()}
    found = canonical(columns, party.agreement.identifiers, duplicates="first", empty="drop", source=str(path))
    places = {key: row for key, row in zip(_keys(found), found.rows.tolist(), strict=True) if key is not None}
    pairs = [(row, places[key]) for row, key in enumerate(_keys(ours.ids)) if key in places]
    if not pairs:
        raise LocalError(f"{path} has no id of ours; give test data of the same customers")
    return np.array(pairs), theirs, told


def _keys(ids: Identifiers) -> list[bytes]:
    return ids.keys[0].take(ids.rows)


def _show(party: Party, found: Audit) -> None:
    table = Table(title=f"{party.agreement.title}: audit at {party.name}", title_justify="left", box=SIMPLE)
    table.add_column("attack, on what")
    for title in ("value", "without", "at most"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in found.verdicts:
        figures = ("" if value is None else f"{value:.3f}" for value in (one.value, one.baseline, one.threshold))
        shown = "n/a" if one.reason else one.verdict
        verdict = Text(shown, COLOURS[one.verdict])
        what = f"{one.attack}, {one.on}" + (f" ({one.metric})" if one.metric else "")
        table.add_row(what, *figures, verdict)
    out.print(table)
    for one in {one.attack: one for one in found.verdicts}.values():
        words = one.explained
        why = f" Not applicable because {one.reason}." if one.reason else ""
        out.print(
            f"{one.attack}: we tried to {words.tried}. If it works, {words.means}. Protection: {words.protects}.{why}",
            highlight=False,
            end="\n\n",
        )
    out.print(f"rehearsed on {found.rows:,} rows: {found.note}", highlight=False)
    told = f"{found.embeddings} embeddings of the same rows in {found.exchanges} exchanges"
    if found.harmless is not None:
        told += f"; up to {found.harmless} keep the columns below the threshold"
    out.print(told, highlight=False)
