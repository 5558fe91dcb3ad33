"""The party's own parallel map: the one place where work is spread over cores, or over a cluster of the party's own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from parties.errors import LocalError

T = TypeVar("T")
R = TypeVar("R")
DASK = "dask://"
CONNECT = 20.0  # seconds for a Dask scheduler to answer
STARTING = threading.Lock()  # joblib replaces workers of other settings: never those that another map just got
PATIENCE = 600.0  # seconds for a group of items, which takes a few; then the workers are taken to hang


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
        self._threads = ThreadPoolExecutor(4, "workers")  # joblib blocks its caller; started on first use
        if isinstance(setting, str):
            self._client = _connect(setting.removeprefix(DASK))
            self.count = max(1, sum(self._client.ncores().values()))
        else:
            self.count = setting or cpu_count()

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`map(work, items)` in order. With several workers at most four items a worker are in flight or wait to be
        taken, however slowly they are; `items` is read in the caller's thread, and several maps may run at once. With
        one worker it is Python's own `map`.

        `work` must be a module-level function (or a `functools.partial` of one). To processes of this machine items
        travel over local pipes, never through files (joblib would map large arrays to disk).
        """
        if self.count == 1 and self._client is None:
            return map(work, items)
        return self._in_groups(work, iter(items))

    def _in_groups(self, work: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
        """While one group of items is worked on, the next one is read."""
        started: deque[Future[list[R | Exception]]] = deque()
        while group := list(islice(items, 2 * self.count)):
            started.append(self._threads.submit(self._run, work, group))
            if len(started) > 1:
                yield from self._results(started.popleft())
        while started:
            yield from self._results(started.popleft())

    def _run(self, work: Callable[[T], R], group: list[T]) -> list[R | Exception]:
        backend = {"backend": "loky"} if self._client is None else {"backend": "dask", "client": self._client}
        with parallel_config(**backend), ExitStack() as open_workers:
            parallel = Parallel(n_jobs=self.count, pre_dispatch="all", batch_size=1, max_nbytes=None)
            with STARTING:
                open_workers.enter_context(parallel)
            results: list[R | Exception] = parallel(delayed(_attempt)(work, item) for item in group)
        return results

    def _results(self, group: Future[list[R | Exception]]) -> Iterator[R]:
        try:
            results = group.result(timeout=PATIENCE)
        except TimeoutError:
            self._give_up()
            raise LocalError(f"our workers gave no result within {PATIENCE:.0f} s; are they running?") from None
        except Exception as error:
            if not (isinstance(error, TerminatedWorkerError) or type(error).__module__.startswith("distributed.")):
                raise
            raise LocalError(
                "one of our worker processes was ended from outside, perhaps for lack of memory; set fewer workers"
            ) from None
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result

    def _give_up(self) -> None:
        """End workers that hang: the threads that wait for them would keep this process from ending."""
        if self._client is None:
            get_reusable_executor(reuse=True).shutdown(wait=False, kill_workers=True)
        else:
            self._client.close()

    def close(self) -> None:
        """Leave the cluster, if any; processes of this machine end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()


def _attempt(work: Callable[[T], R], item: T) -> R | Exception:
    """An error is a result like others: joblib would end the workers under the other map that runs."""
    try:
        return work(item)
    except Exception as error:
        return error


def _connect(address: str) -> Any:
    try:
        from distributed import Client  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise LocalError("workers on a Dask cluster need: pip install 'colonnade[dask]'") from None
    try:
        return Client(address, timeout=CONNECT, set_as_default=False)  # type: ignore[no-untyped-call, unused-ignore]
    except (OSError, ValueError):
        raise LocalError(f"no Dask scheduler answers at {address}; start it, or set workers = 0") from None
