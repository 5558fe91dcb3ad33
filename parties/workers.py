"""The party's own parallel map: the one place where work is spread over cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from joblib import Parallel, delayed

T = TypeVar("T")
R = TypeVar("R")


def spread(work: Callable[[T], R], items: Iterable[T], workers: int = 1) -> Iterator[R]:
    """`map(work, items)` in order over `workers` processes of this machine; lazily, in this process, for one worker.

    `work` must be a module-level function (or a `functools.partial` of one). Items travel to the worker processes over
    local pipes, never over a network, and never through files (joblib would map large arrays to disk).
    """
    if workers <= 1:
        return map(work, items)
    results: Iterator[R] = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="2*n_jobs", max_nbytes=None)(
        delayed(work)(item) for item in items
    )
    return results
