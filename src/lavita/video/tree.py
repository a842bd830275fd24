"""What a folder holds: its videos or images, each once, and a count of everything that is left out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavita.video.formats import FRAME_SUFFIXES, GENERATION, GIVEN, PROMPTS, VIDEO_SUFFIXES, PathLike

KINDS = {
    "images": "images next to videos",
    "videos": "videos next to images",
    "links": "links to what is here already",
    "unreadable": "folders that cannot be read",
}
"""What is left out, by kind, besides the files that are neither videos nor images."""
_MOST_SUFFIXES = 8
"""Suffixes that a note lists."""


@dataclass(frozen=True)
class VideoTree:
    """The videos, or images, below a folder, and what belongs to none of them. Hidden files and folders do not count.

    A file that has several names, by links of either kind, counts once: by a name without symbolic links on the way to
    it if there is one, else by the first of its names. So does a frame folder.
    """

    root: Path
    videos: tuple[Path, ...]
    """Video files and frame folders, sorted; the files of a folder come before its subfolders."""
    left_out: Mapping[str, tuple[int, str]]
    """What is left out: the number, and the first path below the root with forward slashes, by the name in `KINDS`; of
    files that are neither images nor videos by the suffix in lower case (empty for files without one)."""
    frame_folders: tuple[Path, ...]
    """Those of the videos that are folders of images."""
    empty_folders: tuple[str, ...]
    """Folders below the root, as paths below it, that hold no videos at any depth."""

    @property
    def counts(self) -> dict[str, int]:
        """The numbers in `left_out`."""
        return {kind: count for kind, (count, _) in self.left_out.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the folder, one line for each fact: what was left out, and a mixture."""
        parts = []
        for kind, text in KINDS.items():
            if kind in self.left_out:
                count, example = self.left_out[kind]
                parts.append(f"{count:,} {text}, such as {example}")
        others = {suffix: count for suffix, count in self.counts.items() if suffix not in KINDS}
        if others:
            listed = sorted(others.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in listed[:_MOST_SUFFIXES])
            more = f" and {len(listed) - _MOST_SUFFIXES} more suffixes" if len(listed) > _MOST_SUFFIXES else ""
            parts.append(f"{sum(others.values()):,} other files ({shown}{more})")
        lines = [f"{self.root}: left out: {'; '.join(parts)}"] if parts else []
        if 0 < (count := len(self.frame_folders)) < len(self.videos):
            example = self.frame_folders[0].relative_to(self.root).as_posix()
            lines.append(
                f"{self.root}: {count:,} of {len(self.videos):,} videos are folders of images, such as {example}"
            )
        return tuple(lines)


@dataclass
class _Folder:
    path: str
    linked: bool  # reached through a symbolic link
    videos: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """A file, or a folder of images, that may have other names."""

    path: str
    images: Sequence[str] | None  # of a folder, sorted
    linked: bool


