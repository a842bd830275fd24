"""The training loop, and nothing else."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lavita.autoencoder import autoencoder_source, latent_size, load_autoencoder
from lavita.checkpoint import (
    Keep,
    check_resumable,
    fingerprint,
    list_checkpoints,
    load_last_checkpoint,
    restore_training,
    save_checkpoint,
    training_tensors,
)
from lavita.compiled import compile_blocks
from lavita.config import DEFAULT_TUBE_SIZE, RunConfig, TrainConfig
from lavita.convert import initialize
from lavita.data.batches import Batch, BatchMaker
from lavita.data.text_cache import embed_texts, texts_folder
from lavita.diffusion import GaussianDiffusion
from lavita.distributed import Processes, processes, sum_over, whole
from lavita.ema import EMA
from lavita.evaluation.tracking import ScoreLog
from lavita.finetune import prepare, read_fresh, saved_adapters, trained_parameters, write_fresh
from lavita.guards import MOST_SKIPPED, LossScale, StepGuard
from lavita.models.checkpointing import checkpoint_blocks
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.optim import make_optimizers
from lavita.parallel import ParallelModel
from lavita.runtime import (
    Metrics,
    Progress,
    Stopped,
    autocast,
    low_precision,
    only_run,
    pick_device,
    stop_requested,
)
from lavita.snapshots import averaged_model, make_pipeline, save_pipeline, write_samples
from lavita.strict_config import ConfigError, save_config
from lavita.text import DEFAULT_TEXT_ENCODER
from lavita.trackers import Trackers
from lavita.validation import Validation

# What may differ when a run is resumed: how long it is and how it ends, what is written down, and how the work is
# shared, but nothing that changes a step before the end by more than rounding.
RESUMABLE = {
    "data.workers",
    "train.steps",
    "train.decay_steps",
    "train.accumulation",
    "train.parallel",
    "train.gradient_checkpointing",
    "train.compile",
    "train.bad_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.sample_every",
    "train.num_samples",
    "train.score_every",
    "train.score_clips",
    "train.validate_every",
    "train.validation_clips",
    "train.trackers",
    "data.validation",
    "data.validation_captions",
    "train.device",
    "run_dir",
}
TIMEOUT = timedelta(hours=2)  # of a process that waits for one that writes or samples


def train(config: RunConfig) -> Path:
    """Trains a model, resuming from the run folder's last checkpoint, and writes `<run_dir>/pipeline`.

    Under `torchrun` the processes share each batch; they need one run folder that all of them see. Also in it:
    `config.yaml`, `metrics.jsonl`, `events.jsonl`, `validation.jsonl`, `scores.jsonl`, `checkpoints/` and `samples/`.

    Args:
        config: the run.

    Returns:
        The pipeline's folder; its transformer has the averaged weights.

    Raises:
        ValueError: where configuration, data, autoencoder and run folder do not fit together.
        OSError: where the folder cannot be written to; the last checkpoint stays.
        Stopped: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        FloatingPointError: where a step is not finite, see `train.bad_steps`.
    """
    with processes(TIMEOUT) as team, only_run(config.run_dir) if team.is_first else nullcontext():
        return _train(config, team)


def _train(config: RunConfig, team: Processes) -> Path:
    settings, run_dir = config.train, config.run_dir
    if settings.batch_size % (settings.accumulation * team.count):
        raise ConfigError(
            f"train.batch_size is {settings.batch_size}, but must be a multiple of the processes ({team.count}) times "
            f"train.accumulation ({settings.accumulation})"
        )
    check_resumable(run_dir, config, RESUMABLE)
    device = pick_device(settings.device)
    vae = load_autoencoder(autoencoder_source(config.autoencoder, config.data.resolution), device)
    batches = BatchMaker(config, vae)
    encoder = None
    if batches.captions is not None:
        kept = texts_folder(config.data.latent_cache, run_dir)
        encoder = partial(embed_texts, source=config.model.text_encoder, folder=kept, device=device, team=team)
        batches.embed_captions(encoder)
    validation = None
    if config.data.validation is not None:
        validation = Validation(config, vae, batches.source.catalog, encoder, team)
    torch.manual_seed(settings.seed)
    model = build_model(config, vae, batches).to(device)
    fresh: set[str] = set()
    if settings.init_from is not None and not list_checkpoints(run_dir / "checkpoints"):
        report = initialize(model, settings.init_from, settings.init_weights)
        fresh = report.fresh
        if team.is_first:
            write_fresh(run_dir, fresh)
            (run_dir / "init.txt").write_text(f"{report}\n")
            print(report, file=sys.stderr)
    elif settings.freeze is not None or settings.lora_rank:
        fresh = read_fresh(run_dir)
    prepare(model, config, fresh)
    model.train()
    checkpoint_blocks(model, settings.gradient_checkpointing)
    if settings.compile:
        compile_blocks(model)
    size = trained_parameters(model)
    parallel = ParallelModel(model, settings.parallel, team, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    diffusion = GaussianDiffusion(config.model.prediction_type)
    ema = EMA(model, settings.ema_decay)
    optimizers = make_optimizers(model, settings.optimizer, settings.learning_rate, settings.weight_decay)
    guard = StepGuard(settings.spike_factor)
    scale = LossScale(low_precision(device, settings.precision) == torch.float16)
    step, losses = resume(config, team, vae, model, ema, optimizers, guard, scale)
    team.wait()  # all have looked before the first one writes
    if team.is_first:
        save_config(config, run_dir / "config.yaml")
    metrics = Metrics(run_dir / "metrics.jsonl", step, team.is_first)
    validations = Metrics(run_dir / "validation.jsonl", step, team.is_first and validation is not None)
    events = Metrics(run_dir / "events.jsonl", step, team.is_first)
    if step < settings.steps:
        events.write(step=step, event="resume" if step else "start", processes=team.count, parallel=settings.parallel)
    progress = Progress("step", settings.steps, step, team.is_first)
    classes = f", {len(batches.class_names)} classes" if batches.class_names else ""
    texts = f", {len(batches.captions.texts) - 1:,} captions" if batches.captions is not None else ""
    several = f"{team.count} processes ({'FSDP2' if parallel.is_sharded else 'DDP'}); " if team.count > 1 else ""
    progress.message(
        f"{len(batches.source.catalog.videos):,} videos{classes}{texts}, {batches.sampler.num_clips:,} clips; "
        f"{size}; {several}{device}; {run_dir}"
    )
    score_log = ScoreLog(config, step, device, team) if settings.score_every else None
    share = settings.batch_size // team.count
    places = range(team.rank * share, (team.rank + 1) * share)
    micro = share // settings.accumulation
    keep = Keep(settings.keep_checkpoints, settings.keep_every, settings.keep_best)
    since, clips = time.monotonic(), 0

    def due(every: int) -> bool:
        return bool(every) and (step % every == 0 or step == settings.steps)

    with (
        ThreadPoolExecutor(1) as reader,
        closing(Trackers(config, step, team.is_first)) as trackers,
        stop_requested() as stop,
    ):
        upcoming = reader.submit(batches.make, step, places)
        while step < settings.steps:
            batch = upcoming.result()
            upcoming = reader.submit(batches.make, step + 1, places)
            rate_now = learning_rate(settings, step)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate_now

            # Gradients of the micro-batches and processes add up to the whole batch's mean; they are clipped once,
            # together.
            clip_losses = []
            for first in range(0, share, micro):
                part = batch.part(first, micro, device)
                noisy = diffusion.q_sample(part.latents, part.timesteps, part.noise)
                with parallel.gradients_later(first + micro < share):
                    with autocast(device, settings.precision):
                        output = parallel(
                            noisy, part.timesteps, part.class_labels, part.text_embeds, num_images=batches.num_images
                        )
                    part_losses = diffusion.losses(output, part.latents, part.timesteps, part.noise).total
                    (part_losses.mean() * (scale.value / settings.accumulation)).backward()
                clip_losses.append(part_losses.detach())
            scale.unscale([parameter.grad for parameter in parameters if parameter.grad is not None])
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)).item()
            own_loss = torch.cat(clip_losses).mean().item()  # here, where the device has been waited for

            verdict = "overflow" if scale.overflowed(norm) else guard.judge(norm)
            taken = verdict == "good" or (verdict == "spike" and settings.bad_steps == "stop")
            if verdict in ("spike", "not-finite"):
                losers = name_clips(batch, torch.cat(clip_losses), team)
                events.write(step=step + 1, event=verdict, grad_norm=norm, skipped=not taken, clips=losers)
                worst = ", ".join(f"{clip['video']} from frame {clip['start']}" for clip in losers[:2])
                progress.message(f"step {step + 1:,}: gradient norm {norm:.3g} ({verdict}); clips: {worst}, ...")
                guard.skipped = 0 if taken else guard.skipped + 1
                if not taken and (settings.bad_steps == "stop" or guard.skipped > MOST_SKIPPED):
                    raise FloatingPointError(
                        f"the loss is {losers[0]['loss']} and its gradient's norm {norm} at step {step + 1}; lower "
                        f"train.learning_rate, or pass over such steps with train.bad_steps=skip; its clips are in "
                        f"{run_dir / 'events.jsonl'}"
                    )
            elif taken:
                guard.skipped = 0
            for optimizer in optimizers:
                if taken:
                    optimizer.step()
                optimizer.zero_grad()
            step += 1
            if taken:
                ema.update(step)

            # All processes leave at the same step.
            facts = torch.tensor([own_loss, bool(stop)], dtype=torch.float64)
            loss_sum, stops = sum_over(team, facts).tolist()
            clips += settings.batch_size
            if taken:
                losses.append(loss_sum / team.count)
            if due(settings.log_every) and losses:
                rate = clips / (time.monotonic() - since)
                loss_mean = sum(losses) / len(losses)
                line = {"loss": loss_mean, "lr": rate_now, "grad_norm": norm, "clips_per_second": rate}
                if scale.enabled:
                    line["loss_scale"] = scale.value
                metrics.write(step=step, **line)
                trackers.log(step, line)
                progress.update(step, f"loss {loss_mean:.4f}  {rate:.1f} clips/s")
                since, clips, losses = time.monotonic(), 0, []
            stopping = bool(stops) and step < settings.steps
            saving = due(settings.checkpoint_every) or step == settings.steps or stopping
            showing = (settings.sample_every, settings.score_every, settings.validate_every)
            if not saving and not any(map(due, showing)):
                continue

            pipeline = make_pipeline(averaged_model(model, ema), vae)
            validation_loss = None
            if validation is not None and due(settings.validate_every):
                values = validation.evaluate(pipeline.transformer, diffusion, device, settings.precision)
                validation_loss = values["loss"]
                validations.write(step=step, **values)
                trackers.log(step, values, "validation")
                progress.message(f"step {step:,}: validation loss {validation_loss:.4f}")
            if due(settings.sample_every):
                sheet = write_samples(config, pipeline, batches, step, team)
                trackers.image(step, sheet)
            if score_log is not None and due(settings.score_every):
                trackers.log(step, score_log.write(step, pipeline), "score")
            if saving:
                # The pipeline first: a run that is killed in between makes it again when it is resumed.
                adapters = saved_adapters(model, ema.weights)
                if team.is_first:
                    save_pipeline(pipeline, run_dir / "pipeline", adapters)
                state = {
                    "model_config": model_facts(model),
                    "autoencoder": fingerprint(vae),
                    "losses": losses,
                    "guard": guard.state(),
                    "loss_scale": scale.state(),
                    "validation_loss": validation_loss,
                }
                tensors = training_tensors(model, ema, optimizers)
                save_checkpoint(run_dir / "checkpoints", step, tensors, state, keep, team)
            since, clips = time.monotonic(), 0
            if stopping:
                events.write(step=step, event="stop")
                raise Stopped(
                    f"stopped at step {step:,} of {settings.steps:,}; the same command goes on from there", *stop[:1]
                )
            if step == settings.steps:
                events.write(step=step, event="end")
    return run_dir / "pipeline"


def name_clips(batch: Batch, losses: torch.Tensor, team: Processes) -> list[dict[str, Any]]:
    """Where the clips of a step come from, over all processes, with their losses, the worst first."""
    mine = [
        {"video": draw.video.name, "start": draw.start, "flip": draw.flip, "loss": loss}
        for draw, loss in zip(batch.draws, losses.tolist(), strict=True)
    ]
    everyone = [clip for share in team.gather(mine) for clip in share]
    # What is no number is worse than any.
    return sorted(everyone, key=lambda clip: -clip["loss"] if clip["loss"] == clip["loss"] else float("-inf"))


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
    team: Processes,
    vae: AutoencoderKL,
    model: LavitaTransformer3DModel,
    ema: EMA,
    optimizers: list[torch.optim.Optimizer],
    guard: StepGuard,
    scale: LossScale,
) -> tuple[int, list[float]]:
    """Loads the last checkpoint of the run folder into all of them.

    Returns:
        The steps done, and the losses since the last line of the metrics.

    Raises:
        ValueError: where the checkpoint is of another model or autoencoder.
    """
    checkpoint = load_last_checkpoint(config.run_dir / "checkpoints", team)
    if checkpoint is None:
        return 0, []
    facts = model_facts(model)
    for key, value in checkpoint.facts["model_config"].items():
        if facts.get(key) != value:
            raise ValueError(
                f"{config.run_dir} holds a model with {key}={value}, but this data and configuration give "
                f"{facts.get(key)}; use another run_dir"
            )
    if checkpoint.facts["autoencoder"] != fingerprint(vae):
        raise ValueError(f"{config.run_dir} was trained with another autoencoder; use another run_dir")
    restore_training(checkpoint, model, ema, optimizers)
    guard.restore(checkpoint.facts["guard"])
    scale.restore(checkpoint.facts["loss_scale"])
    return checkpoint.step, checkpoint.facts["losses"]


def model_facts(model: LavitaTransformer3DModel) -> dict[str, Any]:
    """The fields of a model's configuration that a checkpoint must agree with, as JSON holds them."""
    return json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
