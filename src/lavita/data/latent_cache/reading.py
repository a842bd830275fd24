"""Reads clips from a latent cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lavita.core.progress import say
from lavita.core.sizes import AnySize, Bucket, Size, parse_size
from lavita.core.text import by_normal_name, normal_name
from lavita.data.buckets import check_sizes
from lavita.data.catalog import Catalog, Video, unusable_note
from lavita.data.clips import ClipDraw, clip_span
from lavita.data.config import Fit
from lavita.data.content_hash import source_bytes
from lavita.data.latent_cache.manifest import read_manifest
from lavita.data.latent_cache.shards import TENSORS, read_rows, read_shard
from lavita.data.latent_cache.statistics import cache_statistics
from lavita.models.autoencoder import Autoencoder
from lavita.models.fingerprint import encoder_fingerprint, fingerprint
from lavita.models.latent_statistics import LatentStatistics
from lavita.video.formats import VideoInfo
from lavita.video.tree import find_videos

LatentClip = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of the latents of a clip, each float32 (K, C, h, w); see `autoencoder.encode`."""


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
        index = {name: label for label, name in enumerate(classes)}
        videos = []
        for number, row in enumerate(rows):
            size = Size.of(parse_size(str(row.get("size") or self.manifest["resolution"])))
            info = VideoInfo(folder / row["shard"], row["num_frames"], size.width, size.height, row["fps"])
            videos.append(Video(info, row["name"], index[labels[number]] if labels else None))
        self.catalog = Catalog(folder, tuple(videos), tuple(classes), tuple(problems))

    def num_bytes(self, video: Video) -> int:
        """Size that a video had on the disk when it was encoded."""
        return self._num_bytes[video.name]

    def _open_shards(self) -> None:
        """Reads from the headers of the shards where the latents of each video are."""
        self._offsets: dict[str, tuple[int, ...]] = {}
        self._frame_shapes: dict[str, tuple[int, ...]] = {}
        shards = {file: read_shard(self.folder / file) for file in {row["shard"] for row in self.manifest["videos"]}}
        for row in self.manifest["videos"]:
            shard = shards[row["shard"]]
            stored = shard.videos.get(row["name"])
            if stored is None or stored.source_sha256 != row["source_sha256"]:
                raise ValueError(
                    f"{shard.path}: lacks {row['name']}, which the manifest lists; run `lavita encode` again"
                )
            self._offsets[row["name"]] = shard.offsets[row["name"]]
            self._frame_shapes[row["name"]] = shard.frame_shape

    def check(
        self,
        vae: Autoencoder,
        resolution: AnySize,
        horizontal_flip: bool,
        path: Path | None,
        names: Collection[str] | None = None,
        fit: Fit = "crop",
        buckets: Sequence[Bucket] = (),
    ) -> None:
        """Checks that the cache fits a run: the same encoder of frames and resolution, and the same videos.

        Videos are compared by name and size; `lavita encode` compares their contents.

        Args:
            vae: the run's autoencoder.
            resolution: size of the run's frames in pixels.
            horizontal_flip: whether the run mirrors clips.
            path: folder of the videos; None if there is only the cache.
            names: names of the videos below `path` that the run trains on; by default all.
            fit: how the run's frames get their size.
            buckets: the run's buckets, in place of `resolution`.

        Raises:
            ValueError: if something differs: the autoencoder, the resolution, mirrored frames, or the videos in `path`.
        """
        manifest = self.manifest
        same = manifest["autoencoder"] == fingerprint(vae)
        # Only the decoder may be another one. Caches from before the encoder was recorded do not have it.
        if not same and manifest.get("encoder") != encoder_fingerprint(vae):
            raise ValueError(f"{self.folder}: was made with another autoencoder than that of this run; encode again")
        if (made := manifest.get("fit", "crop")) != fit:
            raise ValueError(f"{self.folder}: was made with fit={made}, but data.fit is {fit}; encode again")
        if buckets:
            check_sizes([Bucket.parse(text).size for text in manifest["buckets"]], buckets, str(self.folder))
        elif str(manifest["resolution"]) != str(resolution):
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
        shape = self._frame_shapes[draw.video.name]
        first = TENSORS.index("mean_flip" if draw.flip else "mean")
        try:
            # Opened for each clip, which is cheap, so that the number of open files does not grow with the shards.
            with path.open("rb", buffering=0) as stream:
                mean, std = (read_rows(stream.fileno(), offset, shape, rows) for offset in offsets[first : first + 2])
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
