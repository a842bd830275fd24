"""A folder of videos becomes a table of videos."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavita.video import FRAME_SUFFIXES, VIDEO_SUFFIXES, VideoError, VideoInfo, is_frame_folder, probe

GENERATION = "generation.json"


@dataclass(frozen=True)
class Video:
    """One video of a data set: what `video.probe` says of it, and its label."""

    info: VideoInfo
    name: str
    """Path below the data set's folder, with forward slashes."""
    label: int | None
    """Index into `Catalog.class_names`, or None without classes."""


@dataclass(frozen=True)
class Catalog:
    """A data set: its usable videos in the order of their names, and those that are broken."""

    root: Path
    videos: tuple[Video, ...]
    class_names: tuple[str, ...]
    """Sorted; empty without classes."""
    broken: tuple[str, ...]
    """One message a video that cannot be used, each beginning with its path."""


def read_generation(root: Path) -> dict[str, Any] | None:
    """How the videos of a generated folder were made, as `generation.json` says; None where nothing does.

    Raises:
        ValueError: where that file is damaged.
    """
    file = root / GENERATION
    if not file.exists():
        return None
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: damaged; remove it to use the folder without it") from error
    return settings


def find_videos(root: Path) -> Iterator[Path]:
    """Every video file and frame folder below `root`, sorted; hidden ones are left out."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(folder)
        if is_frame_folder(here):
            subfolders.clear()
            yield here
            continue
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield here / name


def find_images(root: Path) -> Iterator[Path]:
    """Every image file below `root`, sorted; hidden ones are left out."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in FRAME_SUFFIXES:
                yield Path(folder) / name


def scan(
    root: Path,
    class_folders: bool = False,
    min_frames: int = 1,
    broken: Literal["skip", "error"] = "skip",
    images: bool = False,
) -> Catalog:
    """Reads the headers of all videos below a folder.

    Args:
        root: the data set's folder.
        class_folders: take the name of each video's parent folder as its class.
        min_frames: shorter videos are broken ones.
        broken: `skip` names broken videos on the console and goes on; `error` raises at the first.
        images: take every image file as a video of one frame, and no videos.

    Raises:
        ValueError: for a folder that is missing or holds no usable video, a video outside a class folder,
            or, with `error`, a broken video.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    videos: list[tuple[VideoInfo, str, str]] = []
    problems: list[str] = []
    for path in find_images(root) if images else find_videos(root):
        try:
            info = probe(path)
            if info.num_frames < min_frames:
                raise VideoError(path, f"has {info.num_frames} frames, but a clip needs {min_frames}")
        except VideoError as error:
            if broken == "error":
                raise
            problems.append(str(error))
            print(f"skipped: {error}", file=sys.stderr)
            continue
        if class_folders and path.parent == root:
            raise ValueError(f"{path}: lies in no class folder; with class_folders each video must be in one")
        videos.append((info, path.relative_to(root).as_posix(), path.parent.name))
    if not videos:
        found = f"{len(problems)} broken ones only, the first: {problems[0]}" if problems else "none"
        kind, suffixes = ("image", FRAME_SUFFIXES) if images else ("video", VIDEO_SUFFIXES)
        raise ValueError(f"{root}: no usable {kind}s (found {found}); {kind} files end in {' '.join(sorted(suffixes))}")
    class_names = tuple(sorted({folder for _, _, folder in videos})) if class_folders else ()
    index = {name: label for label, name in enumerate(class_names)}
    return Catalog(
        root,
        tuple(Video(info, name, index.get(folder)) for info, name, folder in videos),
        class_names,
        tuple(problems),
    )
