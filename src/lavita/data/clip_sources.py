"""Where clips of latents come from: the videos, encoded on the way, or a cache that `data/encode.py` wrote.

A cache is a folder with `manifest.json` and shards (`data/shards.py`), from which any clip, start and interval can be
drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import AutoencoderKL

from lavita.core.config import ConfigError
from lavita.core.precision import Precision
from lavita.data.catalog import Catalog, Video, find_videos, scan
from lavita.data.clips import ClipDraw, clip_span, read_pixels
from lavita.data.config import SPLITS, DataConfig
from lavita.data.content_hash import source_bytes
from lavita.data.datasets import list_dataset, open_dataset
from lavita.data.latent_cache.manifest import MANIFEST, read_manifest
from lavita.data.latent_cache.shards import TENSORS, read_rows, read_shard
from lavita.models.autoencoder import encode, latent_size
from lavita.models.fingerprint import fingerprint
from lavita.video.formats import VideoInfo

LatentClip = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of a clip's latents, float32 (F, C, h, w) each."""


class ClipSource(Protocol):
    """Where the latents of drawn clips come from."""

    catalog: Catalog

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """The latents of a clip."""
        ...

    def read_many(self, draws: Sequence[ClipDraw], num_frames: int, frame_interval: int) -> list[LatentClip]:
        """The latents of several clips, in their order."""
        ...


class VideoSource:
    """Reads clips from the videos and encodes them on the way."""

    def __init__(
        self,
        catalog: Catalog,
        vae: AutoencoderKL,
        resolution: int,
        precision: Precision = "auto",
        workers: int | None = None,
    ) -> None:
        """Latents of the catalog's videos at a resolution, decoded by some threads: by default a core each, up to 8."""
        self.catalog, self.vae, self.resolution, self.precision = catalog, vae, resolution, precision
        # Decoding lets other threads run; processes would each hold a copy of the catalog.
        self._pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), "decode")

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Decodes, crops, mirrors and encodes a clip."""
        return self.read_many([draw], num_frames, frame_interval)[0]

    def read_many(self, draws: Sequence[ClipDraw], num_frames: int, frame_interval: int) -> list[LatentClip]:
        """Decodes several clips at once, and encodes each as soon as it and those before it are there.

        Raises:
            VideoError: where one cannot be decoded.
        """
        clips = self._pool.map(lambda draw: read_pixels(draw, num_frames, frame_interval, self.resolution), draws)
        # Each by itself: what a clip is encoded with changes its last bits, and with them what processes that share a
        # batch train on.
        latents = (encode(self.vae, pixels, self.precision) for pixels in clips)
        # What the cache stores: both ways give the same numbers.
        return [(mean.half().float(), std.half().float()) for mean, std in latents]


class CacheSource:
    """Reads clips from a latent cache."""

    def __init__(
        self,
        folder: Path,
        class_folders: bool = False,
        min_frames: int = 1,
        broken: Literal["skip", "error"] = "skip",
    ) -> None:
        """Opens a cache; its videos become a catalog as that of their data set was.

        Args:
            folder: of the cache.
            class_folders: label the videos: by the class that the cache names, or else by their parent folder.
            min_frames: shorter videos are left out.
            broken: `error`: broken or too short videos are one; `skip`: they are left out.

        Raises:
            ValueError: for a folder that is no finished cache, a shard that is missing or cut off, a cache without
                usable videos, or, with `error`, one that was made of broken videos as well.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        rows = [row for row in self.manifest["videos"] if row["num_frames"] >= min_frames]
        if not rows:
            raise ValueError(f"{folder}: none of its videos has the {min_frames} frames that a clip needs")
        labels = [_class_of(row, folder) for row in rows] if class_folders else []
        classes = sorted(set(labels))
        problems = list(self.manifest["broken"])
        for row in self.manifest["videos"]:
            if row["num_frames"] < min_frames:
                problems.append(f"{row['name']}: has {row['num_frames']} frames, but a clip needs {min_frames}")
                print(f"skipped: {problems[-1]}", file=sys.stderr)
        if problems and broken == "error":
            raise ValueError(problems[0])
        self._open_shards()
        size = self.manifest["resolution"]
        index = {name: label for label, name in enumerate(classes)}
        videos = []
        for number, row in enumerate(rows):
            info = VideoInfo(folder / row["shard"], row["num_frames"], size, size, row["fps"])
            videos.append(Video(info, row["name"], index[labels[number]] if labels else None))
        self.catalog = Catalog(folder, tuple(videos), tuple(classes), tuple(problems))

    def _open_shards(self) -> None:
        """Reads the header of every shard: where each video's latents are."""
        self._offsets: dict[str, tuple[int, ...]] = {}
        shards = {file: read_shard(self.folder / file) for file in {row["shard"] for row in self.manifest["videos"]}}
        for row in self.manifest["videos"]:
            shard = shards[row["shard"]]
            inside = shard.videos.get(row["name"])
            if inside is None or inside.source_sha256 != row["source_sha256"]:
                raise ValueError(f"{shard.path}: lacks {row['name']} of the manifest; run `lavita encode` again")
            self._offsets[row["name"]] = shard.offsets[row["name"]]
            self._frame_shape = shard.frame_shape

    def check(
        self,
        vae: AutoencoderKL,
        resolution: int,
        horizontal_flip: bool,
        path: Path | None,
        names: Collection[str] | None = None,
    ) -> None:
        """Refuses a cache that was made in another way, or of other videos, than this run asks for.

        Videos are compared by name and size; `lavita encode` compares their contents.

        Args:
            vae: the run's autoencoder.
            resolution: side of its frames.
            horizontal_flip: whether it mirrors clips.
            path: folder of the videos; None where only the cache is at hand.
            names: of the videos below `path` that the run trains on; by default all.

        Raises:
            ValueError: naming what differs: autoencoder, resolution, mirrored frames, or the videos in `path`.
        """
        manifest = self.manifest
        if manifest["autoencoder"] != fingerprint(vae):
            raise ValueError(f"{self.folder}: was made with another autoencoder than this run's; encode again")
        if manifest["resolution"] != resolution:
            raise ValueError(
                f"{self.folder}: was made at resolution {manifest['resolution']}, but data.resolution is {resolution}"
            )
        if horizontal_flip and not manifest["horizontal_flip"]:
            raise ValueError(
                f"{self.folder}: holds no mirrored frames; encode with --flip or set data.horizontal_flip=false"
            )
        if path is not None:
            self._check_videos(path, names)

    def _check_videos(self, path: Path, names: Collection[str] | None) -> None:
        sizes = {row["name"]: row["source_bytes"] for row in self.manifest["videos"]}
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
        for name, size in sizes.items():
            try:
                now = source_bytes(path / name)
            except OSError:
                now = None
            if now is None or (names is not None and name not in names):
                raise ValueError(
                    f"{path / name}: is in the cache {self.folder}, but not in data.path; `lavita encode` removes it"
                )
            if now != size:
                raise ValueError(
                    f"{path / name}: has changed since the cache {self.folder} was made; `lavita encode` renews it"
                )
        found = (video.relative_to(path).as_posix() for video in find_videos(path)) if names is None else names
        new = [name for name in found if name not in sizes]
        if new := [name for name in new if not any(m.startswith(f"{name}: ") for m in self.manifest["broken"])]:
            raise ValueError(
                f"{path}: holds videos that the cache {self.folder} lacks ({len(new)}, the first: {min(new)}); "
                "`lavita encode` adds them"
            )

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Reads a clip's latents; ValueError where the file is damaged."""
        rows = range(draw.start, draw.start + clip_span(num_frames, frame_interval), frame_interval)
        path, offsets = draw.video.info.path, self._offsets[draw.video.name]
        first = TENSORS.index("mean_flip" if draw.flip else "mean")
        try:
            # Opened for each clip: cheap beside a step, and nothing is held however many shards there are.
            with path.open("rb", buffering=0) as stream:
                mean, std = (
                    read_rows(stream.fileno(), offset, self._frame_shape, rows) for offset in offsets[first : first + 2]
                )
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: damaged or missing ({error}); run `lavita encode` again") from error
        return mean, std

    def read_many(self, draws: Sequence[ClipDraw], num_frames: int, frame_interval: int) -> list[LatentClip]:
        """Reads the latents of several clips; ValueError where a file is damaged."""
        return [self.read(draw, num_frames, frame_interval) for draw in draws]


