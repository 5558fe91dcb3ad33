"""`colonnade audit` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parties.party_file import Party


def audit_command(
    path: Annotated[Path, typer.Argument(help="Our own file, for example bank.toml.", metavar="PARTY.toml")],
    known: Annotated[int, typer.Option(min=2, help="Rows of which the attacker knows label or columns.")] = 40,
    exchanges: Annotated[int | None, typer.Option(min=1, help="As many instead of the agreed max_exchanges.")] = None,
    rows: Annotated[int, typer.Option(min=100, help="The most of our rows to rehearse with, drawn at random.")] = 2000,
    other: Annotated[
        Path | None, typer.Option("--with", help="Test data: the other side's CSV, with our id columns.")
    ] = None,
    label: Annotated[str, typer.Option(help="Feature holder, with --with: the two-valued label column there.")] = "",
) -> None:
    """Attack a rehearsal of the agreed training on our own table, before anything is sent. Talks to nobody."""
    from vfl.audit_run import run

    run(Party(path), known, exchanges, rows, other, label)
