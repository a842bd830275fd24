"""Writes a latent cache: every frame of every video, encoded once, by one or more processes.

The list of videos alone decides which of them share a shard, and the content of a shard decides its name. So neither
the number of processes nor interruptions change the cache: a shard that exists is finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lavita.core.files import check_outside, remove_partial
from lavita.core.precision import Precision, without_fp16
from lavita.core.prefetch import prefetch
from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.core.sizes import AnySize, Bucket, Size, listed_sizes, plain_size
from lavita.core.text import normal_name
from lavita.data.catalog import Catalog, Video
from lavita.data.clips import fit_frames, mirror
from lavita.data.config import Fit
from lavita.data.content_hash import source_bytes, source_digest
from lavita.data.latent_cache.manifest import MANIFEST, VERSION, read_manifest, write_manifest
from lavita.data.latent_cache.shards import (
    ITEM,
    PREFIX,
    SUFFIX,
    TENSORS,
    Shard,
    ShardVideo,
    damaged_videos,
    latents_digest,
    read_shard,
    write_shard,
)
from lavita.data.latent_cache.statistics import cache_statistics
from lavita.models.autoencoder import Autoencoder, encode, latent_grid, temporal_downsampling
from lavita.models.fingerprint import encoder_fingerprint, fingerprint
from lavita.video.formats import Frames, VideoError
from lavita.video.reading import iter_frames

CHUNK = 64  # frames that are decoded and encoded together
SHARD_BYTES = 256 * 10**6
SHAPE_SETTINGS = ("fit", "buckets", "frame_interval")
"""Settings that a cache of cropped frames of one size does not have."""


@dataclass(frozen=True)
class _Source:
    """A video and its current content."""

    video: Video
    sha256: str
    size: int

    @property
    def key(self) -> tuple[str, str]:
        return self.video.name, self.sha256

    @property
    def content(self) -> tuple[str, str]:
        """What a shard is searched for: the name may be there in another Unicode form, by a copy from a Mac."""
        return normal_name(self.video.name), self.sha256


def encode_dataset(
    catalog: Catalog,
    folder: Path,
    vae: Autoencoder,
    resolution: AnySize,
    horizontal_flip: bool,
    precision: Precision = "auto",
    broken: Literal["skip", "error"] = "skip",
    team: Processes | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    fit: Fit = "crop",
    buckets: Sequence[Bucket] = (),
    frame_interval: int | None = None,
) -> dict[str, Any]:
    """Writes the latent cache of a data set, or completes an existing one.

    An interrupted run resumes, and ends with the same files as an uninterrupted one. If the folder holds a cache
    already, new videos go into new shards, changed videos are encoded again, and missing videos leave the manifest; a
    shard is deleted when none of its videos is left, and never changed. Any number of processes write the same files.

    Args:
        catalog: the videos; the same in every process. With buckets, `buckets.assign_buckets` has given them theirs.
        folder: the cache; created if missing.
        vae: the autoencoder.
        resolution: size of the frames in pixels; ignored with buckets, in whose sizes the videos are encoded.
        horizontal_flip: also encode the mirrored frames.
        precision: see `core.precision.autocast`.
        broken: `skip` reports videos that cannot be decoded and leaves them out; `error` raises at the first.
        team: the processes that share the work.
        shard_bytes: most bytes of latents in a shard; a video with more has a shard of its own.
        verify: read finished shards back first; damaged ones are reported and written again.
        fit: how frames of other sizes get theirs, see `clips.fit_frames`.
        buckets: shapes of clips, with `fit="bucket"`.
        frame_interval: the interval that the videos were given their buckets for.

    Returns:
        The manifest.

    Raises:
        ValueError: if `folder` holds a cache with other settings or of other videos, if a new one would be inside the
            folder of the videos, if no video can be decoded, or if the autoencoder merges frames of videos.
    """
    team = team or Processes()
    check_target(folder, catalog.root)
    sizes = [bucket.size for bucket in buckets] or [Size.of(resolution)]
    for size in sizes:
        latent_grid(vae, plain_size(size))
    factor = temporal_downsampling(vae.config)
    if factor > 1 and any(video.info.num_frames > 1 for video in catalog.videos):
        raise ValueError(
            f"{folder}: cannot hold the latents of videos by an autoencoder that merges groups of {factor} frames, "
            "which begin where a clip does; `lavita train` encodes clips as it draws them, without a cache"
        )
    settings: dict[str, Any] = team.first_says(
        {
            "version": VERSION,
            "autoencoder": fingerprint(vae),
            # As caches had it when frames were cropped squares; those are still read, and completed.
            "resolution": listed_sizes(sizes)
            if buckets
            else resolution
            if isinstance(resolution, int)
            else str(resolution),
            "horizontal_flip": horizontal_flip,
            "precision": without_fp16(vae.device, precision),
            **({} if fit == "crop" else {"fit": fit}),
            **({"buckets": [*map(str, buckets)], "frame_interval": frame_interval} if buckets else {}),
        }
    )
    finished: dict[str, Shard]
    listed: set[str]
    finished, listed = team.first_says(_prepare(folder, settings, catalog) if team.is_first else None)
    if verify:
        for file in _damaged(finished, team):
            del finished[file]
    sources = _hash_sources(catalog, team)
    value_bytes = ITEM * 2 * (1 + horizontal_flip) * int(vae.config["latent_channels"])
    frame_bytes = {size: value_bytes * math.prod(latent_grid(vae, plain_size(size))) for size in sizes}
    sized = [(source, _size_of(source, sizes[0])) for source in sources]
    groups = _group(sized, finished, listed, settings, frame_bytes, shard_bytes)
    work = team.share([(file, group) for file, group in groups.items() if file not in finished])

    progress = Progress("encoding frame", sum(source.video.info.num_frames for _, group in work for source in group))
    note = f"process 1 of {team.count}" if team.count > 1 else ""
    outcome: dict[str, tuple[bool, list[str]]] = {}
    with closing(prefetch(_read([source for _, group in work for source in group], sizes[0], fit))) as pieces:
        videos = groupby(pieces, key=itemgetter(0))
        for file, group in work:
            done, problems = [], []
            for source in group:
                decoded, pieces_of_source = next(videos)
                assert decoded is source
                try:
                    done.append(
                        _encode_video(vae, source, sizes[0], settings, (piece for _, piece in pieces_of_source))
                    )
                except ValueError as error:
                    if broken == "error":
                        raise
                    reason = error.problem if isinstance(error, VideoError) else str(error)
                    problems.append(f"{source.video.name}: {reason}")
                    progress.message(f"skipped: {problems[-1]}")
                if team.is_first:
                    progress.update(progress.done + source.video.info.num_frames, note)
            if done:
                write_shard(folder / file, settings, done, problems)
            outcome[file] = bool(done), problems

    outcome = {file: result for part in team.gather(outcome) for file, result in part.items()}
    if not team.is_first:
        return dict(team.first_says(None))
    shards = finished | {file: read_shard(folder / file) for file, (written, _) in outcome.items() if written}
    problems = list(catalog.broken)
    for file in groups:
        problems += shards[file].broken if file in shards else outcome[file][1]
    rows = _manifest_rows(catalog, sources, shards)
    if not rows:
        raise ValueError(f"{catalog.root}: no video could be decoded; the first: {problems[0]}")
    facts = {"encoder": encoder_fingerprint(vae), **cache_statistics(rows, shards).fields()}
    manifest = {**settings, **facts, "videos": rows, "broken": problems}
    write_manifest(folder, manifest)
    for file in shards.keys() - {row["shard"] for row in rows}:
        (folder / file).unlink()
    return dict(team.first_says(manifest))


def check_target(folder: Path, root: Path) -> None:
    """Refuses to make a cache inside the folder of its videos; one that is there already may be updated."""
    if not (folder / MANIFEST).exists():
        check_outside("out", folder, root)


def _prepare(folder: Path, settings: dict[str, Any], catalog: Catalog) -> tuple[dict[str, Shard], set[str]]:
    """Removes partial and damaged files from a folder; returns its finished shards, and the names in its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    # Only its own: a training run may be writing the embeddings of its captions here.
    remove_partial(folder, f"{PREFIX}*", Path(MANIFEST).stem)
    shards = {}
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        try:
            shards[path.name] = read_shard(path)
        except ValueError as error:
            print(f"{str(error).partition(';')[0]}; is written again", file=sys.stderr)
            path.unlink()
    manifest: dict[str, Any] | None = None
    if (folder / MANIFEST).exists():
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            if "damaged" not in str(error):
                raise
            print(f"{str(error).partition(';')[0]}; is written again", file=sys.stderr)
            (folder / MANIFEST).unlink()
    for other in [shard.settings for shard in shards.values()] + ([manifest] if manifest else []):
        for key in [*settings, *(key for key in SHAPE_SETTINGS if key in other)]:
            if other.get(key) != (value := settings.get(key)):
                raise ValueError(
                    f"{folder}: holds a cache with {key}={other.get(key)}, not {value}; use another folder"
                )
    cached = {normal_name(name) for shard in shards.values() for name in shard.videos}
    if cached and cached.isdisjoint(normal_name(video.name) for video in catalog.videos):
        raise ValueError(
            f"{folder}: holds a cache of other videos, such as {min(cached)}, and of none in {catalog.root}; "
            "use another folder"
        )
    return shards, {row["shard"] for row in manifest["videos"]} if manifest else set()


