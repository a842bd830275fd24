"""Shards, the files of a latent cache: safetensors with the latents of one or more videos.

A shard has float16 tensors `<video>/mean` and `<video>/std` (F, C, h, w), and for a cache with mirrored frames also
`<video>/mean_flip` and `<video>/std_flip`. Its header holds the settings of the cache and the facts of its videos.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lavita.core.files import replacing

PREFIX, SUFFIX = "latents-", ".safetensors"
TENSORS = ("mean", "std", "mean_flip", "std_flip")
"""The tensors of a video, in this order; the last two only with mirrored frames."""
ITEM = 2  # bytes of a float16
_METADATA = "lavita"


@dataclass(frozen=True)
class ShardVideo:
    """The facts of a video in a shard."""

    name: str
    """Path below the data set's folder, with forward slashes."""
    num_frames: int
    fps: float
    source_sha256: str
    source_bytes: int
    latents_sha256: str
    """SHA-256 of the bytes of its tensors, in the order of `TENSORS`."""


@dataclass(frozen=True)
class Shard:
    """The header of a shard."""

    path: Path
    settings: dict[str, Any]
    """The settings of the cache: version, autoencoder, resolution, mirrored frames, precision."""
    videos: dict[str, ShardVideo]
    broken: tuple[str, ...]
    """One message per video of the shard that could not be decoded; each begins with the video's name."""
    frame_shape: tuple[int, ...]
    """(C, h, w)."""
    offsets: dict[str, tuple[int, ...]]
    """For each video, where its tensors begin in the file, in the order of `TENSORS`."""


def write_shard(
    path: Path,
    settings: dict[str, Any],
    videos: Sequence[tuple[ShardVideo, dict[str, torch.Tensor]]],
    broken: Sequence[str],
) -> None:
    """Writes a shard, whole or not at all. Equal inputs give equal files.

    Args:
        path: the file.
        settings: see `Shard`.
        videos: at least one video, with its float16 tensors by the names of `TENSORS`.
        broken: see `Shard`.
    """
    # A single entry, because safetensors writes several in arbitrary order.
    metadata = {_METADATA: json.dumps({**settings, "videos": [asdict(row) for row, _ in videos], "broken": [*broken]})}
    tensors = {f"{_tensor_name(row.name)}/{key}": tensor for row, latents in videos for key, tensor in latents.items()}
    with replacing(path, durable=True) as partial:
        save_file(tensors, partial, metadata)


def read_shard(path: Path) -> Shard:
    """Reads the header of a shard, and checks the length of the file.

    Raises:
        ValueError: if the file is missing, cut off or damaged in its header, or is not a shard.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            begin = 8 + int.from_bytes(stream.read(8), "little")
            if begin > size:
                raise ValueError(f"{path}: cut off; run `lavita encode` again")
            header = json.loads(stream.read(begin - 8))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; run `lavita encode` again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged in its header; run `lavita encode` again") from error
    try:
        settings = json.loads(header.pop("__metadata__")[_METADATA])
        videos = {row["name"]: ShardVideo(**row) for row in settings.pop("videos")}
        broken = tuple(settings.pop("broken"))
        end = begin + max(entry["data_offsets"][1] for entry in header.values())
        frame_shape = tuple(next(iter(header.values()))["shape"][1:])
        keys = TENSORS[: len(header) // len(videos)]
        offsets = {}
        for name, row in videos.items():
            entries = [header[f"{_tensor_name(name)}/{key}"] for key in keys]
            length = ITEM * row.num_frames * math.prod(frame_shape)
            for entry in entries:
                first, last = entry["data_offsets"]
                if (
                    entry["dtype"] != "F16"
                    or entry["shape"] != [row.num_frames, *frame_shape]
                    or last - first != length
                ):
                    raise ValueError(f"{name} has {entry}")
            offsets[name] = tuple(begin + entry["data_offsets"][0] for entry in entries)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, ZeroDivisionError) as error:
        raise ValueError(f"{path}: damaged in its header; run `lavita encode` again") from error
    if end != size:
        raise ValueError(f"{path}: cut off, {size} of {end} bytes are there; run `lavita encode` again")
    return Shard(path, settings, videos, broken, frame_shape, offsets)


def _tensor_name(video: str) -> str:
    """The name of a video as safetensors takes it: one that is not UTF-8 in hex, after a slash, as no other begins."""
    if any("\ud800" <= character <= "\udfff" for character in video):
        return f"/{video.encode('utf-8', 'surrogateescape').hex()}"
    return video


def read_rows(descriptor: int, offset: int, frame_shape: tuple[int, ...], rows: range) -> torch.Tensor:
    """Reads some frames of a tensor.

    Not through a memory map, whose pages count as memory of this process while it is open, and which kills the process
    if the file is cut off.

    Args:
        descriptor: descriptor of the open file.
        offset: where the tensor begins in the file.
        frame_shape: (C, h, w).
        rows: the frames.

    Returns:
        float32 (len(rows), C, h, w).

    Raises:
        ValueError: if the file ends before the last of them.
    """
    length = ITEM * math.prod(frame_shape)
    values = np.empty((len(rows), *frame_shape), np.float16)
    parts = [(rows.start, values)] if rows.step == 1 else list(zip(rows, values, strict=True))
    for row, part in parts:
        if os.preadv(descriptor, [part.data], offset + row * length) != part.nbytes:
            raise ValueError("ends too early")
    return torch.from_numpy(values).float()


def latents_digest(parts: Iterator[Any]) -> str:
    """SHA-256 of the bytes of a video's tensors in the order of `TENSORS`, given in parts of any length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def damaged_videos(shard: Shard, part: int = 1 << 20) -> list[str]:
    """Names of the videos whose latents differ from those that were written; reads the whole file."""
    damaged = []
    with shard.path.open("rb") as stream:

        def blocks(offset: int, length: int) -> Iterator[bytes]:
            stream.seek(offset)
            for first in range(0, length, part):
                yield stream.read(min(part, length - first))

        for name, row in shard.videos.items():
            length = ITEM * row.num_frames * math.prod(shard.frame_shape)
            stored = (block for offset in shard.offsets[name] for block in blocks(offset, length))
            if latents_digest(stored) != row.latents_sha256:
                damaged.append(name)
    return damaged
