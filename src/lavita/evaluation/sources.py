"""Folders of real and generated videos: each is scanned once, each video hashed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lavita.core.progress import say
from lavita.data.catalog import Catalog, Video, make_catalog, probe_all, read_generation
from lavita.data.content_hash import content_hash
from lavita.video.formats import VideoError, VideoInfo
from lavita.video.reading import codec
from lavita.video.tree import find_videos


@dataclass(frozen=True)
class VideoFolder:
    """A folder of videos, real or generated. It is scanned once, and each video is hashed once."""

    root: Path
    _hashes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _catalogs: dict[int, Catalog] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _probed(self) -> dict[Path, VideoInfo | VideoError]:
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")
        tree = find_videos(self.root)
        for note in tree.notes:
            say(note)
        return dict(zip(tree.videos, probe_all(tree.videos), strict=True))

    def catalog(self, min_frames: int = 1, broken: Literal["skip", "error"] = "skip") -> Catalog:
        """Lists the readable videos; the folder that a video is in, if not `root`, is its class.

        Args:
            min_frames: shorter videos count as broken.
            broken: `skip` only names broken videos; `error` raises at the first.

        Raises:
            ValueError: if the folder is missing or has no usable video, or, with `error`, for a broken one.
        """
        catalog = self._catalogs.get(min_frames)
        if catalog is None or (catalog.broken and broken == "error"):
            found = [(path, None if path.parent == self.root else path.parent.name) for path in self._probed]
            catalog = make_catalog(self.root, found, min_frames, broken, probed=self._probed)
            self._catalogs[min_frames] = catalog  # asked for by several metrics; what is left out is said once
        return catalog

    def sha256(self, video: Video) -> str:
        """Hash of a video's content."""
        if video.name not in self._hashes:
            self._hashes[video.name] = content_hash(video.info.path)
        return self._hashes[video.name]

    def usable(self, min_frames: int = 1, skip_broken: bool = False, undecodable: Collection[str] = ()) -> Source:
        """Selects the videos that clips can be cut from.

        Args:
            min_frames: shorter videos count as broken.
            skip_broken: leave broken videos out, and count them, instead of raising.
            undecodable: names of videos that could not be decoded; they count as broken.

        Raises:
            ValueError: if the folder is missing or has no usable video, or for broken videos.
        """
        catalog = self.catalog(min_frames)
        if undecodable:
            kept = tuple(video for video in catalog.videos if video.name not in undecodable)
            lost = tuple(video.name for video in catalog.videos if video.name in undecodable)
            broken = catalog.broken + tuple(f"{name}: cannot be decoded" for name in lost)
            catalog = Catalog(self.root, kept, catalog.class_names, broken)
        if catalog.broken and not skip_broken:
            total = len(catalog.broken) + len(catalog.videos)
            raise ValueError(
                f"{self.root}: {len(catalog.broken)} of {total} videos cannot be used, the first: "
                f"{catalog.broken[0]}; --skip-broken continues without them"
            )
        return Source(catalog, self)


@dataclass(frozen=True)
class Source:
    """The usable videos of a folder, which clips are cut from."""

    catalog: Catalog
    folder: VideoFolder

    def facts(self) -> dict[str, Any]:
        """Facts for the report: numbers of videos, sizes, lengths, codecs."""
        infos = [video.info for video in self.catalog.videos]
        return {
            "folder": str(self.catalog.root),
            "num_videos": len(infos),
            "num_broken": len(self.catalog.broken),
            "broken": list(self.catalog.broken),
            "sizes": dict(Counter(f"{info.width}x{info.height}" for info in infos).most_common(5)),
            "frames": [min(info.num_frames for info in infos), max(info.num_frames for info in infos)],
            "codecs": dict(sorted(Counter(_encoding(info.path) for info in infos).items())),
        }


def _encoding(path: Path) -> str:
    """The codec and pixel format of a video, as in `h264 yuv420p`; for a folder of frames the suffixes of its files."""
    if path.is_dir():
        return "frames " + " ".join(sorted({file.suffix.lower() for file in path.iterdir() if file.suffix}))
    return codec(path)


def find_interval(generated: Path, frame_interval: int | None) -> int | None:
    """The frame interval of generated videos.

    Args:
        generated: their folder.
        frame_interval: the interval that was asked for, or None.

    Returns:
        The interval that was asked for; else the one that `lavita sample` recorded in the folder; else None.

    Raises:
        ValueError: if both are known and differ, or the interval is below 1.
    """
    recorded: int | None = (read_generation(generated) or {}).get("frame_interval")
    if frame_interval is None:
        return recorded
    if frame_interval < 1:
        raise ValueError(f"frame_interval is {frame_interval}; it must be at least 1")
    if recorded not in (None, frame_interval):
        raise ValueError(f"frame_interval is {frame_interval}, but the model of {generated} has {recorded}")
    return frame_interval
