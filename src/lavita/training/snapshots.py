"""Snapshots of a run's averaged model: a plain model of it, and sample videos."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lavita.core.processes import Processes, whole
from lavita.core.seeds import generator
from lavita.models.adapters import adapter_scale, merge_state
from lavita.models.autoencoder import downsampling, pixel_frames
from lavita.models.shapes import trained_shapes
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import LavitaPipeline
from lavita.training.batches import BatchMaker
from lavita.training.config import TrainConfig
from lavita.training.ema import EMA
from lavita.video.contact_sheet import contact_sheet
from lavita.video.writing import write_video

SAMPLE_STEPS = 20


def _place(sample: tuple[int, npt.NDArray[np.uint8]]) -> int:
    return sample[0]


@torch.no_grad()
def averaged_model(model: LavitaTransformer3DModel, ema: EMA) -> LavitaTransformer3DModel:
    """A plain model of the averaged weights, in eval mode: with adapters folded in, unsharded in every process.

    Without sharding it shares memory with the averages: use it before the next step.
    """
    with torch.device("meta"):
        averaged = LavitaTransformer3DModel.from_config(dict(model.config))
    buffers = dict(model.named_buffers())  # also those that no checkpoint holds
    for name in [name for name, _ in averaged.named_buffers()]:
        owner, _, last = name.rpartition(".")
        averaged.get_submodule(owner)._buffers[last] = buffers[name]
    weights = {name: whole(tensor) for name, tensor in {**model.state_dict(), **ema.weights}.items()}
    averaged.sequence_group = model.sequence_group
    averaged.load_state_dict(merge_state(weights, adapter_scale(model)), assign=True)
    return averaged.eval().requires_grad_(False)


def write_samples(
    folder: Path, pipeline: LavitaPipeline, batches: BatchMaker, settings: TrainConfig, step: int, team: Processes
) -> Path:
    """Writes `step-<step>/<i>.mp4` and a contact sheet: the same seeds and conditions every time.

    Args:
        folder: the run's folder of samples.
        pipeline: of the averaged model.
        batches: the source of the class names and of example captions.
        settings: number of samples, batch size and precision.
        step: optimizer steps done.
        team: the processes, which share the batches of samples.

    Returns:
        The contact sheet, `step-<step>.png`, once the first process has written it.
    """
    num_samples = settings.num_samples
    names, embeds = batches.class_names, batches.example_embeds(num_samples)
    size = min(num_samples, settings.batch_size)
    config, factor = pipeline.transformer.config, downsampling(pipeline.vae)
    shapes = trained_shapes(config)
    # Sample i has the i-th trained shape, and so on in turn; those of one batch have one shape.
    turns = [range(first, num_samples, len(shapes)) for first in range(min(num_samples, len(shapes)))]
    parts = [turn[first : first + size] for turn in turns for first in range(0, len(turn), size)]
    own: list[list[npt.NDArray[np.uint8]]] = []
    for part in team.share(parts):
        length, height, width = shapes[part.start % len(shapes)]
        length = pixel_frames(pipeline.vae.config, length)
        try:
            frames = pipeline(
                class_labels=[i % len(names) for i in part] if names else None,
                prompt_embeds=None if embeds is None else embeds[list(part)],
                num_videos=len(part),
                num_frames=length,
                height=height * factor,
                width=width * factor,
                num_inference_steps=SAMPLE_STEPS,
                generator=[generator(seed, "sample") for seed in part],
                precision=settings.precision,
            ).frames
        except FloatingPointError as error:  # of a young model, or in fp16: no reason to end the run
            print(f"step {step:,}: samples {part.start} to {part[-1]} are black: {error}", file=sys.stderr)
            frames = np.zeros((len(part), length, height * factor, width * factor, 3), np.uint8)
        own.append(list(np.asarray(frames)))
    sheet = folder / f"step-{step:08d}.png"
    made = [video for batch in team.collect(own) for video in batch]
    if team.is_first:
        videos = [video for _, video in sorted(zip((i for part in parts for i in part), made, strict=True), key=_place)]
        for index, video in enumerate(videos):
            write_video(folder / f"step-{step:08d}" / f"{index}.mp4", video, pipeline.transformer.config["fps"])
        contact_sheet([[video] for video in videos], sheet)
    return sheet
