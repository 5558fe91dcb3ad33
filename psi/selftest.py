"""A rehearsal: the production path, with the real agreement and the real peers, on ids with a known overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from parties.errors import LocalError
from parties.files import write_json
from parties.party_file import Party
from parties.session import Progress
from parties.tables import Source, Table
from psi.identifiers import canonical
from psi.job import EVIDENCE, House, Prepared, intersect, meeting, prepare
from psi.report import SELFTEST, SelfTest
from psi.specimen import rehearsal_steps, rehearsal_tables

COMMON, OWN = 300, 100


def rehearse(
    party: Party,
    progress: Progress,
    note: Callable[[str], None],
    *,
    source: Source | None = None,
    expected: int | None = None,
) -> SelfTest:
    """`colonnade selftest` at one party: align synthetic ids that follow from the agreement, or those of `source`, of
    which `expected` are known to be common. The result is kept for the next report. Made-up ids spend no budget.

    Raises:
        LocalError: only one of `source` and `expected`; the result is wrong (it is kept all the same).
    """
    if (source is None) != (expected is None):
        raise LocalError("a rehearsal on our own file needs both --input FILE and --expect NUMBER")
    house, approval = House(party, "selftest_", spends=source is not None), party.approval
    steps: list[int] | None = None
    if source is None:
        prepared, steps = _synthetic(party)
        expected = sum(steps)
    else:
        prepared = prepare(party, source=source)
    names = [house.path(name).name for name in EVIDENCE]
    with meeting(house, approval, SELFTEST, names, progress, note) as session:
        minimum = party.file.policy.minimum_intersection if source is not None else 0
        alignment, report = intersect(session, prepared, minimum, house)
    result = SelfTest(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        session=report.session,
        rows=len(prepared.ids),
        expected=expected or 0,
        found=alignment.size,
        passed=alignment.size == expected and steps in (None, [step.size for step in alignment.steps]),
    )
    path = party.output / "selftest.json"
    write_json(path, {party.agreement.digest.hex(): msgspec.to_builtins(result)})
    if not result.passed:
        raise LocalError(f"the rehearsal found {alignment.size} rows in common where {expected} are known; see {path}")
    return result


def _synthetic(party: Party) -> tuple[Prepared, list[int]]:
    """Ids that all parties derive from the agreement alone, and how many are common under each of its keys."""
    agreement = party.agreement
    names = [one.name for one in agreement.ring]
    wanted = max(COMMON, agreement.intersection.minimum) * len(agreement.identifiers.cascade)  # the first key's share
    common = min(wanted, agreement.intersection.maximum_rows)
    own = min(OWN, agreement.intersection.maximum_rows - common)
    seed = hashlib.sha256(b"colonnade/psi/selftest/1" + agreement.digest).digest()
    columns = rehearsal_tables(agreement.identifiers, seed, names.index(party.name), len(names), common, own)
    ids = canonical(columns, agreement.identifiers, empty="drop", source="the rehearsal's table")
    return Prepared(Table("rehearsal", {}, {}, None, len(ids)), ids), rehearsal_steps(agreement.identifiers, common)
