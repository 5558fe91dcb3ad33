"""The command line. Exit codes: 0 done, 2 bad input, 3 refused by policy or agreement, 4 peer lost, 5 protocol
violation, 1 an error of ours."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from parties.agreement import Agreement
from parties.errors import ColonnadeError, LocalError, Refused
from parties.files import check_writable, make_folder, occupied, write_whole
from parties.identity import Identity, check_name
from parties.party_file import Party
from parties.tables import Source
from psi import job
from psi.identifiers import rules_of
from psi.job import House, Prepared, prepare
from psi.report import Check
from psi.selftest import rehearse
from vfl.commands_audit import audit_command
from vfl.console import Watcher, err, frames, logging_to, out
from vfl.horizontal import commands as horizontal
from vfl.serve import serve
from vfl.shown import add_model, show_ids

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Train one model on columns, or rows, that several organisations hold; no row leaves its owner.\n\n"
        "Order of use: keygen, init, check, sign, selftest, run (or align), predict; verify at any time. "
        "Exit codes: 0 done, 2 bad input, 3 refused by policy or agreement, 4 peer lost, 5 protocol violation."
    ),
)

COLOURS = {"PASS": "green", "FAIL": "bold red", "NOT RUN": "yellow"}
PartyPath = Annotated[Path, typer.Argument(help="Our own file, for example bank.toml.", metavar="PARTY.toml")]
Events = Annotated[bool, typer.Option("--events", hidden=True, help="Progress as JSON lines, for a launching process.")]


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("out/demo"),
    key_bits: Annotated[int, typer.Option(help="Paillier key length: 2048, 3072 or 4096.")] = 3072,
    scheme: Annotated[str, typer.Option(help="Encryption of the gradients: paillier, lattice or auto.")] = "paillier",
) -> None:
    """Three parties, three processes, real data (breast cancer): align, train, score, compare with scikit-learn."""
    from vfl.demo import run_demo

    run_demo(out_folder, key_bits, scheme)


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
    horizontal_mode: Annotated[bool, typer.Option("--horizontal", help="The same columns, different rows.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path(),
) -> None:
    """Write a commented agreement.toml (to agree on with the others) and NAME.toml (ours) to fill in."""
    check_name(name)
    make_folder(folder)
    label = 'label = "defaulted"\npositive = "1"                       # the value of the label that counts as 1'
    prefix = "horizontal_" if horizontal_mode else ""
    own = _template(f"{prefix}party.toml").replace("NAME", name)
    own = own.replace("LABEL", label if label_holder else "# no label: ours")
    common, party = folder / "agreement.toml", folder / f"{name}.toml"
    if party.exists():
        raise LocalError(f"{party} exists; move it away first, nothing is overwritten")
    if common.exists():
        out.print(f"kept {common}, as it is", soft_wrap=True)
    else:
        stands_for = "north" if horizontal_mode else "bank" if label_holder else "grocer"
        agreed = _template(f"{prefix}agreement.toml")
        if f'name = "{name}"' not in agreed:
            agreed = agreed.replace(f'name = "{stands_for}"', f'name = "{name}"')
        write_whole(common, agreed.encode())
        out.print(f"wrote {common}", soft_wrap=True)
    write_whole(party, own.encode())
    out.print(f"wrote {party}", soft_wrap=True)
    out.print(f"Fill them in, then: colonnade check {folder / f'{name}.toml'}", soft_wrap=True)


def _template(name: str) -> str:
    return (resources.files("vfl") / "templates" / name).read_text("utf-8")


@app.command()
def check(path: PartyPath) -> None:
    """Look over our ids, read our table, and show what a run would do and cost. Talks to nobody, sends nothing."""
    party = Party(path)
    party.agreement.check_expiry()
    if party.agreement.is_horizontal:
        horizontal.check(party)
        return
    agreement, trains = party.agreement, bool(party.file.table.features or party.file.table.label)
    house, ours, cost = House(party), None, None
    if trains:
        from vfl import job_input
        from vfl.estimate import estimate

        ours = job_input.prepare(party, look=lambda table: show_ids(party, table))
        prepared: Prepared = ours
        cost = estimate(agreement, party.name, len(ours.ids), len(ours.fitted.names))
    else:
        prepared = prepare(party, look=lambda table: show_ids(party, table))
    counts, table = prepared.ids.counts, Table(title=f"{agreement.title}: {party.name}", show_header=False)
    table.title_justify = "left"
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("agreement", agreement.digest.hex())
    for one in agreement.ring:
        table.add_row(f"{one.role} {one.name}", f"{one.endpoint or '(connects only)'}  {one.identity.fingerprint}")
    table.add_row("rows", f"{counts['kept']:,} of {counts['read']:,} take part")
    table.add_row(
        "set aside", f"{counts['empty']:,} empty, {counts['invalid']:,} invalid, {counts['duplicate']:,} duplicate ids"
    )
    for number, key in enumerate(agreement.identifiers.cascade, 1):
        named = ", ".join(
            f"{name} ({agreement.identifiers.fields[name]}) in {party.id_columns[name]!r}" for name in key
        )
        table.add_row("key" if len(agreement.identifiers.cascade) == 1 else f"key {number}", named)
    table.add_row("reveals", f"{agreement.intersection.result}; nothing below {agreement.intersection.minimum:,} rows")
    if ours is not None and cost is not None:
        add_model(party, ours, cost, table)
    for use in house.check_budget(prepared.ids):
        table.add_row(f"budget, {use.peer}", f"{use.runs} runs, {use.distinct_ids:,} distinct ids with this one")
    try:
        table.add_row("our approval", "given" if party.approval else "")
    except Refused as error:
        table.add_row("our approval", str(error))
    out.print(table)
    out.print(f"Nothing was sent. When everybody's check is fine: colonnade sign, colonnade {_verb(trains)}.")


def _verb(trains: bool) -> str:
    return "run" if trains else "align"


@app.command()
def sign(path: PartyPath) -> None:
    """Approve the agreement as it stands: sign its digest. A run starts only when every party has."""
    party = Party(path)
    if party.agreement.is_horizontal:
        horizontal.sign(party)
        return
    rules_of(party.agreement.identifiers)
    written = party.sign()
    agreement = party.agreement
    out.print(f"{party.name} approves {agreement.title!r}", soft_wrap=True)
    out.print(f"purpose      {agreement.purpose}", soft_wrap=True)
    out.print(f"legal basis  {agreement.legal_basis}", soft_wrap=True)
    out.print(f"digest       {agreement.digest.hex()}", soft_wrap=True, highlight=False)
    out.print(f"wrote {written}", soft_wrap=True)


def _waiting(party: Party, events: bool) -> None:
    if not events:
        others = ", ".join(one.name for one in party.agreement.ring if one.name != party.name)
        out.print(
            f"{party.name}: waiting for {others}, at most {party.agreement.deadlines.connect:.0f} s", soft_wrap=True
        )


@app.command()
def selftest(
    path: PartyPath,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Our compliance team's synthetic table instead of made-up ids.")
    ] = None,
    expect: Annotated[int | None, typer.Option(help="How many of its rows are known to be common.")] = None,
    events: Events = False,
) -> None:
    """Rehearse with the real agreement and the real peers, on ids with a known overlap; every party runs this."""
    party = _vertical(path)
    source = None if input_file is None else _source(party, input_file)
    with occupied(party.output), logging_to(party.output / "log.txt") as (log, _), Watcher(events) as watcher:
        _waiting(party, events)
        result = rehearse(party, watcher, log.warning, source=source, expected=expect)
        log.info("selftest in session %s: %d of %d rows found", result.session, result.found, result.expected)
    if not events:
        out.print(f"the rehearsal found all {result.found:,} known common rows of {result.rows:,}; see {party.output}")


@app.command()
def align(path: PartyPath, events: Events = False) -> None:
    """Wait for the others (with a deadline), then find the common rows, and no more: no model."""
    party = _vertical(path)
    with occupied(party.output), logging_to(party.output / "log.txt") as (log, _), Watcher(events) as watcher:
        log.info("align of %s under agreement %s", party.name, party.agreement.digest.hex())
        _waiting(party, events)
        outcome = job.run(party, watcher, log.warning)
        log.info("session %s: %d rows in common", outcome.report.session, outcome.report.size)
    if not events:
        rows = "rows.csv lists ours" if outcome.rows is not None else "which ones stay hidden from us, as agreed"
        out.print(f"{outcome.report.size:,} rows in common; {rows}", soft_wrap=True)
        out.print(f"results in {party.output}", soft_wrap=True)


@app.command()
def run(
    path: PartyPath,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that stopped, from the last state that all have.")
    ] = False,
    events: Events = False,
) -> None:
    """Wait for the others (with a deadline), then align, train, score and report."""
    party = Party(path)
    if party.agreement.is_horizontal:
        horizontal.run(party, events=events, resume=resume)
        return
    from vfl import job as model_job
    from vfl import report

    with (
        occupied(party.output),
        logging_to(party.output / "log.txt") as (log, warnings),
        Watcher(events) as watcher,
    ):
        log.info("run of %s under agreement %s", party.name, party.agreement.digest.hex())
        _waiting(party, events)
        outcome = (model_job.resume if resume else model_job.run)(party, watcher, log.warning)
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
    from vfl import job as model_job
    from vfl import report

    party = _vertical(path)
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
        share = model or party.output / "model.json"
        _waiting(party, events)
        outcome, prepared = model_job.predict(party, _source(party, input_file), share, watcher, log.warning)
        if output_file is not None:
            report.write_scores(output_file, prepared, outcome)
        log.info("session %s: %d rows scored", outcome.session, len(outcome.rows))
    if not events:
        where = f"; scores in {output_file}" if output_file else "; the scores are with the label holder"
        out.print(f"{len(outcome.rows):,} of our {prepared.table.rows:,} rows scored{where}", soft_wrap=True)


def _vertical(path: Path) -> Party:
    """Our file, for what only parties with the same rows do. Raises LocalError for a horizontal job."""
    party = Party(path)
    if party.agreement.is_horizontal:
        raise LocalError("this is for vertical jobs; a horizontal one has check, sign and run, and aligns no rows")
    return party


def _source(party: Party, path: Path) -> Source:
    return replace(party.source, path=path)


@app.command()
def verify(
    reports: Annotated[list[Path], typer.Argument(help="One or more psi_report.json files.", metavar="REPORT...")],
    agreement: Annotated[Path | None, typer.Option(help="The agreement that the reports must be of.")] = None,
    party_path: Annotated[
        Path | None, typer.Option("--party", help="Our own file: audit or replay our own report, on our own premises.")
    ] = None,
    sample: Annotated[
        int, typer.Option(help="Open so many leaves of our input; 459 find a 1 % deviation with 99 %.")
    ] = 0,
    against: Annotated[
        Path | None, typer.Option(help="The auditor's own extract, in which every sampled id must be.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Our compliance team's key file: compute again what we sent, from the escrow.")
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="The table of that run, where it was not the one in our file.")
    ] = None,
) -> None:
    """Check PSI reports offline: signatures, counts, ledgers; several together also against each other; with --party,
    --sample and --replay also our input against what was committed and sent."""
    from psi import audit
    from psi.verify import each_check
    from vfl import information_messages, open_messages, resume, scoring_messages, search_messages  # noqa: F401  # kinds

    party = Party(party_path) if party_path else None
    agreed = Agreement.load(agreement) if agreement else party.agreement if party else None
    if party and agreed and agreed.digest != party.agreement.digest:
        raise LocalError(f"{agreement} is not the agreement that {party_path} names")
    if bool(sample or replay or against or input_file) != bool(party):
        raise LocalError("--party goes with --sample NUMBER or --replay KEY, and these with --party")
    if party and len(reports) != 1:
        raise LocalError("--party looks at our own report: give it alone")
    tally = Counter[str]()
    audited: dict[str, Any] = {"sample": sample, "against": against, "replay": replay}
    if party:
        audited["source"] = None if input_file is None else _source(party, input_file)
        audit.at_hand(party, reports[0], **audited)
    for one in each_check(reports, agreed):
        _show(one, tally)
    if party:
        for one in audit.at_home(party, reports[0], **audited):
            _show(one, tally)
    if tally["FAIL"]:
        raise LocalError(f"{tally['FAIL']} of {tally.total()} checks failed")
    skipped = f", {tally['NOT RUN']} not run" if tally["NOT RUN"] else ""
    out.print(f"{tally['PASS']} checks passed{skipped}", highlight=False)


def _show(check: Check, tally: Counter[str]) -> None:
    """One line; what a report says is printed as text, whatever is in it."""
    tally[check.status] += 1
    text = check.name + (f"  ({check.detail})" if check.detail else "")
    plain = "".join(one if one.isprintable() else "?" for one in text)
    out.print(Text(f"{check.status:<7}", COLOURS[check.status]), plain, soft_wrap=True, highlight=False)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Every error is one line and an exit code; no traceback reaches a user."""
    try:
        yield
    except ColonnadeError as error:
        phase = getattr(error, "phase", "")
        err.print(f"colonnade: {error}{f' (during: {phase})' if phase else ''}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("colonnade: interrupted; the other parties have been told")
        sys.exit(130)
    except Exception as error:
        err.print(f"colonnade: internal error {type(error).__name__} at {frames(error)[0]}; please report it")
        sys.exit(1)


app.command()(horizontal.simulate)
app.command()(serve)
app.command("audit")(audit_command)
for _command in app.registered_commands:
    if _command.callback is not None:
        _command.callback = _one_line_errors()(_command.callback)


def main() -> None:
    """Entry point of the `colonnade` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service that is stopped tells the others too
    app()
