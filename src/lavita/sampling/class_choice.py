"""Which classes of a model to sample, by name or number."""

from __future__ import annotations

from collections.abc import Sequence

from lavita.core.progress import say

ALL = "all"


def parse_classes(choices: Sequence[str], names: Sequence[str]) -> list[int]:
    """Finds the classes that were asked for.

    A name wins over a number: if a data set has the folders 0, 1, 2 and 10, sorted 0, 1, 10, 2, then `2` is the folder
    2, whose number is 3. A line on stderr says so.

    Args:
        choices: each is `all`, the name of a class, or names and numbers separated by commas. A name with a comma in it
            is a choice of its own.
        names: of all classes, in the order of their numbers.

    Returns:
        Numbers of classes, in the order given, each once.

    Raises:
        ValueError: for a text that is neither a name nor a number of a class.
    """
    labels: list[int] = []
    for choice in choices:
        if choice == ALL:
            labels += range(len(names))
            if ALL in names:
                say(f"class {ALL} is taken for every class; the one of that name is class {names.index(ALL)}")
        elif choice in names:
            labels.append(_by_name(choice, names))
        else:
            labels += [_find(part.strip(), names) for part in choice.split(",")]
    return list(dict.fromkeys(labels))


def _find(word: str, names: Sequence[str]) -> int:
    if word in names:
        return _by_name(word, names)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    with_comma = next((name for name in names if "," in name), None)
    hint = f"; a name with a comma in it takes an option of its own: --classes {with_comma!r}" if with_comma else ""
    raise ValueError(f"class is {word!r}; allowed: all, {', '.join(names)}, or 0-{len(names) - 1}{hint}")


def _by_name(word: str, names: Sequence[str]) -> int:
    label = names.index(word)
    if word.isdecimal() and int(word) != label and int(word) < len(names):
        say(f"class {word} is taken for the name, which is class {label}; class {int(word)} is {names[int(word)]!r}")
    if "," in word and all(part.strip() in names for part in word.split(",")):
        say(f"class {word!r} is taken for one name, not for {word.count(',') + 1}")
    return label
