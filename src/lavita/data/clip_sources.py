"""Sources of latent clips: videos that are decoded and encoded on demand, or a latent cache (`latent_cache.encode`).

A cache is a folder with `manifest.json` and shards (`latent_cache.shards`). It holds the latents of every frame, so
that clips of any start and interval can be drawn from it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from lavita.core.config import ConfigError
from lavita.core.precision import Precision
from lavita.core.prefetch import parallel_map
from lavita.core.sizes import AnySize
from lavita.core.text import normal_name
from lavita.data.buckets import assign_buckets
from lavita.data.catalog import Catalog, Video, scan
from lavita.data.clips import ClipDraw, clip_span, read_pixels
from lavita.data.config import SPLITS, DataConfig, Fit
from lavita.data.content_hash import source_bytes
from lavita.data.datasets import list_dataset, open_dataset
from lavita.data.latent_cache.manifest import MANIFEST
from lavita.data.latent_cache.reading import CacheSource, LatentClip
from lavita.data.latent_cache.statistics import spread_frames
from lavita.models.autoencoder import Autoencoder, encode, latent_frames, latent_grid, temporal_downsampling
from lavita.models.latent_statistics import LatentMoments, LatentStatistics
from lavita.video.formats import Frames, VideoError

MEASURED_FRAMES = 128
"""Frames whose latents are measured without a cache: each of them has to be decoded and encoded."""
MEASURED_GROUPS = 3
"""Groups of merged frames after the first frame of the clips that are measured with temporal downsampling."""


class ClipSource(Protocol):
    """Gives the latents of drawn clips."""

    catalog: Catalog

    def num_bytes(self, video: Video) -> int:
        """Size of a video of the catalog on the disk; see `content_hash.source_bytes`."""
        ...

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Reads the latents of a clip."""
        ...

    def read_many(self, draws: Sequence[ClipDraw], num_frames: int, frame_interval: int) -> list[LatentClip]:
        """Reads the latents of several clips, in order."""
        ...

    def statistics(self) -> LatentStatistics:
        """Mean and standard deviation of each channel of the latents."""
        ...


