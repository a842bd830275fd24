"""The training loop, and nothing else."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from lavita.core.config import ConfigError, save_config
from lavita.core.precision import autocast, low_precision, pick_device
from lavita.core.processes import Processes, processes, sum_over, whole
from lavita.core.progress import Progress
from lavita.data.text_embeddings import embed_texts, texts_folder
from lavita.models.adapters import saved_adapters
from lavita.models.autoencoder import load_autoencoder
from lavita.models.compilation import compile_blocks
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.fingerprint import fingerprint
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.packaged import autoencoder_source
from lavita.models.pretrained.transfer import initialize
from lavita.sampling.pipeline import make_pipeline, save_pipeline
from lavita.training.batches import BatchMaker
from lavita.training.checkpoint import Keep, list_checkpoints, save_checkpoint
from lavita.training.config import RunConfig
from lavita.training.ema import EMA
from lavita.training.finetune import prepare, read_fresh, trained_parameters, write_fresh
from lavita.training.optimizers import make_optimizers
from lavita.training.parallel import ParallelModel
from lavita.training.run_folder import RESUMABLE, Metrics, Stopped, check_resumable, only_run, stop_requested
from lavita.training.scoring import ScoreLog
from lavita.training.setup import build_model
from lavita.training.snapshots import averaged_model, write_samples
from lavita.training.stability import MOST_SKIPPED, LossScale, StepGuard, name_clips
from lavita.training.state import model_facts, resume, training_tensors
from lavita.training.step import learning_rate
from lavita.training.trackers import Trackers
from lavita.training.validation import Validation

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
