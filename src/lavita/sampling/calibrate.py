"""Measures what the residual cache may reuse of a model."""

from __future__ import annotations

from pathlib import Path

from lavita.core.precision import pick_device
from lavita.core.progress import Progress
from lavita.core.seeds import generator
from lavita.models.packaged import model_source
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.recipes import Recipe
from lavita.sampling.step_cache import Recorder


def calibrate(model: str, sampler: str = "unipc", steps: int = 50, num_clips: int = 8, device: str = "auto") -> Path:
    """Measures how far a model's pairs of blocks move along the schedule, and writes it into the pipeline's folder.

    Args:
        model: pipeline folder; with texts, it is calibrated on the empty one.
        sampler: one of `pipeline.SAMPLERS`.
        steps: of a loop; the path at other numbers of steps lies on lines between these.
        num_clips: loops, of one clip each, over the classes in turn.
        device: see `runtime.pick_device`.

    Returns:
        The file.

    Raises:
        ValueError: where the model is no folder, or steps or clips are too few.
    """
    source = Path(model_source(model))
    if not source.is_dir():
        raise ValueError(f"{model}: no such folder; a calibration is kept in the pipeline's own")
    for name, value, least in (("steps", steps, 2), ("num_clips", num_clips, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}")
    pipeline = load_pipeline(source, pick_device(device))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_sampler(sampler)
    config = pipeline.transformer.config
    guidance = Recipe().scale(config)
    recorder, progress = Recorder(), Progress("clip", num_clips)
    for number in range(num_clips):
        pipeline(
            class_labels=[number % config["num_classes"]] if config["num_classes"] else None,
            prompt=[""] if config["text_dim"] else None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[generator(number, "calibrate")],
            output_type="latent",
            cache=recorder,
        )
        progress.update(number + 1)
    made_with = {"sampler": sampler, "steps": steps, "guidance_scale": guidance, "clips": num_clips}
    return recorder.calibration(made_with).save(source)
