"""Buckets: clips of several shapes in one run, each batch of one of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Literal

from lavita.core.config import ConfigError
from lavita.core.progress import say
from lavita.core.seeds import numpy_generator
from lavita.core.sizes import Bucket, Size, listed_sizes, plain_size
from lavita.data.catalog import Catalog, Video
from lavita.data.clips import ClipDraw, ClipSampler, clip_span
from lavita.data.config import DataConfig
from lavita.video.formats import VideoInfo


def nearest_bucket(
    info: VideoInfo, buckets: Sequence[Bucket], frame_interval: int, sized: bool = False
) -> Bucket | None:
    """The bucket of a video: of those whose clips it is long enough for, the nearest in the ratio of the sides.

    Ratios are compared as factors, so that 2:1 is as far from a square as 1:2. Of equally near ones it is the one with
    the most values per clip, then the one with the most frames, then the first.

    Args:
        info: the video.
        buckets: the shapes.
        frame_interval: frames of the file from one frame of a clip to the next.
        sized: whether the frames have the size of their bucket already, as those of a cache; others are left out.

    Returns:
        None if the video is too short for all of them.
    """

    def distance(bucket: Bucket) -> tuple[Fraction, int, int]:
        # A fraction: logarithms would decide ties by their rounding.
        factor = Fraction(info.width * bucket.size.height, info.height * bucket.size.width)
        return max(factor, 1 / factor), -bucket.num_frames * bucket.size.area, -bucket.num_frames

    fitting = [
        bucket
        for bucket in buckets
        if clip_span(bucket.num_frames, frame_interval) <= info.num_frames
        and (not sized or bucket.size == Size(info.height, info.width))
    ]
    return min(fitting, key=distance, default=None)


def assign_buckets(
    catalog: Catalog,
    buckets: Sequence[Bucket],
    frame_interval: int,
    broken: Literal["skip", "error"] = "skip",
    sized: bool = False,
    needs_first: bool = False,
) -> Catalog:
    """Gives each video its bucket, and says on stderr how many each has; see `nearest_bucket`.

    Args:
        catalog: the videos.
        buckets: the shapes; without any the catalog stays as it is.
        frame_interval: see `nearest_bucket`.
        broken: what to do with videos that fit none: `skip` says so and leaves them out, `error` raises.
        sized: see `nearest_bucket`.
        needs_first: refuse a first bucket without videos, which samples would have the shape of.

    Raises:
        ValueError: if no video fits a bucket, or one does not with `broken="error"`, or the first bucket is empty.
    """
    if not buckets:
        return catalog
    videos, problems = [], []
    for video in catalog.videos:
        bucket = nearest_bucket(video.info, buckets, frame_interval, sized)
        if bucket is None:
            problems.append(f"{video.name}: has {video.info.num_frames} frames, too few for a bucket of its size")
        else:
            videos.append(replace(video, bucket=bucket))
    if problems and (broken == "error" or not videos):
        raise ValueError(f"{catalog.root}: {problems[0]}")
    for problem in problems:
        say(f"skipped: {problem}")
    counts = {bucket: sum(video.bucket == bucket for video in videos) for bucket in buckets}
    texts = [f"{bucket} {count:,} videos" if count else f"{bucket} NONE" for bucket, count in counts.items()]
    say(f"{catalog.root}: buckets: {', '.join(texts)}")
    if needs_first and not counts[buckets[0]]:
        raise ConfigError(
            f"{catalog.root}: no video is nearest to {buckets[0]}, the first of data.buckets, which samples have the "
            "shape of: name another bucket first"
        )
    return replace(catalog, videos=tuple(videos), broken=(*catalog.broken, *problems))


def check_sizes(there: Sequence[Size], buckets: Sequence[Bucket], name: str) -> None:
    """Checks that a cache has frames of exactly the sizes of a run's buckets; ValueError names both."""
    wanted = [bucket.size for bucket in buckets]
    if set(there) != set(wanted):
        raise ValueError(
            f"{name}: was made for buckets of {listed_sizes(there)}, but those of this run have "
            f"{listed_sizes(wanted)}; encode again, into another folder"
        )


