"""Which classes `--classes` asks for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lavita.sampling.class_choice import parse_classes

GAMES = ["boxing", "enduro", "pong"]
NUMBERS = ["0", "1", "10", "2"]
FRUIT = ["apple", "apple, red", "pear", "red"]


@pytest.mark.parametrize(
    ("choices", "names", "labels"),
    [
        (["all"], GAMES, [0, 1, 2]),
        (["pong, 0"], GAMES, [2, 0]),
        (["2,pong,boxing"], GAMES, [2, 0]),
        (["pong", "enduro"], GAMES, [2, 1]),
        (["10"], NUMBERS, [2]),
        (["0,1"], NUMBERS, [0, 1]),
        (["apple, red"], FRUIT, [1]),
        (["apple,red"], FRUIT, [0, 3]),
        (["apple, red", "pear"], FRUIT, [1, 2]),
    ],
)
def test_names_numbers_and_several_options(choices: Sequence[str], names: Sequence[str], labels: list[int]) -> None:
    assert parse_classes(choices, names) == labels


@pytest.mark.parametrize(
    ("choice", "names", "labels", "line"),
    [
        ("2", NUMBERS, [3], "class 2 is taken for the name, which is class 3; class 2 is '10'"),
        ("apple, red", FRUIT, [1], "class 'apple, red' is taken for one name, not for 2"),
        ("all", ["a", "all"], [0, 1], "class all is taken for every class; the one of that name is class 1"),
        ("10", NUMBERS, [2], ""),
        ("0", NUMBERS, [0], ""),
        ("2", GAMES, [2], ""),
    ],
)
def test_a_name_wins_and_it_is_said(
    choice: str, names: Sequence[str], labels: list[int], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_classes([choice], names) == labels
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


@pytest.mark.parametrize("choice", ["chess", "3", "-1", "", "²", "pong,", "pong;0"])
def test_what_is_no_class_is_refused(choice: str) -> None:
    with pytest.raises(ValueError, match=r"class is '.*'; allowed: all, boxing, enduro, pong, or 0-2$"):
        parse_classes([choice], GAMES)


def test_a_name_with_a_comma_is_explained() -> None:
    with pytest.raises(
        ValueError, match="a name with a comma in it takes an option of its own: --classes 'apple, red'"
    ):
        parse_classes(["apple, red,green"], FRUIT)
