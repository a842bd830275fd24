"""Makes the next item in a thread while the caller works on this one."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items in order, each made by a thread while the caller works on the one before it.

    What an item's making raises is raised in its place; to be closed where it is left early.
    """
    with ThreadPoolExecutor(1, "ahead") as reader:
        coming = reader.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = reader.submit(next, items, _END)
            yield item
