"""Audits at our own premises: what we put into an intersection, and what we sent, checked against our own records.

A report proves what was said. Whether the ids that we committed to are those of our customers, only somebody with our
table and a second source can tell; and he need not look at all: the sample's seed was drawn by all parties together,
after the inputs were fixed. With the masking keys, which are kept only when our policy names a compliance key, all that
we sent can be computed again. No answer holds an id.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from parties.errors import LocalError
from parties.files import read_bytes
from parties.identity import Identity
from parties.message import Array
from parties.party_file import Party
from parties.sealing import unseal
from parties.tables import Source, read_table
from parties.workers import Workers
from psi.align import unambiguous
from psi.commitment import HASH_BYTES, leaf, paths, root, root_of_path, salts, sample
from psi.escrow import ESCROW, Escrow, EscrowedStep
from psi.group import shuffle_order
from psi.identifiers import CHUNK, Identifiers, canonical
from psi.inputs import CANARIES, InputSet, decoys_for
from psi.job import prepare
from psi.masking import hash_and_mask
from psi.messages import parts
from psi.record import ask, beside, from_hex
from psi.report import SELFTEST, Check, Report
from psi.verify import load_report

Bools = NDArray[np.bool_]
DEVIATION = 0.01  # the share of wrong rows for which an audit says how surely it would find one


def at_home(
    party: Party,
    path: Path,
    *,
    sample: int = 0,
    against: Path | None = None,
    replay: Path | None = None,
    source: Source | None = None,
) -> list[Check]:
    """Audit our own report at `path`, and what was kept beside it, against our table: `source`, the file that was
    scored, or the one that the party's file names.

    `sample` rows are opened, and looked up in the auditor's extract `against`, a CSV or Parquet file with our id
    columns; `replay` is the key file of our compliance team. Neither the report's signatures nor its agreement with the
    other parties' are looked at here: that is `verify`.

    Raises:
        LocalError: not our report, or one of a rehearsal; the table, the extract, or what was kept cannot be read.
    """
    report = load_report(path)
    if report.party != party.name or report.agreement != party.agreement.digest.hex():
        raise LocalError(f"{path} is not a report of {party.name} under the agreement that {party.path} names")
    if report.task == SELFTEST:
        raise LocalError(f"{path} is the report of a rehearsal: its ids were made up, there is nothing to audit")
    at_hand(party, path, sample=sample, against=against, replay=replay, source=source)
    ids, checks = prepare(party, source=source).ids, list[Check]()
    if sample:
        extract = None if against is None else _extract(party, against)
        checks += audit(report, _kept(path, "psi_opening.bin"), ids, sample, extract)
    if replay is not None:
        escrow, workers = _kept(path, "psi_escrow.bin"), Workers(party.file.workers)
        try:
            checks += replay_run(report, escrow, Identity.load(replay), ids, workers)
        finally:
            workers.close()
    return checks


def at_hand(
    party: Party,
    path: Path,
    *,
    sample: int = 0,
    against: Path | None = None,
    replay: Path | None = None,
    source: Source | None = None,
) -> None:
    """All files that such an audit needs are there; nothing is computed, see `at_home`.

    Raises:
        LocalError: a file is missing, or is not what it should be; an option lacks another.
    """
    if against is not None and sample < 1:
        raise LocalError("--against looks up the sampled ids: give --sample NUMBER too")
    if sample:
        _kept(path, "psi_opening.bin")
    if replay is not None and not load_report(path).keys.escrow:
        raise LocalError(f"{path}: no escrow was kept of this run; set escrow in [policy] before the next one")
    if replay is not None and replay.suffix == ".pub":
        raise LocalError(f"{replay} is a public key; --replay needs the compliance team's key file, NAME.key")
    if replay is not None:
        _kept(path, "psi_escrow.bin")
    table = (source or party.source).path
    for what, file in {"our table": table, "the extract": against, "the compliance team's key": replay}.items():
        if isinstance(file, Path) and not file.exists():
            raise LocalError(f"cannot find {what}, {file}")


def _kept(path: Path, name: str) -> Path:
    found = beside(path, name)
    if found is None or not found.exists():
        raise LocalError(f"there is no {name} beside {path}: give the report where the run left it, in our own folder")
    return found


def _extract(party: Party, path: Path) -> Identifiers:
    """The ids of an extract, read by the agreement's rules; which of its rows are empty or double does not matter."""
    columns = party.id_columns
    table = read_table(Source(path, _separator(path, party.source.separator)), list(columns.values()))
    texts = {name: table.ids[column] for name, column in columns.items()}
    agreed = party.agreement.identifiers
    return canonical(texts, agreed, duplicates="first", empty="drop", names=columns, source=table.source)


def _separator(path: Path, ours: str) -> str:
    """An extract may come from another tool than our table: its header tells what separates its columns."""
    with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8-sig") as file:
        header = file.readline()
        return ours if ours in header else next((mark for mark in ";,\t|" if mark in header), ours)
    return ours


# ---- a sample of the committed ids


