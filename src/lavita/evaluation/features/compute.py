"""Clips to the outputs of networks: one decode and one pass for all of them, decoding beside the network, and a cache.

Legend: N clips, F frames, S side in pixels.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.data.clips import center_crop_resize
from lavita.evaluation.clips import ClipRef, Side
from lavita.evaluation.features.networks import Network
from lavita.video.formats import VideoError
from lavita.video.reading import read_clip

Outputs = dict[str, list[npt.NDArray[np.float32]]]
"""By the name of the network, an array for each clip: (F, width) or (width,)."""

BATCH_SIZE = 8
"""Clips shown to a network at a time. Part of the numbers' last bits, so it does not follow the processes."""
_AHEAD = 3  # batches decoded while the network works


class BrokenVideos(ValueError):
    """Videos that could not be decoded, found while computing features."""

    def __init__(self, problems: dict[str, str]) -> None:
        """Takes the message of each video by its name."""
        first = next(iter(problems.values()))
        super().__init__(
            f"{len(problems)} videos cannot be decoded, the first: {first}; --skip-broken goes on without them"
        )
        self.names = set(problems)


def pixel_facts() -> dict[str, str]:
    """What turns frames into the pixels that both sides are compared at, for the report."""
    source = inspect.getsource(center_crop_resize)
    return {
        "function": "center_crop_resize",
        "sha256": hashlib.sha256(source.encode()).hexdigest()[:16],
        "pillow": PIL.__version__,
    }


def compute_outputs(
    side: Side,
    networks: Sequence[Network],
    resolution: int,
    cache_dir: Path | None = None,
    processes: Processes | None = None,
    seconds: dict[str, float] | None = None,
) -> Outputs:
    """The output of each network for each clip of a side.

    Args:
        side: the clips.
        networks: which networks; those with cached outputs are not run again.
        resolution: side S of the clips.
        cache_dir: outputs are kept here, by the content of the clips and all that decides the numbers.
        processes: those that share the work; whole batches, so that numbers do not depend on how many there are.
        seconds: time spent decoding, in each network, and waiting, added up by name.

    Raises:
        BrokenVideos: where videos cannot be decoded; every process raises it.
    """
    team = processes or Processes()
    spent = seconds if seconds is not None else {}
    result: Outputs = {}
    missing = []
    for network in networks:
        file = None if cache_dir is None else cache_dir / f"{cache_key(side, network, resolution)}.safetensors"
        cached = None if file is None else _read_cache(file, len(side.clips))
        # All or none, or else they would wait for each other.
        if all(team.gather(cached is not None)):
            assert cached is not None
            result[network.spec.name] = cached
        else:
            missing.append((network, file))
    if missing:
        computed = _run(side, [network for network, _ in missing], resolution, team, spent)
        for network, file in missing:
            result[network.spec.name] = computed[network.spec.name]
            if file is not None and team.is_first:
                _write_cache(file, computed[network.spec.name])
    return result


def cache_key(side: Side, network: Network, resolution: int) -> str:
    """Name of cached outputs: a hash of clips, pixels and network."""
    facts = (side.digest, resolution, sorted(pixel_facts().items()), sorted(network.facts().items()), BATCH_SIZE)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _run(side: Side, networks: Sequence[Network], resolution: int, team: Processes, spent: dict[str, float]) -> Outputs:
    # A batch has one length; the order of clips is restored below.
    by_length = sorted(range(len(side.clips)), key=lambda index: side.clips[index].num_frames)
    batches = []
    for _, group in groupby(by_length, key=lambda index: side.clips[index].num_frames):
        indices = list(group)
        batches += [indices[first : first + BATCH_SIZE] for first in range(0, len(indices), BATCH_SIZE)]
    mine = batches[team.rank :: team.count]
    progress = Progress(f"{side.root}: clip", len(side.clips))
    outputs: list[dict[str, npt.NDArray[np.float32]]] = []
    problems: dict[str, str] = {}
    done = 0
    with ThreadPoolExecutor(1) as reader, torch.inference_mode():
        for clips, errors, decoding in _ahead(reader, side, mine, resolution):
            problems.update(errors)
            spent["decode"] = spent.get("decode", 0.0) + decoding
            found: dict[str, npt.NDArray[np.float32]] = {}
            # After a failure only the other failures are of interest.
            for network in networks if clips is not None and not problems else ():
                start = time.monotonic()
                assert clips is not None
                found[network.spec.name] = network.run(torch.from_numpy(clips)).float().cpu().numpy()
                name = f"network {network.spec.name}"
                spent[name] = spent.get(name, 0.0) + time.monotonic() - start
            outputs.append(found)
            done += BATCH_SIZE * team.count
            if team.is_first:
                progress.update(min(done, len(side.clips)))
    everyone = team.gather((outputs, problems))
    all_problems = {name: text for _, errors in everyone for name, text in errors.items()}
    if all_problems:
        for text in all_problems.values() if team.is_first else ():
            print(f"broken: {text}", file=sys.stderr)
        raise BrokenVideos(dict(sorted(all_problems.items())))
    result: Outputs = {}
    for network in networks:
        rows: list[npt.NDArray[np.float32] | None] = [None] * len(side.clips)
        for rank, (theirs, _) in enumerate(everyone):
            for batch, found in zip(batches[rank :: team.count], theirs, strict=True):
                for index, row in zip(batch, found[network.spec.name], strict=True):
                    rows[index] = row
        result[network.spec.name] = [row for row in rows if row is not None]
        assert len(result[network.spec.name]) == len(side.clips)
    return result


Batch = tuple[npt.NDArray[np.uint8] | None, dict[str, str], float]


def _ahead(
    reader: ThreadPoolExecutor, side: Side, batches: Sequence[Sequence[int]], resolution: int
) -> Iterator[Batch]:
    """Batches in order, the next ones being decoded meanwhile."""
    waiting = [reader.submit(_read_batch, side, batch, resolution) for batch in batches[:_AHEAD]]
    for number in range(len(batches)):
        batch = waiting.pop(0).result()
        if number + _AHEAD < len(batches):
            waiting.append(reader.submit(_read_batch, side, batches[number + _AHEAD], resolution))
        yield batch


def _read_batch(side: Side, batch: Sequence[int], resolution: int) -> Batch:
    start = time.monotonic()
    clips, problems = [], {}
    for index in batch:
        clip = side.clips[index]
        try:
            clips.append(read_pixels(side, clip, resolution))
        except VideoError as error:
            problems[clip.name] = str(error)
    decoded = np.stack(clips) if not problems else None
    return decoded, problems, time.monotonic() - start


def read_pixels(side: Side, clip: ClipRef, resolution: int) -> npt.NDArray[np.uint8]:
    """The pixels of a clip, uint8 (F, S, S, 3): the same function for either side.

    Raises:
        VideoError: where the video cannot be decoded.
    """
    frames = read_clip(side.root / clip.name, clip.start, clip.num_frames, side.frame_interval)
    return center_crop_resize(frames, resolution)


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
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    per_clip = outputs[0].ndim == 1
    content = {
        "rows": np.ascontiguousarray(np.concatenate([row[None] if per_clip else row for row in outputs])),
        "lengths": np.array([1 if per_clip else len(row) for row in outputs], dtype=np.int64),
        "per_clip": np.array([per_clip], dtype=np.uint8),
    }
    try:
        save_file(content, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
