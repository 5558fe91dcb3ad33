"""What `colonnade check` shows of our ids and of the agreed model: counts and predictions, never a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal
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
    shown = Table(title=f"Ids in {table.source}: {found.rows:,} rows", title_justify="left")
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
        shown.add_row(one.column, one.rule, ", ".join(f"{number:,} {what}" for what, number in told.items()))
    out.print(shown)
    for key in found.keys:
        out.print(
            f"key {key.key}: {key.usable:,} rows have it, {key.distinct:,} distinct, "
            f"{key.repeated:,} repeat an earlier one",
            soft_wrap=True,
            highlight=False,
        )
    for remark in found.remarks:
        out.print(f"note: {remark}", soft_wrap=True, highlight=False)


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
    table.add_row("model", f"{model.kind}, {how}")
    table.add_row(cost.unit, _limit(party, cost))
    why = "; auto: it costs less here than the other" if encryption.scheme == "auto" else ""
    table.add_row("encryption", strength(cost.scheme, encryption.key_bits) + why)
    table.add_row(
        "predicted, about", f"{cost.seconds:,.0f} s of one core each, {decimal(cost.bytes)} sent by all together"
    )
    table.add_row("  alignment", f"{cost.align_seconds:,.1f} s, {decimal(cost.align_bytes)}")
    for scheme, one in cost.schemes.items():
        table.add_row(
            f"  {scheme}" + (" (chosen)" if scheme == cost.scheme else ""),
            f"{one.seconds:,.1f} s, {decimal(one.bytes)}, for {cost.exchanges} {cost.unit}",
        )
    table.add_row(
        "  assuming",
        f"{cost.rows:,} rows at every party, all of them common; columns: {_columns(party, cost)}. Other parties know "
        "other numbers, and predict otherwise",
    )
    for text in report.notes(party.agreement):
        table.add_row("note", text)


def _limit(party: Party, cost: Estimate) -> str:
    """How far training may go, why, and what would let it go on."""
    model, unit = party.agreement.model, cost.unit
    setting, agreed = ("epochs", model.epochs) if unit == "epochs" else ("max_exchanges", model.max_exchanges)
    if cost.allowed == agreed:
        return f"at most {agreed}, by {setting} in [model]"
    return (
        f"at most {cost.allowed} of the {agreed} in [model], by the feature holders' independent columns "
        f"({_columns(party, cost)}): with more the label holder could rebuild them. Training may stop there before the "
        "optimum. More columns, another feature holder, or allow_reconstruction = true in [model] allow more"
    )


def _columns(party: Party, cost: Estimate) -> str:
    """The feature holders' numbers of columns, as far as we know them."""
    told = []
    for name, columns in cost.columns.items():
        known = party.agreement.party(name).columns
        how = (
            " (ours)" if name == party.name else " at most, as agreed" if known else ", a guess: the agreement has none"
        )
        told.append(f"{name} {columns}{how}")
    return "; ".join(told)
