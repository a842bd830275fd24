"""Sources of latent clips: videos that are decoded and encoded on demand, or a latent cache (`latent_cache.encode`).

A cache is a folder with `manifest.json` and shards (`latent_cache.shards`). It holds the latents of every frame, so
that clips of any start and interval can be drawn from it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from lavita.core.config import ConfigError
from lavita.core.precision import Precision
from lavita.core.prefetch import parallel_map
from lavita.core.progress import say
from lavita.core.text import by_normal_name, normal_name
from lavita.data.catalog import Catalog, Video, scan, unusable_note
from lavita.data.clips import ClipDraw, clip_span, read_pixels
from lavita.data.config import SPLITS, DataConfig
from lavita.data.content_hash import source_bytes
from lavita.data.datasets import list_dataset, open_dataset
from lavita.data.latent_cache.manifest import MANIFEST, read_manifest
from lavita.data.latent_cache.shards import TENSORS, read_rows, read_shard
from lavita.data.latent_cache.statistics import cache_statistics, spread_frames
from lavita.models.autoencoder import Autoencoder, encode, latent_frames, latent_size, temporal_downsampling
from lavita.models.fingerprint import encoder_fingerprint, fingerprint
from lavita.models.latent_statistics import LatentMoments, LatentStatistics
from lavita.video.formats import Frames, VideoError, VideoInfo
from lavita.video.tree import find_videos

MEASURED_FRAMES = 128
"""Frames whose latents are measured without a cache: each of them has to be decoded and encoded."""
MEASURED_GROUPS = 3
"""Groups of merged frames after the first frame of the clips that are measured with temporal downsampling."""
LatentClip = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of the latents of a clip, each float32 (K, C, h, w); see `autoencoder.encode`."""


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
        resolution: int,
        precision: Precision = "auto",
        workers: int | None = None,
    ) -> None:
        """Prepares to read the catalog's videos.

        Args:
            catalog: the videos.
            vae: the autoencoder.
            resolution: side of the frames in pixels, after center crop and resize.
            precision: see `core.precision.autocast`.
            workers: number of threads that decode; by default one per core, at most 8.
        """
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
            return read_pixels(draw, num_frames, frame_interval, self.resolution)

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


