"""What can go wrong, whose fault it is, and the exit code that says so.

Every text is one line that names the place (file, column, count or peer) and the remedy. No text ever carries an
id, a label, a feature or a secret, because errors end up in logs and tickets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ColonnadeError(Exception):
    """Base of every error that a user meets. `kind` is all that an abort tells the peers."""

    kind = "error"
    exit_code = 1

    def __init__(self, text: str, *, peer: str | None = None) -> None:
        super().__init__(text)
        self.peer = peer


class LocalError(ColonnadeError):
    """Our own input, files or machine: nothing a peer did. Exit code 2."""

    kind = "local"
    exit_code = 2


class Refused(ColonnadeError):
    """A policy or the agreement says no, here or at a peer. Exit code 3."""

    kind = "refused"
    exit_code = 3


class PeerLost(ColonnadeError):
    """A peer did not come, fell silent or stopped making progress before a deadline. Exit code 4."""

    kind = "lost"
    exit_code = 4


class ProtocolViolation(ColonnadeError):
    """A peer sent what the protocol does not allow. Exit code 5."""

    kind = "violation"
    exit_code = 5


class PeerAborted(ColonnadeError):
    """A peer stopped and said so. The exit code follows the peer's reason: 3 refused, 5 violation, else 4."""

    kind = "aborted"

    def __init__(self, text: str, *, peer: str, reason: str) -> None:
        super().__init__(text, peer=peer)
        self.reason = reason
        self.exit_code = {Refused.kind: 3, ProtocolViolation.kind: 5}.get(reason, 4)


@contextmanager
def blame(peer: str) -> Iterator[None]:
    """What `peer` sent was wrong: a ValueError about it becomes a ProtocolViolation that names the peer."""
    try:
        yield
    except ValueError as error:
        raise ProtocolViolation(f"{peer}: {error}", peer=peer) from None
