"""The party's own parallel map: the one place where work is spread over cores, or over a cluster of the party's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from parties.errors import LocalError

T = TypeVar("T")
R = TypeVar("R")
DASK = "dask://"
CONNECT = 20.0  # seconds for a Dask scheduler to answer
# A run that stops half-way leaves work undone: the user hears why it stopped, not that.
warnings.filterwarnings("ignore", message=r"\d+ tasks ", module="joblib")


class Workers:
    """A lazy, ordered `map` over processes of this machine, or over the workers of a Dask cluster.

    Args:
        setting: how many processes (0: one a core; 1: none, all work is done in this process), or "dask://host:port"
            (also "dask://tls://host:port") of a scheduler. What is mapped holds keys and ids: a cluster must be as
            trusted as this machine, and its connections travel unencrypted unless they are tls.
    Raises:
        LocalError: no such cluster, or the extra `colonnade[dask]` is not installed.
    """

    def __init__(self, setting: int | str = 1) -> None:
        self._client: Any = None
        if isinstance(setting, str):
            self._client = _connect(setting.removeprefix(DASK))
            self.count = max(1, sum(self._client.ncores().values()))
        else:
            self.count = setting or cpu_count()

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`map(work, items)` in order. With several workers it starts at once and keeps two items a worker in flight;
        several maps may run at the same time. With one it is Python's own `map`.

        `work` must be a module-level function (or a `functools.partial` of one). To processes of this machine items
        travel over local pipes, never through files (joblib would map large arrays to disk).
        """
        if self.count == 1 and self._client is None:
            return map(work, items)
        backend = {"backend": "loky"} if self._client is None else {"backend": "dask", "client": self._client}
        with parallel_config(**backend):
            parallel = Parallel(
                n_jobs=self.count, return_as="generator", pre_dispatch="2*n_jobs", batch_size=1, max_nbytes=None
            )
            results: Iterator[R] = parallel(delayed(work)(item) for item in items)
        return _watched(results)

    def close(self) -> None:
        """Leave the cluster, if any; processes of this machine end by themselves."""
        if self._client is not None:
            self._client.close()


def _watched(results: Iterator[R]) -> Iterator[R]:
    try:
        yield from results
    except TerminatedWorkerError:
        raise LocalError(
            "one of our worker processes was ended from outside, perhaps for lack of memory; set fewer workers"
        ) from None


def _connect(address: str) -> Any:
    try:
        from distributed import Client  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise LocalError("workers on a Dask cluster need: pip install 'colonnade[dask]'") from None
    try:
        return Client(address, timeout=CONNECT, set_as_default=False)  # type: ignore[no-untyped-call, unused-ignore]
    except (OSError, ValueError):
        raise LocalError(f"no Dask scheduler answers at {address}; start it, or set workers = 0") from None
