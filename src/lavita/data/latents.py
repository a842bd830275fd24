"""The latent cache: every frame of every video, encoded once, and where clips of latents come from.

A cache is a folder with `manifest.json` and one safetensors file a video, of tensors `mean` and `std` (F, C, h, w),
float16, and `mean_flip` and `std_flip` where mirrored frames were asked for. Any clip, start and interval can be drawn
from it later.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lavita.autoencoder import encode, latent_size
from lavita.checkpoint import fingerprint
from lavita.data.catalog import Catalog, Video, scan
from lavita.data.clips import ClipDraw, center_crop_resize, clip_span, mirror, read_pixels
from lavita.runtime import Precision, Progress
from lavita.video import VideoInfo, iter_frames

VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 64  # frames decoded and encoded at once

LatentClip = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of a clip's latents, float32 (F, C, h, w) each."""


class ClipSource(Protocol):
    """Where the latents of a drawn clip come from."""

    catalog: Catalog

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """The latents of a clip."""
        ...


class VideoSource:
    """Reads clips from the videos and encodes them on the way."""

    def __init__(self, catalog: Catalog, vae: AutoencoderKL, resolution: int, precision: Precision = "auto") -> None:
        """Latents of the catalog's videos at a resolution."""
        self.catalog, self.vae, self.resolution, self.precision = catalog, vae, resolution, precision

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Decodes, crops, mirrors and encodes a clip."""
        frames = read_pixels(draw, num_frames, frame_interval, self.resolution)
        mean, std = encode(self.vae, frames, self.precision)
        # What the cache stores: both ways give the same numbers.
        return mean.half().float(), std.half().float()


class CacheSource:
    """Reads clips from a latent cache."""

    def __init__(
        self,
        folder: Path,
        class_folders: bool = False,
        min_frames: int = 1,
        broken: Literal["skip", "error"] = "skip",
    ) -> None:
        """Opens a cache; its videos become a catalog as `scan` would make it.

        Raises:
            ValueError: for a folder that is no finished cache, one without usable videos, or, with `error`, one
                that was made of broken videos as well.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        names = [row["name"] for row in self.manifest["videos"] if row["num_frames"] >= min_frames]
        if not names:
            raise ValueError(f"{folder}: none of its videos has the {min_frames} frames that a clip needs")
        if class_folders and any("/" not in name for name in names):
            raise ValueError(f"{folder}: holds videos that lie in no class folder")
        classes = sorted({Path(name).parent.name for name in names}) if class_folders else []
        videos, problems = [], list(self.manifest["broken"])
        for row in self.manifest["videos"]:
            if row["num_frames"] < min_frames:
                problems.append(f"{row['name']}: has {row['num_frames']} frames, but a clip needs {min_frames}")
                print(f"skipped: {problems[-1]}", file=sys.stderr)
                continue
            label = classes.index(Path(row["name"]).parent.name) if classes else None
            size = self.manifest["resolution"]
            info = VideoInfo(folder / row["file"], row["num_frames"], size, size, row["fps"])
            videos.append(Video(info, row["name"], label))
        if problems and broken == "error":
            raise ValueError(problems[0])
        self.catalog = Catalog(folder, tuple(videos), tuple(classes), tuple(problems))

    def check(self, vae: AutoencoderKL, resolution: int, horizontal_flip: bool, path: Path | None) -> None:
        """Refuses a cache that was made in another way than this run asks for.

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
            for row in manifest["videos"]:
                source = path / row["name"]
                if not source.exists():
                    raise ValueError(f"{source}: is in the cache {self.folder}, but not in data.path")
                if source.is_file() and source.stat().st_size != row["source_bytes"]:
                    raise ValueError(f"{source}: has changed since the cache {self.folder} was made; encode again")

    def read(self, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        """Reads a clip's latents; ValueError where the file is damaged."""
        stop = draw.start + clip_span(num_frames, frame_interval)
        suffix = "_flip" if draw.flip else ""
        try:
            with safe_open(draw.video.info.path, framework="pt") as file:
                mean, std = (
                    file.get_slice(key + suffix)[draw.start : stop][::frame_interval].float() for key in ("mean", "std")
                )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{draw.video.info.path}: damaged or missing ({error}); encode again") from error
        return mean, std


