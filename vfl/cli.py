"""The command line. Exit codes: 0 done, 2 bad input, 3 refused by policy or agreement, 4 peer lost, 5 protocol
violation, 1 an error of ours."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from parties.agreement import Agreement
from parties.errors import ColonnadeError, LocalError, Refused
from parties.files import check_writable, make_folder, occupied, write_whole
from parties.identity import Identity, check_name
from parties.party_file import Party
from psi import verify as psi_verify
from vfl import demo as demonstration
from vfl import job, report
from vfl.console import Watcher, err, frames, logging_to, out
from vfl.estimate import predict_cost

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Train one model on columns that several organisations hold; no row leaves its owner.\n\n"
        "Order of use: keygen, init, check, sign, run, predict; verify at any time. "
        "Exit codes: 0 done, 2 bad input, 3 refused by policy or agreement, 4 peer lost, 5 protocol violation."
    ),
)

MARKS = {True: "[green]ok    [/green]", False: "[bold red]FAILED[/bold red]", None: "[yellow]--    [/yellow]"}
PartyPath = Annotated[Path, typer.Argument(help="Our own file, for example bank.toml.", metavar="PARTY.toml")]
Events = Annotated[bool, typer.Option("--events", hidden=True, help="Progress as JSON lines, for a launching process.")]


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("out/demo"),
    key_bits: Annotated[int, typer.Option(help="Paillier key length: 2048, 3072 or 4096.")] = 3072,
) -> None:
    """Three parties, three processes, real data (breast cancer): align, train, score, compare with scikit-learn."""
    demonstration.run_demo(out_folder, key_bits)


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="Our name in the agreement: a-z, 0-9, '-', '_'.")],
    folder: Annotated[Path, typer.Option(help="Where the key file goes.")] = Path(),
) -> None:
    """Make our keys: NAME.key (secret, mode 0600) and the public line to send to the other parties."""
    identity = Identity.generate(name)
    make_folder(folder)
    identity.save(folder / f"{name}.key")
    write_whole(folder / f"{name}.pub", f"{identity.public}\n".encode())
    out.print(f"secret key   {folder / f'{name}.key'} (never send it)", soft_wrap=True)
    out.print(f"public key   {identity.public}", soft_wrap=True, highlight=False)
    out.print(f"fingerprint  {identity.public.fingerprint}", soft_wrap=True, highlight=False)
    out.print("Send the public key to the other parties; compare fingerprints over the telephone.")


@app.command()
def init(
    name: Annotated[str, typer.Option(help="Our name; our own file becomes NAME.toml.")] = "bank",
    label_holder: Annotated[bool, typer.Option(help="Whether we hold the label.")] = True,
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path(),
) -> None:
    """Write a commented agreement.toml (to agree on with the others) and NAME.toml (ours) to fill in."""
    check_name(name)
    make_folder(folder)
    label = 'label = "defaulted"\npositive = "1"                       # the value of the label that counts as 1'
    own = _template("party.toml").replace("NAME", name).replace("LABEL", label if label_holder else "# no label: ours")
    common, party = folder / "agreement.toml", folder / f"{name}.toml"
    if party.exists():
        raise LocalError(f"{party} exists; move it away first, nothing is overwritten")
    if common.exists():
        out.print(f"kept {common}, as it is", soft_wrap=True)
    else:
        stands_for = "bank" if label_holder else "grocer"
        write_whole(common, _template("agreement.toml").replace(f'name = "{stands_for}"', f'name = "{name}"').encode())
        out.print(f"wrote {common}", soft_wrap=True)
    write_whole(party, own.encode())
    out.print(f"wrote {party}", soft_wrap=True)
    out.print(f"Fill them in, then: colonnade check {folder / f'{name}.toml'}", soft_wrap=True)


def _template(name: str) -> str:
    return (resources.files("vfl") / "templates" / name).read_text("utf-8")


@app.command()
def check(path: PartyPath) -> None:
    """Read our table and show what a run would do and cost. Talks to nobody, writes nothing."""
    party = Party(path)
    party.agreement.check_expiry()
    prepared = job.prepare(party)
    agreement, counts = party.agreement, prepared.ids.counts
    cost = predict_cost(agreement, counts["kept"], len(party.file.table.features), label_holder=party.is_label_holder)
    table = Table(title=f"{agreement.title}: {party.name}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("agreement", agreement.digest.hex())
    for one in agreement.ring:
        table.add_row(f"{one.role} {one.name}", f"{one.endpoint or '(connects only)'}  {one.identity.fingerprint}")
    table.add_row("rows", f"{counts['kept']:,} of {counts['read']:,} take part")
    table.add_row(
        "set aside", f"{counts['empty']:,} empty, {counts['invalid']:,} invalid, {counts['duplicate']:,} duplicate ids"
    )
    table.add_row("id", f"{party.file.table.id!r} as {agreement.identifiers.type} under {agreement.identifiers.rule}")
    table.add_row("columns", f"{len(party.file.table.features)}: {', '.join(party.file.table.features)}")
    if prepared.label is not None:
        table.add_row("label", f"{party.file.table.label!r}, {prepared.label.mean():.1%} positive")
    model = agreement.model
    table.add_row("model", f"{model.kind}, C = {model.C}, {model.solver}, at most {model.max_exchanges} exchanges")
    table.add_row("encryption", f"{agreement.encryption.scheme}, {agreement.encryption.key_bits} bit")
    table.add_row("predicted, at most", f"{cost.seconds:,.0f} s of one core, {decimal(cost.bytes)} sent by us")
    table.add_row(
        "  of that",
        f"alignment {cost.align_seconds:,.1f} s, {decimal(cost.align_bytes)}; about {cost.exchanges} exchanges "
        f"of {cost.exchange_seconds:,.2f} s, {decimal(cost.exchange_bytes)}",
    )
    try:
        table.add_row("our approval", "given" if party.approval else "")
    except Refused as error:
        table.add_row("our approval", str(error))
    for text in report.notes(agreement):
        table.add_row("note", text)
    out.print(table)
    out.print("Nothing was sent. When everybody's check is fine: colonnade sign, then colonnade run.")


@app.command()
def sign(path: PartyPath) -> None:
    """Approve the agreement as it stands: sign its digest. A run starts only when every party has."""
    party = Party(path)
    written = party.sign()
    agreement = party.agreement
    out.print(f"{party.name} approves {agreement.title!r}", soft_wrap=True)
    out.print(f"purpose      {agreement.purpose}", soft_wrap=True)
    out.print(f"legal basis  {agreement.legal_basis}", soft_wrap=True)
    out.print(f"digest       {agreement.digest.hex()}", soft_wrap=True, highlight=False)
    out.print(f"wrote {written}", soft_wrap=True)


@app.command()
def run(path: PartyPath, events: Events = False) -> None:
    """Wait for the others (with a deadline), then align, train, score and report."""
    party = Party(path)
    with (
        occupied(party.output),
        logging_to(party.output / "log.txt") as (log, warnings),
        Watcher(events) as watcher,
    ):
        log.info("run of %s under agreement %s", party.name, party.agreement.digest.hex())
        if not events and out.is_terminal:
            out.print(f"{party.name}: waiting for the others, at most {party.agreement.deadlines.connect:.0f} s")
        outcome = job.run(party, watcher, log.warning)
        summary = report.write_outcome(party, outcome, warnings)
        log.info("session %s: %d rows in common", outcome.session, len(outcome.rows))
        log.info("%d exchanges, converged: %s", summary["exchanges"], summary["converged"])
    if not events:
        out.print(report.closing_table(summary))
        out.print(f"results in {party.output}", soft_wrap=True)


@app.command()
def predict(
    path: PartyPath,
    input_file: Annotated[Path, typer.Option("--input", help="New rows: CSV or Parquet with our id and features.")],
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Label holder: scores as CSV. Feature holders get none.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Our model share; by default model.json in our output folder.")
    ] = None,
    events: Events = False,
) -> None:
    """Score new customers together: every party runs this with its own new rows. Scores stay with the label holder."""
    party = Party(path)
    if party.is_label_holder != (output_file is not None):
        remedy = "give --output FILE" if party.is_label_holder else "leave --output out"
        raise LocalError(f"scores stay with the label holder: {remedy}")
    if output_file is not None:
        check_writable(output_file)
    with (
        occupied(party.output),
        logging_to(party.output / "score_log.txt") as (log, _),
        Watcher(events) as watcher,
    ):
        outcome, prepared = job.predict(party, input_file, model or party.output / "model.json", watcher, log.warning)
        if output_file is not None:
            report.write_scores(output_file, party.file.table.id, prepared, outcome)
        log.info("session %s: %d rows scored", outcome.session, len(outcome.rows))
    if not events:
        where = f"; scores in {output_file}" if output_file else "; the scores are with the label holder"
        out.print(f"{len(outcome.rows):,} of our {len(prepared.table):,} rows scored{where}", soft_wrap=True)


@app.command()
def verify(
    reports: Annotated[list[Path], typer.Argument(help="One or more psi_report.json files.", metavar="REPORT...")],
    agreement: Annotated[Path | None, typer.Option(help="The agreement that the reports must be of.")] = None,
) -> None:
    """Check PSI reports offline: signatures, counts, ledgers; several together also against each other."""
    checks = psi_verify.verify(reports, Agreement.load(agreement) if agreement else None)
    for one in checks:
        mark = {True: "[green]ok    [/green]", False: "[bold red]FAILED[/bold red]", None: "[yellow]--    [/yellow]"}[
            one.passed
        ]
        detail = f"  ({one.detail})" if one.detail else ""
        out.print(f"{mark} {one.name}{detail}", soft_wrap=True, highlight=False)
    failed, skipped = (sum(one.passed is state for one in checks) for state in (False, None))
    if failed:
        raise LocalError(f"{failed} of {len(checks)} checks failed")
    out.print(f"{len(checks) - skipped} checks passed" + (f", {skipped} could not be made" if skipped else ""))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Every error is one line and an exit code; no traceback reaches a user."""
    try:
        yield
    except ColonnadeError as error:
        phase = getattr(error, "phase", "")
        err.print(f"colonnade: {error}{f' (during: {phase})' if phase else ''}", markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("colonnade: interrupted; the other parties have been told", markup=False)
        sys.exit(130)
    except Exception as error:
        err.print(
            f"colonnade: internal error {type(error).__name__} at {frames(error)[0]}; please report it", markup=False
        )
        sys.exit(1)


for _command in app.registered_commands:
    if _command.callback is not None:
        _command.callback = _one_line_errors()(_command.callback)


def main() -> None:
    """Entry point of the `colonnade` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service that is stopped tells the others too
    app()


if __name__ == "__main__":
    main()
