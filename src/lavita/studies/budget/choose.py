"""Chooses everything about a training that was not given: from the videos, the machine, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavita.core.config import ConfigError
from lavita.core.precision import pick_device
from lavita.core.progress import clock
from lavita.data.catalog import Catalog
from lavita.data.clips import clip_span
from lavita.data.datasets import open_dataset
from lavita.data.latent_cache.manifest import read_manifest
from lavita.data.latent_cache.reading import CacheSource
from lavita.models.autoencoder import Autoencoder, downsampling, latent_size, load_autoencoder, temporal_downsampling
from lavita.models.packaged import BUILTIN, autoencoder_source
from lavita.studies.budget import table
from lavita.studies.budget.measure import AutoencoderTrial, try_autoencoder
from lavita.studies.budget.sizes import choose_size, output_seconds
from lavita.studies.budget.values import load, put, recipe, without_path
from lavita.studies.budget.videos import (
    CacheChoice,
    are_classes,
    choose_cache,
    choose_clips,
    choose_side,
    find_table,
    length_of,
)
from lavita.training.config import RunConfig
from lavita.training.setup import check_resolution

CACHE = "latents"
"""Folder of the cache in that of the run."""


@dataclass(frozen=True)
class Choice:
    """A training within a budget, before it begins."""

    config: RunConfig
    lines: tuple[str, ...]
    """What was chosen and why, one line per subject."""
    videos: tuple[str, ...] | None
    """Names of the videos to encode into `<run_dir>/latents`; None if there is nothing to encode."""
    step_seconds: float
    output_seconds: float
    """Estimated time of the last samples, checkpoint and pipeline."""
    catalog: Catalog | None
    """The videos, if they have been looked at."""


def choose(given: Mapping[str, Any], seconds: float, spent: Callable[[], float]) -> Choice:
    """Chooses what `given` leaves open, by looking at the videos and trying the machine; writes nothing.

    Args:
        given: the fields that the user has set, nested; they are kept.
        seconds: the budget.
        spent: gives the seconds of it that are spent.

    Raises:
        ValueError: if there are no usable videos, if fields do not fit together, or if no time is left to train.
    """
    chosen = recipe(given)
    draft = load(chosen, given)
    if draft.data.buckets or not isinstance(draft.data.resolution, int):
        shape = "data.buckets" if draft.data.buckets else f"data.resolution={draft.data.resolution}"
        raise ConfigError(f"a time is only kept with square clips of one shape; train with {shape} by train.steps")
    device = pick_device(draft.train.device)
    catalog, side, flip_cached = _open(draft)
    lengths = [video.info.num_frames for video in catalog.videos]
    rates = [video.info.fps for video in catalog.videos]
    lines = [f"data         {_describe(catalog, lengths, rates)}"]

    classes, line = _classes(given, draft, catalog, chosen)
    lines.append(f"conditions   {line}")
    data = given.get("data", {})
    clips = choose_clips(lengths, rates, data.get("num_frames"), data.get("frame_interval"))
    put(chosen, "data", num_frames=clips.num_frames, frame_interval=clips.frame_interval)
    lines.append(f"clips        {clips.num_frames} frames, interval {clips.frame_interval}: {clips.why}")

    vae = load_autoencoder(autoencoder_source(draft.autoencoder, data.get("resolution", table.SMALL_SIDE)), device)
    if (factor := temporal_downsampling(vae.config)) > 1:
        raise ConfigError(
            f"autoencoder is {draft.autoencoder}, which merges groups of {factor} frames, but a time is only kept with "
            "one of single frames, whose latents can be cached; train without a time, by train.steps"
        )
    resolution, why = _resolution(given, draft, vae, device, side, seconds)
    latent_size(vae, resolution)  # a resolution that the autoencoder does not divide is refused
    put(chosen, "data", resolution=resolution)
    lines.append(f"resolution   {resolution} x {resolution} pixels: {why}")
    trial = try_autoencoder(vae, catalog.videos if draft.data.path is not None else (), resolution)
    name = BUILTIN if draft.autoencoder == "auto" and resolution <= 128 else draft.autoencoder
    lines.append(f"autoencoder  {name}: {_judge(trial)}")

    flip = data.get("horizontal_flip", len(lengths) >= table.FEW_VIDEOS if flip_cached is None else flip_cached)
    cache = CacheChoice(None, flip, 0.0)
    if "latent_cache" not in data:
        cache = choose_cache(lengths, trial.encode_seconds, seconds, flip, "horizontal_flip" not in data)
    clip_seconds = clips.num_frames * trial.encode_seconds
    videos = None
    if draft.data.latent_cache is not None:
        clip_seconds = 0.0
    elif cache.videos is not None:
        clip_seconds = 0.0
        videos = tuple(catalog.videos[index].name for index in cache.videos)
        put(chosen, "data", latent_cache=str(draft.run_dir / CACHE))
        if len(videos) < len(lengths):
            given = without_path(given)
    put(chosen, "data", horizontal_flip=cache.flip)
    lines.append(f"latents      {_explain(cache, draft, lengths, trial, seconds)}")

    num_clips = sum(max(1, length // clip_span(clips.num_frames, clips.frame_interval)) for length in lengths)
    after = cache.seconds + table.PAGE_SECONDS
    row, model, model_line = choose_size(
        chosen, given, vae, classes, device, num_clips, clip_seconds, lambda: seconds - spent() - after
    )
    step_seconds = model.seconds + row.batch_size * clip_seconds
    for num_samples in [draft.train.num_samples] if "num_samples" in given.get("train", {}) else table.NUM_SAMPLES:
        outputs = output_seconds(model, num_samples, clips.num_frames, trial)
        if outputs <= table.SAMPLE_SHARE * seconds:
            break
    put(chosen, "train", num_samples=num_samples)
    training = seconds - spent() - after - outputs
    steps = int(training / step_seconds)
    if steps < 1:
        raise ConfigError(
            f"the budget is {clock(seconds)}, but a step takes about {step_seconds:.2g} s, and looking, encoding, "
            f"samples and page about {clock(seconds - training)}: no time is left to train; give more"
        )
    _schedule(chosen, given, steps, step_seconds, outputs)
    config = load(chosen, given)
    check_resolution(config, vae)
    settings = config.train
    lines += [
        f"model        {model_line}",
        f"training     {config.model.prediction_type}, {settings.optimizer}, rate {settings.learning_rate:g}, "
        f"{settings.batch_size} clips a step ({_source(given, row)}); about {steps:,} "
        f"steps of {step_seconds:.2g} s, measured on {device}; their number follows the time",
        f"time         {clock(seconds)} in all: {clock(spent())} to look and measure, about {clock(cache.seconds)} to "
        f"encode, {clock(training)} to train, {clock(outputs + table.PAGE_SECONDS)} for samples, pipeline and page",
        f"expect       {_expect(row, steps, len(videos or lengths))}",
    ]
    return Choice(config, tuple(lines), videos, step_seconds, outputs, catalog)


# ---- one subject each


def _open(draft: RunConfig) -> tuple[Catalog, int, bool | None]:
    """The videos, their shorter side in pixels, and whether a cache that is given holds mirrored frames."""
    data = draft.data
    flip = side = None
    if data.latent_cache is not None:
        manifest = read_manifest(data.latent_cache)
        if not isinstance(manifest["resolution"], int):
            raise ConfigError(
                f"{data.latent_cache}: has frames of {manifest['resolution']}, but a time is only kept with square "
                "clips of one shape; train by train.steps"
            )
        flip, side = bool(manifest["horizontal_flip"]), manifest["resolution"]
    if data.path is not None:
        catalog = open_dataset(
            data.path, data.dataset, data.split, data.class_folders, 1, data.broken, use_classes=data.use_classes
        )
    elif data.latent_cache is not None:
        catalog = CacheSource(data.latent_cache, data.has_classes, broken=data.broken).catalog
    else:
        raise ConfigError("data.path is missing: name a folder of videos with --data, or a data.latent_cache")
    sides = sorted(min(video.info.width, video.info.height) for video in catalog.videos)
    return catalog, side or sides[len(sides) // 10], flip


def _describe(catalog: Catalog, lengths: list[int], rates: list[float]) -> str:
    sizes = sorted((video.info.width, video.info.height) for video in catalog.videos)
    width, height = sizes[len(sizes) // 2]
    same = "" if sizes[0] == sizes[-1] else ", as the median"
    several = f"{len(lengths):,} videos" if len(lengths) > 1 else "1 video"
    return f"{several}, {length_of(lengths, rates)} in all, {width} x {height} pixels{same}"


def _classes(given: Mapping[str, Any], draft: RunConfig, catalog: Catalog, chosen: dict[str, Any]) -> tuple[int, str]:
    """Number of classes, and the line about classes and captions."""
    data, names = draft.data, [video.name for video in catalog.videos]
    if data.captions is not None:
        return 0, f"captions in {data.captions}"
    table_of_captions = None if data.path is None else find_table(data.path)
    hint = f"; for a model of texts, add data.captions={table_of_captions}" if table_of_captions is not None else ""
    if data.has_classes:
        return len(catalog.class_names), f"{len(catalog.class_names)} classes, as given{hint}"
    if data.dataset == "folder" and "class_folders" not in given.get("data", {}) and are_classes(names):
        put(chosen, "data", class_folders=True)
        count = len({Path(name).parent.name for name in names})
        return count, f"the {count} folders of the videos are classes; against that, data.class_folders=false{hint}"
    return 0, f"none: the videos are not in folders that look like classes{hint}"


def _resolution(
    given: Mapping[str, Any], draft: RunConfig, vae: Autoencoder, device: torch.device, side: int, seconds: float
) -> tuple[int, str]:
    data = given.get("data", {})
    if "resolution" in data:
        assert isinstance(draft.data.resolution, int), "others are refused at the start"
        return draft.data.resolution, "as given"
    if draft.data.latent_cache is not None:
        return side, f"that of {draft.data.latent_cache}"
    unit, preset = downsampling(vae), given.get("model", {}).get("preset")
    if preset is not None and preset.partition("/")[2].isdecimal():
        unit *= max(1, int(preset.partition("/")[2]))
    large = device.type != "cpu" or seconds >= table.LONG_SECONDS
    most = table.SIDES[-1] if large else table.SMALL_SIDE
    found = choose_side(side, most, unit)
    if found < most:
        return found, f"the videos have {side} on the shorter side"
    if device.type != "cpu":
        return found, "on a GPU"
    return found, f"on a CPU, {most} {'from' if large else 'below'} {clock(table.LONG_SECONDS)} on"


def _judge(trial: AutoencoderTrial) -> str:
    if trial.psnr is None:
        return "its reconstruction is not measured, as there are no videos, only latents"
    text = f"it reconstructs your videos at {trial.psnr:.1f} dB, and samples cannot be sharper than that"
    if trial.psnr < table.POOR_PSNR:
        return f"{text}: poor; train one on them with `lavita autoencoder train`, then give autoencoder=FOLDER"
    return f"{text}: fine detail will be missing" if trial.psnr < table.GOOD_PSNR else text


def _explain(cache: CacheChoice, draft: RunConfig, lengths: list[int], trial: AutoencoderTrial, seconds: float) -> str:
    if draft.data.latent_cache is not None:
        return f"from {draft.data.latent_cache}, {'mirrored as well' if cache.flip else 'not mirrored'}"
    all_seconds = sum(lengths) * trial.encode_seconds
    if cache.videos is None and "latent_cache" in draft.data.model_fields_set:
        return "encoded while training, as given"
    if cache.videos is None:
        return (
            f"encoded while training: to encode all frames beforehand would take about {clock(all_seconds)} of "
            f"{clock(seconds)}"
        )
    mirrored = "with mirrored ones" if cache.flip else "without mirrored ones"
    frames = sum(lengths[index] for index in cache.videos)
    text = f"{frames:,} frames, {mirrored}, encoded first in about {clock(cache.seconds)}"
    if len(cache.videos) == len(lengths):
        return text
    left = len(lengths) - len(cache.videos)
    return (
        f"{text}; {left:,} of {len(lengths):,} videos are left out, as all would take {clock(all_seconds)} of "
        f"{clock(seconds)}: give more time, or a data.latent_cache made by `lavita encode`"
    )


def _schedule(
    chosen: dict[str, Any],
    given: Mapping[str, Any],
    steps: int,
    step_seconds: float,
    outputs: float,
) -> None:
    """Sets what depends on the number of steps."""
    train = given.get("train", {})
    seconds = steps * step_seconds
    sets = max(1, min(table.NUM_SAMPLE_SETS, int(table.SAMPLE_SHARE * seconds / outputs)))
    # A little more than a whole share of the steps, so that the last set is not followed at once by that of the end.
    checkpoint_every = max(
        1, round(min(table.CHECKPOINT_SECONDS, 1.1 * seconds / table.NUM_CHECKPOINTS) / step_seconds)
    )
    if train.get("keep_every"):
        checkpoint_every = train["keep_every"]
    elif train.get("keep_best") and train.get("validate_every"):
        checkpoint_every = math.ceil(checkpoint_every / train["validate_every"]) * train["validate_every"]
    put(
        chosen,
        "train",
        steps=steps,
        decay_steps=0,
        warmup_steps=min(table.MOST_WARMUP, round(table.WARMUP_SHARE * steps)),
        log_every=max(1, steps // table.NUM_LOGS),
        checkpoint_every=checkpoint_every,
        # A single set is that of the last step, however many steps there will be.
        sample_every=max(1, round(1.1 * steps / sets)) if sets > 1 else 10 * steps,
    )


def _source(given: Mapping[str, Any], row: table.Row) -> str:
    if {"optimizer", "learning_rate", "batch_size"} & set(given.get("train", {})):
        return "some of it as given"
    return f"measured: {row.measured}" if row.measured else "scaled by the width, not measured"


def _expect(row: table.Row, steps: int, num_videos: int) -> str:
    source = f"measured: {row.measured}" if row.measured else "an estimate, not measured"
    useful = f"useful samples from about {row.steps:,} steps on ({source})"
    if steps < row.steps:
        useful = f"blurred samples: useful ones take about {row.steps:,} steps at this size ({source})"
    if num_videos >= table.FEW_VIDEOS:
        return useful
    these, clips = ("this video", "its clips") if num_videos == 1 else (f"these {num_videos} videos", "their clips")
    return (
        f"{useful}. The model will memorise {these}: samples will become copies of {clips} rather than new ones, and "
        "nothing is held out to show it"
    )
