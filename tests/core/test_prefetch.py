"""Items made in threads ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from lavita.core.prefetch import parallel_map, prefetch

WAIT = 60  # seconds, for what must happen


def counted(made: list[threading.Event]) -> Iterator[int]:
    """The numbers of the events, each set when its number is made."""
    for number, event in enumerate(made):
        event.set()
        yield number


@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order_and_nothing_else(depth: int) -> None:
    assert list(prefetch([3, None, 1, 3], depth)) == [3, None, 1, 3]
    assert list(prefetch([], depth)) == []


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_as_many_items_as_the_depth_are_made_ahead_and_no_more(depth: int) -> None:
    made = [threading.Event() for _ in range(8)]
    with closing(prefetch(counted(made), depth)) as items:
        assert not any(event.is_set() for event in made)  # nothing before the first is asked for
        for number in range(3):
            assert next(items) == number
            assert made[number + depth].wait(WAIT)
            assert not any(event.is_set() for event in made[number + depth + 1 :])


def test_one_thread_makes_all_items() -> None:
    makers = (threading.get_ident() for _ in range(6))
    found = set(prefetch(makers, 3))
    assert len(found) == 1 and threading.get_ident() not in found


def test_an_exception_is_raised_in_the_place_of_the_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    coming = prefetch(items(), depth=3)
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(coming)


def test_closing_early_stops_the_making_and_the_thread() -> None:
    before = threading.active_count()
    made = [threading.Event() for _ in range(100)]
    items = prefetch(counted(made), depth=2)
    next(items)
    items.close()
    assert threading.active_count() == before
    assert sum(event.is_set() for event in made) <= 3
    assert list(items) == []


def test_results_come_in_the_order_of_the_arguments() -> None:
    second_done = threading.Event()

    def square(number: int) -> int:
        if number == 0:
            assert second_done.wait(WAIT)  # the first result is the last to be ready
        elif number == 1:
            second_done.set()
        return number**2

    assert list(parallel_map(square, range(10), workers=2)) == [number**2 for number in range(10)]
    assert list(parallel_map(square, [], workers=2)) == []


@pytest.mark.parametrize(("depth", "expected"), [(None, 4), (1, 1), (3, 3)])
def test_arguments_are_read_lazily(depth: int | None, expected: int) -> None:
    read: list[int] = []

    def arguments() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    with closing(parallel_map(abs, arguments(), workers=2, depth=depth)) as results:
        assert read == []
        for number in range(3):
            assert next(results) == number
            assert len(read) == expected + number


def test_an_exception_of_the_function_is_raised_in_its_place() -> None:
    results = parallel_map(lambda number: 1 // number, [1, 0, 1], workers=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_leaving_early_cancels_what_has_not_begun() -> None:
    begun, release = [], threading.Event()
    before = threading.active_count()

    def work(number: int) -> int:
        begun.append(number)
        if number:
            release.wait(WAIT)
        return number

    results = parallel_map(work, range(100), workers=1, depth=50)
    assert next(results) == 0
    threading.Timer(0.1, release.set).start()
    results.close()
    assert set(begun) <= {0, 1, 2} and len(begun) <= 3
    assert threading.active_count() <= before + 1  # the timer may be ending
