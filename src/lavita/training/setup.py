"""Builds everything that a training run works with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavita.core.config import ConfigError, save_config
from lavita.core.files import write_text
from lavita.core.precision import pick_device
from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.core.text import normal_name
from lavita.data.buckets import used_buckets
from lavita.data.text_embeddings import embed_texts, texts_folder
from lavita.models.autoencoder import Autoencoder, downsampling, latent_frames, latent_grid, load_autoencoder
from lavita.models.compilation import compile_blocks
from lavita.models.config import DEFAULT_TUBE_SIZE
from lavita.models.fingerprint import fingerprint
from lavita.models.flow import FLOW
from lavita.models.given_frames import GivenMasks
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.packaged import autoencoder_source
from lavita.models.presets import preset_sizes
from lavita.models.pretrained.transfer import initialize
from lavita.models.shapes import sample_size_field
from lavita.models.text_encoder import DEFAULT_TEXT_ENCODER
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.batches import BatchMaker
from lavita.training.budget import Budget
from lavita.training.checkpoint import Checkpoint, list_checkpoints, load_last_checkpoint
from lavita.training.config import RunConfig, TrainConfig
from lavita.training.data_record import check_contents, write_contents
from lavita.training.finetune import prepare, read_fresh, trained_parameters, write_fresh
from lavita.training.normalization import latent_statistics
from lavita.training.run_folder import RESUMABLE, Metrics, check_resumable
from lavita.training.scoring import TrackingOptions, TrainingScorer
from lavita.training.state import TrainState
from lavita.training.timesteps import Timesteps
from lavita.training.trackers import Trackers
from lavita.training.validation import Validation


@dataclass(frozen=True)
class Run:
    """Everything that the training loop works with."""

    config: RunConfig
    """With the number of steps that a budget gives."""
    device: torch.device
    vae: Autoencoder
    batches: BatchMaker
    state: TrainState
    validation: Validation | None
    """The held-out clips; None without `data.validation`."""
    scorer: TrainingScorer | None
    """None without `train.score_every`."""
    metrics: Metrics
    validations: Metrics
    scores: Metrics
    events: Metrics
    trackers: Trackers
    progress: Progress


@contextmanager
def open_run(config: RunConfig, team: Processes, budget: Budget | None = None) -> Iterator[Run]:
    """Builds a run, resumed from the last checkpoint of its folder, and closes its files at the end.

    Args:
        config: the run.
        team: the processes that share it.
        budget: the time that decides the number of steps; None for those of the configuration.

    Raises:
        ValueError: if configuration, data, autoencoder and run folder do not fit together, or the budget is spent.
        OSError: if the run folder cannot be written to.
    """
    settings, run_dir = config.train, config.run_dir
    check_batch_size(settings, team)
    check_resumable(run_dir, config, RESUMABLE)
    device = pick_device(settings.device)
    vae = load_autoencoder(autoencoder_source(config.autoencoder, config.data.longest_side), device)
    check_resolution(config, vae)
    texts = texts_folder(config.data.latent_cache, run_dir)
    encoder = partial(
        embed_texts,
        source=config.model.text_encoder,
        folder=texts,
        device=device,
        team=team,
        num_tokens=config.model.text_tokens,
    )
    masks = GivenMasks(config.model.given_frames, config.model.given_dropout)
    batches = BatchMaker(
        config.data,
        settings,
        vae,
        config.model.class_dropout,
        Timesteps.of(config, vae),
        masks,
        config.model.action_dropout,
    )
    contents = batches.contents()
    check_contents(run_dir, contents)
    if batches.captions is not None:
        batches.embed_captions(encoder)
    batches.statistics = latent_statistics(config, batches.source, team)
    validation = None
    if config.data.validation is not None:
        training = batches.source.catalog
        validation = Validation(config.data, settings, vae, training, encoder, team, batches.statistics)
    model = build_model(config, vae, batches).to(device)
    fresh = _initialize(model, config, team)
    state = build_state(model, settings, fresh, device, team)
    checkpoint = _resume(state, run_dir, vae, team)
    if budget is not None:
        plan = budget.begin(state.step, None if checkpoint is None else checkpoint.facts.get("budget"))
        settings = settings.model_copy(update={"steps": plan.steps, "decay_steps": plan.decay_steps})
        config = config.model_copy(update={"train": settings})
    team.wait()  # all processes have read the folder before the first one writes to it
    if team.is_first:
        save_config(config, run_dir / "config.yaml")
        write_contents(run_dir, contents)

    with ExitStack() as stack:

        def log(name: str, active: bool = True) -> Metrics:
            metrics = Metrics(run_dir / f"{name}.jsonl", state.step, team.is_first and active)
            return stack.enter_context(metrics)

        metrics, events = log("metrics"), log("events")
        validations, scores = log("validation", validation is not None), log("scores", bool(settings.score_every))
        if state.step < settings.steps:
            event = "resume" if state.step else "start"
            processes = team.everyone.count
            events.write(step=state.step, event=event, processes=processes, parallel=settings.parallel)
        progress = Progress("step", settings.steps, state.step, team.is_first)
        progress.message(f"{describe(batches, state, device, team)}; {run_dir}")
        scorer = _open_scorer(config, device, team) if settings.score_every else None
        tracked = config.model_dump(mode="json")
        trackers = Trackers(settings.trackers if team.is_first else [], run_dir, tracked, state.step)
        yield Run(
            config=config,
            device=device,
            vae=vae,
            batches=batches,
            state=state,
            validation=validation,
            scorer=scorer,
            metrics=metrics,
            validations=validations,
            scores=scores,
            events=events,
            trackers=stack.enter_context(closing(trackers)),
            progress=progress,
        )


def check_batch_size(settings: TrainConfig, team: Processes) -> None:
    """Refuses a batch that the processes and their micro-batches cannot share evenly; ConfigError says why."""
    if settings.batch_size % (settings.accumulation * team.count):
        what = "processes" if team.members == 1 else f"groups of {team.members} processes"
        raise ConfigError(
            f"train.batch_size is {settings.batch_size}, but must be a multiple of the {what} ({team.count}) times "
            f"train.accumulation ({settings.accumulation})"
        )


def check_resolution(config: RunConfig, vae: Autoencoder) -> None:
    """Refuses sizes that the autoencoder and the patches do not divide; ConfigError names the nearest others."""
    preset, factor = config.model.preset, downsampling(vae)
    patch = preset_sizes(preset, config.model.variant)["patch_size"]
    unit = factor * patch
    for shape in config.data.shapes:
        for side in (shape.size.height, shape.size.width):
            if not side % unit:
                continue
            near = " or ".join(str(n) for n in (side // unit * unit, side // unit * unit + unit) if n)
            field = (
                f"data.buckets has {shape}" if config.data.buckets else f"data.resolution is {config.data.resolution}"
            )
            what = "" if isinstance(config.data.resolution, int) and not config.data.buckets else f"{side} "
            raise ConfigError(
                f"{field}, but {what}must be a multiple of {unit}, such as {near}: the autoencoder divides it by "
                f"{factor}, and model.preset={preset} by {patch}"
            )


def build_model(config: RunConfig, vae: Autoencoder, batches: BatchMaker) -> LavitaTransformer3DModel:
    """The freshly initialised model of a run, on the CPU; its configuration carries the facts about the data."""
    names, table = list(batches.class_names), batches.text_table
    rates = sorted(video.info.fps for video in batches.source.catalog.videos)
    statistics = {} if batches.statistics is None else batches.statistics.fields()
    shapes: dict[str, Any] = {}
    if config.data.buckets:
        used = used_buckets(batches.source.catalog, config.data)
        shapes["trained_shapes"] = [
            [latent_frames(vae.config, bucket.num_frames), *latent_grid(vae, bucket.size)] for bucket in used
        ]
    torch.manual_seed(config.train.seed)
    return model_of_sizes(
        config,
        vae,
        len(names),
        flow_shift=batches.timesteps.shift if config.model.prediction_type == FLOW else None,
        class_names=names or None,
        action_names=None if batches.actions is None else list(batches.actions.names),
        text_dim=0 if table is None else table.shape[-1],
        text_tokens=config.model.text_tokens,
        text_encoder=None if table is None else config.model.text_encoder or DEFAULT_TEXT_ENCODER,
        frame_interval=config.data.frame_interval,
        fps=round(rates[len(rates) // 2] / config.data.frame_interval, 3),
        **statistics,
        **shapes,
    )


def model_of_sizes(config: RunConfig, vae: Autoencoder, num_classes: int, **facts: Any) -> LavitaTransformer3DModel:
    """A model with random weights and the sizes that configuration and autoencoder ask for.

    Args:
        config: the run.
        vae: the autoencoder of its latents.
        num_classes: classes of the data; 0 for none.
        facts: further fields of the model, which depend on the data.
    """
    return LavitaTransformer3DModel.from_preset(
        config.model.preset,
        variant=config.model.variant,
        patch_embedding=config.model.patch_embedding,
        tube_size=config.model.tube_size or DEFAULT_TUBE_SIZE,
        conditioning=config.model.conditioning,
        temporal_position=config.model.temporal_position,
        given_frames=config.model.given_frames or None,
        learn_sigma=config.model.learn_sigma,
        prediction_type=config.model.prediction_type,
        sample_size=sample_size_field(*latent_grid(vae, config.data.resolution)),
        in_channels=vae.config["latent_channels"],
        num_frames=latent_frames(vae.config, config.data.num_frames, "data.num_frames"),
        num_classes=num_classes,
        **facts,
    )


def build_state(
    model: LavitaTransformer3DModel, settings: TrainConfig, fresh: Set[str], device: torch.device, team: Processes
) -> TrainState:
    """Prepares a model for training as the configuration asks: frozen parts, adapters, checkpointing, compilation.

    Args:
        model: on the device.
        settings: the configuration of the training.
        fresh: names of the parameters that have no pretrained weights, see `finetune.prepare`.
        device: the device of the model.
        team: the processes that share each batch.
    """
    prepare(model, settings, fresh)
    model.train()
    checkpoint_blocks(model, settings.gradient_checkpointing)
    if settings.compile:
        compile_blocks(model)
    return TrainState.build(model, settings, device, team)


def describe(batches: BatchMaker, state: TrainState, device: torch.device, team: Processes) -> str:
    """One line about the data, the model and where it is trained."""
    classes = f", {len(batches.class_names)} classes" if batches.class_names else ""
    texts = f", {len(batches.captions.texts) - 1:,} captions" if batches.captions is not None else ""
    kind = "FSDP2" if state.parallel.is_sharded else "DDP"
    sharing = f", {team.members} share a clip" if team.members > 1 else ""
    count = team.everyone.count
    several = f"{count} processes ({kind}{sharing}); " if count > 1 else ""
    return (
        f"{len(batches.source.catalog.videos):,} videos{classes}{texts}, {batches.sampler.num_clips:,} clips; "
        f"{trained_parameters(state.model)}; {several}{device}"
    )


def model_facts(model: LavitaTransformer3DModel) -> dict[str, Any]:
    """The fields of a model's configuration that a checkpoint must agree with, as JSON holds them."""
    facts = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return dict(json.loads(json.dumps(facts)))


