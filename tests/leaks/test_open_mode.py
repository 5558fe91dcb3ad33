"""What per-row gradients in clear tell a feature holder, with the open mode's guard and without; and what the encrypted
mode and the two ways of merging put on the wire instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from parties.errors import PeerAborted, Refused
from parties.memory import outcomes
from parties.session import Session
from tests.conftest import Stream, agree, parties
from tests.leaks.test_attacks import Split, attacked, bank, synthetic
from tests.training import kinds, sent
from vfl import sgd
from vfl.bottoms import initial
from vfl.leakage.features import explained
from vfl.leakage.meter import gradient_leak
from vfl.messages import MaskedEmbedding, PartialEmbedding
from vfl.neural import VerticalMLPClassifier
from vfl.neural_plan import Clauses
from vfl.open_messages import OpenGradient, SeparateEmbedding

torch = pytest.importorskip("torch", reason="networks need the extra 'torch'")
torch.set_num_threads(1)  # small matrices, and a thread for each party

EPOCHS, BATCH, WIDTH = 6, 500, 8
CONSENT = Clauses(open_gradients=True, separate_embeddings=True)
NETWORK = {"hidden_layer_sizes": (WIDTH,), "batch_size": BATCH, "epochs": EPOCHS}
NETWORK |= {"optimiser": "sgd", "learning_rate": 0.3}
LATTICE = {"scheme": "lattice", "key_bits": 2048, "numbers_per_key": 4096}


def train(
    parts: Mapping[str, np.ndarray],
    y: np.ndarray,
    then: Callable[[VerticalMLPClassifier, Session], Any],
    clauses: Clauses,
    **params: Any,
) -> tuple[dict[str, Any], Any]:
    """What each party ended with, and what was sent."""

    def role(name: str) -> Callable[[Session], Any]:
        def run(session: Session) -> Any:
            top = head() if session.is_label_holder and params.get("mode") == "open" else None
            model = VerticalMLPClassifier(**NETWORK | params, top=top)
            labels = y if session.is_label_holder else None
            model.fit(parts[name], labels, session=session, clauses=clauses, randomness=Stream(name))
            return then(model, session)

        return run

    recorded: Any = {}
    policy = {"allow_reconstruction": True, "max_exchanges": 10_000, "residual_range": 4.0}
    known = agree(len(parts), model=policy, encryption=LATTICE)
    return outcomes({name: role(name) for name in parts}, known, parties(len(parts)), recorded=recorded), recorded


def head() -> torch.nn.Module:
    """A top without a hidden unit at the embedding itself: the label's sign and size reach every gradient."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))


def opened(data: Split, clauses: Clauses) -> tuple[float, Any, list[np.ndarray]]:
    """AUC of the test rows, the label holder's model, every epoch's gradients (n, m) as the feature holder got them."""
    tests = {"bank": data.own[1], "grocer": data.x[1]}

    def then(model: VerticalMLPClassifier, session: Session) -> Any:
        return model, model.predict_proba(tests[session.name], session=session)

    ended, recorded = train({"bank": data.own[0], "grocer": data.x[0]}, data.y[0], then, clauses, mode="open")
    model, chances = ended["bank"]
    messages, seen = sent(recorded, "bank", "grocer", OpenGradient), []
    rows = sgd.batches(len(data.y[0]), BATCH, EPOCHS, 0)
    an_epoch = len(rows) // EPOCHS
    for start in range(0, len(messages), an_epoch):
        seen.append(np.zeros((len(data.y[0]), WIDTH)))
        for message, batch in zip(messages[start : start + an_epoch], rows[start : start + an_epoch], strict=True):
            seen[-1][batch] = message.data
    return float(roc_auc_score(data.y[1], chances[:, 1])), model, seen


@pytest.fixture(scope="module")
def data() -> Split:
    return bank()


def unguarded(patch: pytest.MonkeyPatch) -> None:
    """No noise; the meter stays on."""
    patch.setattr("vfl.open_split.marvell", lambda gradients, *rest: gradients)


@pytest.fixture(scope="module")
def plain(data) -> tuple[float, Any, list[np.ndarray]]:
    """Open without noise and without a limit."""
    with pytest.MonkeyPatch.context() as patch:
        unguarded(patch)
        patch.setattr("vfl.open_split.stop", lambda *reading, **limits: None)
        return opened(data, CONSENT)


