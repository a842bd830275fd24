"""The files of a latent cache: safetensors that hold the latents of many videos, and say of which.

A shard has tensors `<video>/mean` and `<video>/std` (F, C, h, w), float16, and `<video>/mean_flip` and
`<video>/std_flip` where mirrored frames were asked for. How they were made, and of what, stands in its header.
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

PREFIX, SUFFIX = "latents-", ".safetensors"
TENSORS = ("mean", "std", "mean_flip", "std_flip")
"""What a video has, in this order; the last two with mirrored frames only."""
ITEM = 2  # bytes of a float16
_METADATA = "lavita"


@dataclass(frozen=True)
class ShardVideo:
    """What a shard says of one of its videos."""

    name: str
    """Path below the data set's folder, with forward slashes."""
    num_frames: int
    fps: float
    source_sha256: str
    source_bytes: int
    latents_sha256: str
    """Of the bytes of its tensors, in the order of `TENSORS`."""


@dataclass(frozen=True)
class Shard:
    """The header of a shard."""

    path: Path
    settings: dict[str, Any]
    """How its latents were made."""
    videos: dict[str, ShardVideo]
    broken: tuple[str, ...]
    """One message a video that should be in it, but could not be decoded; each begins with its name."""
    frame_shape: tuple[int, ...]
    """(C, h, w)."""
    offsets: dict[str, tuple[int, ...]]
    """Of each video: where its tensors begin in the file, in the order of `TENSORS`."""


def write_shard(
    path: Path,
    settings: dict[str, Any],
    videos: Sequence[tuple[ShardVideo, dict[str, torch.Tensor]]],
    broken: Sequence[str],
) -> None:
    """Writes a shard beside and renames it: it is complete or absent, and equal inputs are equal files.

    Args:
        path: the file.
        settings: how the latents were made.
        videos: at least one, each with its tensors by the names of `TENSORS`, float16.
        broken: see `Shard`.
    """
    # One entry: safetensors writes several in any order.
    metadata = {_METADATA: json.dumps({**settings, "videos": [asdict(row) for row, _ in videos], "broken": [*broken]})}
    tensors = {f"{row.name}/{key}": tensor for row, own in videos for key, tensor in own.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


def read_shard(path: Path) -> Shard:
    """Reads the header of a shard, and checks that the file is as long as it says.

    Raises:
        ValueError: for a file that is missing, cut off, damaged in its header, or no shard.
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
            entries = [header[f"{name}/{key}"] for key in keys]
            length = ITEM * row.num_frames * math.prod(frame_shape)
            for entry in entries:
                first, last = entry["data_offsets"]
                if (
                    entry["dtype"] != "F16"
                    or entry["shape"] != [row.num_frames, *frame_shape]
                    or last - first != length
                ):
                    raise ValueError(f"{name} is {entry}")
            offsets[name] = tuple(begin + entry["data_offsets"][0] for entry in entries)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, ZeroDivisionError) as error:
        raise ValueError(f"{path}: damaged in its header; run `lavita encode` again") from error
    if end != size:
        raise ValueError(f"{path}: cut off, {size} of {end} bytes are there; run `lavita encode` again")
    return Shard(path, settings, videos, broken, frame_shape, offsets)


def read_rows(descriptor: int, offset: int, frame_shape: tuple[int, ...], rows: range) -> torch.Tensor:
    """Reads some frames of a tensor, and no others.

    Not through a memory map: its pages count as this process's memory for as long as it stays open, and a file that is
    cut off under it kills the process.

    Args:
        descriptor: of the open file.
        offset: where the tensor begins in it.
        frame_shape: (C, h, w).
        rows: the frames.

    Returns:
        float32 (len(rows), C, h, w).

    Raises:
        ValueError: where the file ends before them.
    """
    length = ITEM * math.prod(frame_shape)
    values = np.empty((len(rows), *frame_shape), np.float16)
    parts = [(rows.start, values)] if rows.step == 1 else list(zip(rows, values, strict=True))
    for row, part in parts:
        if os.preadv(descriptor, [part.data], offset + row * length) != part.nbytes:
            raise ValueError("ends too early")
    return torch.from_numpy(values).float()


def latents_digest(parts: Iterator[Any]) -> str:
    """SHA-256 of the bytes of a video's tensors, given in the order of `TENSORS`, in parts of any length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def damaged_videos(shard: Shard, part: int = 1 << 20) -> list[str]:
    """Names of the videos whose latents are not those that were written; reads the whole file."""
    damaged = []
    with shard.path.open("rb") as stream:

        def blocks(offset: int, length: int) -> Iterator[bytes]:
            stream.seek(offset)
            for first in range(0, length, part):
                yield stream.read(min(part, length - first))

        for name, row in shard.videos.items():
            length = ITEM * row.num_frames * math.prod(shard.frame_shape)
            own = (block for offset in shard.offsets[name] for block in blocks(offset, length))
            if latents_digest(own) != row.latents_sha256:
                damaged.append(name)
    return damaged
