"""What `colonnade check` shows of our ids and of the agreed model: counts and predictions, never a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from parties.party_file import Party
from parties.tables import Table as DataTable
from psi.hygiene import survey
from vfl.console import out

if TYPE_CHECKING:
    from vfl.estimate import Estimate
    from vfl.job_input import Prepared as PreparedColumns


def show_ids(party: Party, table: DataTable) -> None:
    """The state of our ids, before they are judged: counts only."""
    identifiers = party.agreement.identifiers
    columns = {name: table.ids[column] for name, column in party.id_columns.items()}
    found = survey(columns, identifiers, party.id_columns)
    shown = Table(title=f"Ids in {escape(str(table.source))}: {found.rows:,} rows", title_justify="left")
    shown.add_column("column")
    shown.add_column("rule")
    shown.add_column("values")
    for one in found.fields:
        told = {
            "empty": one.empty,
            "refused": one.refused,
            "changed by the rule": one.changed,
            "distinct": one.distinct,
            "digits only": one.digits_only,
            "with letters": one.with_letters,
        }
        shown.add_row(escape(one.column), one.rule, ", ".join(f"{number:,} {what}" for what, number in told.items()))
    out.print(shown)
    for key in found.keys:
        out.print(
            f"key {key.key}: {key.usable:,} rows have it, {key.distinct:,} distinct, "
            f"{key.repeated:,} repeat an earlier one",
            soft_wrap=True,
            highlight=False,
        )
    for remark in found.remarks:
        out.print(f"note: {remark}", soft_wrap=True, highlight=False, markup=False)


def add_model(party: Party, prepared: PreparedColumns, cost: Estimate, table: Table) -> None:
    """The model's rows of what was agreed, and what both schemes are predicted to cost."""
    from vfl import report
    from vfl.encryption.choice import strength

    choice, model, encryption = party.file.table, party.agreement.model, party.agreement.encryption
    table.add_row("columns", f"{len(choice.features)}: {', '.join(choice.features)}")
    if prepared.fitted.names != list(choice.features):
        table.add_row("  prepared", f"{len(prepared.fitted.names)}: {', '.join(prepared.fitted.names)}")
    if prepared.label is not None:
        values = set(prepared.label.tolist())
        told = f"{prepared.label.mean():.1%} positive" if values == {0.0, 1.0} else f"{len(values):,} different values"
        table.add_row("label", f"{choice.label!r}, {told}")
    strong = f"C = {model.C}" if model.kind == "logistic regression" else f"alpha = {model.alpha}"
    how = f"{model.epochs} epochs" if party.agreement.is_network else f"{strong}, {model.solver}"
    table.add_row("model", f"{model.kind}, {how}, at most {model.max_exchanges} exchanges")
    why = "; auto: it costs less here than the other" if encryption.scheme == "auto" else ""
    table.add_row("encryption", strength(cost.scheme, encryption.key_bits) + why)
    table.add_row("predicted, at most", f"{cost.seconds:,.0f} s of one core, {decimal(cost.bytes)}")
    table.add_row("  alignment", f"{cost.align_seconds:,.1f} s, {decimal(cost.align_bytes)} sent by us")
    for scheme, one in cost.schemes.items():
        table.add_row(
            f"  {scheme}" + (" (chosen)" if scheme == cost.scheme else ""),
            f"{one.seconds:,.1f} s, {decimal(one.bytes)} sent by all, for about {cost.exchanges} exchanges",
        )
    for text in report.notes(party.agreement):
        table.add_row("note", text)
