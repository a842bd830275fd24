"""Actions of the frames of videos: reading tables of them, and cutting out those of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lavita.core.progress import say
from lavita.core.text import by_normal_name, normal_name
from lavita.data.catalog import Catalog
from lavita.data.tables import read_rows

COLUMNS = ("file", "actions")


@dataclass(frozen=True)
class ActionTable:
    """The actions of the frames of some videos."""

    names: tuple[str, ...]
    """The actions, sorted."""
    rows: Mapping[str, torch.Tensor]
    """By video the numbers of the actions of its frames, int64 (frames,)."""

    def of_clip(self, video: str, start: int, num_frames: int) -> torch.Tensor:
        """The actions of successive frames of a video, int64 (num_frames,)."""
        return self.rows[video][start : start + num_frames]

    def texts(self) -> dict[str, str]:
        """The actions of each video, as one text."""
        return {video: " ".join(self.names[number] for number in row.tolist()) for video, row in self.rows.items()}


def match_actions(
    file: Path, catalog: Catalog, broken: Literal["skip", "error"] = "skip"
) -> tuple[ActionTable, Catalog]:
    """Finds the actions of a catalog's videos, and reduces the catalog to the videos that have them.

    Args:
        file: CSV with a header, JSONL or Parquet (extra `tables`), with the columns `file` (path below the folder of
            the videos) and `actions` (a text with an action for each frame, separated by white space, or a list).
        catalog: the videos.
        broken: `skip` leaves videos without actions out and counts them on stderr; `error` raises at the first.

    Raises:
        ValueError: if the table cannot be read, has none of the videos, has a video twice or another number of actions
            than the video has frames, or, with `broken="error"`, if a video has none.
    """
    frames = {video.name: video.info.num_frames for video in catalog.videos}
    known = by_normal_name(frames, file)
    found: dict[str, list[str]] = {}
    num_rows, example = 0, ""
    for number, row in read_rows(file, COLUMNS):
        if missing := [column for column in COLUMNS if row.get(column) is None]:
            raise ValueError(
                f"{file}: line {number} has no {missing[0]!r}; a table of actions has {', '.join(COLUMNS)}"
            )
        num_rows += 1
        name = known.get(normal_name(str(row["file"])))
        if name is None:
            example = example or str(row["file"])
            continue
        if name in found:
            raise ValueError(f"{file}: line {number} is about {name} a second time")
        value = row["actions"]
        if not isinstance(value, str | list) or not all(isinstance(action, str | int) for action in value):
            raise ValueError(
                f"{file}: line {number} has {value!r} for actions, but must have a text, with white space between the "
                "actions of the frames, or a list of names or whole numbers"
            )
        found[name] = value.split() if isinstance(value, str) else [str(action) for action in value]
        if len(found[name]) != frames[name]:
            raise ValueError(
                f"{file}: line {number} has {len(found[name])} actions for {name}, which has {frames[name]} frames"
            )
    if not found:
        raise ValueError(
            f"{file}: has no actions for any of the {len(frames)} files in {catalog.root}: it lists files such as "
            f"{example or 'none'!r}, the folder holds {catalog.videos[0].name!r}"
        )
    if num_rows > len(found):
        say(f"{file}: {num_rows - len(found):,} of {num_rows:,} rows are about other files, such as {example}")
    without = [name for name in frames if name not in found]
    if without and broken == "error":
        raise ValueError(f"{file}: has no actions for {without[0]}")
    if without:
        say(
            f"{file}: {len(without):,} of {len(frames):,} videos have no actions and are left out, such as {without[0]}"
        )
    names = tuple(sorted({action for actions in found.values() for action in actions}))
    numbers = {name: number for number, name in enumerate(names)}
    rows = {name: torch.tensor([numbers[action] for action in actions]) for name, actions in found.items()}
    return ActionTable(names, rows), catalog.only(set(found)) if without else catalog