class CacheSource:
    """Reads clips from a latent cache."""

    def __init__(
        self,
        folder: Path,
        class_folders: bool = False,
        min_frames: int = 1,
        broken: Literal["skip", "error"] = "skip",
    ) -> None:
        """Opens a cache and makes a catalog of its videos, the same as that of their data set.

        Args:
            folder: the cache.
            class_folders: label the videos, by the class in the cache if it has classes, else by their parent folder.
            min_frames: shorter videos are left out.
            broken: `skip` leaves out broken and too short videos; `error` raises if there are any.

        Raises:
            ValueError: if the folder holds no finished cache, if a shard is missing or cut off, if no video is usable,
                or, with `broken="error"`, if a video is broken or too short.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        rows = [row for row in self.manifest["videos"] if row["num_frames"] >= min_frames]
        if not rows:
            raise ValueError(f"{folder}: no video has the {min_frames} frames that a clip needs")
        labels = [_class_of(row, folder) for row in rows] if class_folders else []
        classes = sorted(set(labels))
        problems = list(self.manifest["broken"])
        for row in self.manifest["videos"]:
            if row["num_frames"] < min_frames:
                problems.append(f"{row['name']}: has {row['num_frames']} frames, but a clip needs {min_frames}")
                say(f"skipped: {problems[-1]}")
        if problems and broken == "error":
            raise ValueError(f"{folder}: {problems[0]}")
        lost_classes = set()
        if labels:
            short = [row for row in self.manifest["videos"] if row["num_frames"] < min_frames]
            lost_classes = {_class_of(row, folder) for row in short} - set(classes)
        if note := unusable_note(folder, len(rows), len(problems), lost_classes):
            say(f"{note}; the first: {problems[0]}")
        self._open_shards()
        self._num_bytes: dict[str, int] = {row["name"]: row["source_bytes"] for row in rows}
        size = self.manifest["resolution"]
        index = {name: label for label, name in enumerate(classes)}
        videos = []
        for number, row in enumerate(rows):
            info = VideoInfo(folder / row["shard"], row["num_frames"], size, size, row["fps"])
            videos.append(Video(info, row["name"], index[labels[number]] if labels else None))
        self.catalog = Catalog(folder, tuple(videos), tuple(classes), tuple(problems))

    def num_bytes(self, video: Video) -> int:
        """Size that a video had on the disk when it was encoded."""
        return self._num_bytes[video.name]

    def _open_shards(self) -> None:
        """Reads from the headers of the shards where the latents of each video are."""
        self._offsets: dict[str, tuple[int, ...]] = {}
        shards = {file: read_shard(self.folder / file) for file in {row["shard"] for row in self.manifest["videos"]}}
        for row in self.manifest["videos"]:
            shard = shards[row["shard"]]
            stored = shard.videos.get(row["name"])
            if stored is None or stored.source_sha256 != row["source_sha256"]:
                raise ValueError(
                    f"{shard.path}: lacks {row['name']}, which the manifest lists; run `lavita encode` again"
                )
            self._offsets[row["name"]] = shard.offsets[row["name"]]
            self._frame_shape = shard.frame_shape

    def check(
        self,
        vae: Autoencoder,
        resolution: int,
        horizontal_flip: bool,
        path: Path | None,
        names: Collection[str] | None = None,
    ) -> None:
        """Checks that the cache fits a run: the same encoder of frames and resolution, and the same videos.

        Videos are compared by name and size; `lavita encode` compares their contents.

        Args:
            vae: the run's autoencoder.
            resolution: side of the run's frames in pixels.
            horizontal_flip: whether the run mirrors clips.
            path: folder of the videos; None if there is only the cache.
            names: names of the videos below `path` that the run trains on; by default all.

        Raises:
            ValueError: if something differs: the autoencoder, the resolution, mirrored frames, or the videos in `path`.
        """
        manifest = self.manifest
        same = manifest["autoencoder"] == fingerprint(vae)
        # Only the decoder may be another one. Caches from before the encoder was recorded do not have it.
        if not same and manifest.get("encoder") != encoder_fingerprint(vae):
            raise ValueError(f"{self.folder}: was made with another autoencoder than that of this run; encode again")
        if manifest["resolution"] != resolution:
            raise ValueError(
                f"{self.folder}: was made at resolution {manifest['resolution']}, but data.resolution is {resolution}"
            )
        if horizontal_flip and not manifest["horizontal_flip"]:
            raise ValueError(
                f"{self.folder}: has no mirrored frames; encode with --flip or set data.horizontal_flip=false"
            )
        if path is not None:
            self._check_videos(path, names)

    def _check_videos(self, path: Path, names: Collection[str] | None) -> None:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
        if names is None:
            names = [video.relative_to(path).as_posix() for video in find_videos(path).videos]
        cached = by_normal_name((row["name"] for row in self.manifest["videos"]), self.folder)
        there = by_normal_name(names, path)
        sizes = {normal_name(row["name"]): row["source_bytes"] for row in self.manifest["videos"]}
        for form, name in cached.items():
            try:
                current_size = source_bytes(path / there[form])
            except (OSError, KeyError):
                raise ValueError(
                    f"{path / name}: is in the cache {self.folder}, but not in data.path; `lavita encode` removes it"
                ) from None
            if current_size != sizes[form]:
                raise ValueError(
                    f"{path / name}: has changed since the cache {self.folder} was made; `lavita encode` updates it"
                )
        broken = [normal_name(message) for message in self.manifest["broken"]]
        new = [
            name
            for form, name in there.items()
            if form not in cached and not any(message.startswith(f"{form}: ") for message in broken)
        ]
        if new:
            raise ValueError(
                f"{path}: holds {len(new)} videos that the cache {self.folder} lacks, the first: {min(new)}; "
                "`lavita encode` adds them"
            )

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Reads the latents of a clip; ValueError if the file is damaged."""
        rows = range(draw.start, draw.start + clip_span(num_frames, frame_interval), frame_interval)
        path, offsets = draw.video.info.path, self._offsets[draw.video.name]
        first = TENSORS.index("mean_flip" if draw.flip else "mean")
        try:
            # Opened for each clip, which is cheap, so that the number of open files does not grow with the shards.
            with path.open("rb", buffering=0) as stream:
                mean, std = (
                    read_rows(stream.fileno(), offset, self._frame_shape, rows) for offset in offsets[first : first + 2]
                )
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: damaged or missing ({error}); run `lavita encode` again") from error
        return mean, std

    def read_many(self, draws: Sequence[ClipDraw], num_frames: int, frame_interval: int) -> list[LatentClip]:
        """Reads the latents of several clips; ValueError if a file is damaged."""
        return [self.read(draw, num_frames, frame_interval) for draw in draws]

    def statistics(self) -> LatentStatistics:
        """The statistics in the manifest, or for a cache from before they were recorded there, measured now."""
        if (recorded := LatentStatistics.of(self.manifest)) is not None:
            return recorded
        rows = self.manifest["videos"]
        return cache_statistics(rows, {file: read_shard(self.folder / file) for file in {row["shard"] for row in rows}})


