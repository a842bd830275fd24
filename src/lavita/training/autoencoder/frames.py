"""The frames that an autoencoder is trained on: pairs of successive ones, or longer clips for a causal one.

They show which pixels move: in most videos the background covers most of the frame, and a few moving pixels matter
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
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]


def clip_length(config: AutoencoderConfig) -> int:
    """Frames of a clip that is trained on: 2, or with temporal downsampling those of three latents."""
    factor = config.temporal_downsampling
    return 2 if factor == 1 else 1 + 2 * factor


def clips_per_step(config: AutoencoderConfig) -> int:
    """Number of clips in a step."""
    return max(1, config.batch_size // clip_length(config))


def load_frames(catalog: Catalog, resolution: int, memory_gib: float, seed: int, least: int = 2) -> list[Frames]:
    """Decodes a folder of videos, shrunk so that their shorter side is at most twice that of the crops.

    Args:
        catalog: the videos, of at least `least` frames each.
        resolution: side of the crops in pixels.
        memory_gib: memory for the frames; if all of them need more, a random stretch of each video is kept.
        seed: seed of the choice of stretches.
        least: frames of a video that are kept in any case.

    Returns:
        uint8 arrays `(F, h, w, 3)`, one per video, F >= `least`.
    """
    sizes = [_shrunk(video.info.width, video.info.height, 2 * resolution) for video in catalog.videos]
    total = sum(video.info.num_frames * w * h * 3 for video, (w, h) in zip(catalog.videos, sizes, strict=True))
    share = min(1.0, memory_gib * 2**30 / total)

    def read(index: int) -> Frames:
        video, size = catalog.videos[index], sizes[index]
        count = max(least, int(video.info.num_frames * share))
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


def draw_clips(sources: list[list[Frames]], config: AutoencoderConfig, step: int) -> Frames:
    """The clips of a step, a pure function of the seed and the step.

    Returns:
        uint8 `(clips_per_step * L, R, R, 3)`, clip after clip, of L = `clip_length` successive frames with the same
        crop and flip.
    """
    length = clip_length(config)
    rng = numpy_generator(config.seed, "pairs", step)
    side = config.resolution
    weights = np.array(config.data_weights or [1.0] * len(sources))
    clips = []
    for _ in range(clips_per_step(config)):
        source = sources[rng.choice(len(sources), p=weights / weights.sum())]
        video = source[rng.integers(len(source))]
        first = int(rng.integers(len(video) - length + 1))
        clip = video[first : first + length]
        shorter = min(clip.shape[1:3])
        target = int(rng.integers(side, max(side, shorter) + 1))
        if target != shorter:
            height, width = (round(edge * target / shorter) for edge in clip.shape[1:3])
            clip = np.stack(
                [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BOX)) for f in clip]
            )
        top = int(rng.integers(clip.shape[1] - side + 1))
        left = int(rng.integers(clip.shape[2] - side + 1))
        clip = clip[:, top : top + side, left : left + side]
        if config.horizontal_flip and rng.random() < 0.5:
            clip = clip[:, :, ::-1]
        clips.append(clip)
    return np.ascontiguousarray(np.concatenate(clips))


def draw_frames(sources: list[list[Frames]], config: AutoencoderConfig) -> Frames:
    """At least 1,024 frames as in training, uint8 `(N, R, R, 3)`, other than those that are trained on first."""
    frames = clips_per_step(config) * clip_length(config)
    return np.concatenate([draw_clips(sources, config, -1 - batch) for batch in range(math.ceil(1024 / frames))])


def _shrunk(width: int, height: int, shorter: int) -> tuple[int, int]:
    """The size with its shorter side reduced to `shorter` pixels, if it is longer."""
    ratio = min(1.0, shorter / min(width, height))
    return max(1, round(width * ratio)), max(1, round(height * ratio))
