"""The clips that class metrics look at: every generated video, and real videos of each class."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from lavita.data.catalog import Catalog, Video
from lavita.data.clips import clip_span
from lavita.evaluation.clips import ClipSet, successive_clips
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.sources import Source, VideoFolder, find_interval

MAX_REAL_VIDEOS = 32
"""Real videos that are looked at in each class: enough to know a class, however large the data set."""


@dataclass(frozen=True)
class ClassVideos:
    """Videos whose classes are compared; made by `select_videos`."""

    real: Source
    generated: Source
    held_out: Source | None
    num_frames: int
    """Frames of a clip, generated or real."""
    frame_interval: int
    """Step from one frame of a real clip to the next, in frames of the video."""
    resolution: int
    """Side of the generated frames' middle square; real frames are resized to it."""
    seed: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that were generated, sorted: all of the real ones or some."""
        return self.generated.catalog.class_names

    def generated_clips(self) -> ClipSet:
        """Every generated video as one clip."""
        return successive_clips(self.generated, self.generated.catalog.videos, self.num_frames, 1)

    def real_clips(self, source: Source, class_names: Collection[str]) -> ClipSet:
        """Successive clips of some videos of each class, `source` being `real` or `held_out`."""
        videos = [video for video in spread_videos(source.catalog) if class_of(source.catalog, video) in class_names]
        return successive_clips(source, videos, self.num_frames, self.frame_interval)


def select_videos(
    real: VideoFolder,
    generated: VideoFolder,
    held_out: VideoFolder | None,
    protocol: Protocol,
    skip_broken: bool = False,
) -> ClassVideos:
    """Checks that the classes of three folders can be compared.

    Args:
        real: class folders of real videos.
        generated: class folders of generated videos, all of one size and length.
        held_out: like `real`, of videos that were not trained on.
        protocol: its frame interval, by default the one recorded with the generated videos, else 1; and its seed.
        skip_broken: leave out real videos that are broken or too short, instead of raising.

    Raises:
        ValueError: for a folder that is missing or has no usable video, videos outside class folders, generated or
            held-out classes that `real` does not have, generated videos of several sizes, or a frame interval other
            than the recorded one.
    """
    interval = find_interval(generated.root, protocol.frame_interval) or 1
    made = generated.catalog(broken="error")
    _check_class_folders(made)
    first = made.videos[0].info
    for video in made.videos:
        info = video.info
        if (info.num_frames, info.width, info.height) != (first.num_frames, first.width, first.height):
            raise ValueError(
                f"{info.path}: has {info.num_frames} frames of {info.width}x{info.height}, but {first.path} has "
                f"{first.num_frames} of {first.width}x{first.height}; generated clips must all be of one size"
            )
    span = clip_span(first.num_frames, interval)
    references = real.usable(span, skip_broken)
    _check_class_folders(references.catalog)
    _check_classes(made, references.catalog)
    checks = None
    if held_out is not None:
        checks = held_out.usable(span, skip_broken)
        _check_class_folders(checks.catalog)
        _check_classes(checks.catalog, references.catalog)
    return ClassVideos(
        real=references,
        generated=Source(made, generated),
        held_out=checks,
        num_frames=first.num_frames,
        frame_interval=interval,
        resolution=min(first.width, first.height),
        seed=protocol.seed,
    )


def _check_class_folders(catalog: Catalog) -> None:
    for video in catalog.videos:
        if video.label is None:
            raise ValueError(f"{video.info.path}: is not in a class folder; class metrics need every video in one")


def _check_classes(catalog: Catalog, real: Catalog) -> None:
    unknown = sorted(set(catalog.class_names) - set(real.class_names))
    if unknown:
        raise ValueError(
            f"{catalog.root}: has the class {unknown[0]!r}, of which {real.root} has no usable video; "
            f"its classes: {', '.join(real.class_names)}"
        )


def class_of(catalog: Catalog, video: Video) -> str:
    """The name of a video's class; the catalog must be one with classes."""
    assert video.label is not None
    return catalog.class_names[video.label]


def spread_videos(catalog: Catalog) -> list[Video]:
    """At most `MAX_REAL_VIDEOS` of each class, evenly spaced over the sorted names."""
    chosen = []
    for label in range(len(catalog.class_names)):
        videos = [video for video in catalog.videos if video.label == label]
        picked = np.linspace(0, len(videos) - 1, min(len(videos), MAX_REAL_VIDEOS)).round().astype(int)
        chosen += [videos[index] for index in picked]
    return chosen
