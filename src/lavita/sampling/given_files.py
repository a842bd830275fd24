"""Frames that are given to sampled videos as files: images, videos, or a folder of videos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavita.core.progress import say
from lavita.core.sizes import AnySize, Size
from lavita.data.clips import center_crop_resize
from lavita.models.autoencoder import downsampling, temporal_downsampling
from lavita.models.shapes import sample_grid
from lavita.sampling.given import Places, check_places, listed
from lavita.sampling.jobs import Job
from lavita.sampling.pipeline import LavitaPipeline
from lavita.video.formats import Frames, VideoError
from lavita.video.reading import read_clip
from lavita.video.tree import is_frame_folder


@dataclass(frozen=True)
class GivenFiles:
    """Files whose frames are given to the videos."""

    image: Path | None = None
    """Image, or video for its first frame."""
    last_image: Path | None = None
    video: Path | None = None
    """Video whose first frames are given, or a folder of videos: one is generated for each of them."""
    keep_frames: int | None = None
    """Number of first frames of `video`; by default 1."""
    keep_every: int | None = None
    """Every n-th frame of `video` instead."""
    guided: bool = False
    """Guide towards the frames (see `LavitaPipeline`)."""
    exact: bool = False
    """Put the given pixels in the place of their decoded ones."""
    labelled: bool = True
    """False generates with "no class" in a model with classes, for a folder of videos."""

    def __post_init__(self) -> None:
        """Checks that the fields fit together.

        Raises:
            ValueError: if one has no effect without another, or two give the same frame.
        """
        if self.image is not None and self.video is not None:
            raise ValueError("image and video both give the first frame; give one of them")
        if self.video is None and (self.keep_frames is not None or self.keep_every is not None):
            raise ValueError("keep_frames and keep_every have no effect without a video")
        if self.keep_frames is not None and self.keep_every is not None:
            raise ValueError(f"keep_frames is {self.keep_frames} and keep_every {self.keep_every}; give one of them")
        if not self and (self.guided or self.exact):
            raise ValueError("guide_frames and exact have no effect without an image or a video")
        if not self.labelled and self.folder is None:
            raise ValueError("unlabelled has no effect without --video and a folder of videos")

    def __bool__(self) -> bool:
        """Whether any frame is given."""
        return any(path is not None for path in (self.image, self.last_image, self.video))

    @property
    def folder(self) -> Path | None:
        """`video`, if it is a folder of videos."""
        is_folder = self.video is not None and self.video.is_dir() and not is_frame_folder(self.video)
        return self.video if is_folder else None

    def places(self, num_frames: int) -> list[int]:
        """Which frames of `video` are given to a video of F frames: the first ones, or every n-th.

        Raises:
            ValueError: if nothing would be left to generate.
        """
        if self.keep_every is not None:
            if not 2 <= self.keep_every < num_frames:
                raise ValueError(f"keep_every is {self.keep_every}, but must be in 2..{num_frames - 1}")
            return list(range(0, num_frames, self.keep_every))
        number = 1 if self.keep_frames is None else self.keep_frames
        if self.video is not None and not 1 <= number < num_frames:
            raise ValueError(
                f"keep_frames is {number}, but must be in 1..{num_frames - 1}: a video has {num_frames} frames"
            )
        return list(range(number))


NO_FILES = GivenFiles()


def read_given(
    given: GivenFiles, jobs: Sequence[Job], pipeline: LavitaPipeline, num_frames: int, size: AnySize | None = None
) -> dict[Path, dict[int, Frames]]:
    """The given frames of each job, by its file; empty without any. `size`: the videos', if not the model's."""
    if not given:
        return {}
    config = pipeline.transformer.config
    unit = downsampling(pipeline.vae)
    height, width = (side * unit for side in sample_grid(config))
    fit = Fitting(Size(height, width) if size is None else Size.of(size))
    shared: dict[int, Frames] = {}
    for path, place in ((given.image, 0), (given.last_image, num_frames - 1)):
        if path is not None:
            shared[place] = fit(path, read_places(path, [0], 1))[0]
    found: dict[Path | None, dict[int, Frames]] = {None: shared}
    places = given.places(num_frames)
    for source in dict.fromkeys(job.source or given.video for job in jobs):
        if source is not None:
            found[source] = {**fit(source, read_places(source, places, config["frame_interval"])), **shared}
    if temporal_downsampling(pipeline.vae.config) == 1:  # else it is known when they are encoded
        for each in found.values():
            if each:
                check_places(config, sorted(each), num_frames)
    fit.report()
    return {job.path: dict(sorted(found[job.source or given.video].items())) for job in jobs}


def read_places(path: Path, places: Sequence[int], frame_interval: int) -> dict[int, Frames]:
    """Reads frames of a video, or an image.

    Args:
        path: video file, frame folder or image.
        places: frames of the clip that starts with the video, rising.
        frame_interval: frames of the file from one frame of the clip to the next.

    Raises:
        VideoError: if the file is missing, broken or too short.
    """
    if not path.exists():
        raise VideoError(path, "cannot be found")
    return dict(zip(places, read_clip(path, 0, places[-1] + 1, frame_interval)[list(places)], strict=True))


class Fitting:
    """Crops and scales given frames to the size of the model's videos, and counts what was not of this size."""

    def __init__(self, size: Size) -> None:
        """`size` is that of the videos in pixels."""
        self._size = size
        self._others: list[str] = []

    def __call__(self, path: Path, places: Places) -> dict[int, Frames]:
        """The frames of a file in the size of the videos."""
        height, width = next(iter(places.values())).shape[:2]
        if (height, width) != (self._size.height, self._size.width):
            self._others.append(f"{path} is {width}x{height}")
        fitted = center_crop_resize(np.stack(list(places.values())), self._size)
        return dict(zip(places, fitted, strict=True))

    def report(self) -> None:
        """Says on stderr what was cropped and scaled, in one line."""
        if self._others:
            more = f" (and {len(self._others) - 1:,} more are of other sizes)" if self._others[1:] else ""
            say(f"{self._others[0]}{more}: the middle is cut out and scaled to {self._size.width}x{self._size.height}")


def digest(places: Places) -> str:
    """A text that tells given frames apart: their places and a hash of their pixels."""
    pixels = hashlib.sha256(b"".join(frame.tobytes() for frame in places.values())).hexdigest()[:16]
    return f"{listed(list(places))}: {pixels}"