def audit(
    report: Report, opened: bytes | Path, ids: Identifiers, count: int, against: Identifiers | None = None
) -> list[Check]:
    """Open `count` leaves of our commitment, those that the parties' common seed picks (all, where there are no more).

    `opened` is what `opening` gave, or the file that holds it; `ids` are those of our table, read under the agreement
    as for the run. `against` are those of an extract that the auditor drew from the system of record: every key of an
    opened row must be among them, in any row. Verify the report itself before: root and seed are taken from it.

    Raises:
        LocalError: nothing to sample; a file that cannot be read; an extract under other rules.
    """
    if count < 1:
        raise LocalError("an audit opens at least one row: give a sample of 1 or more")
    if against is not None and _kinds(against) != _kinds(ids):
        raise LocalError("the extract has other keys or rules than the agreement: read it under the same agreement")
    return list(_audit(report, opened, ids, count, against))


def _audit(
    report: Report, opened: bytes | Path, ids: Identifiers, count: int, against: Identifiers | None
) -> Iterator[Check]:
    party, kept = report.party, report.input.rows.kept
    key, tree = _read_opening(opened)
    whole = len(tree) == kept and root(tree) == from_hex(report.input.merkle_root)
    yield ask(f"{party}: the leaves kept are those committed to", [] if whole else ["number or root differs"])
    yield _same_counts(report, ids)
    title = f"{party}: opened leaves are the salted ids of our table"
    if not whole or len(ids) != kept:
        yield Check(name=title, status="NOT RUN", detail="the leaves, or the table, are not those of the run")
        return
    chosen = sample(from_hex(report.audit_seed), kept, count)
    odd = _listed(ids, chosen, _wrong_leaves(report, key, tree, ids, chosen), "not as committed")
    yield ask(title, odd, _reach(len(chosen), kept))
    if against is not None:
        odd = _listed(ids, chosen, _strange(ids, chosen, against), "not in the extract")
        yield ask(f"{party}: opened ids are in the auditor's extract", odd, f"{against.counts['read']:,} rows of it")


