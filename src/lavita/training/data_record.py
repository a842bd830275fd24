"""What a run is trained on, recorded in its folder: a run that is resumed with other videos would draw other clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lavita.core.config import ConfigError
from lavita.core.files import write_text
from lavita.data.catalog import Catalog, Video
from lavita.training.checkpoint import list_checkpoints

RECORD = "videos.json"

Facts = list[int | str]
"""Frames and bytes of a video, and a digest of its captions if there are any."""
Contents = dict[str, dict[str, Facts]]
"""The facts of each video by its name, for each folder of videos by what it is to the run."""


def video_facts(
    catalog: Catalog,
    num_bytes: Callable[[Video], int],
    captions: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Facts]:
    """The facts by which videos are recognised, by name.

    Args:
        catalog: the videos.
        num_bytes: the size of a video on the disk.
        captions: the captions of each video by its name; None without captions.
    """
    found: dict[str, Facts] = {}
    for video in catalog.videos:
        found[video.name] = [video.info.num_frames, num_bytes(video)]
        if captions is not None:
            texts = json.dumps(captions[video.name]).encode()
            found[video.name].append(hashlib.sha256(texts).hexdigest()[:16])
    return found


def check_contents(run_dir: Path, contents: Contents) -> None:
    """Refuses to resume a run on other videos; a folder without checkpoints or without a record is not checked.

    Raises:
        ConfigError: naming what was added, removed or changed.
    """
    file = run_dir / RECORD
    if not file.exists() or not list_checkpoints(run_dir / "checkpoints"):
        return
    way_on = f"use another run_dir, or delete {file} to go on with what is there now"
    try:
        before: Contents = json.loads(file.read_text(encoding="utf-8"))
        differences = [
            f"{kind}: {text}" for kind in contents if (text := _difference(before.get(kind, {}), contents[kind]))
        ]
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file}: damaged; {way_on}") from error
    if differences:
        raise ConfigError(
            f"{run_dir} was trained on other data ({'; '.join(differences)}), so that it would draw other clips now; "
            f"restore the data, {way_on}"
        )


def write_contents(run_dir: Path, contents: Contents) -> None:
    """Records the videos of a run, unless it is resumed and has a record."""
    if not (run_dir / RECORD).exists() or not list_checkpoints(run_dir / "checkpoints"):
        write_text(run_dir / RECORD, json.dumps(contents, ensure_ascii=False))


def _difference(before: Mapping[str, Facts], now: Mapping[str, Facts]) -> str:
    """What has changed, such as `1 added (b.mp4), 2 changed (a.mp4, ...)`; empty if nothing has."""
    changes = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    return ", ".join(
        f"{len(names):,} {change} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for change, names in changes.items()
        if names
    )