def _initialize(model: LavitaTransformer3DModel, config: RunConfig, team: Processes) -> set[str]:
    """Gives a new run the weights of `train.init_from`.

    Returns:
        Names of the parameters that have no pretrained weights; empty if nothing depends on them.
    """
    settings, run_dir = config.train, config.run_dir
    if settings.init_from is not None and not list_checkpoints(run_dir / "checkpoints"):
        report = initialize(model, settings.init_from, settings.init_weights, settings.init_closed)
        if team.is_first:
            write_fresh(run_dir, report.fresh)
            write_text(run_dir / "init.txt", f"{report}\n")
            print(report, file=sys.stderr)
        return report.fresh
    if settings.freeze is not None or settings.lora_rank:
        return read_fresh(run_dir)
    return set()


def _resume(state: TrainState, run_dir: Path, vae: Autoencoder, team: Processes) -> Checkpoint | None:
    """Restores the last checkpoint of the run folder, and returns it; None if there is none.

    Raises:
        ValueError: if the checkpoint belongs to another model or autoencoder.
    """
    checkpoint = load_last_checkpoint(run_dir / "checkpoints", team)
    if checkpoint is None:
        return None
    facts = model_facts(state.model)
    for key, value in checkpoint.facts["model_config"].items():
        if key == "class_names" and value:  # other Unicode forms in older checkpoints
            value = [normal_name(name) for name in value]
        if facts.get(key) != value:
            raise ValueError(
                f"{run_dir} holds a model with {key}={value}, but this data and configuration give {facts.get(key)}; "
                "use another run_dir"
            )
    if checkpoint.facts["autoencoder"] != fingerprint(vae):
        raise ValueError(f"{run_dir} was trained with another autoencoder; use another run_dir")
    state.restore(checkpoint)
    return checkpoint


def _open_scorer(config: RunConfig, device: torch.device, team: Processes) -> TrainingScorer:
    data = config.data
    assert data.path is not None and isinstance(data.resolution, int), "the configuration has no scores for these data"
    options = TrackingOptions(num_clips=config.train.score_clips)
    return TrainingScorer(data.path, data.num_frames, data.frame_interval, data.resolution, options, device, team)
