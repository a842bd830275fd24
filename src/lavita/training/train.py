"""The training loop."""

from __future__ import annotations

import sys
import time
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path

from lavita.core.config import save_config
from lavita.core.files import check_outside
from lavita.core.prefetch import prefetch
from lavita.core.processes import Processes, processes
from lavita.models.adapters import saved_adapters
from lavita.models.fingerprint import fingerprint
from lavita.sampling.pipeline import make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline
from lavita.training.batches import Batch
from lavita.training.budget import Budget
from lavita.training.card import newest_sheet, run_facts
from lavita.training.checkpoint import Keep, save_checkpoint
from lavita.training.config import RunConfig, TrainConfig
from lavita.training.power_ema import save_snapshot
from lavita.training.run_folder import Stopped, only_run, stop_requested
from lavita.training.setup import Run, model_facts, open_run
from lavita.training.snapshots import averaged_model, write_samples
from lavita.training.stability import MOST_SKIPPED, name_clips, not_finite
from lavita.training.step import StepResult, train_step

TIMEOUT = timedelta(hours=2)
"""How long a process waits for one that writes or samples."""


def train(config: RunConfig, budget: Budget | None = None) -> Path:
    """Trains a model, resuming from the run folder's last checkpoint, and writes `<run_dir>/pipeline`.

    Under `torchrun` the processes share each batch; they need one run folder that all of them see. It also holds
    `config.yaml`, `videos.json`, `metrics.jsonl`, `events.jsonl`, `validation.jsonl`, `scores.jsonl`, `checkpoints/`,
    `averages/` and `samples/`.

    Args:
        config: the run.
        budget: the time that it may take, which then decides the number of steps instead of `train.steps` and
            `train.decay_steps`; `config.yaml` has the last decision. Only in one process.

    Returns:
        The pipeline's folder; its transformer has the averaged weights.

    Raises:
        ValueError: if configuration, data, autoencoder and run folder do not fit together.
        OSError: if the folder cannot be written to; the last checkpoint stays.
        Stopped: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        FloatingPointError: if a step is not finite, see `train.bad_steps`.
    """
    check_outside("run_dir", config.run_dir, config.data.path, config.data.images, config.data.validation)
    with (
        processes(TIMEOUT, config.train.sequence_parallel) as team,
        only_run(config.run_dir) if team.is_first else nullcontext(),
        open_run(config, team, budget) as run,
        stop_requested() as stop,
    ):
        _loop(run, team, stop, budget)
    return config.run_dir / "pipeline"


