"""Trains an autoencoder on frames: a reconstruction loss that weights moving pixels, plus a KL divergence.

Frames are drawn as pairs of successive ones, which shows which pixels move: in most videos the background covers most
of the frame, and a few moving pixels matter most.
"""

from __future__ import annotations

import math
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from lavita.core.config import save_config
from lavita.core.files import check_outside
from lavita.core.precision import autocast, pick_device, without_fp16
from lavita.core.prefetch import parallel_map, prefetch
from lavita.core.progress import Progress
from lavita.core.seeds import generator, numpy_generator
from lavita.data.catalog import Catalog, scan
from lavita.data.content_hash import source_bytes
from lavita.evaluation.reconstruction import reconstruction_quality, show_quality
from lavita.models.autoencoder import Autoencoder, AutoencoderKL, encode, load_autoencoder, to_pixels
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.training.checkpoint import Keep, load_last_checkpoint, save_checkpoint
from lavita.training.config import AutoencoderConfig
from lavita.training.data_record import check_contents, video_facts, write_contents
from lavita.training.ema import EMA
from lavita.training.optimizers import set_learning_rate
from lavita.training.run_folder import Metrics, Stopped, check_resumable, only_run, stop_requested
from lavita.training.stability import not_finite
from lavita.training.state import restore_training, training_tensors
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]

EMA_DECAY = 0.999
WARMUP_STEPS = 200
FULL_MOTION = 0.2
"""Change of a pixel, on [0, 1], that counts as full motion."""
RESUMABLE = {
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "held_out",
    "save_dtype",
    "device",
    "run_dir",
}
"""Fields that may differ when a run is resumed: its length, what is written and what is measured."""


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


def motion_weights(pixels: torch.Tensor, weight: float) -> torch.Tensor:
    """The weight of each pixel: 1 where the frames of a pair agree, up to `1 + weight` where they differ, with mean 1.

    Args:
        pixels: `(2 P, 3, H, W)` in [-1, 1], pairs of successive frames.
        weight: additional weight of full motion.

    Returns:
        `(2 P, 1, H, W)`, scaled to mean 1 over all pixels; the frames of a pair have the same weights.
    """
    pairs = pixels.unflatten(0, (-1, 2))
    moved = (pairs[:, 0] - pairs[:, 1]).abs().amax(dim=1, keepdim=True) / (2 * FULL_MOTION)
    moved = F.max_pool2d(moved.clamp(max=1.0), kernel_size=3, stride=1, padding=1)
    weights = 1.0 + weight * moved
    return (weights / weights.mean()).repeat_interleave(2, dim=0)


def autoencoder_loss(
    vae: Autoencoder, pixels: torch.Tensor, noise: torch.Tensor, config: AutoencoderConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """Motion-weighted L1, L1 of the image gradients, and KL(q(z|x) || N(0, 1)) (Kingma & Welling 2014, App. B).

    Args:
        vae: the autoencoder.
        pixels: `(2 P, 3, H, W)` in [-1, 1], pairs of successive frames.
        noise: standard normal `(2 P, C, h, w)`, for the reparametrized sample.
        config: the weights of the terms.

    Returns:
        The loss (0-dim) and the values of its parts `reconstruction` and `kl`.
    """
    posterior = vae.encode(pixels).latent_dist
    z = posterior.mean + posterior.std * noise
    output = vae.decode(z).sample.float()
    weights = motion_weights(pixels, config.motion_weight)
    reconstruction = (weights * (output - pixels).abs()).mean()
    edges = sum((torch.diff(output, dim=dim) - torch.diff(pixels, dim=dim)).abs().mean() for dim in (-1, -2))
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    loss = reconstruction + config.edge_weight * edges + config.kl_weight * kl
    return loss, {"reconstruction": reconstruction.item(), "kl": kl.item()}


def learning_rate(config: AutoencoderConfig, step: int) -> float:
    """The learning rate at a step (from 0): linear warm-up, then a cosine down to 1% of the peak."""
    if step < WARMUP_STEPS:
        return config.learning_rate * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, config.steps - WARMUP_STEPS)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train_autoencoder(config: AutoencoderConfig) -> Path:
    """Trains an autoencoder, resuming from the run folder's last checkpoint, and writes `<run_dir>/autoencoder`.

    The `scaling_factor` and `shift_factor` are measured on training frames, so that scaled latents have mean 0 and
    variance 1 over all their values.

    Args:
        config: the run.

    Returns:
        The autoencoder's folder; with `held_out` it also holds `reconstruction.json`.

    Raises:
        ValueError: if configuration, data and run folder do not fit together.
        Stopped: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        FloatingPointError: if the loss is no longer finite.
    """
    check_outside("run_dir", config.run_dir, *config.data, *config.held_out)
    with only_run(config.run_dir):
        return _train(config)


