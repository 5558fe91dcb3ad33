"""What the networks share: scikit-learn's contract over the columns of several parties."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.validation import check_is_fitted

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.session import Session
from vfl import split
from vfl.bottoms import Deep, Linear, Randomness, columns_of, frozen, initial, inputs_of, put_state
from vfl.encryption.paillier import SecretKey
from vfl.exchange import LabelEnd, accept_key, offer_key
from vfl.inputs import matrix, row_weights
from vfl.losses import Matrix, Vector
from vfl.meter import Meter
from vfl.neural_plan import Clauses, check_consent, plan
from vfl.neural_share import NetworkShare, plain
from vfl.open_split import DEFENCES, Guard
from vfl.optimisers import Rule
from vfl.preparation import FittedColumns
from vfl.resume import ANEW, Checkpoints, Start
from vfl.secure_sum import Contribution
from vfl.split import Merge
from vfl.top import Top, perceptron
from vfl.training import agree

log = logging.getLogger("colonnade")
CHOICES = {
    "mode": ("encrypted", "open"),
    "merge": ("sum", "concatenation"),
    "optimiser": ("adam", "sgd"),
    "defence": DEFENCES,
}


class VerticalMLP(BaseEstimator):  # type: ignore[misc]
    """What the classifier and the regressor share.

    Parameters:
        hidden_layer_sizes: the first is the width m of the embedding; the others are of the default top.
        top: at the label holder, any torch.nn.Module from (b, m) merged embeddings (concatenation: m a party) to (b,
            outputs); a copy is trained. None: ReLU and linear layers of `hidden_layer_sizes`.
        bottom: at a feature holder. Encrypted mode: a torch.nn.Module or function that does not learn, from X to the
            features that a linear layer learns on. Open mode: a torch.nn.Module from X to (b, m), a copy of which
            learns. None: X itself and a linear layer.
        mode: "encrypted" (feature holders get aggregate gradients, by the encrypted exchange) or "open" (gradients a
            row, under noise).
        merge: "sum" of the embeddings, or "concatenation", side by side.
        defence: open mode: "marvell" (two classes) or "max_norm".
        optimiser: "adam" or "sgd", with torch.optim's meaning of learning_rate, momentum (sgd) and alpha, the
            weight_decay (L2) of all parameters.
        batch_size, epochs: a remainder joins an epoch's last batch.
        early_stopping: hold out validation_fraction of the rows; stop after n_iter_no_change epochs without a loss
            smaller by tol, and keep the weights of the best one.
        random_state: of batches and held-out rows; shared. First weights are secret: whoever knew them would read
            columns from the first embedding.

    What protects the parties is in the agreement: [model] max_exchanges, minimum_rows_off_mode, allow_reconstruction,
    residual_range, and `Clauses`.

    Attributes:
        epochs_ (and n_iter_) that were trained; tensors_ our weights by name; terms_ how exchanges were encrypted
        (None: open); feature_names_in_; training_ the session's id in hex; course_ (label holder) losses and why
        training stopped; alone_ (label holder) scikit-learn's linear model of its own columns; readings_ of the
        leak meter, an epoch each; classes_ (label holder, classifier).
    """

    epochs_: int

    def __init__(
        self,
        hidden_layer_sizes: tuple[int, ...] = (16,),
        *,
        top: Any = None,
        bottom: Any = None,
        mode: str = "encrypted",
        merge: str = "sum",
        defence: str = "marvell",
        optimiser: str = "adam",
        learning_rate: float = 0.001,
        momentum: float = 0.0,
        alpha: float = 0.0,
        batch_size: int = 256,
        epochs: int = 5,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        tol: float = 1e-4,
        random_state: int = 0,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.top = top
        self.bottom = bottom
        self.mode = mode
        self.merge = merge
        self.defence = defence
        self.optimiser = optimiser
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.alpha = alpha
        self.batch_size = batch_size
        self.epochs = epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.random_state = random_state

    def fit(
        self,
        X: Any = None,
        y: Any = None,
        *,
        session: Session,
        sample_weight: Any = None,
        clauses: Clauses | None = None,
        checkpoints: Checkpoints | None = None,
        resume: bool = False,
        secret: SecretKey | None = None,
        randomness: Randomness = os.urandom,
    ) -> VerticalMLP:
        """Train with every other party of the session. X (n, d) float, or what `bottom` takes, rows aligned (the label
        holder may have none: None); y (n,) and sample_weight (n,) at the label holder only: a batch's loss is the mean
        of its rows' losses times their weights. `clauses`: None, those of the session's agreement. With `checkpoints`
        our state is kept every few exchanges; with `resume` all go on from the last that all have. `secret` and
        `randomness` replay in tests.

        Reveals:
            To the label holder: numbers of columns; per batch and epoch m numbers a row, the sum over the feature
            holders of their embeddings (one feature holder, or side by side: each one's).
            To a feature holder: its own aggregate gradient, d * m numbers a batch; in open mode every row's gradient,
            times its weight, under noise, and whether these reached the agreed leak_auc. With early stopping which
            epoch was the best and when training stops. To all: everybody's number of columns, rank and magnitude.
        Raises:
            LocalError: input that cannot be trained on, before anything is sent; an exploding loss. Refused: the
            agreement does not consent. PeerLost, ProtocolViolation: see the errors.
        """
        self._check_parameters()
        clauses = clauses or Clauses.of(session.agreement)
        check_consent(session, clauses, self.mode, self.merge)
        if session.is_label_holder != (y is not None):
            raise LocalError("the label holder gives y, feature holders give None")
        x, names = self._features(X, session, None if y is None else len(y))
        weights = row_weights(sample_weight, len(x))

        def start() -> Start:
            return ANEW if checkpoints is None else checkpoints.start(session, resume=resume)

        if y is None:
            self._fit_feature_holder(session, clauses, x, names, start, randomness)
        else:
            self._fit_label_holder(session, clauses, x, names, y, weights, start, secret, randomness)
        if checkpoints is not None:
            checkpoints.clear()
        self.n_iter_ = self.epochs_
        self.converged_ = True  # a network has no optimum to reach
        self.gradient_norm_ = None
        if y is not None and x.shape[1]:
            alone = Ridge() if isinstance(self, RegressorMixin) else LogisticRegression(max_iter=1000)
            self.alone_ = alone.fit(x, y, sample_weight=weights)
        self.feature_names_in_, self.n_features_in_ = np.array(names, dtype=object), len(names)
        self.training_, self.agreement_, self.party_ = session.id.hex(), session.agreement.digest.hex(), session.name
        return self

    def _fit_label_holder(
        self,
        session: Session,
        clauses: Clauses,
        x: Matrix,
        names: list[str],
        y: Any,
        weights: Vector,
        start: Callable[[], Start],
        secret: SecretKey | None,
        randomness: Randomness,
    ) -> None:
        target, outputs = self._target(y, len(x))
        merge = self._merged(session.agreement, names)
        block = merge.blocks[session.name]
        shape = x.shape[1], block.stop - block.start
        bottom = Linear(x, initial(shape, x.shape[1], randomness), self._rule)
        top, hidden = self._top(merge.width, outputs, randomness), self._hidden(target)
        schedule, setup, ranks = plan(
            session, type(self).__name__, self._plain_params(), clauses, self._width, x, names
        )
        begin = start()
        exchange: LabelEnd | Guard
        if setup is None:
            exchange = Guard(self.defence, clauses.leak_limit, self.epochs, hidden, merge.width, randomness)
        else:
            exchange = offer_key(session, setup.terms, secret)
        meter = self._meter(session, ranks, len(x), target.astype(np.float64))
        self.course_ = split.label_holder(
            session, bottom, top, target, weights, schedule, merge, exchange, meter, begin
        )
        self.readings_ = meter.readings
        self.epochs_, self.tensors_ = len(self.course_.losses), bottom.tensors() | top.tensors()
        self.terms_ = None if setup is None else setup.terms
        if self.course_.stopped:
            log.warning("training stopped after %d epochs: %s", self.epochs_, self.course_.stopped)

    def _fit_feature_holder(
        self,
        session: Session,
        clauses: Clauses,
        x: NDArray[np.float64],
        names: list[str],
        start: Callable[[], Start],
        randomness: Randomness,
    ) -> None:
        bottom = self._bottom(x, randomness)
        schedule, setup, ranks = plan(
            session, type(self).__name__, self._plain_params(), clauses, self._width, x, names
        )
        begin = start()
        end = None if setup is None else accept_key(session, setup.terms, setup.x)
        contribution, merge = Contribution(session), self._merged(session.agreement, names)
        meter = self._meter(session, ranks, len(x))
        self.epochs_ = split.feature_holder(session, bottom, schedule, merge, contribution, end, meter, begin)
        self.readings_ = meter.readings
        self.tensors_ = bottom.tensors()
        self.terms_ = None if setup is None else setup.terms

    def _meter(self, session: Session, ranks: Mapping[str, int], rows: int, y: Vector | None = None) -> Meter:
        agreement, separate = session.agreement, self.merge == "concatenation"
        return Meter(ranks, rows, agreement.leakage, agreement.model.allow_reconstruction, y, separate)

    def _outputs(self, X: Any, session: Session) -> Matrix | None:
        """What the top makes of the rows, (n, outputs), at the label holder; None at a feature holder.

        Reveals:
            To the label holder: per row, the sum over the feature holders of their embeddings; with one, or side by
            side, each one's. To a feature holder: nothing but the number of rows.
        """
        x = self.inputs(X, session)
        agree(session, f"score {self.training_}", self._plain_params(), x.reshape(len(x), math.prod(x.shape[1:])))
        merge, ours = self.merge_of(session.agreement), self.embed(x)
        if not session.is_label_holder:
            split.contribute(session, merge, Contribution(session), ours, 0)
            return None
        return self.head()(split.collect(session, merge, ours, 0))

    def inputs(self, X: Any, session: Session) -> NDArray[np.float64]:
        """X as the fitted model takes it, (n, d) or (n, ...). Raises LocalError."""
        check_is_fitted(self)
        if self.agreement_ != session.agreement.digest.hex() or self.party_ != session.name:
            raise LocalError("this share is of another party or another agreement; load the one that was trained here")
        x, names = self._features(X, session)
        if names != list(self.feature_names_in_):
            raise LocalError(f"the model wants the columns {', '.join(self.feature_names_in_)}, in this order")
        return x

    def embed(self, x: NDArray[np.float64]) -> Matrix:
        """Our embedding of `inputs`, (n, m)."""
        bottom = self._bottom(x)
        bottom.restore(self.tensors_)
        return bottom.embed(np.arange(len(x)), learning=False)

    def merge_of(self, agreement: Agreement) -> Merge:
        """How all parties' embeddings become the top's input."""
        return self._merged(agreement, list(self.feature_names_in_))

    def head(self) -> Callable[[Matrix], Matrix]:
        """What the label holder makes of merged embeddings: the top's outputs, (n, outputs)."""
        return self._trained_top().outputs

    def save(self, path: Path | str, prepared: FittedColumns | None = None) -> None:
        """Our share as JSON: numbers alone; `prepared` is what made our columns of our table's. Modules of one's own,
        frozen ones too, are given again to `load`."""
        check_is_fitted(self)
        NetworkShare(
            kind=type(self).__name__,
            party=self.party_,
            training=self.training_,
            agreement=self.agreement_,
            params=self._plain_params(),
            features=list(self.feature_names_in_),
            tensors=plain(self.tensors_),
            classes=self.classes_.tolist() if hasattr(self, "classes_") else [],
            epochs=self.epochs_,
            own_top=self.top is not None,
            own_bottom=self.bottom is not None,
            prepared=prepared,
        ).save(Path(path))

    @classmethod
    def load(cls, path: Path | str, *, top: Any = None, bottom: Any = None) -> VerticalMLP:
        """A share that `save` wrote, with newly constructed modules where it had any; `prepared_` is what was saved
        with it, or None. Raises LocalError: no share of this estimator, or modules with other parameters."""
        share = NetworkShare.load(Path(path))
        if share.kind != cls.__name__:
            raise LocalError(f"{path} is a share of {share.kind}, not of {cls.__name__}")
        for given, own, what in ((top, share.own_top, "top"), (bottom, share.own_bottom, "bottom")):
            if (given is not None) != own:
                raise LocalError(f"{path} was trained {'with' if own else 'without'} a {what} of one's own: load it so")
        try:
            model = cls(top=top, bottom=bottom, **share.params)
            model.hidden_layer_sizes = tuple(model.hidden_layer_sizes)
            model._check_parameters()
        except TypeError:
            raise LocalError(f"{path} has parameters that this version does not know") from None
        model.tensors_, model.epochs_, model.prepared_ = share.arrays(), share.epochs, share.prepared
        model.feature_names_in_, model.n_features_in_ = np.array(share.features, dtype=object), len(share.features)
        model.training_, model.agreement_, model.party_ = share.training, share.agreement, share.party
        if share.classes:
            model.classes_ = np.array(share.classes)
        model._check_tensors(path)
        return model

    def _check_tensors(self, path: Path | str) -> None:
        """Refuse numbers that do not fit the features, the classes or the modules."""
        shapes = {name: tensor.shape for name, tensor in self.tensors_.items()}
        if not self._deep and shapes.get("weights") not in ((self.n_features_in_, self._width), (0, 0)):
            raise LocalError(f"{path} is damaged: its weights do not fit its features")
        if len(shapes.get("bias", ())) == 1:
            self._trained_top()
        elif self._deep:
            put_state(copy.deepcopy(self.bottom), "bottom", self.tensors_)

    def _trained_top(self) -> Top:
        outputs = len(getattr(self, "classes_", ())) if isinstance(self, ClassifierMixin) else 1
        top = self._top(len(self.tensors_["bias"]), outputs)
        top.restore(self.tensors_)
        return top

    def _top(self, width: int, outputs: int, randomness: Randomness = os.urandom) -> Top:
        module = self.top
        if module is None:
            module = perceptron([width, *self.hidden_layer_sizes[1:], outputs], randomness)
        return Top(module, width, outputs, isinstance(self, ClassifierMixin), self._rule)

    def _bottom(self, x: NDArray[np.float64], randomness: Randomness = os.urandom) -> Linear | Deep:
        if self._deep:
            return Deep(x, self.bottom, self._width, self._rule)
        return Linear(x, initial((x.shape[1], self._width), x.shape[1], randomness), self._rule)

    def _merged(self, agreement: Agreement, names: list[str]) -> Merge:
        ring = [party.name for party in agreement.ring]
        return Merge.of(ring, self._width, self.merge == "concatenation", bool(names))

    @property
    def _deep(self) -> bool:
        return self.mode == "open" and self.bottom is not None

    @property
    def _width(self) -> int:
        return int(self.hidden_layer_sizes[0])

    @property
    def _rule(self) -> Rule:
        return Rule(self.optimiser, self.learning_rate, self.momentum, self.alpha)

    def _features(self, X: Any, session: Session, rows: int | None = None) -> tuple[NDArray[np.float64], list[str]]:
        if session.is_label_holder and self.bottom is not None:
            raise LocalError("a bottom is for feature holders; transform the label holder's columns before")
        if self.bottom is None:
            return columns_of(X, session.is_label_holder, rows)
        return inputs_of(X) if self._deep else matrix(frozen(self.bottom, X))

    def _plain_params(self) -> dict[str, Any]:
        """The shared parameters as Python's own types, so that 1, 1.0 and numpy's 1.0 are one value."""
        defaults, own = type(self)().get_params(), self.get_params()
        shared = {name: type(defaults[name])(own[name]) for name in own if name not in ("top", "bottom")}
        return shared | {"hidden_layer_sizes": [int(size) for size in self.hidden_layer_sizes]}

    def _check_parameters(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise LocalError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("learning_rate", "batch_size", "epochs", "n_iter_no_change"):
            if not getattr(self, name) > 0:
                raise LocalError(f"{name} must be positive")
        if not (self.alpha >= 0 and 0 <= self.momentum < 1 and 0 < self.validation_fraction < 1):
            raise LocalError("alpha is at least 0, momentum from 0 to below 1, validation_fraction between 0 and 1")
        if not self.hidden_layer_sizes or not all(size > 0 for size in self.hidden_layer_sizes):
            raise LocalError("hidden_layer_sizes holds at least one size, all of them positive")

    def _target(self, y: Any, rows: int) -> tuple[NDArray[Any], int]:
        """y as the loss takes it, (n,), and the number of outputs. Raises LocalError."""
        raise NotImplementedError

    def _hidden(self, target: NDArray[Any]) -> Matrix:
        """What gradients must not tell, (n, k) in {0, 1}."""
        raise NotImplementedError