def _loop(run: Run, team: Processes, stop: list[int], budget: Budget | None) -> None:
    config, state = run.config, run.state
    settings, run_dir = config.train, config.run_dir
    keep = Keep(settings.keep_checkpoints, settings.keep_every, settings.keep_best)
    steps = range(state.step, settings.steps)
    if budget is not None and steps:
        steps = range(state.step, sys.maxsize)  # the budget ends them
        _write_plan(budget, run, settings, budget.describe(state.step), team)
    since, clips = time.monotonic(), 0

    def due(every: int) -> bool:
        return bool(every) and (state.step % every == 0 or state.step == settings.steps)

    with closing(prefetch(run.batches.make_all(steps, team, run.device))) as upcoming:
        for batch in upcoming:
            result = train_step(state, batch, settings, team)
            clips += settings.batch_size
            if result.verdict in ("spike", "not-finite"):
                _report_bad_step(config, run, team, batch, result)
            if budget is not None:
                settings = _follow(budget, run, settings, team)
            stopping = team.any(bool(stop)) and state.step < settings.steps

            if due(settings.log_every) and state.losses:
                rate = clips / (time.monotonic() - since)
                loss = sum(state.losses) / len(state.losses)
                line = {"loss": loss, "lr": result.learning_rate, "grad_norm": result.grad_norm}
                line["clips_per_second"] = rate
                if state.scale.enabled:
                    line["loss_scale"] = state.scale.value
                run.metrics.write(step=state.step, **line)
                run.trackers.log(state.step, line)
                run.progress.update(state.step, f"loss {loss:.4f}  {rate:.1f} clips/s")
                since, clips, state.losses = time.monotonic(), 0, []

            saving = due(settings.checkpoint_every) or stopping
            if not saving and not any(map(due, (settings.sample_every, settings.score_every, settings.validate_every))):
                continue
            outputs_begin = 0.0 if budget is None else budget.spent()
            pipeline = make_pipeline(averaged_model(state.model, state.ema), run.vae)
            validation_loss = None
            if run.validation is not None and due(settings.validate_every):
                values = run.validation.evaluate(pipeline.transformer, state.diffusion, run.device, settings.precision)
                validation_loss = values["loss"]
                run.validations.write(step=state.step, **values)
                run.trackers.log(state.step, values, "validation")
                run.progress.message(f"step {state.step:,}: validation loss {validation_loss:.4f}")
            if due(settings.sample_every):
                sheet = write_samples(run_dir / "samples", pipeline, run.batches, settings, state.step, team)
                run.trackers.image(state.step, sheet)
            if run.scorer is not None and due(settings.score_every) and (scores := run.scorer(pipeline)):
                run.scores.write(step=state.step, **scores)
                run.trackers.log(state.step, scores, "score")
            if saving:
                # The pipeline comes first: a run that is killed between the two writes it again when it is resumed.
                adapters = saved_adapters(state.model, state.ema.weights)
                if team.is_first:
                    save_pipeline(pipeline, run_dir / "pipeline", adapters, run_facts(run_dir), newest_sheet(run_dir))
                facts = {
                    "model_config": model_facts(state.model),
                    "autoencoder": fingerprint(run.vae),
                    **state.facts(),
                    "validation_loss": validation_loss,
                    **({} if budget is None else {"budget": budget.facts()}),
                }
                if state.power and due(settings.checkpoint_every):
                    save_snapshot(run_dir, state.step, state.power, team)
                save_checkpoint(run_dir / "checkpoints", state.step, state.tensors(), facts, keep, team)
            since, clips = time.monotonic(), 0
            if budget is not None:
                budget.leave_out(budget.spent() - outputs_begin)
            if stopping:
                run.events.write(step=state.step, event="stop")
                raise Stopped(state.step, settings.steps, stop)
            if state.step == settings.steps:
                run.events.write(step=state.step, event="end")
                if budget is not None and team.is_first:
                    save_config(config.model_copy(update={"train": settings}), run_dir / "config.yaml")
                break


def _follow(budget: Budget, run: Run, settings: TrainConfig, team: Processes) -> TrainConfig:
    """The settings with the number of steps that the budget decides on; what changes much is written down."""
    step = run.state.step
    if not budget.replan(step):
        return settings
    plan = budget.plan
    settings = settings.model_copy(update={"steps": plan.steps, "decay_steps": plan.decay_steps})
    run.progress.total = plan.steps
    if (news := budget.news(step)) is not None:
        _write_plan(budget, run, settings, news, team)
    return settings


def _write_plan(budget: Budget, run: Run, settings: TrainConfig, note: str, team: Processes) -> None:
    plan = budget.plan
    run.events.write(step=run.state.step, event="plan", steps=plan.steps, decay_steps=plan.decay_steps, note=note)
    if team.is_first:
        save_config(run.config.model_copy(update={"train": settings}), run.config.run_dir / "config.yaml")


def _report_bad_step(config: RunConfig, run: Run, team: Processes, batch: Batch, result: StepResult) -> None:
    """Names the clips of a step that went wrong; FloatingPointError if the run must end there."""
    step, norm = run.state.step, result.grad_norm
    clips = name_clips(batch, result.clip_losses, team)
    run.events.write(step=step, event=result.verdict, grad_norm=norm, skipped=not result.taken, clips=clips)
    worst = ", ".join(f"{clip['video']} from frame {clip['start']}" for clip in clips[:2])
    run.progress.message(f"step {step:,}: gradient norm {norm:.3g} ({result.verdict}); clips: {worst}, ...")
    too_many = config.train.bad_steps == "stop" or run.state.guard.skipped > MOST_SKIPPED
    if not result.taken and too_many:
        advice = "lower train.learning_rate, or skip such steps with train.bad_steps=skip; the clips of the step are in"
        raise not_finite(step, clips[0]["loss"], norm, f"{advice} {config.run_dir / 'events.jsonl'}")
