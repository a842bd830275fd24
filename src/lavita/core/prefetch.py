"""Does the next pieces of work in threads while the caller uses the current one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Argument = TypeVar("Argument")
Item = TypeVar("Item")
_END: Any = object()


def prefetch(items: Iterable[Item], depth: int = 1) -> Generator[Item, None, None]:
    """Yields the items in order; one thread makes up to `depth` items ahead of the caller.

    An exception raised while an item is made is raised in its place. Close the generator if you leave it early
    (`contextlib.closing`): that waits for the item being made and makes no further ones.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(next, source, _END) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(thread.submit(next, source, _END))
                yield item
        finally:
            for future in pending:
                future.cancel()


def parallel_map(
    function: Callable[[Argument], Item], arguments: Iterable[Argument], workers: int, depth: int | None = None
) -> Generator[Item, None, None]:
    """Yields `function(argument)` for each argument, in order, computed by several threads.

    Args:
        function: runs in threads, so it pays where it releases the interpreter's lock (decoding, reading, numpy).
        arguments: read lazily.
        workers: number of threads.
        depth: results that may be waiting or in the making; by default two for each thread.
    """
    remaining = iter(arguments)
    pending: deque[Future[Item]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(pending) < (depth or 2 * workers) and (argument := next(remaining, _END)) is not _END:
                pending.append(pool.submit(function, argument))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
