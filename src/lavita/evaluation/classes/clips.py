"""Generated clips and the real videos that their classes are compared with, and at what size."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lavita.core.progress import Progress
from lavita.data.catalog import Catalog, Video, scan
from lavita.data.clips import center_crop_resize, clip_span
from lavita.evaluation.clips import check_interval, refuse_broken
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]

MAX_REAL_VIDEOS = 32
"""Real videos that are looked at in each class: enough to know a class, whatever the size of the data set."""


@dataclass(frozen=True)
class Comparison:
    """Generated clips and the real videos that they are compared with; made by `compare`."""

    real: Catalog
    generated: Catalog
    held_out: Catalog | None
    num_frames: int
    """Frames of a clip, generated or real."""
    frame_interval: int
    """Frames of a real video from one frame of a clip to the next, as the model was trained."""
    resolution: int
    """Side of the generated frames' middle square; real frames are shrunk or enlarged to it."""
    seed: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that were generated, sorted: all of the real ones or some."""
        return self.generated.class_names

    def generated_clips(self) -> Iterator[tuple[str, Video, Frames]]:
        """Every generated clip as (class asked for, video, uint8 `(F, resolution, resolution, 3)`)."""
        for video in self.generated.videos:
            frames = np.stack(list(iter_frames(video.info.path)))
            yield class_of(self.generated, video), video, center_crop_resize(frames, self.resolution)

    def real_clips(self, catalog: Catalog, class_names: Collection[str]) -> Iterator[tuple[str, Frames]]:
        """Clips of a catalog's videos, of some classes, as (class, uint8 `(F, resolution, resolution, 3)`)."""
        videos = [video for video in spread_videos(catalog) if class_of(catalog, video) in class_names]
        progress = Progress(f"{catalog.root}: video", len(videos))
        for number, video in enumerate(videos, start=1):
            for clip in cut_clips(video.info.path, self.num_frames, self.frame_interval, self.resolution):
                yield class_of(catalog, video), clip
            progress.update(number)


def compare(
    real: Path,
    generated: Path,
    held_out: Path | None = None,
    frame_interval: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
) -> Comparison:
    """Reads the headers of all videos and checks that they can be compared.

    Args:
        real: folder of class folders of real videos.
        generated: folder of class folders of generated clips, all of one size and length.
        held_out: like `real`, of videos that were not trained on.
        frame_interval: that of the model, >= 1; by default what `lavita sample` recorded beside the clips, else 1.
        seed: of everything random in the metrics.
        skip_broken: go on without real videos that are broken or too short, instead of raising.

    Raises:
        ValueError: for a folder that is missing or holds no usable video, videos outside class folders, generated or
            held-out classes that `real` does not have, generated clips of several sizes, or real videos all shorter
            than a clip, or a frame interval other than the recorded one.
    """
    frame_interval = check_interval(generated, frame_interval) or 1
    clips = scan(generated, class_folders=True, broken="error")
    first = clips.videos[0].info
    for video in clips.videos:
        info = video.info
        if (info.num_frames, info.width, info.height) != (first.num_frames, first.width, first.height):
            raise ValueError(
                f"{info.path}: has {info.num_frames} frames of {info.width}x{info.height}, but {first.path} has "
                f"{first.num_frames} of {first.width}x{first.height}; generated clips must all be of one size"
            )
    min_frames = clip_span(first.num_frames, frame_interval)
    videos = refuse_broken(scan(real, class_folders=True, min_frames=min_frames), skip_broken)
    _check_classes(clips, videos)
    checks = None
    if held_out is not None:
        checks = refuse_broken(scan(held_out, class_folders=True, min_frames=min_frames), skip_broken)
        _check_classes(checks, videos)
    resolution = min(first.width, first.height)
    return Comparison(videos, clips, checks, first.num_frames, frame_interval, resolution, seed)


def _check_classes(catalog: Catalog, real: Catalog) -> None:
    unknown = sorted(set(catalog.class_names) - set(real.class_names))
    if unknown:
        raise ValueError(
            f"{catalog.root}: has the class {unknown[0]!r}, which {real.root} has no usable videos of; "
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


def cut_clips(path: Path, num_frames: int, frame_interval: int, resolution: int) -> Iterator[Frames]:
    """Cuts a video into clips that do not overlap, decoding it once; what is left at its end is not used.

    Args:
        path: a video file or frame folder.
        num_frames: frames of a clip, F.
        frame_interval: frames of the video from one frame of a clip to the next.
        resolution: side of the clips after center crop and resize.

    Yields:
        uint8 `(F, resolution, resolution, 3)`.
    """
    span = clip_span(num_frames, frame_interval)
    kept: list[Frames] = []
    for number, frame in enumerate(iter_frames(path)):
        if number % span % frame_interval == 0:
            kept.append(frame)
        if len(kept) == num_frames:
            yield center_crop_resize(np.stack(kept), resolution)
            kept = []