class BucketSampler:
    """Draws the bucket of each step, and clips of it.

    The bucket is a pure function of (seed, step), so that a resumed run, all processes and all micro-batches of a step
    have the same one. Its probability is its share of the clips: as without buckets, every clip of the data is drawn
    equally often, whatever its shape.
    """

    def __init__(self, samplers: Sequence[ClipSampler], seed: int, stream: str = "bucket") -> None:
        """Takes one sampler for each bucket that has videos; samplers of another `stream` draw independently."""
        self.samplers, self._seed, self._stream = samplers, seed, stream
        self._ends = list(accumulate(sampler.num_clips for sampler in samplers))

    @property
    def num_clips(self) -> int:
        """Number of distinct clips of all buckets."""
        return self._ends[-1]

    def choose(self, step: int) -> int:
        """The position of a step's sampler in `samplers`."""
        number = int(numpy_generator(self._seed, self._stream, step).integers(self.num_clips))
        return bisect_right(self._ends, number)

    def at(self, step: int) -> ClipSampler:
        """The sampler of a step."""
        return self.samplers[self.choose(step)]

    def draw(self, step: int, index: int, attempt: int = 0) -> ClipDraw:
        """See `ClipSampler.draw`."""
        return self.at(step).draw(step, index, attempt)


class PairedSampler:
    """Draws the images of a step in the size of its bucket."""

    def __init__(self, buckets: BucketSampler, samplers: Sequence[ClipSampler]) -> None:
        """Takes one sampler of images for each sampler of `buckets`."""
        self._buckets, self._samplers = buckets, samplers

    def at(self, step: int) -> ClipSampler:
        """The sampler of a step."""
        return self._samplers[self._buckets.choose(step)]

    def draw(self, step: int, index: int, attempt: int = 0) -> ClipDraw:
        """See `ClipSampler.draw`."""
        return self.at(step).draw(step, index, attempt)


def clip_sampler(catalog: Catalog, data: DataConfig, seed: int) -> ClipSampler | BucketSampler:
    """The sampler of a run's training clips."""
    if not data.buckets:
        return ClipSampler(
            catalog, data.num_frames, data.frame_interval, data.horizontal_flip, seed, span=data.clip_span
        )
    return BucketSampler(_samplers(catalog, data, data.horizontal_flip, seed, "clip"), seed)


def validation_sampler(catalog: Catalog, data: DataConfig, seed: int) -> ClipSampler | BucketSampler:
    """The sampler of held-out clips; each clip draws its own bucket, in place of a step."""
    if not data.buckets:
        return ClipSampler(catalog, data.num_frames, data.frame_interval, False, seed, "validation")
    return BucketSampler(_samplers(catalog, data, False, seed, "validation"), seed, "validation bucket")


def image_sampler(
    catalog: Catalog, data: DataConfig, seed: int, clips: ClipSampler | BucketSampler
) -> ClipSampler | PairedSampler:
    """The sampler of the images of joint training: image files in any bucket's size, frames of videos in their own."""
    if isinstance(clips, ClipSampler):
        return ClipSampler(catalog, 1, 1, data.horizontal_flip, seed, "image")
    samplers = []
    for sampler in clips.samplers:
        images = catalog if data.images is not None else sampler.catalog
        samplers.append(ClipSampler(images, 1, 1, data.horizontal_flip, seed, "image", size=sampler.size))
    return PairedSampler(clips, samplers)


def used_buckets(catalog: Catalog, data: DataConfig) -> list[Bucket]:
    """The buckets that have videos, in the order of the configuration."""
    used = {video.bucket for video in catalog.videos}
    return [bucket for bucket in data.buckets if bucket in used]


def _samplers(catalog: Catalog, data: DataConfig, flip: bool, seed: int, stream: str) -> list[ClipSampler]:
    samplers = []
    for bucket in used_buckets(catalog, data):
        videos: tuple[Video, ...] = tuple(video for video in catalog.videos if video.bucket == bucket)
        samplers.append(
            ClipSampler(
                replace(catalog, videos=videos),
                bucket.num_frames,
                data.frame_interval,
                flip,
                seed,
                stream,
                size=plain_size(bucket.size),
            )
        )
    return samplers
