"""Runs networks on clips: each clip is decoded once for all networks, ahead of them, and their outputs are cached.

Legend: N clips, F frames, S side in pixels.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lavita.core.files import replacing
from lavita.core.prefetch import prefetch
from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.evaluation.clips import ClipSet, read_pixels
from lavita.evaluation.features.networks import Network
from lavita.video.formats import VideoError

Outputs = dict[str, list[npt.NDArray[np.float32]]]
"""For each network, by name, one array per clip: (F, width) or (width,)."""

BATCH_SIZE = 8
"""Clips per call of a network. It affects the last bits of the outputs, so it does not depend on the processes."""
PIXELS = "90fca6b40186be2e"
"""Identifies the pixels that `center_crop_resize` makes: a hash of its source, as it was first written. It is part of
reports and of cache keys, so change it if the function makes other pixels, and only then."""
_PREFETCHED = 3  # batches that are decoded while the network works


class BrokenVideos(ValueError):
    """Videos that could not be decoded, found while computing features."""

    def __init__(self, problems: dict[str, str]) -> None:
        """Takes the message of each video by its name."""
        first = next(iter(problems.values()))
        super().__init__(
            f"{len(problems)} videos cannot be decoded, the first: {first}; --skip-broken continues without them"
        )
        self.names = set(problems)


def pixel_facts() -> dict[str, str]:
    """Describes how frames are turned into pixels, real and generated ones alike, for the report."""
    return {"function": "center_crop_resize", "sha256": PIXELS, "pillow": PIL.__version__}


def compute_outputs(
    clips: ClipSet,
    networks: Sequence[Network],
    resolution: int,
    cache_dir: Path | None = None,
    team: Processes | None = None,
    seconds: dict[str, float] | None = None,
) -> Outputs:
    """Computes the output of each network for each clip.

    Args:
        clips: the clips.
        networks: networks to run, unless their outputs are in the cache.
        resolution: side S of the pixels.
        cache_dir: folder of cached outputs, named by the clips' content and everything else that decides the numbers.
        team: processes that share the work, in whole batches, so that the numbers do not depend on how many there are.
        seconds: times spent decoding and in each network, by name; this call adds to them.

    Raises:
        BrokenVideos: if videos cannot be decoded; raised in every process.
    """
    team = team or Processes()
    seconds = seconds if seconds is not None else {}
    result: Outputs = {}
    missing = []
    for network in networks:
        file = None if cache_dir is None else cache_dir / f"{cache_key(clips, network, resolution)}.safetensors"
        cached = None if file is None else _read_cache(file, len(clips.clips))
        # All processes use the cache or none does; otherwise they would wait for each other.
        if all(team.gather(cached is not None)):
            assert cached is not None
            result[network.spec.name] = cached
        else:
            missing.append((network, file))
    if missing:
        computed = _run(clips, [network for network, _ in missing], resolution, team, seconds)
        for network, file in missing:
            result[network.spec.name] = computed[network.spec.name]
            if file is not None and team.is_first:
                _write_cache(file, computed[network.spec.name])
    return result


def cache_key(clips: ClipSet, network: Network, resolution: int) -> str:
    """Name of cached outputs: a hash of clips, pixels and network."""
    facts = (clips.digest, resolution, sorted(pixel_facts().items()), sorted(network.facts().items()), BATCH_SIZE)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _run(
    clips: ClipSet, networks: Sequence[Network], resolution: int, team: Processes, seconds: dict[str, float]
) -> Outputs:
    # All clips of a batch have one length; the order of the clips is restored below.
    by_length = sorted(range(len(clips.clips)), key=lambda index: clips.clips[index].num_frames)
    batches = []
    for _, group in groupby(by_length, key=lambda index: clips.clips[index].num_frames):
        indices = list(group)
        batches += [indices[first : first + BATCH_SIZE] for first in range(0, len(indices), BATCH_SIZE)]
    progress = Progress(f"{clips.root}: clip", len(clips.clips), active=team.is_first)
    outputs: list[dict[str, npt.NDArray[np.float32]]] = []
    problems: dict[str, str] = {}
    decoded = prefetch((_read_batch(clips, batch, resolution) for batch in team.share(batches)), _PREFETCHED)
    with closing(decoded), torch.inference_mode():
        for number, (pixels, errors, duration) in enumerate(decoded, start=1):
            problems.update(errors)
            seconds["decode"] = seconds.get("decode", 0.0) + duration
            found: dict[str, npt.NDArray[np.float32]] = {}
            # After a failure the remaining batches are only decoded, to find all broken videos.
            if pixels is not None and not problems:
                for network in networks:
                    start = time.monotonic()
                    found[network.spec.name] = network.run(torch.from_numpy(pixels)).float().cpu().numpy()
                    name = f"network {network.spec.name}"
                    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            outputs.append(found)
            progress.update(min(number * BATCH_SIZE * team.count, len(clips.clips)))
    all_problems = {name: text for errors in team.gather(problems) for name, text in errors.items()}
    if all_problems:
        for text in all_problems.values() if team.is_first else ():
            print(f"broken: {text}", file=sys.stderr)
        raise BrokenVideos(dict(sorted(all_problems.items())))
    rows = {
        index: {name: array[row] for name, array in found.items()}
        for batch, found in zip(batches, team.collect(outputs), strict=True)
        for row, index in enumerate(batch)
    }
    return {
        network.spec.name: [rows[index][network.spec.name] for index in range(len(clips.clips))] for network in networks
    }


def _read_batch(
    clips: ClipSet, batch: Sequence[int], resolution: int
) -> tuple[npt.NDArray[np.uint8] | None, dict[str, str], float]:
    """Pixels (B, F, S, S, 3), or None if a video is broken; messages by the name of the video; and the time spent."""
    start = time.monotonic()
    pixels, problems = [], {}
    for index in batch:
        clip = clips.clips[index]
        try:
            pixels.append(read_pixels(clips, clip, resolution))
        except VideoError as error:
            problems[clip.name] = str(error)
    stacked = np.stack(pixels) if not problems else None
    return stacked, problems, time.monotonic() - start


def _read_cache(file: Path, count: int) -> list[npt.NDArray[np.float32]] | None:
    if not file.exists():
        return None
    try:
        content = load_file(file)
        rows = np.split(content["rows"], np.cumsum(content["lengths"])[:-1])
        per_clip = bool(content["per_clip"][0])
    except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
        print(f"{file}: damaged, computing it again ({type(error).__name__})", file=sys.stderr)
        return None
    if len(rows) != count:
        print(f"{file}: damaged, computing it again ({len(rows)} clips instead of {count})", file=sys.stderr)
        return None
    return [row[0] for row in rows] if per_clip else rows


def _write_cache(file: Path, outputs: list[npt.NDArray[np.float32]]) -> None:
    per_clip = outputs[0].ndim == 1
    content = {
        "rows": np.ascontiguousarray(np.concatenate([row[None] if per_clip else row for row in outputs])),
        "lengths": np.array([1 if per_clip else len(row) for row in outputs], dtype=np.int64),
        "per_clip": np.array([per_clip], dtype=np.uint8),
    }
    with replacing(file) as partial:
        save_file(content, partial)