def _damaged(shards: dict[str, Shard], team: Processes) -> list[str]:
    """Deletes the shards whose latents differ from those that were written; returns their names."""
    damaged = []
    work = team.share(sorted(shards))
    progress = Progress("verifying shard", len(work))
    for number, file in enumerate(work, 1):
        if names := damaged_videos(shards[file]):
            progress.message(
                f"{shards[file].path}: damaged in {len(names)} videos, such as {names[0]}; is written again"
            )
            shards[file].path.unlink()
            damaged.append(file)
        if team.is_first:
            progress.update(number)
    return [file for part in team.gather(damaged) for file in part]


def _hash_sources(catalog: Catalog, team: Processes) -> list[_Source]:
    """Digests every video, in the order of the catalog."""
    facts = []
    work = team.share(catalog.videos)
    progress = Progress("hashing video", len(work), active=team.is_first)
    for video in work:
        facts.append((source_digest(video.info.path), source_bytes(video.info.path)))
        progress.update(len(facts))
    return [_Source(video, *fact) for video, fact in zip(catalog.videos, team.collect(facts), strict=True)]


def _size_of(source: _Source, size: Size) -> Size:
    """The size of a video's frames: that of its bucket, or the only one."""
    return size if source.video.bucket is None else source.video.bucket.size