def test_unprotected_gradients_give_labels_away_by_norm_and_direction(data, plain):
    _, model, seen = plain
    norm, direction = np.max([attacked(gradients, data.y[0]) for gradients in seen], axis=0)
    assert norm > 0.9
    assert direction > 0.9
    assert max(reading.leak_auc for reading in model.readings_) > 0.9  # the meter sees it too


def test_guarded_gradients_hide_labels_at_little_loss(data, plain):
    """In each epoch, and in the mean of all: the noise is shared out over the epochs."""
    task_auc, model, seen = opened(data, CONSENT)
    assert len(seen) == model.epochs_ == EPOCHS
    for gradients in (*seen, np.mean(seen, axis=0)):
        norm, direction = attacked(gradients, data.y[0])
        assert norm < 0.6
        assert direction < 0.7
    assert plain[0] - task_auc < 0.02


def test_the_meter_stops_training_after_the_first_epoch_that_leaks_more_than_agreed(monkeypatch):
    data = synthetic()
    unguarded(monkeypatch)
    _, model, seen = opened(data, CONSENT)
    leaks = [gradient_leak(gradients, data.y[0]) for gradients in seen]
    assert leaks[-1] > 0.7
    assert all(leak <= 0.7 for leak in leaks[:-1])
    assert model.epochs_ == len(seen) < EPOCHS
    assert "above the agreed 0.700" in model.course_.stopped


# What else goes over the wire


def few(count: int, rows: int = 120) -> tuple[dict[str, np.ndarray], np.ndarray]:
    generator = np.random.default_rng(1)
    names = ("bank", "grocer", "mill")[:count]
    parts = {name: generator.normal(size=(rows, 3)) for name in names}
    return parts, (sum(part[:, 0] for part in parts.values()) > 0).astype(int)


def test_encrypted_sends_a_feature_holder_ciphertexts_and_sums_alone():
    parts, y = few(2)
    ended, recorded = train(parts, y, lambda model, session: model.epochs_, CONSENT, batch_size=60, epochs=1)
    assert ended == {"bank": 1, "grocer": 1}
    told = {"Hello", "Plan", "SchemeKey", "SealedResidual", "OpenedGradient", "EpochEnd", "Closing"}
    assert set(kinds(recorded, "bank", "grocer")) == told


def test_by_sum_the_label_holder_gets_masked_embeddings_and_side_by_side_each_ones(monkeypatch):
    parts, y = few(3)
    then = lambda model, session: model.epochs_
    _, recorded = train(parts, y, then, CONSENT, batch_size=60, epochs=1)
    assert {"MaskedEmbedding"} == {k for k in kinds(recorded, "grocer", "bank") if k.endswith("Embedding")}
    masked = np.concatenate([message.data for message in sent(recorded, "grocer", "bank", MaskedEmbedding)])
    assert abs(np.unpackbits(masked.view(np.uint8)).mean() - 0.5) < 0.02  # 4 deviations of 122,880 bits and more
    ended, _ = train(parts, y, then, CONSENT, batch_size=60, epochs=1, merge="concatenation")
    assert isinstance(ended["grocer"], Refused)  # the ledger lets nothing out in clear between three
    assert OpenGradient.ledger_class == SeparateEmbedding.ledger_class == "plaintext"


def test_known_first_weights_would_give_the_columns_from_the_first_batch_so_they_are_secret():
    parts, y = few(2)
    x = parts["grocer"]
    _, recorded = train(parts, y, lambda model, session: None, CONSENT, batch_size=60, epochs=1)
    rows = sgd.batches(len(y), 60, 1, 0)[0]
    first = sent(recorded, "grocer", "bank", PartialEmbedding)[0].data.reshape(len(rows), WIDTH)
    known = first @ np.linalg.pinv(initial((3, WIDTH), 3, Stream("grocer")))
    assert explained(x[rows], known).min() > 0.999
    guessed = first @ np.linalg.pinv(initial((3, WIDTH), 3))
    assert explained(x[rows], guessed).mean() < 0.9


def test_without_consent_there_is_nothing_to_see():
    parts, y = few(2)
    ended, recorded = train(parts, y, lambda model, session: None, Clauses(), mode="open")
    assert all(isinstance(error, (Refused, PeerAborted)) for error in ended.values())
    assert "OpenGradient" not in kinds(recorded, "bank", "grocer")