def _read_opening(opened: bytes | Path) -> tuple[bytes, Array]:
    """The salts' key and the leaves, (n, 32); neither for what is no opening at all."""
    if isinstance(opened, bytes):
        raw: Array = np.frombuffer(opened, np.uint8)
    else:
        try:
            raw = np.memmap(opened, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # a file of no bytes cannot be mapped
            reason = getattr(error, "strerror", None) or "it is empty"
            raise LocalError(f"cannot read what opens our commitment, {opened}: {reason}") from None
    if len(raw) % HASH_BYTES or not len(raw):
        return b"", np.zeros((0, HASH_BYTES), np.uint8)
    return raw[:HASH_BYTES].tobytes(), raw[HASH_BYTES:].reshape(-1, HASH_BYTES)


def _wrong_leaves(report: Report, key: bytes, tree: Array, ids: Identifiers, chosen: Array) -> Bools:
    """Which of the chosen rows, behind their salts, are not the leaf whose audit path leads to the root."""
    wrong: list[bool] = []
    committed = from_hex(report.input.merkle_root)
    for start in range(0, len(chosen), CHUNK):
        numbers = chosen[start : start + CHUNK].tolist()
        found = [
            leaf(number, salts(key, number, 1).tobytes(), value)
            for number, value in zip(numbers, ids.leaf_values(np.array(numbers)), strict=True)
        ]
        if len(chosen) == len(tree):  # all are opened: the root was computed over these very leaves
            wrong += [one != tree[number].tobytes() for number, one in zip(numbers, found, strict=True)]
        else:
            wrong += [
                root_of_path(one, number, len(tree), way) != committed
                for number, one, way in zip(numbers, found, paths(tree, numbers), strict=True)
            ]
    return np.array(wrong)


def _strange(ids: Identifiers, chosen: Array, against: Identifiers) -> Bools:
    """Which of the chosen rows have a key that is in no row of the extract."""
    strange = np.zeros(len(chosen), np.bool_)
    for ours, theirs in zip(ids.keys, against.keys, strict=True):
        values = ours.values.take(pa.array(ids.rows[chosen]))
        known = theirs.values.filter(pc.is_in(theirs.values, value_set=values.drop_null()))
        strange |= values.is_valid().to_numpy() & ~pc.is_in(values, value_set=known).to_numpy()
    return strange


def _listed(ids: Identifiers, chosen: Array, wrong: Bools, what: str) -> list[str]:
    """How many, and a row number of our own table: enough to look it up there."""
    if not wrong.any():
        return []
    first = ids.rows[chosen[np.argmax(wrong)]]
    return [f"{wrong.sum():,} of {len(wrong):,} opened are {what}; the first is row {first} of our table, from 0"]


def _reach(count: int, kept: int) -> str:
    """What a sample of so many says, rounded down: the odds of drawing without replacement."""
    deviating = math.ceil(DEVIATION * kept)
    few, many = sorted((count, deviating))
    unseen = np.prod((kept - many - np.arange(few)).clip(0) / (kept - np.arange(few)))
    sure = math.floor(1000 * (1 - float(unseen))) / 10
    return f"{count:,} of {kept:,} leaves opened; a deviation of {100 * DEVIATION:g} % would be found with {sure:.1f} %"


# ---- what we sent, computed again


def replay_run(
    report: Report, sealed: bytes | Path, compliance: Identity, ids: Identifiers, workers: Workers | None = None
) -> list[Check]:
    """Open the escrow with the compliance team's key and compute from our table, step by step, the points that we sent.

    With `audit` of all rows this shows that what we committed to is what we sent. Verify the report itself before.

    Raises:
        LocalError: the escrow's file cannot be read.
    """
    data = sealed if isinstance(sealed, bytes) else read_bytes(sealed, "the escrow")
    return list(_replay(report, data, compliance, ids, workers or Workers()))


def _replay(report: Report, sealed: bytes, compliance: Identity, ids: Identifiers, workers: Workers) -> Iterator[Check]:
    party, rest = report.party, np.arange(len(ids))
    opens = f"{party}: the escrow opens with the compliance key that the report names"
    try:
        escrow = msgspec.msgpack.decode(unseal(compliance, sealed, ESCROW), type=Escrow)
    except (LocalError, msgspec.MsgspecError) as error:
        why = str(error) if isinstance(error, LocalError) else "its content is not an escrow of this version"
        yield Check(name=opens, status="FAIL", detail=why)
        return
    named = report.keys.escrow == compliance.public.fingerprint
    yield ask(opens, [] if named else ["the report names another key"], compliance.public.fingerprint)
    same = escrow.session == from_hex(report.session) and len(escrow.steps) == len(report.steps) == len(ids.keys)
    yield ask(f"{party}: the escrow is of this session", [] if same else ["another session, or other steps"])
    yield _same_counts(report, ids)
    if not same:
        return
    for number, (secrets, key) in enumerate(zip(escrow.steps, ids.keys, strict=True)):
        entries, decoys = unambiguous(key, ids.rows, rest), report.steps[number].decoys
        ours = InputSet(escrow.session, number, key, ids.rows[entries], decoys, secrets.decoys)
        yield _same_set(report, ours)
        yield _same_points(report, ours, secrets, workers)
        if number + 1 < len(escrow.steps):
            matched = np.frombuffer(secrets.matched[: len(secrets.matched) // 4 * 4], "<u4")
            due = len(np.unique(matched)) == len(matched) == report.steps[number].size
            odd = [] if due and np.isin(matched, entries).all() else ["others"]
            yield ask(f"{party}: step {number + 1}: what later steps leave out is what was common", odd)
            rest = np.setdiff1d(rest, matched)


def _same_set(report: Report, ours: InputSet) -> Check:
    """Whether our table gives a set as large as announced, with its canaries and decoys."""
    agreed, step = report.governance.intersection, report.steps[ours.step]
    told = f"{len(ours.rows):,} ids, {CANARIES} canaries, {step.decoys:,} decoys"
    right = step.decoys == decoys_for(len(ours.rows), agreed.decoys, agreed.bucket)
    odd = [] if right and len(ours) == step.set_sizes.get(report.party) else [f"our table gives {told}"]
    return ask(f"{report.party}: step {ours.step + 1}: our set is as large as announced", odd, told)


def _same_points(report: Report, ours: InputSet, secrets: EscrowedStep, workers: Workers) -> Check:
    due = (ours.step, "sent", "points", report.party)
    stated = [flow.digest for flow in report.flows if (flow.step, flow.direction, flow.what, flow.owner) == due]
    try:
        found = _digest_of_points(report.governance.intersection.suite, secrets, ours, workers)
        odd = [] if stated == [found] else ["another table, other settings, or other points were sent"]
    except ValueError:
        odd = ["the escrowed secrets are none"]
    title = f"{report.party}: step {ours.step + 1}: we sent the points that the escrowed key makes of our table"
    return ask(title, odd)


def _digest_of_points(suite: str, secrets: EscrowedStep, ours: InputSet, workers: Workers) -> str:
    """SHA-256 of our set as it leaves us: masked, in the order of our first shuffle."""
    order, digest = shuffle_order(len(ours), secrets.shuffle).astype(np.uint32), hashlib.sha256()
    inputs = (ours.take(piece) for piece in parts(order))
    for points in workers.map(partial(hash_and_mask, suite, secrets.mask), inputs):
        digest.update(np.ascontiguousarray(points).data)
    return digest.hexdigest()


def _same_counts(report: Report, ids: Identifiers) -> Check:
    same = ids.counts == msgspec.structs.asdict(report.input.rows)
    scored = "; a scoring took --input FILE: give the same" if report.task.startswith("score") else ""
    odd = [] if same else [f"another table, or other settings, than in the run{scored}"]
    return ask(f"{report.party}: our table gives the counts that the report states", odd)


def _kinds(ids: Identifiers) -> list[tuple[str, bytes]]:
    return [(key.name, key.type) for key in ids.keys]
