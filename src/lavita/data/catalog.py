"""A folder of videos becomes a table of videos."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavita.video.formats import FRAME_SUFFIXES, VIDEO_SUFFIXES, VideoError, VideoInfo
from lavita.video.frame_folders import is_frame_folder
from lavita.video.reading import probe

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

    def only(self, names: Container[str]) -> Catalog:
        """The videos with these names; a class that none of them has is gone."""
        videos = [video for video in self.videos if video.name in names]
        kept = sorted({video.label for video in videos if video.label is not None})
        labels = {label: index for index, label in enumerate(kept)}
        return Catalog(
            self.root,
            tuple(Video(v.info, v.name, None if v.label is None else labels[v.label]) for v in videos),
            tuple(self.class_names[label] for label in kept),
            self.broken,
        )


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
    paths = find_images(root) if images else find_videos(root)
    found = [(path, path.parent.name if class_folders and path.parent != root else None) for path in paths]
    catalog = make_catalog(root, found, min_frames, broken, "image" if images else "video")
    for video in catalog.videos:
        if class_folders and video.label is None:
            raise ValueError(
                f"{video.info.path}: lies in no class folder; with class_folders each video must be in one"
            )
    return catalog


def make_catalog(
    root: Path,
    found: Iterable[tuple[Path, str | None]],
    min_frames: int = 1,
    broken: Literal["skip", "error"] = "skip",
    kind: Literal["video", "image"] = "video",
    probed: Mapping[Path, VideoInfo | VideoError] | None = None,
) -> Catalog:
    """Reads the headers of videos.

    Args:
        root: the data set's folder.
        found: videos below it, each with the name of its class or None.
        min_frames: shorter videos are broken ones.
        broken: as for `scan`.
        kind: what they are, for messages.
        probed: what `probe_all` said of each of them, if their headers have been read already.

    Raises:
        ValueError: where no video is usable, or, with `error`, one is broken.
    """
    class_of = dict(found)
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
        problems.append(str(result))
        print(f"skipped: {result}", file=sys.stderr)
    if not videos:
        words = f"{len(problems)} broken ones only, the first: {problems[0]}" if problems else "none"
        suffixes = FRAME_SUFFIXES if kind == "image" else VIDEO_SUFFIXES
        raise ValueError(f"{root}: no usable {kind}s (found {words}); {kind} files end in {' '.join(sorted(suffixes))}")
    classes = {info.path: class_of[info.path] for info in videos}
    class_names = tuple(sorted({name for name in classes.values() if name is not None}))
    index: dict[str | None, int] = {name: label for label, name in enumerate(class_names)}
    return Catalog(
        root,
        tuple(Video(info, info.path.relative_to(root).as_posix(), index.get(classes[info.path])) for info in videos),
        class_names,
        tuple(problems),
    )


def probe_all(
    paths: Iterable[Path], on_probed: Callable[[int], None] = lambda count: None
) -> Iterator[VideoInfo | VideoError]:
    """`video.probe` of many videos on all cores, in their order.

    Args:
        paths: the videos.
        on_probed: is told how many are done, after each.

    Yields:
        What a video holds, or why it cannot be read.
    """
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)  # threads: decoding and reading happen outside of the interpreter's lock
    pending: deque[Future[VideoInfo | VideoError]] = deque()
    count = 0
    try:
        remaining = iter(paths)
        while True:
            while len(pending) < 16 * workers and (path := next(remaining, None)) is not None:
                pending.append(pool.submit(_try_probe, path))
            if not pending:
                return
            result = pending.popleft().result()
            count += 1
            on_probed(count)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _try_probe(path: Path) -> VideoInfo | VideoError:
    try:
        return probe(path)
    except VideoError as error:
        return error
