"""`lavita train --dry-run`: what a run would do, need and take, without writing anything."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch

from lavita.core.config import ConfigError
from lavita.core.files import check_outside
from lavita.core.precision import low_precision, pick_device
from lavita.core.processes import Processes
from lavita.core.progress import clock
from lavita.data.buckets import BucketSampler
from lavita.models.autoencoder import load_autoencoder
from lavita.models.given_frames import GivenMasks
from lavita.models.packaged import autoencoder_source
from lavita.models.pretrained.transfer import initialize
from lavita.models.shapes import largest_shape
from lavita.models.text_encoder import load_text_encoder
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.live_storages import Peak
from lavita.studies.memory import Precision, Setting, available_memory, training_memory
from lavita.training.batches import BatchMaker
from lavita.training.checkpoint import list_checkpoints
from lavita.training.config import RunConfig
from lavita.training.data_record import check_contents
from lavita.training.finetune import read_fresh, trained_parameters
from lavita.training.normalization import latent_statistics
from lavita.training.run_folder import RESUMABLE, check_resumable
from lavita.training.setup import build_model, build_state, check_batch_size, check_resolution
from lavita.training.step import train_step
from lavita.training.timesteps import Timesteps
from lavita.training.validation import HeldOut

STEPS = 2
"""Real steps that are taken; the last one is timed, because the first one also sets things up."""


@dataclass(frozen=True)
class DryRun:
    """What a run would do, need and take in one process."""

    steps_done: int
    """Steps of the run folder's last checkpoint."""
    num_videos: int
    num_clips: int
    class_names: tuple[str, ...]
    num_captions: int
    left_out: tuple[str, ...]
    """One message per video that cannot be used."""
    num_held_out: int
    """Held-out videos."""
    parameters: str
    """Number of parameters, and how many of them are trained."""
    memory: Peak
    """Predicted peak of a training step."""
    autoencoder_bytes: int
    """Weights of the autoencoder."""
    device: str
    precision: str
    step_seconds: float | None
    """Measured time of a step, with buckets the mean over the steps; None if a step does not fit into the memory that
    is free."""
    read_seconds: float | None
    """Measured time of reading a batch."""
    run_seconds: float | None
    """Predicted time of all remaining steps, if reading does not overlap with them."""
    free_bytes: int | None
    """Memory of the device that is free; None if unknown."""


def dry_run(config: RunConfig) -> DryRun:
    """Opens the data, builds the model and takes two steps in memory; writes nothing.

    Args:
        config: the run. Its folder is only read.

    Raises:
        ValueError: if configuration, data, autoencoder and run folder do not fit together, or under torchrun.
    """
    settings, data, team = config.train, config.data, Processes()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--dry-run runs in one process; start it without torchrun")
    if settings.parallel != "auto":
        # One process cannot share a model; everything else about the run can be tried.
        settings = settings.model_copy(update={"parallel": "auto"})
    check_batch_size(settings, team)
    check_outside("run_dir", config.run_dir, data.path, data.images, data.validation)
    check_resumable(config.run_dir, config, RESUMABLE)
    checkpoints = list_checkpoints(config.run_dir / "checkpoints")
    steps_done = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    device = pick_device(settings.device)
    vae = load_autoencoder(autoencoder_source(config.autoencoder, data.longest_side), device)
    check_resolution(config, vae)
    masks = GivenMasks(config.model.given_frames, config.model.given_dropout)
    batches = BatchMaker(data, settings, vae, config.model.class_dropout, Timesteps.of(config, vae), masks)
    check_contents(config.run_dir, batches.contents())
    if batches.captions is not None:
        batches.embed_captions(lambda texts: _stand_in_embeddings(texts, config, device))
    batches.statistics = latent_statistics(config, batches.source)
    held_out = None
    if data.validation is not None:
        held_out = HeldOut.open(data, settings.precision, vae, batches.source.catalog)

    with torch.device("meta"):
        outline = build_model(config, vae, batches)
    precision = _precision_name(low_precision(device, settings.precision))
    setting = Setting(
        settings.optimizer,
        settings.gradient_checkpointing,
        precision,
        settings.accumulation,
        num_averages=1 + len(settings.power_ema),
    )
    micro = settings.batch_size // settings.accumulation
    memory = training_memory(largest_shape(outline.config), micro, num_images=data.num_images, setting=setting)
    free = available_memory(device)
    step_seconds = read_seconds = run_seconds = None
    parameters = trained_parameters(outline)
    if free is None or memory.total < free:
        model = build_model(config, vae, batches).to(device)
        fresh = _fresh_parameters(model, config, bool(checkpoints))
        state = build_state(model, settings, fresh, device, team)
        parameters = trained_parameters(model)
        step_seconds = read_seconds = 0.0
        for steps, share in _steps_to_time(batches, steps_done):
            for step in steps:
                start = time.perf_counter()
                batch = batches.make(step)
                read = time.perf_counter()
                train_step(state, batch, settings)  # waits for the device: it reads the loss
                last = time.perf_counter() - read, read - start
            step_seconds, read_seconds = step_seconds + share * last[0], read_seconds + share * last[1]
        run_seconds = (settings.steps - steps_done) * (step_seconds + read_seconds)
    catalog = batches.source.catalog
    return DryRun(
        steps_done=steps_done,
        num_videos=len(catalog.videos),
        num_clips=batches.sampler.num_clips,
        class_names=tuple(batches.class_names),
        num_captions=len(batches.captions.texts) - 1 if batches.captions is not None else 0,
        left_out=catalog.broken,
        num_held_out=len(held_out.source.catalog.videos) if held_out is not None else 0,
        parameters=parameters,
        memory=memory,
        autoencoder_bytes=sum(tensor.nbytes for tensor in vae.state_dict().values()),
        device=str(device),
        precision=precision,
        step_seconds=step_seconds,
        read_seconds=read_seconds,
        run_seconds=run_seconds,
        free_bytes=free,
    )


