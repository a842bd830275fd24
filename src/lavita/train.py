"""The training loop, and nothing else."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from lavita.autoencoder import autoencoder_source, latent_size, load_autoencoder
from lavita.checkpoint import check_resumable, fingerprint, load_last_checkpoint, save_checkpoint
from lavita.config import ConfigError, RunConfig, TrainConfig, save_config
from lavita.data.catalog import scan
from lavita.data.clips import ClipSampler, clip_span
from lavita.data.latents import CacheSource, ClipSource, VideoSource
from lavita.diffusion import NUM_TIMESTEPS, GaussianDiffusion
from lavita.ema import EMA
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.pipeline import LavitaPipeline, make_scheduler
from lavita.runtime import Metrics, Progress, Stopped, autocast, generator, pick_device, stop_requested
from lavita.sheets import contact_sheet
from lavita.video import write_video

# What may differ when a run is resumed: how long it is and how it ends, and what is written down, but nothing that
# changes a step before the end.
RESUMABLE = {
    "train.steps",
    "train.decay_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.num_samples",
    "train.device",
    "run_dir",
}
SAMPLE_STEPS = 20


@dataclass
class Batch:
    """The clips of one optimizer step; everything in it is a pure function of the seed and the step."""

    latents: torch.Tensor
    """z_0, (B, F, C, h, w)."""
    noise: torch.Tensor
    timesteps: torch.Tensor
    """int64 (B,)."""
    labels: torch.Tensor | None
    """int64 (B,), the null class where a label was dropped; None for an unconditional model."""


def train(config: RunConfig) -> Path:
    """Trains a model, resuming from the run folder's last checkpoint, and writes `<run_dir>/pipeline`.

    Also in the run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/` and `samples/`.

    Args:
        config: the run.

    Returns:
        The pipeline's folder; its transformer has the averaged weights.

    Raises:
        ValueError: where configuration, data, autoencoder and run folder do not fit together.
        Stopped: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        FloatingPointError: where the loss is no longer finite.
    """
    settings, run_dir = config.train, config.run_dir
    check_resumable(run_dir, config, RESUMABLE)
    device = pick_device(settings.device)
    vae = load_autoencoder(autoencoder_source(config.autoencoder, config.data.resolution), device)
    source = open_source(config, vae)
    sampler = ClipSampler(
        source.catalog,
        config.data.num_frames,
        config.data.frame_interval,
        config.data.horizontal_flip,
        settings.seed,
    )
    torch.manual_seed(settings.seed)
    model = build_model(config, vae, source).to(device).train()
    if settings.init_from is not None:
        from lavita.pipeline import load_pipeline
        from lavita.generate import model_source
        model.load_state_dict(load_pipeline(model_source(settings.init_from)).transformer.state_dict())
        model.train()
    diffusion = GaussianDiffusion(config.model.prediction_type)
    ema = EMA(model, settings.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    step, losses = resume(config, vae, model, ema, optimizer)
    save_config(config, run_dir / "config.yaml")
    metrics = Metrics(run_dir / "metrics.jsonl", step)
    progress = Progress("step", settings.steps, step)
    classes = f", {len(source.catalog.class_names)} classes" if source.catalog.class_names else ""
    progress.message(
        f"{len(source.catalog.videos):,} videos{classes}, {sampler.num_clips:,} clips; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {device}; {run_dir}"
    )
    micro = settings.batch_size // settings.accumulation
    since, clips = time.monotonic(), 0

    with ThreadPoolExecutor(1) as reader, stop_requested() as stop:
        upcoming = reader.submit(make_batch, config, source, sampler, model, step)
        while step < settings.steps:
            batch = upcoming.result()
            upcoming = reader.submit(make_batch, config, source, sampler, model, step + 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)

            # Gradients of the micro-batches add up to the whole batch's mean; they are clipped once, together.
            loss = torch.zeros((), device=device)
            for first in range(0, settings.batch_size, micro):
                part = slice(first, first + micro)
                latents, noise = batch.latents[part].to(device), batch.noise[part].to(device)
                timesteps = batch.timesteps[part].to(device)
                labels = batch.labels[part].to(device) if batch.labels is not None else None
                with autocast(device, settings.precision):
                    output = model(diffusion.q_sample(latents, timesteps, noise), timesteps, labels).sample
                part_loss = diffusion.losses(output, latents, timesteps, noise).total.mean()
                (part_loss / settings.accumulation).backward()
                loss += part_loss.detach() / settings.accumulation
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
            value, norm = loss.item(), grad_norm.item()
            if not math.isfinite(value) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"the loss is {value} and its gradient's norm {norm} at step {step + 1}; lower train.learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            ema.update(step)

            clips += settings.batch_size
            losses.append(value)
            if step % settings.log_every == 0 or step == settings.steps:
                rate = clips / (time.monotonic() - since)
                loss_mean = sum(losses) / len(losses)
                metrics.write(
                    step=step,
                    loss=loss_mean,
                    lr=optimizer.param_groups[0]["lr"],
                    grad_norm=norm,
                    clips_per_second=rate,
                )
                progress.update(step, f"loss {loss_mean:.4f}  {rate:.1f} clips/s")
                since, clips, losses = time.monotonic(), 0, []
            if settings.sample_every and (step % settings.sample_every == 0 or step == settings.steps):
                with ema.applied():
                    write_samples(config, model, vae, source, step)
                since, clips = time.monotonic(), 0
            stopping = bool(stop) and step < settings.steps  # read once: a later signal waits for the next step
            if step % settings.checkpoint_every == 0 or step == settings.steps or stopping:
                state = {
                    "model": model.state_dict(),
                    "ema": ema.weights,
                    "optimizer": optimizer.state_dict(),
                    "model_config": model_facts(model),
                    "autoencoder": fingerprint(vae),
                    "losses": losses,
                }
                # The pipeline first: a run that is killed in between makes it again when it is resumed.
                with ema.applied():
                    save_pipeline(model, vae, run_dir / "pipeline")
                save_checkpoint(run_dir / "checkpoints", step, state, settings.keep_checkpoints)
                since, clips = time.monotonic(), 0
            if stopping:
                metrics.close()
                raise Stopped(f"stopped at step {step:,} of {settings.steps:,}; the same command goes on from there")
    metrics.close()
    return run_dir / "pipeline"


def learning_rate(settings: TrainConfig, step: int) -> float:
    """The rate of a step (from 0): up to the set one, constant, and down to 0 in the last `decay_steps`.

    A constant rate can be stopped and decayed at any time, so the length of a run need not be known at its start
    (Haegele et al. 2024, Sec. 3).
    """
    rise = (step + 1) / max(1, settings.warmup_steps)
    fall = (settings.steps - step) / (settings.decay_steps + 1)
    return settings.learning_rate * min(1.0, rise, fall)


def open_source(config: RunConfig, vae: AutoencoderKL) -> ClipSource:
    """The latent cache if the configuration names one, else the videos."""
    data = config.data
    span = clip_span(data.num_frames, data.frame_interval)
    latent_size(vae, data.resolution)
    if data.latent_cache is not None:
        cache = CacheSource(data.latent_cache, data.class_folders, span, data.broken)
        cache.check(vae, data.resolution, data.horizontal_flip, data.path)
        return cache
    if data.path is None:
        raise ConfigError("data.path is missing: name a folder of videos, or a data.latent_cache")
    catalog = scan(data.path, data.class_folders, span, data.broken)
    return VideoSource(catalog, vae, data.resolution, config.train.precision)


def build_model(config: RunConfig, vae: AutoencoderKL, source: ClipSource) -> LavitaTransformer3DModel:
    """The freshly initialised model of a run, which carries the facts about its data."""
    names = list(source.catalog.class_names)
    rates = sorted(video.info.fps for video in source.catalog.videos)
    return LavitaTransformer3DModel.from_preset(
        config.model.preset,
        variant=config.model.variant,
        learn_sigma=config.model.learn_sigma,
        prediction_type=config.model.prediction_type,
        sample_size=latent_size(vae, config.data.resolution),
        in_channels=vae.config["latent_channels"],
        num_frames=config.data.num_frames,
        num_classes=len(names),
        class_names=names or None,
        frame_interval=config.data.frame_interval,
        fps=round(rates[len(rates) // 2] / config.data.frame_interval, 3),
    )


def make_batch(
    config: RunConfig, source: ClipSource, sampler: ClipSampler, model: LavitaTransformer3DModel, step: int
) -> Batch:
    """Reads the clips of a step and draws all that is random in it."""
    size, seed = config.train.batch_size, config.train.seed
    draws = [sampler.draw(step, index) for index in range(size)]
    clips = [source.read(draw, sampler.num_frames, sampler.frame_interval) for draw in draws]
    mean, std = (torch.stack(parts) for parts in zip(*clips, strict=True))
    random = generator(seed, "step", step)
    latents = mean + std * torch.randn(mean.shape, generator=random)
    noise = torch.randn(mean.shape, generator=random)
    timesteps = torch.randint(0, NUM_TIMESTEPS, (size,), generator=random)
    labels = None
    if num_classes := model.config["num_classes"]:
        labels = torch.tensor([draw.video.label for draw in draws])
        dropped = torch.rand(size, generator=random) < config.model.class_dropout
        labels = torch.where(dropped, num_classes, labels)
    return Batch(latents, noise, timesteps, labels)


def resume(
    config: RunConfig,
    vae: AutoencoderKL,
    model: LavitaTransformer3DModel,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, list[float]]:
    """Loads the last checkpoint of the run folder into all of them.

    Returns:
        The steps done, and the losses since the last line of the metrics.

    Raises:
        ValueError: where the checkpoint is of another model or autoencoder.
    """
    loaded = load_last_checkpoint(config.run_dir / "checkpoints")
    if loaded is None:
        return 0, []
    step, state = loaded
    facts = model_facts(model)
    for key, value in state["model_config"].items():
        if facts.get(key) != value:
            raise ValueError(
                f"{config.run_dir} holds a model with {key}={value}, but this data and configuration give "
                f"{facts.get(key)}; use another run_dir"
            )
    if state["autoencoder"] != fingerprint(vae):
        raise ValueError(f"{config.run_dir} was trained with another autoencoder; use another run_dir")
    model.load_state_dict(state["model"])
    ema.load(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return step, state["losses"]


def model_facts(model: LavitaTransformer3DModel) -> dict[str, Any]:
    """The fields of a model's configuration that a checkpoint must agree with."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def write_samples(
    config: RunConfig, model: LavitaTransformer3DModel, vae: AutoencoderKL, source: ClipSource, step: int
) -> None:
    """Writes `samples/step-<step>/<i>.mp4` and a contact sheet beside: the same seeds and labels every time."""
    num_samples, folder = config.train.num_samples, config.run_dir / "samples"
    names = source.catalog.class_names
    labels: list[int | str] | None = [i % len(names) for i in range(num_samples)] if names else None
    pipeline = make_pipeline(model.eval(), vae)
    pipeline.set_progress_bar_config(disable=True)
    videos: list[npt.NDArray[np.uint8]] = []
    for first in range(0, num_samples, config.train.batch_size):
        part = range(first, min(num_samples, first + config.train.batch_size))
        frames = pipeline(
            class_labels=labels[part.start : part.stop] if labels is not None else None,
            num_videos=len(part),
            num_inference_steps=SAMPLE_STEPS,
            generator=[generator(seed, "sample") for seed in part],
            precision=config.train.precision,
        ).frames
        videos.extend(np.asarray(frames))
    model.train()
    for index, video in enumerate(videos):
        write_video(folder / f"step-{step:08d}" / f"{index}.mp4", video, model.config["fps"])
    contact_sheet([[video] for video in videos], folder / f"step-{step:08d}.png")


def make_pipeline(model: LavitaTransformer3DModel, vae: AutoencoderKL) -> LavitaPipeline:
    """The pipeline of a model, with UniPC as its sampler."""
    scheduler = make_scheduler("unipc", model.config["learn_sigma"], model.config["prediction_type"])
    return LavitaPipeline(model, vae, scheduler)


def save_pipeline(model: LavitaTransformer3DModel, vae: AutoencoderKL, folder: Path) -> None:
    """Saves model and autoencoder as a pipeline in diffusers' layout, replacing an older one whole."""
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    make_pipeline(model, vae).save_pretrained(partial)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