def _group(
    sources: Sequence[tuple[_Source, Size]],
    finished: dict[str, Shard],
    listed: set[str],
    settings: dict[str, Any],
    frame_bytes: Mapping[Size, int],
    shard_bytes: int,
) -> dict[str, list[_Source]]:
    """Groups videos of one size into shards, by the shard's name; shards of an interrupted run are among them."""
    # All frames of a shard have one size; the order of the videos would change from one size to another all the time.
    sources = [pair for size in frame_bytes for pair in sources if pair[1] == size]
    # Shards that the manifest does not list come from an interrupted run. Their videos are grouped once more, so that
    # the other videos are grouped as they were then.
    kept = listed & finished.keys()
    for _ in range(2):
        done = {(normal_name(row.name), row.source_sha256) for file in kept for row in finished[file].videos.values()}
        groups: list[list[_Source]] = []
        room, last = 0, None
        for source, size in sources:
            if source.content in done:
                continue
            num_bytes = source.video.info.num_frames * frame_bytes[size]
            if size != last or num_bytes > room:
                groups.append([])
                room, last = shard_bytes, size
            groups[-1].append(source)
            room -= num_bytes
        named = {_shard_name(settings, group): group for group in groups}
        if finished.keys() <= kept | named.keys():
            break
        # The videos have changed since the interruption: keep its shards and group the remaining videos.
        kept = set(finished)
    return named


def _shard_name(settings: dict[str, Any], group: Sequence[_Source]) -> str:
    identity = json.dumps([settings, [source.key for source in group]], sort_keys=True)
    return f"{PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:24]}{SUFFIX}"


def _manifest_rows(catalog: Catalog, sources: Sequence[_Source], shards: dict[str, Shard]) -> list[dict[str, Any]]:
    stored: dict[tuple[str, str], tuple[str, ShardVideo]] = {}
    for file, shard in sorted(shards.items()):
        for row in shard.videos.values():
            stored.setdefault((normal_name(row.name), row.source_sha256), (file, row))
    rows = []
    for source in sources:
        if source.content in stored:
            file, row = stored[source.content]
            label = source.video.label
            rows.append(
                {
                    "name": row.name,
                    "class": None if label is None else catalog.class_names[label],
                    "shard": file,
                    "num_frames": row.num_frames,
                    "fps": row.fps,
                    "source_sha256": row.source_sha256,
                    "source_bytes": row.source_bytes,
                    **({} if source.video.bucket is None else {"size": str(source.video.bucket.size)}),
                }
            )
    return rows


def _read(sources: Sequence[_Source], size: Size, fit: Fit) -> Iterator[tuple[_Source, Frames | ValueError]]:
    """Yields the frames of videos in order, in their size, up to CHUNK at a time.

    If a video breaks, its error takes the place of its remaining frames. There is at least one item per video.
    """
    for source in sources:
        info = source.video.info
        frames = iter_frames(info.path)
        num_read = 0
        try:
            while chunk := list(islice(frames, CHUNK)):
                num_read += len(chunk)
                if num_read > info.num_frames:
                    raise VideoError(info.path, f"has more than the {info.num_frames} frames that were counted")
                yield source, fit_frames(np.stack(chunk), _size_of(source, size), fit)
            if num_read < info.num_frames:
                raise VideoError(info.path, f"has {num_read} of the {info.num_frames} frames that were counted")
        except ValueError as error:
            yield source, error


def _encode_video(
    vae: Autoencoder, source: _Source, size: Size, settings: dict[str, Any], pieces: Iterable[Frames | ValueError]
) -> tuple[ShardVideo, dict[str, torch.Tensor]]:
    """Encodes the frames of a video, in the pieces that `_read` yields, to float16 latents."""
    info = source.video.info
    grid = latent_grid(vae, _size_of(source, size))
    shape = (info.num_frames, int(vae.config["latent_channels"]), *grid)
    keys = TENSORS if settings["horizontal_flip"] else TENSORS[:2]
    tensors = {key: torch.empty(shape, dtype=torch.float16) for key in keys}
    first = 0
    for pixels in pieces:
        if isinstance(pixels, ValueError):
            raise pixels
        last = first + len(pixels)
        for number in range(0, len(keys), 2):
            latents = encode(vae, mirror(pixels) if number else pixels, settings["precision"])
            for key, values in zip(keys[number : number + 2], latents, strict=True):
                tensors[key][first:last] = values
        first = last
    digest = latents_digest(tensor.numpy() for tensor in tensors.values())
    row = ShardVideo(source.video.name, info.num_frames, info.fps, source.sha256, source.size, digest)
    return row, tensors