def _train(config: AutoencoderConfig) -> Path:
    run_dir = config.run_dir
    check_resumable(run_dir, config, RESUMABLE)
    catalogs = [scan(root, min_frames=2) for root in config.data]
    contents = {
        str(catalog.root): video_facts(catalog, lambda video: source_bytes(video.info.path)) for catalog in catalogs
    }
    check_contents(run_dir, contents)
    save_config(config, run_dir / "config.yaml")
    write_contents(run_dir, contents)
    device = pick_device(config.device)
    memory = config.memory_gib / len(config.data)
    sources = [load_frames(catalog, config.resolution, memory, config.seed) for catalog in catalogs]
    torch.manual_seed(config.seed)
    vae: Autoencoder = build_autoencoder(config).to(device)  # type: ignore[arg-type]
    if isinstance(vae, LavitaPatchAutoencoder):
        vae.set_principal_components(to_pixels(_draw_frames(sources, config), device))
    ema = EMA(vae, EMA_DECAY)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step = 0
    if (checkpoint := load_last_checkpoint(run_dir / "checkpoints")) is not None:
        step = checkpoint.step
        restore_training(checkpoint, vae, ema, [optimizer])
    _optimize(config, vae, ema, optimizer, sources, step, device)

    vae.load_state_dict(ema.weights)
    vae.eval().requires_grad_(False)
    measure_scaling(vae, sources, config)
    folder = run_dir / "autoencoder"
    vae.to(getattr(torch, config.save_dtype)).save_pretrained(folder)
    if config.held_out:
        saved = load_autoencoder(str(folder), device)
        quality = {str(root): reconstruction_quality(saved, root, config.resolution) for root in config.held_out}
        show_quality(quality, folder / "reconstruction.json")
    return folder


def _optimize(
    config: AutoencoderConfig,
    vae: Autoencoder,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    sources: list[list[Frames]],
    step: int,
    device: torch.device,
) -> None:
    """Trains from step `step` to the end, and saves checkpoints."""
    run_dir = config.run_dir
    precision = without_fp16(device, config.precision)
    side = config.resolution // config.downsampling
    latent_shape = (config.batch_size, config.latent_channels, side, side)
    progress = Progress("autoencoder step", config.steps, step)
    batches = (draw_pairs(sources, config, number) for number in range(step, config.steps))
    with (
        Metrics(run_dir / "metrics.jsonl", step) as metrics,
        stop_requested() as stop,
        closing(prefetch(batches)) as upcoming,
    ):
        for pairs in upcoming:
            pixels = to_pixels(pairs, device)
            noise = torch.randn(latent_shape, generator=generator(config.seed, "noise", step)).to(device)
            rate = learning_rate(config, step)
            set_learning_rate([optimizer], rate)
            with autocast(device, precision):
                loss, parts = autoencoder_loss(vae, pixels, noise, config)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            value, norm = loss.item(), grad_norm.item()
            if not math.isfinite(value) or not math.isfinite(norm):
                raise not_finite(step + 1, value, norm, "lower learning_rate")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            ema.update(step)

            if step % config.log_every == 0 or step == config.steps:
                metrics.write(step=step, loss=value, lr=rate, grad_norm=norm, **parts)
            progress.update(step, f"loss {value:.4f}  L1 {parts['reconstruction']:.4f}")
            stopping = bool(stop) and step < config.steps  # read once: a later signal waits for the next step
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                tensors = training_tensors(vae, ema, [optimizer])
                save_checkpoint(run_dir / "checkpoints", step, tensors, {}, Keep(config.keep_checkpoints))
            if stopping:
                raise Stopped(step, config.steps, stop)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """A randomly initialized autoencoder of a configuration."""
    if config.architecture == "patch":
        return LavitaPatchAutoencoder(
            config.downsampling,
            config.latent_channels,
            config.width,
            config.num_encoder_blocks,
            config.num_decoder_blocks,
        )
    levels = len(config.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=math.gcd(8, *config.widths),
        mid_block_add_attention=False,
        sample_size=config.resolution,
    )


def measure_scaling(vae: Autoencoder, sources: list[list[Frames]], config: AutoencoderConfig) -> None:
    """Sets `scaling_factor` and `shift_factor` from the latents of at least 1,024 training frames."""
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    mean, std = encode(vae, _draw_frames(sources, config), config.precision)
    mean64, std64 = mean.double(), std.double()
    variance = mean64.var() + std64.square().mean()
    vae.register_to_config(
        scaling_factor=round(1.0 / variance.sqrt().item(), 5), shift_factor=round(mean64.mean().item(), 5)
    )


def _draw_frames(sources: list[list[Frames]], config: AutoencoderConfig) -> Frames:
    """At least 1,024 frames as in training, other than those that are trained on first."""
    return np.concatenate(
        [draw_pairs(sources, config, -1 - batch) for batch in range(math.ceil(1024 / config.batch_size))]
    )


def _shrunk(width: int, height: int, shorter: int) -> tuple[int, int]:
    """The size with its shorter side reduced to `shorter` pixels, if it is longer."""
    ratio = min(1.0, shorter / min(width, height))
    return max(1, round(width * ratio)), max(1, round(height * ratio))
