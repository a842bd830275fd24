"""What faster sampling costs in quality and what it saves, compared with the paper's 250 DDPM steps.

Each recipe samples the same classes and seeds as `ddpm250`, losslessly, and is scored against the same real clips; its
difference from the score of ddpm250 is to be compared with that score's 95% interval. `exact` is the distance of its
latents from those of 100 UniPC steps for the same noise (root mean square, relative): a deterministic sampler close to
the exact solution differs from DDPM only by chance. `spread` is the variance of a pixel over the clips of a class,
relative to real clips: below 1, the clips of a class differ too little from each other. Times are medians over rounds
in which the recipes take turns, one clip each, latents only, and are given relative to ddpm250. Only timing needs a
quiet machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from lavita.core.files import write_json
from lavita.core.names import CacheName
from lavita.core.seeds import generator
from lavita.evaluation.evaluate import EvaluationOptions, evaluate
from lavita.evaluation.report.table import write_scores
from lavita.models.flow import FLOW
from lavita.models.packaged import model_source
from lavita.models.pretrained.reading import read_config
from lavita.sampling.generate import generate
from lavita.sampling.jobs import parse_seeds
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.recipes import RECIPES, Recipe
from lavita.sampling.schedulers import DIFFUSION_SAMPLERS, FLOW_SAMPLERS
from lavita.video.reading import iter_frames

METRICS = ["kernel-video", "kernel-image", "frechet-image", "prdc"]
FEW = Recipe(steps=12)
DRAWS = Recipe(sampler="sde-dpm++", steps=12)
INTERVAL = (100, 800)
EXACT = Recipe(steps=100, spacing="quadratic")
NUM_EXACT_CLIPS = 8
GRID = {
    "ddpm250": Recipe(sampler="ddpm", steps=250),
    "unipc25": Recipe(),
    "unipc12": FEW,
    "unipc8": replace(FEW, steps=8),
    "unipc16-karras": replace(FEW, steps=16, spacing="karras"),
    "unipc25-karras": Recipe(spacing="karras"),
    "unipc25-quadratic": Recipe(spacing="quadratic"),
    "ddim25": Recipe(sampler="ddim"),
    "sde25": replace(DRAWS, steps=25),
    "sde12": DRAWS,
    "sde8": replace(DRAWS, steps=8),
    "sde6": replace(DRAWS, steps=6),
    "sde12-interval": replace(DRAWS, guidance_interval=INTERVAL),
    **{f"sde12-{name}": replace(DRAWS, cache=name) for name in get_args(CacheName)},
    "sde12-int8": replace(DRAWS, quantize="int8"),
    "sde8-interval": replace(RECIPES["fast"], spacing="trailing"),
    "sde8-quadratic-interval": replace(RECIPES["fast"], spacing="quadratic"),
    "sde8-interval-int8": replace(RECIPES["fast"], quantize="int8"),
    "sde8-interval-compiled": replace(RECIPES["fast"], compiled=True),
    "sde8-interval-int8-compiled": replace(RECIPES["fast"], quantize="int8", compiled=True),
    "unipc12-interval": replace(FEW, guidance_interval=INTERVAL),
    **{f"unipc12-{name}": replace(FEW, cache=name) for name in get_args(CacheName)},
    **{f"unipc25-{name}": Recipe(cache=name) for name in get_args(CacheName)},
    "unipc12-int8": replace(FEW, quantize="int8"),
}


def compare_recipes(
    out: Path,
    model: str = "builtin",
    data: Path | None = None,
    seeds: str = "0-19",
    num_real_clips: int = 2048,
    cache: Path | None = None,
    rounds: int = 3,
    names: Sequence[str] | None = None,
    quality: bool = True,
    timing: bool = True,
) -> None:
    """Samples, scores and times recipes, and prints a table of all results in a folder.

    Args:
        out: folder for videos, scores and `times.json`; finished videos and scores are kept.
        model: pipeline folder, or `builtin`.
        data: folder with train/, which has one folder per class.
        seeds: seeds per class, as in `lavita sample --seeds`.
        num_real_clips: real clips that the samples are scored against.
        cache: folder of cached features; by default `out/cache`.
        rounds: rounds of timing.
        names: names from `GRID`; by default all that fit the model. Times are relative to the first one.
        quality: whether to sample and score.
        timing: whether to time the sampling loops.

    Raises:
        ValueError: for an unknown recipe, wrong seeds, or no `data` for the scores.
    """
    for name in names or ():
        if name not in GRID:
            raise ValueError(f"recipes has {name!r}; allowed: {', '.join(GRID)}")
    chosen = list(names) if names is not None else fitting(model)
    parse_seeds(seeds)
    if quality:
        if data is None:
            raise ValueError("data is not given, but --quality needs it")
        for name in chosen:
            score_recipe(name, out, model, data / "train", seeds, num_real_clips, cache or out / "cache")
    times = out / "times.json"
    if timing:
        write_json(times, time_recipes(chosen, model, rounds))
    print(table(out, chosen, json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}))


def fitting(model: str) -> list[str]:
    """The names of the recipes that fit a model: a flow has other samplers and spacings than a diffusion."""
    is_flow = read_config(model).get("prediction_type") == FLOW
    samplers = FLOW_SAMPLERS if is_flow else DIFFUSION_SAMPLERS
    return [
        name
        for name, recipe in GRID.items()
        if recipe.sampler in samplers and not (is_flow and recipe.spacing == "karras")
    ]


def latents(pipeline: LavitaPipeline, options: dict[str, Any], numbers: Sequence[int]) -> torch.Tensor:
    """Samples one clip per number, of the classes in turn: (N, F, C, h, w)."""
    classes = pipeline.transformer.config["num_classes"]
    result = pipeline(
        class_labels=[number % classes for number in numbers] if classes else None,
        num_videos=len(numbers),
        generator=[generator(number, "sample") for number in numbers],
        output_type="latent",
        **options,
    ).frames
    assert isinstance(result, torch.Tensor)
    return result


@lru_cache
def recipe_latents(recipe: Recipe, source: str) -> torch.Tensor:
    """The latents of a few clips, whose distance to the exact solution is measured."""
    pipeline = load_pipeline(source)
    return latents(pipeline, recipe.prepare(pipeline), range(NUM_EXACT_CLIPS))


def score_recipe(name: str, out: Path, model: str, real: Path, seeds: str, num_real_clips: int, cache: Path) -> None:
    """Writes `NAME.json` with the scores of a recipe and its distance to the exact solution, unless it is there."""
    result = out / f"{name}.json"
    if result.exists():
        return
    recipe, source = GRID[name], model_source(model)
    generate(model, out / name, seeds=seeds, recipe=recipe, suffix=".mkv")
    count = len(list((out / name).rglob("*.mkv")))
    fields = [f"num_real_clips={num_real_clips}", f"num_generated_clips={count}", "frame_interval=1"]
    options = EvaluationOptions(
        real,
        out / name,
        metrics=METRICS,
        preset="offline",
        overrides=[*fields, "floor=false"],
        cache=cache,
        device="cpu",
    )
    report = evaluate(options).report
    if recipe.sampler not in ("ddpm", "sde-dpm++"):
        exact, found = recipe_latents(EXACT, source), recipe_latents(recipe, source)
        report["exact"] = float(((found - exact).square().mean() / exact.square().mean()).sqrt())
    report["spread"] = class_spread(out / name, real)
    report["recipe"] = asdict(recipe)
    write_scores(report, result)


def class_spread(generated: Path, real: Path) -> float:
    """Variance of a pixel over the clips of a class, generated by real: the mean over the classes of their ratios.

    Args:
        generated: folder of class folders of samples.
        real: folder of class folders of videos, at the samples' frame interval; as many clips are taken from it.
    """
    ratios = []
    for folder in sorted(path for path in generated.iterdir() if path.is_dir()):
        samples = np.stack([np.stack(list(iter_frames(path))) for path in sorted(folder.glob("*.mkv"))])
        length = samples.shape[1]
        videos = [np.stack(list(iter_frames(path))) for path in sorted((real / folder.name).iterdir())]
        starts = [(video, start) for video in videos for start in range(0, len(video) - length + 1, length)]
        picked = np.linspace(0, len(starts) - 1, min(len(samples), len(starts))).round().astype(int)
        clips = np.stack([starts[index][0][starts[index][1] :][:length] for index in picked])
        ratios.append(float(samples.var(axis=0, ddof=1).mean() / clips.var(axis=0, ddof=1).mean()))
    return float(np.mean(ratios))


def time_recipes(names: Sequence[str], model: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each recipe's loop over one clip, one value per round."""
    source = model_source(model)
    ready = {}
    for name in names:
        pipeline = load_pipeline(source)
        options = GRID[name].prepare(pipeline)
        latents(pipeline, options if GRID[name].compiled else {**options, "num_inference_steps": 2}, [0])
        ready[name] = pipeline, options
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name, (pipeline, options) in ready.items():
            start = time.perf_counter()
            latents(pipeline, options, [number])
            seconds[name].append(time.perf_counter() - start)
            print(f"round {number}: {name} {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def table(out: Path, names: Sequence[str], seconds: dict[str, list[float]]) -> str:
    """The results that are there, in Markdown."""
    reports = {
        name: json.loads(path.read_text(encoding="utf-8")) for name in names if (path := out / f"{name}.json").exists()
    }
    scored = [key for key in next(iter(reports.values()))["scores"] if "prdc" not in key] if reports else []
    extra = ["recall", "coverage", "spread"]
    lines = [
        "| recipe | steps | time | exact | " + " | ".join([*scored, *extra]) + " |",
        "|" + "---|" * (4 + len(scored) + len(extra)),
    ]
    for name in names:
        cells = [name, str(GRID[name].num_steps)]
        ratios = np.divide(seconds.get(name, []), seconds.get(names[0], []))
        cells.append(f"{np.median(ratios):.4f}" if len(ratios) else "")
        report = reports.get(name, {})
        cells.append(f"{report['exact']:.3f}" if "exact" in report else "")
        for key in scored:
            found = report.get("scores", {}).get(key)
            cells.append(
                "" if found is None else "{:.4g} ({:.4g} to {:.4g})".format(found["value"], *found["interval_95"])
            )
        neighbours: dict[str, float] = next(
            (row for key, row in report.get("scores", {}).items() if key.startswith("prdc")), {}
        )
        values = {**neighbours, "spread": report.get("spread")}
        cells += ["" if values.get(key) is None else f"{values[key]:.2f}" for key in extra]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
