"""Clips a second of what feeds training, and whether a step ever waits for them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.setup import IN_CHANNELS, Setup, available_memory
from benchmarks.speed.timing import Row, Section, interleave, timings
from benchmarks.speed.training import CHECKPOINTED, OURS, Trainer, predicted_memory
from lavita.core.progress import Progress
from lavita.data.catalog import scan
from lavita.data.clip_sources import CacheSource
from lavita.data.clips import ClipSampler, clip_span, read_pixels
from lavita.data.latent_cache.manifest import VERSION, write_manifest
from lavita.data.latent_cache.shards import TENSORS, ShardVideo, latents_digest, write_shard
from lavita.video.writing import write_video

CACHE = "a clip from the latent cache"
VIDEOS = "a clip from videos, decoded and resized"
STEP = "a training step, a clip"
INTERVAL = 3
NUM_VIDEOS = 4
LEAST_LENGTH = 60  # frames of a video
PIXELS = 8  # a latent pixel's side, Stable Diffusion's


def make_cache(folder: Path, setup: Setup, length: int) -> None:
    """Random latents, as `lavita encode` writes them."""
    folder.mkdir()
    facts = {"version": VERSION, "autoencoder": "none: random numbers", "resolution": PIXELS * setup.sample_size}
    facts |= {"horizontal_flip": True, "precision": "fp32"}
    shape = (length, IN_CHANNELS, setup.sample_size, setup.sample_size)
    values = {key: torch.randn(shape).half() for key in TENSORS}
    digest = latents_digest(tensor.numpy() for tensor in values.values())
    names = [f"{number:05}.mp4" for number in range(NUM_VIDEOS)]
    shard = f"latents-{0:024}.safetensors"
    videos = [ShardVideo(name, length, 25.0, "", 0, digest) for name in names]
    copies = [(video, {key: tensor.clone() for key, tensor in values.items()}) for video in videos]
    write_shard(folder / shard, facts, copies, [])
    common = {"class": None, "shard": shard, "num_frames": length, "fps": 25.0, "source_sha256": "", "source_bytes": 0}
    write_manifest(folder, {**facts, "videos": [{"name": name, **common} for name in names], "broken": []})


def make_videos(folder: Path, setup: Setup, length: int, count: int = 2) -> list[Path]:
    """Coloured squares that move, 5 wide for 4 high as many real clips are."""
    folder.mkdir()
    side = max(16, setup.sample_size * PIXELS)
    files = []
    for seed in range(count):
        small = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        picture = small.repeat(side // 16, 0).repeat(side // 16, 1)
        frames = np.stack([np.roll(picture, (number, 2 * number), (0, 1)) for number in range(length)])
        files.append(folder / f"{seed}.mp4")
        write_video(files[-1], frames, fps=25)
    return files


def waiting_share(read: Callable[[int], Any], step: Callable[[], Any], steps: int) -> float:
    """The share of a training loop that waits for its reader, which reads one batch ahead, as `train`'s does."""
    waited, start = 0.0, time.perf_counter()
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(read, 0)
        upcoming.result()  # the first one has nothing to hide behind
        start = time.perf_counter()
        upcoming = reader.submit(read, 1)
        for number in range(steps):
            before = time.perf_counter()
            upcoming.result()
            waited += time.perf_counter() - before
            upcoming = reader.submit(read, number + 2)
            step()
    return waited / (time.perf_counter() - start)


def run(setup: Setup) -> Section:
    """Times of reading beside a training step of the preset."""
    free = available_memory(setup.torch_device)
    kind = OURS if free is None or predicted_memory(setup) < 0.9 * free else CHECKPOINTED
    if free is not None and kind == CHECKPOINTED and predicted_memory(setup, True) > 0.9 * free:
        raise ValueError(f"preset is {setup.preset}, whose training step does not fit into memory here; take another")
    trainer = Trainer(setup)
    step = trainer.configure(kind)
    span, batch = clip_span(setup.num_frames, INTERVAL), setup.batch_size
    length = max(LEAST_LENGTH, span + 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cache(folder / "cache", setup, length)
        make_videos(folder / "videos", setup, length)
        cache = CacheSource(folder / "cache", min_frames=span)
        latents = ClipSampler(cache.catalog, setup.num_frames, INTERVAL, True, seed=0)
        pixels = ClipSampler(scan(folder / "videos"), setup.num_frames, INTERVAL, True, seed=0)

        def from_cache(number: int = 0) -> Any:
            draws = [latents.draw(number, place) for place in range(batch)]
            return cache.read_many(draws, setup.num_frames, INTERVAL)

        def from_videos(number: int = 0) -> Any:
            draws = [pixels.draw(number, place) for place in range(batch)]
            return [read_pixels(draw, setup.num_frames, INTERVAL, PIXELS * setup.sample_size) for draw in draws]

        runs: dict[str, Callable[[], Any]] = {CACHE: from_cache, VIDEOS: from_videos, STEP: step}
        progress = Progress("data: run", timings(len(runs), setup.repeats) + 1)
        seconds = interleave(runs, setup.repeats, setup.torch_device, progress)
        waits = waiting_share(from_cache, step, max(2, setup.repeats))
        progress.update(progress.done + 1, "waiting")
    each = {name: [value / batch for value in values] for name, values in seconds.items()}
    rows = [Row(name, each[name], floor=STEP if name != STEP else None) for name in runs]
    median = {name: statistics.median(values) for name, values in each.items()}
    facts = {"clips_per_second": {name: 1 / value for name, value in median.items()}, "waiting_share": waits}
    notes = [
        f"The training step is that of {setup.preset} ({kind}): below 1, reading is quicker than training. "
        f"Clips of {setup.num_frames} frames at interval {INTERVAL} from files that lie in the page cache; encoding "
        "frames on the way is the autoencoder's cost, see there.",
        f"With the latent cache and its one reader thread, {waits:.2%} of the training loop waits for clips.",
    ]
    return Section("data", "Reading clips", "one clip", rows, facts, notes, base="a training step")
