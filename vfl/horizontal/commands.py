"""The horizontal mode on the command line: what check, sign and run do under a horizontal agreement, and simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from parties.agreement import Agreement
from parties.errors import Refused
from parties.files import make_folder, occupied
from parties.horizontal import Horizontal
from parties.party_file import Party
from vfl.console import Watcher, logging_to, out


def check(party: Party) -> None:
    """Read our table and show what was agreed. Talks to nobody, sends nothing."""
    from vfl.horizontal.job import prepare
    from vfl.horizontal.own import own_model

    data = prepare(party)
    model = own_model(party, data)
    table = _agreed(party.agreement, party.name)
    if model is not None:
        table.add_row("our own model", f"{party.file.model.file}: what travels of it is as agreed")
    if data is not None:
        table.add_row("our rows", f"{len(data.y):,}, every agreed column is there and in order")
    try:
        table.add_row("our approval", "given" if party.approval else "")
    except Refused as error:
        table.add_row("our approval", str(error))
    out.print(table)
    out.print("Nothing was sent. When everybody's check is fine: colonnade sign, colonnade run.", soft_wrap=True)


def sign(party: Party) -> None:
    """Approve the agreement as it stands, once our table goes with it."""
    from vfl.horizontal.job import prepare
    from vfl.horizontal.own import own_model

    own_model(party, prepare(party))
    written = party.sign()
    out.print(_agreed(party.agreement, party.name))
    out.print(f"{party.name} approves this", soft_wrap=True)
    out.print(f"wrote {written}", soft_wrap=True)


def _agreed(agreement: Agreement, name: str) -> Table:
    """What an owner approves: purpose, schema, model, rounds, epsilon, quorum."""
    from vfl.horizontal.job import agreed
    from vfl.horizontal.report import protection

    plan, columns = agreed(agreement)
    table = Table(title=f"{agreement.title}: {name}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("agreement", agreement.digest.hex())
    table.add_row("purpose", agreement.purpose)
    table.add_row("legal basis", agreement.legal_basis)
    coordinator = agreement.ring[0]
    also = ", a client too" if agreement.job.coordinator_trains else ""
    table.add_row(
        f"coordinator {coordinator.name}{also}", f"{coordinator.endpoint}  {coordinator.identity.fingerprint}"
    )
    for one in agreement.ring[1:]:
        table.add_row(f"client {one.name}", one.identity.fingerprint)
    said = columns.units | dict.fromkeys(columns.categories, "categories")
    named = [one + (f" ({said[one]})" if one in said else "") for one in columns.features]
    table.add_row("columns", f"{len(named)}: {', '.join(named)}")
    listed = f": {', '.join(map(str, plan.classes))}" if plan.classes else ""
    table.add_row("label", columns.label + listed)
    table.add_row("model", f"{plan.model}, {plan.strategy}, at most {plan.rounds} rounds")
    for row in _travelling(plan):
        table.add_row(*row)
    table.add_row("quorum", f"{agreement.quorum} of {len(agreement.clients)} clients")
    for row in protection(plan):
        table.add_row(*row)
    return table


def _travelling(plan: Horizontal) -> list[tuple[str, str]]:
    """What leaves a client of own models, and what stays."""
    if plan.public is not None:
        return [("predictions", f"of {plan.public.rows:,} public rows, digest {plan.public.digest}")]
    each = [f"{one.name} {one.dtype}{list(one.shape)}" for one in plan.arrays]
    rows = [
        ("arrays", f"{len(each)}: {', '.join(each)}" if each else ""),
        ("frozen body", plan.frozen),
        ("personal", f"{plan.personal}*" if plan.personal else ""),
    ]
    return [(name, value) for name, value in rows if value]


def run(party: Party, *, events: bool, resume: bool) -> None:
    """Wait for the others (with a deadline), then train, score and report."""
    from vfl.horizontal import job, report

    with (
        occupied(party.output),
        logging_to(party.output / "log.txt") as (log, warnings),
        Watcher(events) as watcher,
    ):
        log.info("run of %s under agreement %s", party.name, party.agreement.digest.hex())
        if not events:
            others = ", ".join(one.name for one in party.agreement.peers(party.name))
            patience = party.agreement.deadlines.connect
            out.print(f"{party.name}: waiting for {others}, at most {patience:.0f} s", soft_wrap=True)
        finished = job.run(party, watcher, log.warning, resume=resume)
        summary = report.write_outcome(party, finished, warnings)
        rounds = finished.outcome.earlier + len(finished.outcome.rounds)
        log.info("session %s: %d rounds, %d before this start", finished.session, rounds, finished.outcome.earlier)
    if not events:
        out.print(report.closing_table(summary))
        out.print(f"results in {party.output}", soft_wrap=True)


def simulate(
    path: Annotated[Path, typer.Argument(help="A file with [horizontal], such as an agreement.", metavar="JOB.toml")],
    clients: Annotated[int, typer.Option(help="How many clients share the rows.", min=1)] = 10,
    partition: Annotated[
        str, typer.Option(help="iid, dirichlet:0.3, labels:2 or quantity:0.5: how the rows are shared.")
    ] = "iid",
    data: Annotated[
        Path | None, typer.Option(help="CSV or Parquet with the job's [columns]; scikit-learn's digits without it.")
    ] = None,
    model: Annotated[
        str, typer.Option(help='Of own models: our code, as in "model.py:build"; every client trains one.')
    ] = "",
    public: Annotated[Path | None, typer.Option(help="Of a distillation: the public table.")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("out/simulation"),
    workers: Annotated[str, typer.Option(help="Processes; 0: one a core; or dask://host:8786.")] = "0",
) -> None:
    """Try a horizontal job with many made-up clients on this machine: progress, figures, learning curves."""
    from parties.workers import Workers
    from vfl.horizontal import simulation

    job = simulation.load(path)
    rows = simulation.digits() if data is None else simulation.table(job, data)
    own = simulation.own_models(job, model, public)
    make_folder(out_folder)
    crew = Workers(int(workers) if workers.isdecimal() else workers)
    try:
        with Watcher() as watcher:
            summary = simulation.run(job, rows, clients, partition, crew, watcher, own)
    finally:
        crew.close()
    drawn = simulation.write(out_folder, summary)
    out.print(simulation.closing_table(summary))
    out.print(f"results in {out_folder}: {', '.join(drawn)}", soft_wrap=True)
