"""An organisation's own model on the command line: its own code, named in its own file, never in the agreement and
never from a peer. `[model] file = "model.py:build"` is a function in a file on this machine:

    def build(x, y):              our rows, (n, d) float64 and (n,); without rows at a coordinator that has none
        return ...                a scikit-learn estimator, a torch.nn.Module, or an object with Flower's methods

What it returns is trained as the agreement says; what travels of it is what the agreement lists.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from parties.errors import LocalError, Refused
from parties.files import write_whole
from parties.horizontal import Horizontal, Public
from parties.party_file import Party
from parties.tables import Source, read_table
from vfl.horizontal.distillation import Distilled, PublicTable
from vfl.horizontal.layout import as_toml, frozen, layout, require_agreed
from vfl.horizontal.models import Estimator, FlowerClient, Model, TorchModel
from vfl.horizontal.trainer import Data, describe
from vfl.own_code import blamed_on, load

Build = Callable[[Any, Any], Any]


def read_public(source: Source, features: tuple[str, ...]) -> PublicTable:
    """The public table, under the agreed names. Raises LocalError that names file, column and count."""
    table = read_table(source, [], features)
    return PublicTable(np.column_stack([table.features[name] for name in features]), features)


def adapt(build: Build, plan: Horizontal, rows: Data, public: PublicTable | None = None) -> Model:
    """What `build` makes for these rows, ready to train. Raises LocalError: it is no model that can take part."""
    if public is not None and plan.public is not None:
        return _distilled(build, plan, rows, public, plan.public)
    with blamed_on("our own model"):
        model = _model(build(rows.x, rows.y), plan, rows)
        if not plan.arrays:
            ours = as_toml(layout(plan, model), frozen(plan, model))
            raise LocalError(f"[horizontal] must list what travels; our model has {ours}")
        require_agreed(plan, model)
    return model


def _model(built: Any, plan: Horizontal, rows: Data) -> Model:
    if all(hasattr(built, method) for method in ("get_parameters", "fit", "evaluate")):
        return FlowerClient(built, plan.config)
    if hasattr(built, "named_parameters"):
        return _torch(built, plan, rows)
    if hasattr(built, "fit") and hasattr(built, "predict"):
        return Estimator(built, rows.x, rows.y, plan.classes)
    raise LocalError(
        f"our own model is a {type(built).__name__}; build returns a scikit-learn estimator, a torch.nn.Module or "
        "an object with get_parameters, fit and evaluate"
    )


def _distilled(build: Build, plan: Horizontal, rows: Data, public: PublicTable, agreed: Public) -> Distilled:
    public.require(agreed)
    order = np.random.default_rng(plan.seed).permutation(len(rows.y))
    cut = round(plan.test_fraction * len(order))
    ours = rows.rows(np.sort(order[cut:]))
    test = (rows.x[order[:cut]], rows.y[order[:cut]]) if cut else None
    with blamed_on("our own model"):
        built = build(ours.x, ours.y)
        return Distilled(built, ours.x, ours.y, public, plan.classes, agreed.weight, test)


def _torch(module: Any, plan: Horizontal, rows: Data) -> TorchModel:
    """Rows and targets as tensors like the module's own parameters; the agreed loss."""
    import torch
    from torch.nn import functional

    like = next(module.parameters())
    kind = plan.loss or ("cross_entropy" if plan.classes else "squared")
    if (kind == "cross_entropy") != bool(plan.classes):
        raise LocalError("loss cross_entropy goes with classes in [horizontal], the others go without")
    losses = {
        "cross_entropy": functional.cross_entropy,
        "squared": lambda outputs, y: functional.mse_loss(outputs.reshape(y.shape), y),
        "poisson": lambda outputs, y: functional.poisson_nll_loss(outputs.reshape(y.shape), y),
    }
    if plan.classes:
        y = torch.as_tensor(np.searchsorted(np.asarray(plan.classes), rows.y), device=like.device)
    else:
        y = torch.as_tensor(rows.y.astype(np.float64)).to(like)
    return TorchModel(module, losses[kind], torch.as_tensor(rows.x).to(like), y)


def own_model(party: Party, data: Data | None) -> Model | None:
    """Our own model for our rows, where the agreement trains own ones; nothing has been sent yet.

    Raises:
        LocalError: our code, the public table or what travels is not as agreed, with the difference.
    """
    plan, columns = party.agreement.horizontal, party.agreement.columns
    if plan is None or columns is None or plan.model != "own":
        return None
    if columns.categories:
        raise LocalError("an own model takes numbers: no categories in [columns] of the agreement")
    public = read_public(party.public_source, columns.features) if plan.public else None
    if public is not None:
        _skops()
    nothing = np.zeros(0, np.asarray(plan.classes).dtype) if plan.classes else np.zeros(0)
    rows = data or Data(np.zeros((0, len(columns.features))), nothing, columns.features)
    build: Any = load(party.file.model.file, party.path.parent)
    model = adapt(build, plan, rows, public)
    if data is not None and (short := describe(plan, data, model).short):
        raise Refused(f"{party.source} has fewer {short} than the agreed minimum; agree on less, or stay out")
    return model


def save(model: Model, folder: Path) -> str:
    """Write what was trained into `folder`; the file's name.

    weights.npz: arrays by name, of a torch module its whole state, frozen body and buffers too. model.skops: the fitted
    estimator of a distillation. Neither runs anything when it is read.
    """
    if isinstance(model, Distilled):
        name, data = "model.skops", _skops().dumps(model.estimator)
    else:
        arrays = model.arrays()  # type: ignore[attr-defined]
        if isinstance(model, TorchModel):
            arrays = {key: value.cpu().numpy() for key, value in model.module.state_dict().items()}
        buffer = io.BytesIO()
        with ZipFile(buffer, "w") as archive:  # as np.savez, which pickles what is no array of numbers
            for key, value in arrays.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        name, data = "weights.npz", buffer.getvalue()
    write_whole(folder / name, data, mode=0o600)
    return name


def _skops() -> Any:
    try:
        import skops.io
    except ImportError:
        raise LocalError("a distilled model is kept as model.skops: install 'colonnade[skops]'") from None
    return skops.io
