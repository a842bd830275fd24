"""Clips a second of what feeds training, and of the training step: reading must cost nothing beside it.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/readers.py

Makes a cache of random latents, 4 x 32 x 32 a frame, and a few videos of 256 x 256 pixels in a temporary folder; reads
clips of 16 frames at interval 3 from both; and trains B/2 on such clips in float32. Medians over repetitions, in a
table that is also written to benchmarks/results/<date>-readers.md. Machines differ; what counts is the last column.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from lavita.data.catalog import scan
from lavita.data.clip_sources import CacheSource, VideoSource
from lavita.data.clips import ClipSampler, clip_span, read_pixels
from lavita.data.latent_cache.manifest import VERSION, write_manifest
from lavita.data.latent_cache.shards import TENSORS, ShardVideo, latents_digest, write_shard
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.video.writing import write_video

NUM_FRAMES, INTERVAL, RESOLUTION = 16, 3, 256
LATENT = (4, 32, 32)
LENGTH = 180  # frames of a video, about UCF101's mean
SHARD_VIDEOS = 40  # about 256 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4, help="of the cache, a quarter of a gigabyte each")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1, help="of the training step")
    parser.add_argument("--reads", type=int, default=20_000, help="of the memory measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    repetitions = arguments.repetitions
    rows: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cache(folder / "cache", arguments.shards)
        make_videos(folder / "videos")
        cache = CacheSource(folder / "cache", min_frames=clip_span(NUM_FRAMES, INTERVAL))
        files = sorted((folder / "cache").glob("*.safetensors"))
        sampler = ClipSampler(cache.catalog, NUM_FRAMES, INTERVAL, True, seed=0)
        draws = [sampler.draw(0, number) for number in range(256)]

        def read_cache() -> int:
            return len(cache.read_many(draws, NUM_FRAMES, INTERVAL))

        cold = rate(read_cache, repetitions, before=lambda: forget(files))
        rows.append(("cache, dropped from the page cache before", *cold))
        rows.append(("cache, warm", *rate(read_cache, repetitions)))
        memory = memory_over(cache, sampler, arguments.reads)

        vae = autoencoder()
        videos = VideoSource(scan(folder / "videos"), vae, RESOLUTION, "fp32")
        clips = ClipSampler(videos.catalog, NUM_FRAMES, INTERVAL, True, seed=0)
        few = [clips.draw(0, number) for number in range(4)]
        decoded = rate(lambda: len([read_pixels(d, NUM_FRAMES, INTERVAL, RESOLUTION) for d in few]), repetitions)
        rows.append(("videos, decoded only", *decoded))
        whole = rate(lambda: len(videos.read_many(few, NUM_FRAMES, INTERVAL)), repetitions)
        rows.append((f"videos, decoded and encoded ({count(vae):.1f} M parameters)", *whole))
    model = LavitaTransformer3DModel.from_preset("B/2", variant=2, sample_size=LATENT[-1], num_frames=NUM_FRAMES)
    step = training_step(model, arguments.batch_size)
    step()  # the optimizer's state is made in the first
    stepped = rate(step, repetitions)
    rows.append((f"training step, B/2, {count(model):.0f} M parameters, batch of {arguments.batch_size}", *stepped))
    report = table(rows, stepped[0], memory, arguments.reads)
    print(report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{date.today()}-readers.md").write_text(report)


def make_cache(folder: Path, num_shards: int) -> None:
    folder.mkdir()
    settings = {
        "version": VERSION,
        "autoencoder": "none: random numbers",
        "resolution": RESOLUTION,
        "horizontal_flip": True,
        "precision": "fp32",
    }
    rows = []
    values = {key: torch.randn(LENGTH, *LATENT).half() for key in TENSORS}
    digest = latents_digest(tensor.numpy() for tensor in values.values())
    for number in range(num_shards):
        names = [f"{number * SHARD_VIDEOS + index:05}.mp4" for index in range(SHARD_VIDEOS)]
        shard = f"latents-{number:024}.safetensors"
        videos = [ShardVideo(name, LENGTH, 25.0, "", 0, digest) for name in names]
        copies = [(video, {key: tensor.clone() for key, tensor in values.items()}) for video in videos]
        write_shard(folder / shard, settings, copies, [])
        common = {"class": None, "shard": shard, "num_frames": LENGTH, "fps": 25.0, "source_sha256": ""}
        rows += [{"name": name, **common, "source_bytes": 0} for name in names]
    write_manifest(folder, {**settings, "videos": rows, "broken": []})


def make_videos(folder: Path) -> None:
    """Noise that moves, softened as pictures are."""
    folder.mkdir()
    for seed in range(2):
        small = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        picture = small.repeat(16, 0).repeat(16, 1)
        frames = np.stack([np.roll(picture, (number, 2 * number), (0, 1)) for number in range(LENGTH)])
        write_video(folder / f"{seed}.mp4", frames, fps=25)


def autoencoder() -> AutoencoderKL:
    """A narrow one of Stable Diffusion's layout: 256 pixels to 4 x 32 x 32."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    ).requires_grad_(False)


def training_step(model: LavitaTransformer3DModel, batch_size: int) -> Callable[[], int]:
    diffusion = GaussianDiffusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    latents, noise = torch.randn(2, batch_size, NUM_FRAMES, *LATENT)
    timesteps = torch.randint(0, 1000, (batch_size,))

    def step() -> int:
        output = model(diffusion.q_sample(latents, timesteps, noise), timesteps).sample
        diffusion.losses(output, latents, timesteps, noise).total.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch_size

    return step


def rate(work: Callable[[], int], repetitions: int, before: Callable[[], None] = lambda: None) -> tuple[float, str]:
    """Median of clips a second, and the range."""
    rates = []
    for _ in range(repetitions):
        before()
        start = time.perf_counter()
        rates.append(work() / (time.perf_counter() - start))
    return statistics.median(rates), f"{min(rates):.3g} to {max(rates):.3g}"


def forget(files: list[Path]) -> None:
    """Asks the kernel to drop the files from its page cache; the disk's own stays."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_over(cache: CacheSource, sampler: ClipSampler, reads: int) -> tuple[float, float]:
    """Resident megabytes after 1,000 reads and after all."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    early = 0.0
    for number in range(reads):
        cache.read(sampler.draw(1, number), NUM_FRAMES, INTERVAL)
        if number == 999:
            early = resident()
    return early, resident()


def count(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def table(rows: list[tuple[str, float, str]], step: float, memory: tuple[float, float], reads: int) -> str:
    lines = [
        f"# Readers against the training step, {date.today()}",
        "",
        f"`python benchmarks/readers.py` on {torch.get_num_threads()} thread(s) and "
        f"{len(os.sched_getaffinity(0))} core(s) of {platform.machine()}, torch {torch.__version__}, float32. Clips of "
        f"{NUM_FRAMES} frames at interval {INTERVAL}, {RESOLUTION} pixels, latents {' x '.join(map(str, LATENT))}.",
        "",
        "| | clips/s, median | range | times the step |",
        "|---|---|---|---|",
        *(f"| {name} | {median:.3g} | {spread} | {median / step:.3g} |" for name, median, spread in rows),
        "",
        f"Resident memory after 1,000 reads from the cache: {memory[0]:.1f} MB; after {reads:,}: {memory[1]:.1f} MB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