class VideoSource:
    """Decodes clips from the videos and encodes them."""

    def __init__(
        self,
        catalog: Catalog,
        vae: Autoencoder,
        resolution: AnySize,
        precision: Precision = "auto",
        workers: int | None = None,
        fit: Fit = "crop",
    ) -> None:
        """Prepares to read the catalog's videos.

        Args:
            catalog: the videos.
            vae: the autoencoder.
            resolution: size of the frames in pixels, for draws and videos that have none of their own.
            precision: see `core.precision.autocast`.
            workers: number of threads that decode; by default one per core, at most 8.
            fit: how frames of other sizes get it, see `clips.fit_frames`.
        """
        self.fit = fit
        self.catalog, self.vae, self.resolution, self.precision = catalog, vae, resolution, precision
        # Threads: decoding releases the interpreter's lock, and processes would each hold a copy of the catalog.
        self.workers = workers or min(8, os.cpu_count() or 1)

    def num_bytes(self, video: Video) -> int:
        """Size of a video on the disk; OSError if it is gone."""
        return source_bytes(video.info.path)

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Decodes, crops, mirrors and encodes a clip."""
        return self.read_many([draw], num_frames, frame_interval)[0]

    def read_many(self, draws: Sequence[ClipDraw], num_frames: int, frame_interval: int) -> list[LatentClip]:
        """Decodes several clips in parallel while it encodes them in order.

        Raises:
            VideoError: if one of them cannot be decoded.
        """

        def decode(draw: ClipDraw) -> Frames:
            bucket = draw.video.bucket
            size = draw.size or (self.resolution if bucket is None else bucket.size)
            return read_pixels(draw, num_frames, frame_interval, size, self.fit)

        # Encoded one by one: the size of a batch changes the last bits of its latents, so that processes that share a
        # training batch would train on other numbers than one process.
        latents = (encode(self.vae, pixels, self.precision) for pixels in parallel_map(decode, draws, self.workers))
        # Rounded as in the cache, so that both sources give the same numbers.
        return [(mean.half().float(), std.half().float()) for mean, std in latents]

    def statistics(self) -> LatentStatistics:
        """Measures `MEASURED_FRAMES` frames that are spread evenly over the videos; unreadable ones are left out.

        Raises:
            ValueError: if none of them can be read.
        """
        moments, videos = LatentMoments(), self.catalog.videos
        factor = temporal_downsampling(self.vae.config)
        # Latents of several frames differ from those of one: short clips are measured then.
        groups = MEASURED_GROUPS if factor > 1 else 0
        lengths = [video.info.num_frames for video in videos]
        for number, frame in spread_frames(lengths, MEASURED_FRAMES // (1 + groups)):
            num_frames = 1 + factor * min(groups, (lengths[number] - 1) // factor)
            start = min(frame, lengths[number] - num_frames)
            with suppress(VideoError):
                moments.add(*self.read(ClipDraw(videos[number], start, False), num_frames, 1))
        return moments.statistics()


def _check_shapes(data: DataConfig, vae: Autoencoder) -> None:
    for shape in data.shapes:
        latent_grid(vae, shape.size)
        latent_frames(vae.config, shape.num_frames, "data.num_frames" if not data.buckets else f"data.buckets: {shape}")


def _check_merging(key: str, folder: Path, vae: Autoencoder) -> None:
    """Refuses a cache of videos if latents depend on the frame that a clip begins with."""
    if (factor := temporal_downsampling(vae.config)) > 1:
        raise ConfigError(
            f"{key} is {folder}, a latent cache, but this autoencoder merges groups of {factor} frames, which begin "
            "where a clip does: name the folder of the videos instead, whose clips are encoded as they are drawn"
        )


def open_videos(data: DataConfig, vae: Autoencoder, precision: Precision) -> ClipSource:
    """Opens the training clips: the latent cache if `data.latent_cache` is set, else the videos of `data.path`.

    Args:
        data: the configuration.
        vae: the run's autoencoder.
        precision: precision of the autoencoder, see `core.precision.autocast`.

    Raises:
        ValueError: if there are no usable videos, or if the cache does not fit the configuration.
    """
    span = data.clip_span
    _check_shapes(data, vae)
    if data.latent_cache is not None:
        _check_merging("data.latent_cache", data.latent_cache, vae)
        cache = CacheSource(data.latent_cache, data.has_classes, span, data.broken)
        members = None
        if data.dataset != "folder" and data.path is not None:
            members = {member.name for member in list_dataset(data.path, data.dataset).choose(data.split)}
            forms = set(map(normal_name, members))
            if outside := [video.name for video in cache.catalog.videos if normal_name(video.name) not in forms]:
                raise ConfigError(
                    f"{data.latent_cache}: holds {outside[0]}, which is not in split "
                    f"{data.split or SPLITS[data.dataset][0]!r} of {data.path}; encode that split"
                )
        cache.check(vae, data.resolution, data.horizontal_flip, data.path, members, data.fit, data.buckets)
        cache.catalog = _assign(cache.catalog, data, sized=True, needs_first=True)
        return cache
    if data.path is None:
        raise ConfigError("data.path is missing: name a folder of videos, or a data.latent_cache")
    catalog = open_dataset(
        data.path, data.dataset, data.split, data.class_folders, span, data.broken, use_classes=data.use_classes
    )
    catalog = _assign(catalog, data, needs_first=True)
    return VideoSource(catalog, vae, data.resolution, precision, data.workers, data.fit)


def _assign(catalog: Catalog, data: DataConfig, sized: bool = False, needs_first: bool = False) -> Catalog:
    return assign_buckets(catalog, data.buckets, data.frame_interval, data.broken, sized, needs_first)


def open_images(data: DataConfig, vae: Autoencoder, precision: Precision) -> ClipSource:
    """Opens `data.images`: a folder of image files or a latent cache of one; see `open_videos`."""
    assert data.images is not None
    if (data.images / MANIFEST).exists():
        if data.buckets:
            raise ConfigError(
                f"data.images is {data.images}, a latent cache, but images are needed in the size of every bucket: "
                "name the folder of the images instead"
            )
        cache = CacheSource(data.images, data.has_classes, broken=data.broken)
        cache.check(vae, data.resolution, data.horizontal_flip, None, fit=data.fit)
        return cache
    catalog = scan(data.images, data.has_classes, broken=data.broken, images=True)
    return VideoSource(catalog, vae, data.resolution, precision, data.workers, data.fit)


def open_validation(data: DataConfig, vae: Autoencoder, precision: Precision) -> ClipSource:
    """Opens `data.validation`: a folder of held-out videos or a latent cache of one; see `open_videos`."""
    assert data.validation is not None
    span = data.clip_span if data.buckets else clip_span(data.num_frames, data.frame_interval)
    _check_shapes(data, vae)
    if (data.validation / MANIFEST).exists():
        _check_merging("data.validation", data.validation, vae)
        cache = CacheSource(data.validation, data.has_classes, span, data.broken)
        cache.check(vae, data.resolution, False, None, fit=data.fit, buckets=data.buckets)
        cache.catalog = _assign(cache.catalog, data, sized=True)
        return cache
    # The whole folder is held out.
    split = None if data.dataset == "folder" else "all"
    catalog = open_dataset(
        data.validation, data.dataset, split, data.class_folders, span, data.broken, use_classes=data.use_classes
    )
    return VideoSource(_assign(catalog, data), vae, data.resolution, precision, data.workers, data.fit)
