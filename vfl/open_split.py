"""Per-row matrices in clear, and what guards them: noise before they leave, a meter over what has left."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import LocalError, blame
from vfl.bottoms import Randomness, Rows
from vfl.leakage.defences import marvell, max_norm, sum_kl_within
from vfl.leakage.meter import Reading, Stop, gradient_leak, stop
from vfl.losses import Matrix
from vfl.messages import LARGEST, VALUES_PER_PART
from vfl.open_messages import OpenGradient, SeparateEmbedding
from vfl.resume import State

DEFENCES = ("marvell", "max_norm")
InClear = OpenGradient | SeparateEmbedding


def check_size(values: Matrix, step: int) -> None:
    """Raises LocalError before a message would refuse the numbers."""
    if not np.abs(values).max(initial=0.0) < LARGEST:
        raise LocalError(
            f"step {step + 1} needs numbers of 2^46 or more: training explodes; use a smaller learning_rate, or "
            "standardise"
        )


def send_rows(channel: Channel, kind: type[InClear], values: Matrix, exchange: int) -> None:
    """A matrix (b, m), in parts. Raises LocalError: a number too large.

    Reveals:
        To the peer: all of it.
    """
    check_size(values, exchange)
    step = max(VALUES_PER_PART // max(values.shape[1], 1), 1)
    for start in range(0, len(values), step):
        channel.send(kind(exchange, np.ascontiguousarray(values[start : start + step], "<f8")))


def receive_rows(channel: Channel, kind: type[InClear], exchange: int, rows: int, width: int) -> Matrix:
    """What `send_rows` sends. Raises ProtocolViolation: of another step or shape than is due.

    Reveals:
        To the peer: nothing; nothing is sent.
    """
    parts, step = [], max(VALUES_PER_PART // max(width, 1), 1)
    for start in range(0, rows, step):
        part = channel.receive(kind)
        with blame(channel.peer):
            if part.exchange != exchange or part.data.shape != (min(step, rows - start), width):
                raise ValueError(f"{kind.__name__} of another step or shape than is due")
        parts.append(part.data)
    return np.vstack(parts) if parts else np.empty((0, width))


class Guard:
    """The label holder's guard of gradients in clear: noise within `leak_limit`, the largest AUC of an attack on them.

    `labels` (n, k) in {0, 1} are what they must not tell: a column for two classes (all that marvell can hide), else
    one a class. The meter attacks an epoch's gradients and their mean over all epochs: fresh noise averages out.
    """

    def __init__(
        self,
        defence: str,
        leak_limit: float,
        epochs: int,
        labels: Matrix,
        width: int,
        randomness: Randomness = os.urandom,
    ) -> None:
        self._defence, self._limit, self._labels, self._key = defence, leak_limit, labels, randomness(32)
        self._allowed = sum_kl_within(leak_limit, epochs)
        self._now, self._all = np.zeros((len(labels), width)), np.zeros((len(labels), width))
        self._sent = np.zeros(len(labels), bool)  # rows of validation never are
        self.readings: list[Reading] = []

    def protect(self, gradients: Matrix, rows: Rows, step: int) -> Matrix:
        """gradients (b, width) of these rows as they may leave. Noise is drawn from a secret key, the step and the
        gradients: a step that is done again after a resume gives the same message, never a second draw to average."""
        random = self._noise(gradients, step)
        if self._defence == "marvell":
            noisy = marvell(gradients, self._labels[rows, 0], self._allowed, random)
        else:
            noisy = max_norm(gradients, random)
        self._now[rows], self._sent[rows] = noisy, True
        return noisy

    def _noise(self, gradients: Matrix, step: int) -> Randomness:
        key = hmac.digest(self._key, step.to_bytes(8, "little") + gradients.tobytes(), "sha256")
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        return lambda size: stream.update(bytes(size))

    def end_epoch(self) -> Stop | None:
        """Read the meter; whether training must stop."""
        self._all += self._now
        leaks = [
            gradient_leak(seen[self._sent], column[self._sent])
            for seen in (self._now, self._all / (len(self.readings) + 1))
            for column in self._labels.T
        ]
        self.readings.append(Reading({}, {}, max((leak for leak in leaks if not np.isnan(leak)), default=0.5)))
        return stop(self.readings[-1], width=0, allow_reconstruction=True, leak_limit=self._limit)

    def state(self) -> State:
        """What the meter has seen, and the key of the noise."""
        return {
            "guard.key": np.frombuffer(self._key, np.uint8),
            "guard.now": self._now,
            "guard.all": self._all,
            "guard.sent": self._sent.astype(np.uint8),
            "guard.leaks": np.array([reading.leak_auc for reading in self.readings], np.float64),
        }

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where a guard stood that had this state."""
        self._key = state["guard.key"].tobytes()
        self._now, self._all, self._sent = state["guard.now"], state["guard.all"], state["guard.sent"].astype(bool)
        self.readings = [Reading({}, {}, leak) for leak in state["guard.leaks"].tolist()]
