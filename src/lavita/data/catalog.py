"""Catalogs: the usable videos of a data set, counted and labelled."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lavita.core.prefetch import parallel_map
from lavita.core.progress import say
from lavita.core.sizes import Bucket
from lavita.core.text import by_normal_name, normal_name
from lavita.video.formats import COMMON_SUFFIXES, FRAME_SUFFIXES, GENERATION, VideoError, VideoInfo
from lavita.video.reading import probe
from lavita.video.tree import find_images, find_videos


@dataclass(frozen=True)
class Video:
    """A video, or an image, of a data set."""

    info: VideoInfo
    name: str
    """Path below the data set's folder, with forward slashes."""
    label: int | None
    """Index into `Catalog.class_names`, or None without classes."""
    bucket: Bucket | None = None
    """The shape of its clips in a run with several, see `data.buckets`."""


@dataclass(frozen=True)
class Catalog:
    """The usable videos of a data set, sorted by folder and name, and the broken ones."""

    root: Path
    videos: tuple[Video, ...]
    class_names: tuple[str, ...]
    """Sorted, in their normal form (`core.text.normal_name`); empty without classes."""
    broken: tuple[str, ...]
    """One message per video that cannot be used; each begins with the video's name."""

    def only(self, names: Container[str]) -> Catalog:
        """Keeps the videos with these names, and the classes that they have."""
        videos = [video for video in self.videos if video.name in names]
        kept = sorted({video.label for video in videos if video.label is not None})
        labels = {label: index for index, label in enumerate(kept)}
        return Catalog(
            self.root,
            tuple(replace(video, label=None if video.label is None else labels[video.label]) for video in videos),
            tuple(self.class_names[label] for label in kept),
            self.broken,
        )


def read_generation(root: Path) -> dict[str, Any] | None:
    """Reads how the videos of a folder were generated from its `generation.json`; None if there is no such file.

    Raises:
        ValueError: if that file is damaged.
    """
    file = root / GENERATION
    if not file.exists():
        return None
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged; remove it to use the folder without it") from error
    return settings


def scan(
    root: Path,
    class_folders: bool = False,
    min_frames: int = 1,
    broken: Literal["skip", "error"] = "skip",
    images: bool = False,
) -> Catalog:
    """Catalogs all videos below a folder, and says on stderr how many were found and what is left out.

    Args:
        root: the data set's folder.
        class_folders: use the name of each video's parent folder as its class.
        min_frames: shorter videos count as broken.
        broken: `skip` reports broken videos on stderr and leaves them out; `error` raises at the first.
        images: catalog the image files below the folder instead, each as a video of one frame.

    Raises:
        ValueError: if the folder is missing or has no usable video, if a video is in no class folder, or, with
            `broken="error"`, if a video is broken.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    tree = find_images(root) if images else find_videos(root)
    for note in tree.notes:
        say(note)
    if class_folders and tree.empty_folders:
        count, example = len(tree.empty_folders), tree.empty_folders[0]
        say(f"{root}: {count:,} folders hold no videos and are no classes, such as {example}")
    found = [(path, path.parent.name if class_folders and path.parent != root else None) for path in tree.videos]
    catalog = make_catalog(root, found, min_frames, broken, "image" if images else "video")
    for video in catalog.videos:
        if class_folders and video.label is None:
            raise ValueError(f"{video.info.path}: is in no class folder, which class_folders needs for every video")
    return catalog


def make_catalog(
    root: Path,
    found: Iterable[tuple[Path, str | None]],
    min_frames: int = 1,
    broken: Literal["skip", "error"] = "skip",
    kind: Literal["video", "image"] = "video",
    probed: Mapping[Path, VideoInfo | VideoError] | None = None,
) -> Catalog:
    """Counts and measures videos, and numbers their classes by name.

    Args:
        root: the data set's folder.
        found: videos below it, each with the name of its class or None.
        min_frames: shorter videos count as broken.
        broken: see `scan`.
        kind: what the videos are, for messages.
        probed: results of `probe_all`, if the headers have been read already.

    Raises:
        ValueError: if no video is usable, if the names of two are one in different Unicode forms, or, with
            `broken="error"`, if a video is broken.
    """
    class_of = {path: None if name is None else normal_name(name) for path, name in found}
    by_normal_name((path.relative_to(root).as_posix() for path in class_of), root)
    videos: list[VideoInfo] = []
    problems: list[str] = []
    results = probe_all(class_of) if probed is None else (probed[path] for path in class_of)
    for path, result in zip(class_of, results, strict=True):
        if isinstance(result, VideoInfo):
            if result.num_frames >= min_frames:
                videos.append(result)
                continue
            result = VideoError(path, f"has {result.num_frames} frames, but a clip needs {min_frames}")
        if broken == "error":
            raise result
        problems.append(f"{path.relative_to(root).as_posix()}: {result.problem}")
        say(f"skipped: {problems[-1]}")
    if not videos:
        count = f"only {len(problems)} broken ones, the first: {problems[0]}" if problems else "none"
        suffixes = ", ".join(sorted(FRAME_SUFFIXES)) if kind == "image" else f"{COMMON_SUFFIXES}, ..."
        raise ValueError(f"{root}: no usable {kind}s (found {count}); the names of {kind} files end in {suffixes}")
    classes = {info.path: class_of[info.path] for info in videos}
    class_names = tuple(sorted({name for name in classes.values() if name is not None}))
    lost_classes = {name for name in class_of.values() if name is not None} - set(class_names)
    if note := unusable_note(root, len(videos), len(problems), lost_classes, kind):
        say(note)
    index: dict[str | None, int] = {name: label for label, name in enumerate(class_names)}
    return Catalog(
        root,
        tuple(Video(info, info.path.relative_to(root).as_posix(), index.get(classes[info.path])) for info in videos),
        class_names,
        tuple(problems),
    )


def unusable_note(
    root: Path, num_used: int, num_unusable: int, lost_classes: Collection[str], kind: str = "video"
) -> str | None:
    """One line about the videos that are left out because they cannot be used; None if all can be.

    Args:
        root: the folder of the videos.
        num_used: usable videos.
        num_unusable: the others.
        lost_classes: classes without a usable video, which are no classes then.
        kind: what the videos are.
    """
    if not num_unusable:
        return None
    note = f"{root}: {num_used:,} of {num_used + num_unusable:,} {kind}s are used, {num_unusable:,} are left out"
    if lost_classes:
        note += f"; {len(lost_classes):,} classes have no usable {kind}, such as {min(lost_classes)!r}"
    return note


def probe_all(paths: Iterable[Path]) -> Iterator[VideoInfo | VideoError]:
    """Counts and measures many videos on all cores.

    Yields:
        For each path, in order, the facts of its video, or the error that says why it cannot be read.
    """
    workers = os.cpu_count() or 1
    return parallel_map(_try_probe, paths, workers, depth=16 * workers)


def _try_probe(path: Path) -> VideoInfo | VideoError:
    try:
        return probe(path)
    except VideoError as error:
        return error
