"""Reading clips compared with a training step: reading must cost nothing next to it."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.peaks import resident
from benchmarks.speed.setup import IN_CHANNELS, Setup
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from benchmarks.speed.training import CHECKPOINTED, OURS, Trainer, predicted_memory
from lavita.core.prefetch import prefetch
from lavita.core.progress import Progress
from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.clips import ClipDraw, ClipSampler, clip_span, read_pixels
from lavita.data.latent_cache.manifest import VERSION, write_manifest
from lavita.data.latent_cache.reading import CacheSource
from lavita.data.latent_cache.shards import TENSORS, ShardVideo, latents_digest, write_shard
from lavita.models.autoencoder import AutoencoderKL
from lavita.studies.memory import available_memory
from lavita.video.writing import write_video

COLD = "from the latent cache, not in the page cache"
WARM = "from the latent cache"
DECODED = "from videos, decoded and resized"
ENCODED = "from videos, decoded and encoded"
STEP = "a training step, per clip"
INTERVAL = 3
PIXELS = 8  # height and width of the frame patch of one latent pixel, as in Stable Diffusion
NUM_SHARDS, SHARD_VIDEOS = 4, 40  # with 4 x 32 x 32 latents about 256 MB each
LENGTH = 180  # frames per video, about the mean of UCF101
NUM_VIDEOS = 2
CACHED_CLIPS, VIDEO_CLIPS = 256, 4  # per call
EARLY_READS, MANY_READS = 1_000, 20_000


def make_cache(folder: Path, setup: Setup, length: int) -> None:
    """Writes random latents in the format of `lavita encode`."""
    folder.mkdir()
    settings = {
        "version": VERSION,
        "autoencoder": "none: random numbers",
        "resolution": PIXELS * setup.sample_size,
        "horizontal_flip": True,
        "precision": "fp32",
    }
    shape = (length, IN_CHANNELS, setup.sample_size, setup.sample_size)
    values = {key: torch.randn(shape).half() for key in TENSORS}
    digest = latents_digest(tensor.numpy() for tensor in values.values())
    rows = []
    for number in range(NUM_SHARDS):
        names = [f"{number * SHARD_VIDEOS + index:05}.mp4" for index in range(SHARD_VIDEOS)]
        shard = f"latents-{number:024}.safetensors"
        videos = [ShardVideo(name, length, 25.0, "", 0, digest) for name in names]
        copies = [(video, {key: tensor.clone() for key, tensor in values.items()}) for video in videos]
        write_shard(folder / shard, settings, copies, [])
        common = {"class": None, "shard": shard, "num_frames": length, "fps": 25.0, "source_sha256": ""}
        rows += [{"name": name, **common, "source_bytes": 0} for name in names]
    write_manifest(folder, {**settings, "videos": rows, "broken": []})


def make_videos(folder: Path, side: int, length: int, count: int = NUM_VIDEOS) -> list[Path]:
    """Writes videos of moving coloured squares, with an aspect ratio of 5 to 4."""
    folder.mkdir()
    scale = max(1, side // 16)
    files = []
    for seed in range(count):
        small = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        picture = small.repeat(scale, 0).repeat(scale, 1)
        frames = np.stack([np.roll(picture, (number, 2 * number), (0, 1)) for number in range(length)])
        files.append(folder / f"{seed}.mp4")
        write_video(files[-1], frames, fps=25)
    return files


def narrow_autoencoder(device: torch.device) -> AutoencoderKL:
    """An autoencoder in Stable Diffusion's layout with 1.0 M parameters and random weights."""
    vae: AutoencoderKL = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=IN_CHANNELS,
        norm_num_groups=8,
    )
    torch.nn.Module.to(vae, device)  # diffusers declares its own `to` in a way that mypy misreads
    return vae.eval().requires_grad_(False)


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """Asks the kernel to drop files from its page cache; the disk's own cache stays."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def waiting_share(read: Callable[[int], Any], step: Callable[[], Any], steps: int) -> float:
    """The share of a training loop that waits for its reader, which reads one batch ahead, as in `lavita train`."""
    waited = 0.0
    with closing(prefetch(read(number) for number in itertools.count())) as batches:
        next(batches)  # has no step to hide behind
        start = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - before
            step()
        return waited / (time.perf_counter() - start)


def memory_growth(read: Callable[[int], Any]) -> dict[str, int | None]:
    """Resident bytes after the first thousand reads and after all of them."""
    early = None
    for number in range(MANY_READS):
        read(number)
        if number + 1 == EARLY_READS:
            early = resident("VmRSS")
    return {f"after_{EARLY_READS}": early, f"after_{MANY_READS}": resident("VmRSS")}


def run(setup: Setup) -> Section:
    """Measures the time per clip of reading and of a training step of the preset."""
    free = available_memory(setup.torch_device)
    kind = OURS if free is None or predicted_memory(setup) < 0.9 * free else CHECKPOINTED
    if free is not None and kind == CHECKPOINTED and predicted_memory(setup, True) > 0.9 * free:
        raise ValueError(f"preset is {setup.preset}, whose training step does not fit into memory here")
    step = Trainer(setup).configure(kind)
    frames, resolution = setup.num_frames, PIXELS * setup.sample_size
    span = clip_span(frames, INTERVAL)
    length = max(LENGTH, span + 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cache(folder / "cache", setup, length)
        make_videos(folder / "videos", resolution, length)
        cache = CacheSource(folder / "cache", min_frames=span)
        shards = sorted((folder / "cache").glob("*.safetensors"))
        videos = VideoSource(
            scan(folder / "videos"), narrow_autoencoder(setup.torch_device), resolution, setup.precision
        )
        cached, decoded = (ClipSampler(source.catalog, frames, INTERVAL, True, seed=0) for source in (cache, videos))
        cached_draws = [cached.draw(0, index) for index in range(CACHED_CLIPS)]
        video_draws = [decoded.draw(0, index) for index in range(VIDEO_CLIPS)]

        def read_cold() -> Any:
            drop_from_page_cache(shards)
            return cache.read_many(cached_draws, frames, INTERVAL)

        def read_decoded(draws: Sequence[ClipDraw]) -> Any:
            return [read_pixels(draw, frames, INTERVAL, resolution) for draw in draws]

        runs: dict[str, tuple[int, Callable[[], Any]]] = {
            COLD: (CACHED_CLIPS, read_cold),
            WARM: (CACHED_CLIPS, lambda: cache.read_many(cached_draws, frames, INTERVAL)),
            DECODED: (VIDEO_CLIPS, lambda: read_decoded(video_draws)),
            ENCODED: (VIDEO_CLIPS, lambda: videos.read_many(video_draws, frames, INTERVAL)),
            STEP: (setup.batch_size, step),
        }
        progress = Progress("data: run", num_timings(len(runs), setup.repeats) + 1)
        calls = {name: call for name, (_, call) in runs.items()}
        seconds = interleave(calls, setup.repeats, setup.torch_device, progress, clock="wall")

        def read_batch(number: int) -> Any:
            draws = [cached.draw(number, index) for index in range(setup.batch_size)]
            return cache.read_many(draws, frames, INTERVAL)

        waits = waiting_share(read_batch, step, max(2, setup.repeats))
        memory = (
            memory_growth(lambda number: cache.read(cached.draw(1, number), frames, INTERVAL)) if setup.memory else {}
        )
        progress.update(progress.done + 1, "waiting")
    each = {name: [value / runs[name][0] for value in values] for name, values in seconds.items()}
    rows = [Row(name, each[name], floor=STEP if name != STEP else None) for name in runs]
    rates = {name: 1 / statistics.median(values) for name, values in each.items()}
    facts = {"clips_per_second": rates, "waiting_share": waits, "resident": memory}
    notes = [
        f"The training step is that of {setup.preset} ({kind}); reading is faster than training if its ratio is below "
        f"1. Clips of {frames} frames at interval {INTERVAL}; latents of {IN_CHANNELS} x {setup.sample_size} x "
        f"{setup.sample_size}, frames of {resolution} pixels, an autoencoder of 1.0 M parameters. All times are wall "
        "times, as reading waits for the disk.",
        f"Clips per second: {', '.join(f'{name} {rate:.3g}' for name, rate in rates.items())}.",
        f"With the latent cache and one reader thread, {waits:.2%} of the training loop waits for clips.",
    ]
    early, late = memory.get(f"after_{EARLY_READS}"), memory.get(f"after_{MANY_READS}")
    if early is not None and late is not None:
        notes.append(
            f"Resident memory after {EARLY_READS:,} reads from the cache: {early / 1e6:.1f} MB; after {MANY_READS:,}: "
            f"{late / 1e6:.1f} MB."
        )
    return Section("data", "Reading clips", "one clip", rows, facts, notes, base="a training step")
