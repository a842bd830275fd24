"""The size of the model: the largest that the machine can train well in the time, by a few real steps of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lavita.core.config import merge
from lavita.core.precision import low_precision
from lavita.models.autoencoder import Autoencoder, latent_size
from lavita.models.presets import SIZES, preset_sizes
from lavita.studies.budget import table
from lavita.studies.budget.measure import AutoencoderTrial, StepTrial, time_step
from lavita.studies.budget.values import load, put
from lavita.studies.budget.videos import choose_patch
from lavita.studies.memory import Precision, Setting, available_memory, training_memory
from lavita.training.config import RunConfig
from lavita.training.finetune import trained_parameters
from lavita.training.setup import check_resolution, model_of_sizes
from lavita.training.snapshots import SAMPLE_STEPS


def choose_size(
    chosen: dict[str, Any],
    given: Mapping[str, Any],
    vae: Autoencoder,
    num_classes: int,
    device: torch.device,
    num_clips: int,
    clip_seconds: float,
    left: Callable[[], float],
) -> tuple[table.Row, StepTrial, str]:
    """The row of the largest model whose steps fit, what it takes without reading, and the line about it.

    Args:
        chosen: gets the fields of the model.
        given: what the user has set.
        vae: the autoencoder.
        num_classes: classes of the model.
        device: the device of the training.
        num_clips: clips without common frames.
        clip_seconds: time of encoding a clip while training.
        left: gives the seconds that are left for training and samples.
    """
    preset = given.get("model", {}).get("preset")
    accumulation = given.get("train", {}).get("accumulation", 1)
    rows: Iterable[table.Row] = table.ROWS if preset is None else [row_of(preset.partition("/")[0])]
    best: tuple[table.Row, StepTrial, dict[str, Any], str] | None = None
    why = "as given" if preset is not None else "the largest one"
    resolution = load(chosen, given).data.longest_side  # it is a square, see `choose`
    tokens = table.FEW_TOKENS if device.type == "cpu" and resolution <= table.SMALL_SIDE else table.TOKENS
    for row in rows:
        if best is not None and num_clips < row.least_clips:
            why = f"large enough for {num_clips:,} clips without common frames"
            break
        size = latent_size(vae, resolution)
        batch_size = math.ceil(row.batch_size / accumulation) * accumulation
        values: dict[str, Any] = {}
        merge(values, chosen)
        put(values, "model", preset=f"{row.size}/{choose_patch(size, tokens)}")
        put(values, "train", batch_size=batch_size, optimizer=row.optimizer, learning_rate=row.learning_rate)
        config = load(values, given)
        check_resolution(config, vae)
        row = for_tokens(row, (size // preset_sizes(config.model.preset, config.model.variant)["patch_size"]) ** 2)
        if best is not None and not _fits(config, vae, num_classes, device):
            why = "the largest one that fits into the memory"
            break
        trial = time_step(config, vae, num_classes, device)
        fitting = int(left() / (trial.seconds + config.train.batch_size * clip_seconds))
        enough = fitting >= row.steps
        if best is not None and not enough:
            why = f"the largest one whose steps fit: {row.size} would get {fitting:,} of {row.steps:,}"
            break
        with torch.device("meta"):
            count = trained_parameters(model_of_sizes(config, vae, num_classes))
        fitted = replace(row, batch_size=config.train.batch_size)
        best = fitted, trial, values, f"{config.model.preset}, {count}"
        if not enough:
            why = why if preset is not None else "the smallest one, as even its steps do not all fit"
            break
    assert best is not None
    merge(chosen, best[2])
    return best[0], best[1], f"{best[3]}: {why}"


def row_of(size: str) -> table.Row:
    """The row of a size; for one without, the rate follows from the width, and the steps are those of the next row."""
    for row in table.ROWS:
        if row.size == size:
            return row
    if size not in SIZES:
        return table.ROWS[0]  # the configuration names what is allowed
    first, width = table.ROWS[0], SIZES[size][0]
    steps = next((row.steps for row in table.ROWS if SIZES[row.size][0] >= width), table.ROWS[-1].steps)
    rate = first.learning_rate * SIZES[first.size][0] / width
    return table.Row(size, first.batch_size, "muon", float(f"{rate:.2g}"), steps, 0, "")


def for_tokens(row: table.Row, tokens: int) -> table.Row:
    """A measured row for more tokens per frame than it was measured with: it takes as many times the steps.

    At 64 tokens, 2,490 steps of `mini` gave recognisable faces with visible patches, where 1,000 are useful at 16.
    """
    if not row.measured or tokens <= table.FEW_TOKENS:
        return row
    times = tokens / table.FEW_TOKENS
    source = f"{row.measured}; times {times:g} for {tokens} tokens, an estimate"
    return replace(row, steps=round(times * row.steps), measured=source)


def _fits(config: RunConfig, vae: Autoencoder, num_classes: int, device: torch.device) -> bool:
    free = available_memory(device)
    if free is None:
        return True
    with torch.device("meta"):
        outline = model_of_sizes(config, vae, num_classes)
    settings, low = config.train, low_precision(device, config.train.precision)
    precision: Precision = "fp32" if low is None else "bf16" if low == torch.bfloat16 else "fp16"
    setting = Setting(settings.optimizer, settings.gradient_checkpointing, precision, settings.accumulation)
    micro = settings.batch_size // settings.accumulation
    return training_memory(outline.config, micro, num_images=config.data.num_images, setting=setting).total < free


def output_seconds(model: StepTrial, num_samples: int, num_frames: int, autoencoder: AutoencoderTrial) -> float:
    """Time of the last samples, their files, a checkpoint and the pipeline."""
    clip = SAMPLE_STEPS * model.clip_seconds + num_frames * autoencoder.decode_seconds
    return num_samples * clip + table.FILES_SECONDS
