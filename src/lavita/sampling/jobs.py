"""Which videos `lavita sample` makes: one per seed and class, prompt, or video to go on with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavita.core.files import folded, inside
from lavita.core.text import normal_name
from lavita.data.captions import read_captions
from lavita.data.catalog import scan
from lavita.sampling.class_choice import ALL, parse_classes
from lavita.sampling.names import class_folders, prompt_folder, table_prefixes

MOST_SEEDS = 10**6


def parse_seeds(text: str) -> list[int]:
    """Parses seeds such as `0-3`, `1,5,9` or `0-3,9`, in the order given.

    Raises:
        ValueError: for another text, an empty range, or more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if match is None:
            raise ValueError(f"seeds is {text!r}; allowed: numbers and ranges such as 0-7 or 1,5,9")
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(seeds) + len(numbers) > MOST_SEEDS:
            raise ValueError(f"seeds is {text!r}; at most {MOST_SEEDS:,} seeds are allowed")
        seeds.extend(numbers)
    if not seeds:
        raise ValueError(f"seeds is {text!r}, an empty range")
    return seeds


class Job(NamedTuple):
    """One video to generate."""

    path: Path
    seed: int
    label: int | None = None
    prompt: str | None = None
    source: Path | None = None
    """The video of a folder that gives the frames."""


def plan_jobs(
    config: Mapping[str, Any],
    out: Path,
    suffix: str,
    seeds: list[int],
    classes: str | Sequence[str],
    prompts: Sequence[str],
    prompt_table: Path | None,
) -> list[Job]:
    """Lists the videos to generate with a class-conditional, a text-conditional or an unconditional model."""
    if (prompts or prompt_table is not None) and not config["text_dim"]:
        raise ValueError("a prompt was given, but this model has no texts")
    if config["num_classes"]:
        names = config["class_names"] or [str(label) for label in range(config["num_classes"])]
        asked = [classes] if isinstance(classes, str) else classes
        labels = parse_classes([normal_name(text) for text in asked], [normal_name(name) for name in names])
        folders = class_folders(names)
        return _distinct(
            Job(inside(out, f"{folders[label]}/{seed}{suffix}"), seed, label) for label in labels for seed in seeds
        )
    asked = classes if isinstance(classes, str) else ",".join(classes)
    if asked != ALL:
        raise ValueError(f"classes is {asked!r}, but this model has none")
    if not config["text_dim"]:
        return _distinct(Job(out / f"{seed}{suffix}", seed) for seed in seeds)
    rows: list[tuple[str, str]] = [(f"{prompt_folder(prompt)}/", prompt) for prompt in prompts]
    if prompt_table is not None:
        captions = read_captions(prompt_table)
        for file in captions:
            inside(out, file)  # else an error that names the file, not the name made of it
        rows += table_prefixes(captions)
    if not rows:
        raise ValueError("this model has texts: give --prompt, or a table with --prompts")
    return _distinct(
        Job(inside(out, f"{name}{seed}{suffix}"), seed, prompt=text) for name, text in rows for seed in seeds
    )


def plan_continuations(
    config: Mapping[str, Any],
    out: Path,
    suffix: str,
    seeds: list[int],
    classes: str | Sequence[str],
    folder: Path,
    labelled: bool,
) -> list[Job]:
    """Lists the videos to generate from the frames of each video in a folder."""
    if config["text_dim"]:
        raise ValueError("a folder of videos was given, but this model needs a prompt for each; give a single video")
    catalog = scan(folder)
    sources = {video.name: video for video in catalog.videos}
    labels: list[int | None] = [None]
    names = [normal_name(name) for name in config["class_names"] or map(str, range(config["num_classes"]))]
    asked = [classes] if isinstance(classes, str) else list(classes)
    by_folder = bool(names) and labelled and asked == [ALL]
    if names and labelled and not by_folder:
        labels = list(parse_classes([normal_name(text) for text in asked], names))
    elif not by_folder and asked != [ALL]:
        raise ValueError(f"classes is {','.join(asked)!r}, but no class is used here")
    jobs = []
    for prefix, source in table_prefixes({name: [name] for name in sources}):
        path = Path(sources[source].info.path)
        if by_folder:
            parent = normal_name(path.parent.name)
            if parent not in names:
                raise ValueError(f"{path}: its folder is no class of this model; give --classes or --unlabelled")
            labels = [names.index(parent)]
        for label in labels:
            group = f"{class_folders(names)[label]}/" if label is not None and not by_folder else ""
            jobs += [Job(inside(out, f"{group}{prefix}{seed}{suffix}"), seed, label, source=path) for seed in seeds]
    return _distinct(jobs)


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each job once; no two of them may have one file, on any file system."""
    owners: dict[str, Job] = {}
    for job in jobs:
        other = owners.setdefault(folded(job.path.as_posix()), job)
        if other != job:
            raise ValueError(f"{other.path} and {job.path} would be one file for two videos; sample them apart")
    return list(owners.values())
