"""The training of an autoencoder: from videos to `<run_dir>/autoencoder`, resumable at any step."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import torch

from lavita.core.config import ConfigError, save_config
from lavita.core.files import check_outside
from lavita.core.precision import autocast, pick_device, without_fp16
from lavita.core.prefetch import prefetch
from lavita.core.progress import Progress
from lavita.core.seeds import generator
from lavita.data.catalog import scan
from lavita.data.content_hash import source_bytes
from lavita.evaluation.features.perceptual import PACKAGE, FeatureDistance
from lavita.evaluation.reconstruction import quality_at, show_quality
from lavita.models.autoencoder import Autoencoder, frame_network, latent_frames, load_autoencoder, to_pixels
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.autoencoder.discriminator import Adversary, last_layer
from lavita.training.autoencoder.frames import Frames, clip_length, clips_per_step, draw_clips, draw_frames, load_frames
from lavita.training.autoencoder.losses import autoencoder_losses
from lavita.training.autoencoder.network import measure_scaling, record_start, start_autoencoder
from lavita.training.checkpoint import Checkpoint, Keep, load_last_checkpoint, save_checkpoint
from lavita.training.data_record import check_contents, video_facts, write_contents
from lavita.training.ema import EMA
from lavita.training.optimizers import set_learning_rate
from lavita.training.run_folder import Metrics, Stopped, check_resumable, only_run, stop_requested
from lavita.training.stability import not_finite
from lavita.training.state import restore_training, training_tensors

EMA_DECAY = 0.999
WARMUP_STEPS = 200
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
    config, vae = start_autoencoder(config)
    check_resumable(run_dir, config, RESUMABLE)
    device = pick_device(config.device)
    distance = _distance(config, device)
    catalogs = [scan(root, min_frames=clip_length(config)) for root in config.data]
    contents = {
        str(catalog.root): video_facts(catalog, lambda video: source_bytes(video.info.path)) for catalog in catalogs
    }
    check_contents(run_dir, contents)
    save_config(config, run_dir / "config.yaml")
    record_start(config, vae)
    write_contents(run_dir, contents)
    memory = config.memory_gib / len(config.data)
    length = clip_length(config)
    sources = [load_frames(catalog, config.resolution, memory, config.seed, length) for catalog in catalogs]
    if config.init_from is None and isinstance(vae, LavitaPatchAutoencoder):
        vae.set_principal_components(to_pixels(draw_frames(sources, config)))
    run = AutoencoderRun(config, vae, distance, device)
    if (checkpoint := load_last_checkpoint(run_dir / "checkpoints")) is not None:
        run.restore(checkpoint)
    _optimize(run, sources)

    vae.load_state_dict(vae.state_dict() | run.ema.weights)
    vae.eval().requires_grad_(False)
    if config.freeze is None:
        measure_scaling(vae, sources, config)
    folder = run_dir / "autoencoder"
    if config.save_dtype == "float16":
        vae.half()
    vae.save_pretrained(folder)
    if config.held_out:
        saved = load_autoencoder(str(folder), device)
        quality = quality_at(saved, config.held_out, [config.resolution], FeatureDistance.load(device))
        show_quality(quality, folder / "reconstruction.json")
    return folder


class AutoencoderRun:
    """What a run's steps change, and how a step changes it."""

    def __init__(
        self, config: AutoencoderConfig, vae: Autoencoder, distance: FeatureDistance | None, device: torch.device
    ) -> None:
        """The state before the first step; `vae` moves to `device`."""
        self.config, self.distance, self.device = config, distance, device
        self.vae: Autoencoder = vae.to(device)  # type: ignore[arg-type]
        self.precision = without_fp16(device, config.precision)
        self.parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        self.ema = EMA(vae, EMA_DECAY)
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.adversary = Adversary(config, device, self.precision) if config.adversarial_weight else None
        side = config.resolution // config.downsampling
        latents = clips_per_step(config) * latent_frames(vae.config, clip_length(config))
        self.latent_shape = (latents, config.latent_channels, side, side)
        self.step = 0
        """Optimizer steps done."""

    def take_step(self, frames: Frames) -> dict[str, float]:
        """Takes a step on clips, as `draw_clips` gives them.

        Returns:
            What `metrics.jsonl` says of the step, without its number.

        Raises:
            FloatingPointError: if a loss or a gradient is not finite; no weight has changed then.
        """
        config = self.config
        pixels = to_pixels(frames, self.device)
        noise = torch.randn(self.latent_shape, generator=generator(config.seed, "noise", self.step)).to(self.device)
        rate = learning_rate(config, self.step)
        set_learning_rate([self.optimizer], rate)
        with autocast(self.device, self.precision):
            losses = autoencoder_losses(self.vae, pixels, noise, config, self.distance)
        value, parts = losses.total.item(), losses.parts
        adversary = self.adversary if self.step >= config.adversarial_start else None
        if adversary is None:
            losses.total.backward()
        else:
            parts = parts | adversary.backward(losses, pixels, last_layer(frame_network(self.vae).decoder))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        if not all(math.isfinite(number) for number in (value, norm, *parts.values())):
            raise not_finite(self.step + 1, value, norm, "lower learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if adversary is not None:
            adversary.step()
        self.step += 1
        self.ema.update(self.step)
        return {"loss": value, "lr": rate, "grad_norm": norm, **parts}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint."""
        tensors = training_tensors(self.vae, self.ema, [self.optimizer])
        return tensors if self.adversary is None else tensors | self.adversary.tensors()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint; ValueError if it belongs to another run."""
        restore_training(checkpoint, self.vae, self.ema, [self.optimizer])
        if self.adversary is not None:
            self.adversary.restore(checkpoint)
        self.step = checkpoint.step


def _optimize(run: AutoencoderRun, sources: list[list[Frames]]) -> None:
    """Trains to the end, and saves checkpoints."""
    config = run.config
    progress = Progress("autoencoder step", config.steps, run.step)
    batches = (draw_clips(sources, config, number) for number in range(run.step, config.steps))
    with (
        Metrics(config.run_dir / "metrics.jsonl", run.step) as metrics,
        stop_requested() as stop,
        closing(prefetch(batches)) as upcoming,
    ):
        for clips in upcoming:
            record = run.take_step(clips)
            step = run.step
            if step % config.log_every == 0 or step == config.steps:
                metrics.write(step=step, **record)
            progress.update(step, f"loss {record['loss']:.4f}  L1 {record['reconstruction']:.4f}")
            stopping = bool(stop) and step < config.steps  # read once: a later signal waits for the next step
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                keep = Keep(config.keep_checkpoints)
                save_checkpoint(config.run_dir / "checkpoints", step, run.tensors(), {}, keep)
            if stopping:
                raise Stopped(step, config.steps, stop)


def _distance(config: AutoencoderConfig, device: torch.device) -> FeatureDistance | None:
    """The perceptual distance, if it has a weight."""
    if not config.perceptual_weight:
        return None
    if (distance := FeatureDistance.load(device)) is None:
        raise ConfigError(
            f"perceptual_weight is {config.perceptual_weight:g}, but needs the package {PACKAGE}: "
            "pip install 'lavita[evaluate]'"
        )
    return distance
