"""The frames that an autoencoder is trained on: pairs of successive ones.

A pair shows which pixels move: in most videos the background covers most of the frame, and a few moving pixels matter
most.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
from PIL import Image

from lavita.core.prefetch import parallel_map
from lavita.core.progress import Progress
from lavita.core.seeds import numpy_generator
from lavita.data.catalog import Catalog
from lavita.training.config import AutoencoderConfig
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]


def load_frames(catalog: Catalog, resolution: int, memory_gib: float, seed: int) -> list[Frames]:
    """Decodes a folder of videos, shrunk so that their shorter side is at most twice that of the crops.

    Args:
        catalog: the videos, of at least two frames each.
        resolution: side of the crops in pixels.
        memory_gib: memory for the frames; if all of them need more, a random stretch of each video is kept.
        seed: seed of the choice of stretches.

    Returns:
        uint8 arrays `(F, h, w, 3)`, one per video, F >= 2.
    """
    sizes = [_shrunk(video.info.width, video.info.height, 2 * resolution) for video in catalog.videos]
    total = sum(video.info.num_frames * w * h * 3 for video, (w, h) in zip(catalog.videos, sizes, strict=True))
    share = min(1.0, memory_gib * 2**30 / total)

    def read(index: int) -> Frames:
        video, size = catalog.videos[index], sizes[index]
        count = max(2, int(video.info.num_frames * share))
        start = int(numpy_generator(seed, "stretch", index).integers(video.info.num_frames - count + 1))
        kept = []
        for number, frame in enumerate(iter_frames(video.info.path)):
            if number >= start:
                image = Image.fromarray(frame)
                if image.size != size:
                    image = image.resize(size, Image.Resampling.BOX)
                kept.append(np.asarray(image))
            if len(kept) == count:
                break
        return np.stack(kept)

    videos = []
    progress = Progress(f"reading {catalog.root}", len(sizes))
    for frames in parallel_map(read, range(len(sizes)), workers=os.cpu_count() or 1):
        videos.append(frames)
        progress.update(len(videos))
    return videos


def draw_pairs(sources: list[list[Frames]], config: AutoencoderConfig, step: int) -> Frames:
    """The frame pairs of a step, a pure function of the seed and the step.

    Returns:
        uint8 `(batch_size, R, R, 3)`; frames 2i and 2i + 1 are successive ones with the same crop and flip.
    """
    rng = numpy_generator(config.seed, "pairs", step)
    side = config.resolution
    weights = np.array(config.data_weights or [1.0] * len(sources))
    pairs = []
    for _ in range(config.batch_size // 2):
        source = sources[rng.choice(len(sources), p=weights / weights.sum())]
        video = source[rng.integers(len(source))]
        first = int(rng.integers(len(video) - 1))
        pair = video[first : first + 2]
        shorter = min(pair.shape[1:3])
        target = int(rng.integers(side, max(side, shorter) + 1))
        if target != shorter:
            height, width = (round(edge * target / shorter) for edge in pair.shape[1:3])
            pair = np.stack(
                [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BOX)) for f in pair]
            )
        top = int(rng.integers(pair.shape[1] - side + 1))
        left = int(rng.integers(pair.shape[2] - side + 1))
        pair = pair[:, top : top + side, left : left + side]
        if config.horizontal_flip and rng.random() < 0.5:
            pair = pair[:, :, ::-1]
        pairs.append(pair)
    return np.ascontiguousarray(np.concatenate(pairs))


def draw_frames(sources: list[list[Frames]], config: AutoencoderConfig) -> Frames:
    """At least 1,024 frames as in training, uint8 `(N, R, R, 3)`, other than those that are trained on first."""
    return np.concatenate(
        [draw_pairs(sources, config, -1 - batch) for batch in range(math.ceil(1024 / config.batch_size))]
    )


def _shrunk(width: int, height: int, shorter: int) -> tuple[int, int]:
    """The size with its shorter side reduced to `shorter` pixels, if it is longer."""
    ratio = min(1.0, shorter / min(width, height))
    return max(1, round(width * ratio)), max(1, round(height * ratio))