class _LeftOut:
    """Counts what is left out."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, paths: Iterable[str]) -> None:
        for path in paths:
            count, first = self._kinds.get(kind, (0, path))
            self._kinds[kind] = count + 1, min(first, path)

    def counts(self) -> dict[str, tuple[int, str]]:
        """Number and first path below the root of each kind, sorted by kind."""
        return {
            kind: (count, Path(first).relative_to(self._root).as_posix())
            for kind, (count, first) in sorted(self._kinds.items())
        }


def find_videos(root: Path) -> VideoTree:
    """Finds every video below a folder.

    A folder of images is a video of its own, a frame folder, if there are no videos next to the images: neither video
    files, nor subfolders with video files or frame folders in them. Otherwise its images are stray ones.

    Raises:
        OSError: The folder itself cannot be read.
    """
    left_out = _LeftOut(root)
    folders = _walk(root, left_out)
    holders: set[str] = set()  # folders with videos in their subfolders
    frame_folders: set[str] = set()
    empty: list[str] = []
    for folder in reversed(folders):  # subfolders before the folders that hold them
        if folder.images and not folder.videos and folder.path not in holders:
            frame_folders.add(folder.path)
        if folder.images or folder.videos or folder.path in holders:
            holders.add(os.path.dirname(folder.path))
        else:
            empty.append(folder.path)
    found: list[_Found] = []
    for folder in folders:
        if folder.path in frame_folders:
            found.append(_Found(folder.path, folder.images, folder.linked))
            continue
        found += _files(folder, folder.videos)
        left_out.add("images", (os.path.join(folder.path, name) for name in folder.images))
    kept = _without_repeats(found, left_out)
    return VideoTree(
        root,
        tuple(Path(video.path) for video in kept),
        left_out.counts(),
        tuple(Path(video.path) for video in kept if video.images is not None),
        tuple(Path(path).relative_to(root).as_posix() for path in reversed(empty) if path != os.fspath(root)),
    )


def find_images(root: Path) -> VideoTree:
    """Finds every image file below a folder, in the order of `find_videos`; videos are left out.

    Raises:
        OSError: The folder itself cannot be read.
    """
    left_out = _LeftOut(root)
    found: list[_Found] = []
    for folder in _walk(root, left_out):
        found += _files(folder, folder.images)
        left_out.add("videos", (os.path.join(folder.path, name) for name in folder.videos))
    kept = _without_repeats(found, left_out)
    return VideoTree(root, tuple(Path(image.path) for image in kept), left_out.counts(), (), ())


def is_frame_folder(path: PathLike) -> bool:
    """Whether `path` is a folder of frames: a folder of images without videos next to them (see `find_videos`)."""
    path = Path(path)
    return path.is_dir() and find_videos(path).videos == (path,)


def _walk(root: Path, left_out: _LeftOut) -> list[_Folder]:
    """Every folder below the root once, sorted by path; links to folders are followed after all other folders."""
    folders: list[_Folder] = []
    seen: set[tuple[int, int]] = set()
    pending, linked = [os.fspath(root)], False
    links: list[str] = []
    while pending or links:
        if not pending:
            links.sort(reverse=True)
            pending, linked = [links.pop()], True
        path = pending.pop()
        try:
            if (identity := _identity(path)) in seen:
                left_out.add("links", [path])
                continue
            with os.scandir(path) as entries:
                listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            if path == os.fspath(root):
                raise
            left_out.add("unreadable", [path])
            continue
        seen.add(identity)
        folder = _Folder(path, linked)
        folders.append(folder)
        for entry in listed:
            suffix = os.path.splitext(entry.name)[1].lower()
            if _leads_to_folder(entry):
                (links if entry.is_symlink() else pending).append(entry.path)
            elif suffix in VIDEO_SUFFIXES and is_content(entry):
                folder.videos.append(entry.name)
            elif suffix in FRAME_SUFFIXES and is_content(entry):
                folder.images.append(entry.name)
            elif entry.name not in (GENERATION, PROMPTS, GIVEN):
                left_out.add(suffix, [entry.path])
    return sorted(folders, key=lambda folder: Path(folder.path).parts)


def _identity(path: str) -> tuple[int, int]:
    """Device and inode, which all names of a file share."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def is_content(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder counts as a video or an image by its suffix.

    It does if it is a file, or a link that leads nowhere: that is a broken video or frame, and not one less. Devices
    and pipes, which may block whoever reads them, do not.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link in a circle
        return True


def _files(folder: _Folder, names: Iterable[str]) -> list[_Found]:
    paths = [os.path.join(folder.path, name) for name in names]
    return [_Found(path, None, folder.linked or os.path.islink(path)) for path in paths]


def _without_repeats(found: Sequence[_Found], left_out: _LeftOut) -> list[_Found]:
    """The first name of each file, and of each folder with the same images; names without a link go first."""
    kept: set[int] = set()
    by_identity: dict[tuple[int, int], list[_Found]] = {}
    for number in sorted(range(len(found)), key=lambda number: (found[number].linked, number)):
        one = found[number]
        try:
            identity = _identity(one.path if one.images is None else os.path.join(one.path, one.images[0]))
        except OSError:  # a link that leads nowhere: the video is reported as broken
            kept.add(number)
            continue
        others = by_identity.setdefault(identity, [])
        if any(_has_same_images(one, other) for other in others):
            left_out.add("links", [one.path])
        else:
            kept.add(number)
            others.append(one)
    return [found[number] for number in sorted(kept)]


def _has_same_images(one: _Found, other: _Found) -> bool:
    """Whether two names of one file, or two folders with one first image, stand for the same video."""
    if one.images is None or other.images is None:
        return one.images is other.images
    if len(one.images) != len(other.images):
        return False
    try:
        return all(
            os.path.samefile(os.path.join(one.path, a), os.path.join(other.path, b))
            for a, b in zip(one.images, other.images, strict=True)
        )
    except OSError:
        return False
