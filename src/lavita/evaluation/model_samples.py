"""Samples of a model for an evaluation: seeded, lossless, and shared by the processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavita.core.processes import Processes
from lavita.models.packaged import BUILTIN, model_source
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.recipes import RECIPES, Recipe

LOSSLESS = ".mkv"


@dataclass(frozen=True)
class SamplingOptions:
    """How a model is sampled; all of it is recorded in `generation.json` beside the samples."""

    recipe: Recipe = RECIPES["default"]
    first_seed: int = 0
    batch_size: int = 8


def is_model(generated: str) -> bool:
    """Whether what is to be scored is a model, `builtin` or a pipeline's folder, and not a folder of videos."""
    return generated == BUILTIN or (Path(generated) / "model_index.json").is_file()


def sample_model(
    model: str,
    out: Path,
    num_clips: int,
    num_frames: int | None,
    options: SamplingOptions,
    device: str = "auto",
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Generates at least `num_clips` videos, as many of each class; finished ones are left alone.

    Args:
        model: see `is_model`.
        out: folder of the samples, `<class>/<seed>.mkv`, without loss.
        num_clips: how many are needed.
        num_frames: of a video; by default the model's.
        options: recipe, seeds.
        device: see `runtime.pick_device`.
        processes: those that share the work.

    Returns:
        What is known of the model, for the report.

    Raises:
        ValueError: for a model that cannot be loaded or has texts, or a folder whose videos were made in another way.
    """
    source = model_source(model)
    config = load_pipeline(source).transformer.config
    if config["text_dim"]:
        raise ValueError(f"generated is {model}, which has texts: use `lavita sample`, then score its folder")
    num_classes = config["num_classes"] or 1
    seeds_a_class = -(-num_clips // num_classes)
    seeds = range(options.first_seed, options.first_seed + seeds_a_class)
    generate(
        model,
        out,
        seeds=f"{seeds[0]}-{seeds[-1]}",
        recipe=options.recipe,
        num_frames=num_frames,
        batch_size=options.batch_size,
        suffix=LOSSLESS,
        device=device,
        team=processes,
    )
    return {"source": model, "weights": _weights(source, model), "seeds": f"{seeds[0]}-{seeds[-1]}"}


def _weights(source: str, model: str) -> str:
    """Which weights a pipeline has, where that is certain: `lavita train` writes averaged ones only."""
    run = Path(source).parent
    trained_here = (run / "config.yaml").is_file() and (run / "checkpoints").is_dir()
    return "ema" if model == BUILTIN or trained_here else "not recorded"
