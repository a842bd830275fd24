"""What this machine does in a second: real work on a few frames, and a few real training steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np
import torch

from lavita.core.precision import autocast
from lavita.data.catalog import Video
from lavita.data.clips import center_crop_resize
from lavita.evaluation.reconstruction import quality_of, reconstruction_errors
from lavita.models.autoencoder import Autoencoder, decode, encode
from lavita.training.batches import random_batch
from lavita.training.config import RunConfig
from lavita.training.setup import model_of_sizes
from lavita.training.state import TrainState
from lavita.training.step import train_step
from lavita.video.formats import VideoError
from lavita.video.reading import iter_frames

NUM_VIDEOS, NUM_FRAMES = 6, 16
"""Videos that the autoencoder is tried on, and frames of each."""
MOST_STEPS, MOST_SECONDS = 4, 6.0
"""Training steps that are taken, fewer if they take longer than this."""


@dataclass(frozen=True)
class AutoencoderTrial:
    """An autoencoder on a few frames of the videos."""

    psnr: float | None
    """Of the reconstruction, in dB; None without error, or without videos."""
    encode_seconds: float
    """Time of reading, cropping and encoding a frame."""
    decode_seconds: float
    """Time of decoding a frame."""


@dataclass(frozen=True)
class StepTrial:
    """A model on random latents."""

    seconds: float
    """Time of a training step."""
    clip_seconds: float
    """Time of a pass without gradients, per clip."""


def try_autoencoder(vae: Autoencoder, videos: Sequence[Video], resolution: int) -> AutoencoderTrial:
    """Reconstructs the first frames of a few videos, spread over the list; without any, times frames without content.

    Raises:
        VideoError: if none of them can be read.
    """
    # The first call sets things up, and is not timed.
    empty = encode(vae, np.zeros((1, resolution, resolution, 3), np.uint8))[0]
    decode(vae, empty)
    if not videos:
        start = time.perf_counter()
        decode(vae, empty.repeat(NUM_FRAMES, 1, 1, 1))
        return AutoencoderTrial(None, 0.0, (time.perf_counter() - start) / NUM_FRAMES)
    count = min(NUM_VIDEOS, len(videos))
    chosen = [videos[(2 * number + 1) * len(videos) // (2 * count)] for number in range(count)]
    errors, problem = [], None
    encoding = decoding = 0.0
    for video in chosen:
        start = time.perf_counter()
        try:
            frames = np.stack(list(islice(iter_frames(video.info.path), NUM_FRAMES)))
        except VideoError as error:
            problem = error
            continue
        real = center_crop_resize(frames, resolution)
        latents, _ = encode(vae, real)
        encoded = time.perf_counter()
        reconstructed = decode(vae, latents)
        encoding, decoding = encoding + encoded - start, decoding + time.perf_counter() - encoded
        errors.append(reconstruction_errors(real, reconstructed))
    if not errors:
        assert problem is not None
        raise problem
    quality = quality_of(errors)
    return AutoencoderTrial(quality["psnr"], encoding / quality["frames"], decoding / quality["frames"])


def time_step(config: RunConfig, vae: Autoencoder, num_classes: int, device: torch.device) -> StepTrial:
    """Takes a few training steps on random latents, the first of which does not count, and a pass as in sampling."""
    settings = config.train
    model = model_of_sizes(config, vae, num_classes).to(device).train()
    state = TrainState.build(model, settings, device)
    batch = random_batch(model.config, settings.batch_size, num_images=config.data.num_images)
    seconds: list[float] = []
    while len(seconds) < MOST_STEPS and sum(seconds) < MOST_SECONDS:
        start = time.perf_counter()
        train_step(state, batch, settings)  # waits for the device: it reads the loss
        seconds.append(time.perf_counter() - start)
    part = batch.part(0, settings.batch_size, device)
    clips = part.latents[:, : config.data.num_frames]
    labels = torch.zeros(len(clips), dtype=torch.long, device=device) if num_classes else None
    start = time.perf_counter()
    with torch.no_grad(), autocast(device, settings.precision):
        model.eval()(clips, part.timesteps, labels).sample.sum().item()
    return StepTrial(median(seconds[1:] or seconds), (time.perf_counter() - start) / len(clips))