def _class_of(row: dict[str, Any], folder: Path) -> str:
    if row["class"] is not None:
        return str(row["class"])
    if "/" not in row["name"]:
        raise ValueError(f"{folder}: holds videos that lie in no class folder, such as {row['name']}")
    return Path(row["name"]).parent.name


def open_videos(data: DataConfig, vae: AutoencoderKL, precision: Precision) -> ClipSource:
    """The latent cache if the configuration names one, else the videos."""
    span = clip_span(data.num_frames, data.frame_interval)
    latent_size(vae, data.resolution)
    if data.latent_cache is not None:
        cache = CacheSource(data.latent_cache, data.has_classes, span, data.broken)
        members = None
        if data.dataset != "folder" and data.path is not None:
            members = {member.name for member in list_dataset(data.path, data.dataset).choose(data.split)}
            if outside := [video.name for video in cache.catalog.videos if video.name not in members]:
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


def open_images(data: DataConfig, vae: AutoencoderKL, precision: Precision) -> ClipSource:
    """The image files of `data.images`, or the cache of them that it names."""
    assert data.images is not None
    if (data.images / MANIFEST).exists():
        cache = CacheSource(data.images, data.has_classes, broken=data.broken)
        cache.check(vae, data.resolution, data.horizontal_flip, None)
        return cache
    catalog = scan(data.images, data.has_classes, broken=data.broken, images=True)
    return VideoSource(catalog, vae, data.resolution, precision, data.workers)


def open_validation(data: DataConfig, vae: AutoencoderKL, precision: Precision) -> ClipSource:
    """The held-out videos of a run, or the cache of them that `data.validation` names.

    Raises:
        ValueError: where there are no usable ones, or the cache was made in another way than the run asks for.
    """
    assert data.validation is not None
    span = clip_span(data.num_frames, data.frame_interval)
    latent_size(vae, data.resolution)
    if (data.validation / MANIFEST).exists():
        cache = CacheSource(data.validation, data.has_classes, span, data.broken)
        cache.check(vae, data.resolution, False, None)
        return cache
    # All of the folder: it is named for what is held out.
    split = None if data.dataset == "folder" else "all"
    catalog = open_dataset(
        data.validation, data.dataset, split, data.class_folders, span, data.broken, use_classes=data.use_classes
    )
    return VideoSource(catalog, vae, data.resolution, precision, data.workers)
