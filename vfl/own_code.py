"""A party's own modules on the command line: its own code, named in its own file, never in the agreement and never from
a peer. `[model] bottom = "bottom.py:build"` (or `top`, at the label holder) is a function in a file of ours:

    def build(inputs, outputs):   of a bottom: our prepared columns and the width of the embedding
        return ...                of a top: the width of the merged embeddings and the classes (1: a number)

Which modules are taken is said at `VerticalMLP`. A share on disk holds their numbers, and their code is built again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parties.errors import ColonnadeError, LocalError
from parties.files import read_bytes

if TYPE_CHECKING:  # they bring pyarrow and scikit-learn, and a simulation needs little of either
    from parties.agreement import Agreement
    from parties.party_file import Party
    from vfl.neural_share import NetworkShare


@dataclass(frozen=True)
class Own:
    """Our own part of a network, "top" or "bottom"; `digest` is its file's."""

    part: str
    build: Callable[[int, int], Any] = field(repr=False)
    digest: bytes = field(repr=False)

    def modules(self, agreement: Agreement, columns: int, classes: int) -> dict[str, Any]:
        """Built anew for our prepared columns and, at the label holder, so many classes (1: a number), as an estimator
        takes it. Raises LocalError: our code fails."""
        if self.part == "top":
            return self._built(self.merged(agreement, columns), classes)
        return self._built(columns, agreement.network.hidden[0])

    def merged(self, agreement: Agreement, columns: int) -> int:
        """The width of the merged embeddings, where the label holder has so many columns."""
        network = agreement.network
        beside = agreement.feature_holders + bool(columns) if network.merge == "concatenation" else 1
        return beside * network.hidden[0]

    def of_share(self, share: NetworkShare) -> dict[str, Any]:
        """Built anew for a share. Raises LocalError: our code fails."""
        if self.part == "top":
            return self._built(len(share.tensors["bias"].values), max(len(share.classes), 1))
        columns = share.features if share.prepared is None else share.prepared.names
        return self._built(len(columns), share.params["hidden_layer_sizes"][0])

    def _built(self, inputs: int, outputs: int) -> dict[str, Any]:
        with blamed_on(f"our {self.part}"):
            return {self.part: self.build(inputs, outputs)}


def own_module(party: Party) -> Own | None:
    """What our file names under [model]. Raises LocalError: there is no such file or function, or the file fails."""
    part = "top" if party.is_label_holder else "bottom"
    place = getattr(party.file.model, part)
    if not place:
        return None
    build: Any = load(place, party.path.parent)
    text = read_bytes(party.path.parent / place.rpartition(":")[0], f"our {part}")
    return Own(part, build, hashlib.sha256(text).digest())


def load(place: str, folder: Path) -> object:
    """The function that `place`, "file.py:function", names; the file is looked for in `folder` and runs as our own.

    Raises:
        LocalError: there is no such file or function, or the file itself fails.
    """
    file, _, name = place.rpartition(":")
    path = folder / file
    if not path.is_file():
        raise LocalError(f"{path} is no file; [model] names our own code as 'file.py:function'")
    known = f"colonnade_own_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(known, path)
    if spec is None or spec.loader is None:
        raise LocalError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look a class's module up there
    with blamed_on(str(path)):
        spec.loader.exec_module(module)
    function: object = getattr(module, name, None)
    if not callable(function):
        raise LocalError(f"{path} has no function {name!r}")
    return function


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Whatever our own code raises becomes a LocalError of one line that says where; its text may hold values."""
    try:
        yield
    except ColonnadeError:
        raise
    except ModuleNotFoundError as error:
        lacking = "torch: pip install 'colonnade[torch]'" if error.name == "torch" else f"{error.name}: install it"
        raise LocalError(f"{what} needs {lacking}") from None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise LocalError(f"{what} raised {type(error).__name__} ({where}); try it alone") from None
