"""Items made ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lavita.core.prefetch import ahead


def test_items_come_in_order_and_nothing_else() -> None:
    assert list(ahead(iter([3, None, 1]))) == [3, None, 1]
    assert list(ahead(iter([]))) == []


def test_an_item_is_made_while_the_one_before_is_in_use() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = ahead(items())
    for number in range(3):
        assert next(coming) == number
        assert made[number + 1].wait(60)
        assert not any(event.is_set() for event in made[number + 2 :])
    coming.close()


def test_what_the_making_raises_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="broken"):
        next(coming)


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    coming = ahead(iter(range(100)))
    next(coming)
    coming.close()
    assert threading.active_count() == before