def _steps_to_time(batches: BatchMaker, first: int) -> list[tuple[Sequence[int], float]]:
    """For each shape of clips, the next steps that have it, of which the last one is timed, and its share of steps."""
    sampler = batches.sampler
    if not isinstance(sampler, BucketSampler):
        return [(range(first, first + STEPS), 1.0)]
    found: list[tuple[Sequence[int], float]] = []
    for number, each in enumerate(sampler.samplers):
        upcoming = (step for step in count(first) if sampler.choose(step) == number)
        found.append((list(islice(upcoming, STEPS)), each.num_clips / sampler.num_clips))
    return found


def print_dry_run(config: RunConfig, found: DryRun) -> None:
    """Prints what `dry_run` found, one line per subject."""
    settings = config.train
    begun = f"resumes after step {found.steps_done:,}" if found.steps_done else "new"
    print(f"run         {config.run_dir}: {begun}; {settings.steps:,} steps of {settings.batch_size} clips")
    classes = f", {len(found.class_names)} classes" if found.class_names else ""
    captions = f", {found.num_captions:,} captions" if found.num_captions else ""
    left_out = (
        f"; {len(found.left_out):,} left out, the first: {found.left_out[0]}" if found.left_out else "; none left out"
    )
    print(f"data        {found.num_videos:,} videos, {found.num_clips:,} clips{classes}{captions}{left_out}")
    if found.num_held_out:
        print(f"validation  {found.num_held_out:,} videos, {settings.validation_clips} clips")
    print(f"model       {config.model.preset}, variant {config.model.variant}: {found.parameters}")
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in found.memory.parts.items())
    print(
        f"memory      {_gib(found.memory.total)} GiB at the peak of a step, predicted for training all parameters in "
        f"one process ({parts}); in addition the autoencoder, {_gib(found.autoencoder_bytes)} GiB of weights"
    )
    if found.step_seconds is None or found.read_seconds is None or found.run_seconds is None:
        print(f"step        not measured: a step does not fit into the {_gib(found.free_bytes or 0)} GiB that are free")
        print("duration    unknown")
        return
    print(
        f"step        {found.step_seconds:.3g} s, measured on {found.device} in {found.precision}: the last of {STEPS} "
        f"real steps of {settings.batch_size} clips in one process; reading a batch took {found.read_seconds:.3g} s"
    )
    print(
        f"duration    at most about {clock(found.run_seconds)} for the {settings.steps - found.steps_done:,} remaining "
        "steps, less if a batch is read while the step before it is computed; without checkpoints, samples, validation "
        "and scores"
    )


def _fresh_parameters(model: LavitaTransformer3DModel, config: RunConfig, resumed: bool) -> set[str]:
    """Loads `train.init_from` into a new run's model; names of the parameters without pretrained weights."""
    settings = config.train
    if settings.init_from is not None and not resumed:
        return initialize(model, settings.init_from, settings.init_weights, settings.init_closed).fresh
    return read_fresh(config.run_dir) if settings.freeze is not None or settings.lora_rank else set()


def _stand_in_embeddings(texts: Sequence[str], config: RunConfig, device: torch.device) -> torch.Tensor:
    """The embedding of the first text for all texts: of the right size, in no time, and without a cache."""
    first = load_text_encoder(config.model.text_encoder, device).encode(texts[:1], config.model.text_tokens)
    return first.expand(len(texts), *first.shape[1:])


def _precision_name(dtype: torch.dtype | None) -> Precision:
    return "fp32" if dtype is None else "bf16" if dtype == torch.bfloat16 else "fp16"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f}"