def encode_dataset(
    root: Path,
    folder: Path,
    vae: AutoencoderKL,
    resolution: int,
    horizontal_flip: bool,
    precision: Precision = "auto",
    broken: Literal["skip", "error"] = "skip",
    images: bool = False,
    catalog: Catalog | None = None,
) -> dict[str, Any]:
    """Writes a latent cache of every frame of every video below `root`; one that was stopped goes on.

    Args:
        root: folder of videos.
        folder: the cache; made if missing.
        vae: the autoencoder.
        resolution: side of the frames after center crop and resize.
        horizontal_flip: encode the mirrored frames as well.
        precision: see `runtime.autocast`.
        broken: what a video that cannot be read does: `skip` names it and goes on.
        images: take every image file as a video of one frame, and no videos.
        catalog: the videos below `root` to encode; by default all.

    Returns:
        The manifest.

    Raises:
        ValueError: where `folder` holds a cache made in another way, or `root` holds no usable video.
    """
    latent_size(vae, resolution)
    settings: dict[str, Any] = {
        "version": VERSION,
        "autoencoder": fingerprint(vae),
        "resolution": resolution,
        "horizontal_flip": horizontal_flip,
        "precision": precision,
        "images": images,
    }
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / "settings.json"
    if started.exists():
        previous = json.loads(started.read_text())
        for key, value in settings.items():
            if previous.get(key) != value:
                raise ValueError(
                    f"{folder}: holds a cache with {key}={previous.get(key)}, not {value}; use another folder"
                )
    started.write_text(json.dumps(settings))

    catalog = catalog or scan(root, broken=broken, images=images)
    problems = list(catalog.broken)
    rows = []
    progress = Progress("encoding frame", sum(video.info.num_frames for video in catalog.videos))
    for video in catalog.videos:
        source = video.info.path
        digest = _source_digest(source)
        file = f"{hashlib.sha256(video.name.encode()).hexdigest()[:16]}-{digest[:16]}.safetensors"
        num_frames = video.info.num_frames
        if not (folder / file).exists():
            try:
                tensors = _encode_video(vae, source, resolution, horizontal_flip, precision)
            except ValueError as error:
                if broken == "error":
                    raise
                problems.append(str(error))
                progress.message(f"skipped: {error}")
                continue
            partial = folder / f"{file}.partial"
            save_file(tensors, partial)
            partial.replace(folder / file)
        rows.append(
            {
                "name": video.name,
                "file": file,
                "num_frames": num_frames,
                "fps": video.info.fps,
                "source_sha256": digest,
                "source_bytes": source.stat().st_size if source.is_file() else None,
            }
        )
        progress.update(progress.done + num_frames)
    if not rows:
        raise ValueError(f"{root}: none of its videos could be read; the first: {problems[0]}")
    manifest = {**settings, "videos": rows, "broken": problems}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    partial.replace(folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache; ValueError for a folder that is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no finished latent cache there (no {MANIFEST}); run `lavita encode`") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / MANIFEST}: damaged; encode again") from error
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder}: a cache of version {manifest.get('version')}, this is {VERSION}; encode again")
    return manifest


def _encode_video(
    vae: AutoencoderKL, path: Path, resolution: int, horizontal_flip: bool, precision: Precision
) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    frames: Iterator[Any] = iter_frames(path)
    while chunk := list(islice(frames, CHUNK)):
        pixels = center_crop_resize(np.stack(chunk), resolution)
        for suffix, view in (("", pixels), ("_flip", mirror(pixels)))[: 2 if horizontal_flip else 1]:
            mean, std = encode(vae, view, precision)
            parts.setdefault("mean" + suffix, []).append(mean.half())
            parts.setdefault("std" + suffix, []).append(std.half())
    return {key: torch.cat(tensors).contiguous() for key, tensors in parts.items()}


def _source_digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
