"""What many tests share: four parties' keys, agreements between them, and randomness that replays."""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background; tests interrupt, and are told
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: many parties share few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch

import hashlib
from collections.abc import Mapping
from typing import Any

import hypothesis
import msgspec
import pytest

from parties.agreement import Agreement
from parties.identity import Identity
from parties.memory import make_agreement
from vfl.encryption.paillier import SecretKey, generate

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

NAMES = ("bank", "grocer", "mill", "press")


class Stream:
    """Deterministic randomness: `Stream("a")(32)` gives 32 bytes, other ones at every call, the same in every run."""

    def __init__(self, seed: str) -> None:
        self._seed, self._calls = seed.encode(), 0

    def __call__(self, size: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(self._seed + b"/" + str(self._calls).encode()).digest(size)


def nonces(count: int, seed: str = "nonce") -> dict[str, bytes]:
    """For the first `count` parties: with them and a Stream for each a session replays."""
    return {name: Stream(f"{seed}/{name}")(32) for name in NAMES[:count]}


IDENTITIES = {name: Identity._from_secrets(name, Stream(f"{name}/c")(32), Stream(f"{name}/s")(32)) for name in NAMES}


@pytest.fixture(scope="session")
def identities() -> Mapping[str, Identity]:
    """The keys of bank, grocer, mill and press, the same for the whole run."""
    return IDENTITIES


@pytest.fixture(scope="session")
def secret() -> SecretKey:
    """A Paillier key: making one takes longer than most tests."""
    return generate(2048)


def parties(count: int) -> dict[str, Identity]:
    """The first `count` of them; the bank holds the label."""
    return {name: IDENTITIES[name] for name in NAMES[:count]}


def agree(count: int, **tables: Any) -> Agreement:
    """An agreement of the first `count` parties: any intersection is large enough, and nobody waits for long."""
    tables["intersection"] = {"minimum": 1} | tables.get("intersection", {})
    tables["deadlines"] = {"message": 20.0} | tables.get("deadlines", {})
    tables.setdefault("expires", "2999-12-31")  # the same agreement, hence the same session ids, every day
    return make_agreement(parties(count), **tables)


def changed(agreement: Agreement, **fields: Any) -> Agreement:
    """A copy with other top-level fields, checked as if it were read from a file."""
    return msgspec.convert(msgspec.to_builtins(agreement) | fields, Agreement)
