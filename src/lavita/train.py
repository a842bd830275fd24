"""The training loop, and nothing else."""

from __future__ import annotations

import math
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from lavita.autoencoder import autoencoder_source, latent_size, load_autoencoder
from lavita.checkpoint import check_resumable, fingerprint, list_checkpoints, load_last_checkpoint, save_checkpoint
from lavita.config import DEFAULT_TUBE_SIZE, RunConfig, TrainConfig, save_config
from lavita.convert import initialize
from lavita.data.batches import BatchMaker
from lavita.diffusion import GaussianDiffusion
from lavita.ema import EMA
from lavita.evaluation.tracking import ScoreLog
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.optim import make_optimizers
from lavita.pipeline import LavitaPipeline, make_scheduler
from lavita.runtime import Metrics, Progress, Stopped, autocast, generator, pick_device, stop_requested
from lavita.sheets import contact_sheet
from lavita.text import DEFAULT_TEXT_ENCODER, load_text_encoder
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
    "train.score_every",
    "train.score_clips",
    "train.device",
    "run_dir",
}
SAMPLE_STEPS = 20


def train(config: RunConfig) -> Path:
    """Trains a model, resuming from the run folder's last checkpoint, and writes `<run_dir>/pipeline`.

    Also in the run folder: `config.yaml`, `metrics.jsonl`, `scores.jsonl`, `checkpoints/` and `samples/`.

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
    batches = BatchMaker(config, vae)
    if batches.captions is not None:
        batches.embed_captions(load_text_encoder(config.model.text_encoder, device))
    torch.manual_seed(settings.seed)
    model = build_model(config, vae, batches).to(device)
    if settings.init_from is not None and not list_checkpoints(run_dir / "checkpoints"):
        report = str(initialize(model, settings.init_from, settings.init_weights))
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "init.txt").write_text(report + "\n")
        print(report, file=sys.stderr)
    model.train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    diffusion = GaussianDiffusion(config.model.prediction_type)
    ema = EMA(model, settings.ema_decay)
    optimizers = make_optimizers(model, settings.optimizer, settings.learning_rate, settings.weight_decay)
    step, losses = resume(config, vae, model, ema, optimizers)
    save_config(config, run_dir / "config.yaml")
    metrics = Metrics(run_dir / "metrics.jsonl", step)
    progress = Progress("step", settings.steps, step)
    classes = f", {len(batches.class_names)} classes" if batches.class_names else ""
    texts = f", {len(batches.captions.texts) - 1:,} captions" if batches.captions is not None else ""
    progress.message(
        f"{len(batches.source.catalog.videos):,} videos{classes}{texts}, {batches.sampler.num_clips:,} clips; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {device}; {run_dir}"
    )
    score_log = ScoreLog(config, step, device) if settings.score_every else None
    micro = settings.batch_size // settings.accumulation
    since, clips = time.monotonic(), 0

    with ThreadPoolExecutor(1) as reader, stop_requested() as stop:
        upcoming = reader.submit(batches.make, step)
        while step < settings.steps:
            batch = upcoming.result()
            upcoming = reader.submit(batches.make, step + 1)
            rate_now = learning_rate(settings, step)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate_now

            # Gradients of the micro-batches add up to the whole batch's mean; they are clipped once, together.
            loss = torch.zeros((), device=device)
            for first in range(0, settings.batch_size, micro):
                part = batch.part(first, micro, device)
                noisy = diffusion.q_sample(part.latents, part.timesteps, part.noise)
                with autocast(device, settings.precision):
                    output = model(
                        noisy, part.timesteps, part.class_labels, part.text_embeds, num_images=batches.num_images
                    ).sample
                part_loss = diffusion.losses(output, part.latents, part.timesteps, part.noise).total.mean()
                (part_loss / settings.accumulation).backward()
                loss += part_loss.detach() / settings.accumulation
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
            value, norm = loss.item(), grad_norm.item()
            if not math.isfinite(value) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"the loss is {value} and its gradient's norm {norm} at step {step + 1}; lower train.learning_rate"
                )
            for optimizer in optimizers:
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
                    lr=rate_now,
                    grad_norm=norm,
                    clips_per_second=rate,
                )
                progress.update(step, f"loss {loss_mean:.4f}  {rate:.1f} clips/s")
                since, clips, losses = time.monotonic(), 0, []
            if settings.sample_every and (step % settings.sample_every == 0 or step == settings.steps):
                with ema.applied():
                    write_samples(config, model, vae, batches, step)
                since, clips = time.monotonic(), 0
            if score_log is not None and score_log.is_due(step):
                with ema.applied():
                    score_log.write(step, make_pipeline(model, vae))
                since, clips = time.monotonic(), 0
            stopping = bool(stop) and step < settings.steps  # read once: a later signal waits for the next step
            if step % settings.checkpoint_every == 0 or step == settings.steps or stopping:
                state = {
                    "model": model.state_dict(),
                    "ema": ema.weights,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
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


def build_model(config: RunConfig, vae: AutoencoderKL, batches: BatchMaker) -> LavitaTransformer3DModel:
    """The freshly initialised model of a run, which carries the facts about its data."""
    names, table = list(batches.class_names), batches.text_table
    rates = sorted(video.info.fps for video in batches.source.catalog.videos)
    return LavitaTransformer3DModel.from_preset(
        config.model.preset,
        variant=config.model.variant,
        patch_embedding=config.model.patch_embedding,
        tube_size=config.model.tube_size or DEFAULT_TUBE_SIZE,
        conditioning=config.model.conditioning,
        temporal_position=config.model.temporal_position,
        learn_sigma=config.model.learn_sigma,
        prediction_type=config.model.prediction_type,
        sample_size=latent_size(vae, config.data.resolution),
        in_channels=vae.config["latent_channels"],
        num_frames=config.data.num_frames,
        num_classes=len(names),
        class_names=names or None,
        text_dim=0 if table is None else table.shape[1],
        text_encoder=None if table is None else config.model.text_encoder or DEFAULT_TEXT_ENCODER,
        frame_interval=config.data.frame_interval,
        fps=round(rates[len(rates) // 2] / config.data.frame_interval, 3),
    )


def resume(
    config: RunConfig,
    vae: AutoencoderKL,
    model: LavitaTransformer3DModel,
    ema: EMA,
    optimizers: list[torch.optim.Optimizer],
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
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return step, state["losses"]


def model_facts(model: LavitaTransformer3DModel) -> dict[str, Any]:
    """The fields of a model's configuration that a checkpoint must agree with."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def write_samples(
    config: RunConfig, model: LavitaTransformer3DModel, vae: AutoencoderKL, batches: BatchMaker, step: int
) -> None:
    """Writes `samples/step-<step>/<i>.mp4` and a contact sheet beside: the same seeds and conditions every time."""
    num_samples, folder = config.train.num_samples, config.run_dir / "samples"
    names, embeds = batches.class_names, batches.example_embeds(num_samples)
    pipeline = make_pipeline(model.eval(), vae)
    pipeline.set_progress_bar_config(disable=True)
    videos: list[npt.NDArray[np.uint8]] = []
    for first in range(0, num_samples, config.train.batch_size):
        part = range(first, min(num_samples, first + config.train.batch_size))
        frames = pipeline(
            class_labels=[i % len(names) for i in part] if names else None,
            prompt_embeds=None if embeds is None else embeds[part.start : part.stop],
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
