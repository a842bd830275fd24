"""What a run shows of its averaged model on the way: sample videos and the pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from lavita.config import RunConfig
from lavita.data.batches import BatchMaker
from lavita.distributed import Processes, whole
from lavita.ema import EMA
from lavita.finetune import Adapters, adapter_scale, merge_state
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.pipeline import LavitaPipeline, make_scheduler
from lavita.runtime import generator
from lavita.sheets import contact_sheet
from lavita.video_writer import write_video

SAMPLE_STEPS = 20


@torch.no_grad()
def averaged_model(model: LavitaTransformer3DModel, ema: EMA) -> LavitaTransformer3DModel:
    """A plain model of the averaged weights, with adapters folded in, whole in every process, in eval mode.

    It shares memory with the averages where they are not sharded: use it before the next step.
    """
    with torch.device("meta"):
        averaged = LavitaTransformer3DModel.from_config(dict(model.config))
    buffers = dict(model.named_buffers())  # those that no checkpoint holds are computed from the configuration
    for name in [name for name, _ in averaged.named_buffers()]:
        owner, _, last = name.rpartition(".")
        averaged.get_submodule(owner)._buffers[last] = buffers[name]
    weights = {name: whole(tensor) for name, tensor in {**model.state_dict(), **ema.weights}.items()}
    averaged.load_state_dict(merge_state(weights, adapter_scale(model)), assign=True)
    return averaged.eval().requires_grad_(False)


def make_pipeline(model: LavitaTransformer3DModel, vae: AutoencoderKL) -> LavitaPipeline:
    """The pipeline of a model, with UniPC as its sampler."""
    scheduler = make_scheduler("unipc", model.config["learn_sigma"], model.config["prediction_type"])
    pipeline = LavitaPipeline(model, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_samples(config: RunConfig, pipeline: LavitaPipeline, batches: BatchMaker, step: int, team: Processes) -> Path:
    """Writes `samples/step-<step>/<i>.mp4` and a contact sheet beside: the same seeds and conditions every time.

    The processes share the batches.

    Returns:
        The contact sheet, once the first process has written it.
    """
    num_samples, folder = config.train.num_samples, config.run_dir / "samples"
    names, embeds = batches.class_names, batches.example_embeds(num_samples)
    size = min(num_samples, config.train.batch_size)
    parts = [range(first, min(num_samples, first + size)) for first in range(0, num_samples, size)]
    mine: list[npt.NDArray[np.uint8]] = []
    for part in team.share(parts):
        frames = pipeline(
            class_labels=[i % len(names) for i in part] if names else None,
            prompt_embeds=None if embeds is None else embeds[part.start : part.stop],
            num_videos=len(part),
            num_inference_steps=SAMPLE_STEPS,
            generator=[generator(seed, "sample") for seed in part],
            precision=config.train.precision,
        ).frames
        mine.append(np.asarray(frames))
    sheet = folder / f"step-{step:08d}.png"
    videos = [video for batch in team.collect(mine) for video in batch]
    if team.is_first:
        for index, video in enumerate(videos):
            write_video(folder / f"step-{step:08d}" / f"{index}.mp4", video, pipeline.transformer.config["fps"])
        contact_sheet([[video] for video in videos], sheet)
    return sheet


def save_pipeline(pipeline: LavitaPipeline, folder: Path, adapters: Adapters | None = None) -> None:
    """Saves a pipeline in diffusers' layout, and adapters in `lora` below, replacing an older one whole."""
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        if adapters is not None:
            adapters.save(partial / "lora")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{partial}: {error}") from error  # its writer's own kind for a full disk
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
