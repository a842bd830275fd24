"""Names of samples: different jobs have different files, and a name does not depend on what else is asked for.

A name is what a reader expects where that is unambiguous: the class, the words of a prompt in small letters, the file
of a table. All other names end in a hash of the text, as `a-dog--1f0c3a9b2d4e`, which no readable name does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lavita.core.files import folded, hashed_name, is_plain_name

_MOST_LETTERS = 80


def class_folders(names: Sequence[str]) -> list[str]:
    """The folder of each class: its name, unless it cannot be one, or differs from another's by its case only."""
    counts = Counter(map(folded, names))
    return [name if is_plain_name(name) and counts[folded(name)] == 1 else hashed_name(name) for name in names]


def prompt_folder(prompt: str) -> str:
    """The folder of a prompt: its words joined by hyphens, if the prompt can be read off them."""
    words = "-".join(re.findall(r"\w+", prompt))
    is_exact = words.replace("-", " ") == prompt and folded(prompt) == prompt and len(words) <= _MOST_LETTERS
    return words if is_exact and is_plain_name(words) else hashed_name(prompt)


def table_prefixes(captions: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Names and prompts of the rows of a table.

    Args:
        captions: the captions of each file, as `captions.read_captions` gives them.

    Returns:
        For each file and caption what the names of its samples begin with, and the caption. It begins with the path of
        the file, without `.mp4`; for one of several captions a hash follows.
    """
    readable = {file: _readable(file) for file in captions}
    counts = Counter(folded(name) for name in readable.values())
    rows = []
    for file, texts in captions.items():
        name = readable[file]
        if not all(map(is_plain_name, name.split("/"))) or counts[folded(name)] > 1:
            name = hashed_name(file)
        distinct = list(dict.fromkeys(texts))
        for text in distinct:
            mark = hashed_name("\0".join((file, text)))[-14:] if len(distinct) > 1 else ""
            rows.append((f"{name}{mark}-", text))
    return rows


def _readable(file: str) -> str:
    """A file without `.mp4`, or as it is if it has another suffix, so that `a.mp4` and `a.mkv` differ; or empty."""
    stem = file.removesuffix(".mp4")
    has_dot = "." in stem.rpartition("/")[2]
    if stem != file and not has_dot:
        return stem
    return file if has_dot else ""  # without a suffix, it could be any video's