def _class_of(row: dict[str, Any], folder: Path) -> str:
    if row["class"] is not None:
        return normal_name(str(row["class"]))
    if "/" not in row["name"]:
        raise ValueError(f"{folder}: holds videos that are in no class folder, such as {row['name']}")
    return normal_name(Path(row["name"]).parent.name)


def _check_sizes(data: DataConfig, vae: Autoencoder) -> None:
    latent_size(vae, data.resolution)
    latent_frames(vae.config, data.num_frames, "data.num_frames")


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
    _check_sizes(data, vae)
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
        cache.check(vae, data.resolution, data.horizontal_flip, data.path, members)
        return cache
    if data.path is None:
        raise ConfigError("data.path is missing: name a folder of videos, or a data.latent_cache")
    catalog = open_dataset(
        data.path, data.dataset, data.split, data.class_folders, span, data.broken, use_classes=data.use_classes
    )
    return VideoSource(catalog, vae, data.resolution, precision, data.workers)


def open_images(data: DataConfig, vae: Autoencoder, precision: Precision) -> ClipSource:
    """Opens `data.images`: a folder of image files or a latent cache of one; see `open_videos`."""
    assert data.images is not None
    if (data.images / MANIFEST).exists():
        cache = CacheSource(data.images, data.has_classes, broken=data.broken)
        cache.check(vae, data.resolution, data.horizontal_flip, None)
        return cache
    catalog = scan(data.images, data.has_classes, broken=data.broken, images=True)
    return VideoSource(catalog, vae, data.resolution, precision, data.workers)


def open_validation(data: DataConfig, vae: Autoencoder, precision: Precision) -> ClipSource:
    """Opens `data.validation`: a folder of held-out videos or a latent cache of one; see `open_videos`."""
    assert data.validation is not None
    span = clip_span(data.num_frames, data.frame_interval)
    _check_sizes(data, vae)
    if (data.validation / MANIFEST).exists():
        _check_merging("data.validation", data.validation, vae)
        cache = CacheSource(data.validation, data.has_classes, span, data.broken)
        cache.check(vae, data.resolution, False, None)
        return cache
    # The whole folder is held out.
    split = None if data.dataset == "folder" else "all"
    catalog = open_dataset(
        data.validation, data.dataset, split, data.class_folders, span, data.broken, use_classes=data.use_classes
    )
    return VideoSource(catalog, vae, data.resolution, precision, data.workers)
