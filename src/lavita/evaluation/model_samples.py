"""Samples of a model for an evaluation: seeded, lossless, and shared by the processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavita.core.processes import Processes
from lavita.data.captions import read_captions
from lavita.models.packaged import BUILTIN, model_source
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.recipes import Recipe

LOSSLESS = ".mkv"
"""Suffix of the samples, which are written without loss."""


def is_model(generated: str) -> bool:
    """Whether this is a model, `builtin` or the folder of a pipeline, rather than a folder of videos."""
    return generated == BUILTIN or (Path(generated) / "model_index.json").is_file()


def sample_model(
    model: str,
    out: Path,
    num_clips: int,
    num_frames: int | None,
    recipe: Recipe,
    first_seed: int = 0,
    device: str = "auto",
    team: Processes | None = None,
    prompts: Path | None = None,
) -> dict[str, Any]:
    """Generates the videos to score: at least `num_clips`, equally many of each class; finished ones are kept.

    With texts exactly `num_clips`: one of each prompt in the order of the table, up to the number that is needed, or if
    there are fewer prompts, with as many seeds as it takes.

    Args:
        model: see `is_model`.
        out: folder of the samples, `<class>/<seed>.mkv`, or for prompts `<file>-<seed>.mkv`; `generation.json` in it
            records how they were made.
        num_clips: number of clips that are needed.
        num_frames: frames of a video; by default those of the model.
        recipe: how to sample.
        first_seed: seed of the first video of each class; the following seeds follow.
        device: see `core.precision.pick_device`.
        team: processes that share the work.
        prompts: table of prompts, see `generate`; for a model with texts.

    Returns:
        Facts of the model for the report.

    Raises:
        ValueError: if the model cannot be loaded, prompts are missing or not wanted, or `out` has videos that were made
            differently.
    """
    source = model_source(model)
    config = load_pipeline(source).transformer.config
    if bool(config["text_dim"]) != (prompts is not None):
        needs = "needs texts: give a table of them with --prompts" if config["text_dim"] else "takes no prompts"
        raise ValueError(f"generated is {model}, a model that {needs}")
    groups = config["num_classes"] or 1
    if prompts is not None:
        groups = min(num_clips, sum(len(set(texts)) for texts in read_captions(prompts).values()))
    clips_per_group = -(-num_clips // groups)
    seeds = f"{first_seed}-{first_seed + clips_per_group - 1}"
    generate(
        model,
        out,
        prompt_table=prompts,
        most=None if prompts is None else num_clips,
        seeds=seeds,
        recipe=recipe,
        num_frames=num_frames,
        suffix=LOSSLESS,
        device=device,
        team=team,
    )
    return {"source": model, "weights": _weights(source, model), "seeds": seeds}


def _weights(source: str, model: str) -> str:
    """Which weights a pipeline has, if that is certain: `lavita train` only writes averaged ones."""
    run = Path(source).parent
    trained_here = (run / "config.yaml").is_file() and (run / "checkpoints").is_dir()
    return "ema" if model == BUILTIN or trained_here else "not recorded"
