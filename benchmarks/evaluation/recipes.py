"""Quality and time of faster sampling recipes, relative to the paper's 250 DDPM steps.

    python benchmarks/evaluation/recipes.py --model builtin --data runs/demo/data --seeds 0-19 --out runs/speed

Each recipe samples the same classes and seeds as `ddpm 250`, without loss, and is scored against the same real clips.
Compare differences between scores with their 95% intervals. `exact` is the relative root-mean-square distance of the
latents from those of 100 steps of the same solver, for the same noise: a deterministic sampler near the exact solution
differs from ddpm by chance alone. Times are medians over rounds in which the recipes take turns, one clip each, latents
only, relative to ddpm. Finished videos and scores are kept, so a stopped run resumes. Only `--only-time` needs a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavita.core.seeds import generator
from lavita.evaluation.evaluate import EvaluationOptions, evaluate
from lavita.evaluation.report.table import write_scores
from lavita.models.packaged import model_source
from lavita.sampling.generate import generate, parse_seeds
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.recipes import RECIPES, Recipe

METRICS = ["kernel-video", "kernel-image", "frechet-image", "prdc"]
FEW = Recipe(steps=12)
DRAWS = Recipe(sampler="sde-dpm++", steps=12)
INTERVAL = (100, 800)
GRID = {
    "ddpm250": RECIPES["paper"],
    "unipc25": Recipe(),
    "unipc12": FEW,
    "unipc8": replace(FEW, steps=8),
    "unipc16-karras": replace(FEW, steps=16, spacing="karras"),
    "unipc25-karras": Recipe(spacing="karras"),
    "ddim25": Recipe(sampler="ddim"),
    "sde25": replace(DRAWS, steps=25),
    "sde12": DRAWS,
    "sde8": replace(DRAWS, steps=8),
    "sde6": replace(DRAWS, steps=6),
    "sde12-interval": replace(DRAWS, guidance_interval=INTERVAL),
    "sde12-residual0.3": replace(DRAWS, cache="residual", cache_threshold=0.3),
    "sde12-pab": replace(DRAWS, cache="pab"),
    "sde12-int8": replace(DRAWS, quantize="int8"),
    "sde25-residual0.2": replace(DRAWS, steps=25, cache="residual", cache_threshold=0.2),
    "sde25-residual0.3": replace(DRAWS, steps=25, cache="residual", cache_threshold=0.3),
    "sde8-interval": RECIPES["fast"],
    "sde8-interval-int8": replace(RECIPES["fast"], quantize="int8"),
    "sde8-interval-compiled": replace(RECIPES["fast"], compiled=True),
    "sde8-interval-int8-compiled": replace(RECIPES["fast"], quantize="int8", compiled=True),
    "unipc12-interval": replace(FEW, guidance_interval=INTERVAL),
    "unipc12-residual0.3": replace(FEW, cache="residual", cache_threshold=0.3),
    "unipc12-pab": replace(FEW, cache="pab"),
    "unipc12-int8": replace(FEW, quantize="int8"),
    "unipc25-residual0.2": Recipe(cache="residual", cache_threshold=0.2),
}


def latents(pipeline: Any, recipe: Recipe, options: dict[str, Any], numbers: list[int]) -> torch.Tensor:
    """One clip a number, of the classes in turn, (N, F, C, h, w)."""
    classes = pipeline.transformer.config["num_classes"]
    return pipeline(
        class_labels=[number % classes for number in numbers] if classes else None,
        num_videos=len(numbers),
        generator=[generator(number, "sample") for number in numbers],
        output_type="latent",
        **options,
    ).frames


def quality(arguments: argparse.Namespace, names: list[str]) -> None:
    """Samples, scores, and the distance to the exact solution, a file each."""
    source = Path(model_source(arguments.model))
    clips = list(range(8))
    exact: dict[str, torch.Tensor] = {}
    for name in names:
        result = arguments.out / f"{name}.json"
        if result.exists():
            continue
        recipe = GRID[name]
        generate(arguments.model, arguments.out / name, seeds=arguments.seeds, recipe=recipe, suffix=".mkv")
        count = len(list((arguments.out / name).rglob("*.mkv")))
        fields = [f"num_real_clips={arguments.num_real_clips}", f"num_generated_clips={count}", "frame_interval=1"]
        options = EvaluationOptions(
            arguments.data / "train",
            arguments.out / name,
            metrics=METRICS,
            preset="offline",
            overrides=[*fields, "floor=false"],
            cache=arguments.cache,
            device="cpu",
        )
        report = evaluate(options).report
        if recipe.sampler not in ("ddpm", "sde-dpm++"):
            solver = Recipe(steps=100, spacing="karras", guidance_scale=recipe.guidance_scale)
            if not exact:
                pipeline = load_pipeline(source)
                exact["latents"] = latents(pipeline, solver, solver.prepare(pipeline, source), clips)
            pipeline = load_pipeline(source)
            found = latents(pipeline, recipe, recipe.prepare(pipeline, source), clips)
            error = (found - exact["latents"]).square().mean() / exact["latents"].square().mean()
            report["exact"] = float(error.sqrt())
        report["recipe"] = asdict(recipe)
        write_scores(report, result)


def timing(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each recipe's loop over one clip, round by round."""
    source = Path(model_source(arguments.model))
    ready = {}
    for name in names:
        pipeline = load_pipeline(source)
        ready[name] = pipeline, GRID[name], GRID[name].prepare(pipeline, source)
        latents(pipeline, GRID[name], {**ready[name][2], "num_inference_steps": 2}, [0])
        if GRID[name].compiled:
            latents(pipeline, GRID[name], ready[name][2], [0])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name, (pipeline, recipe, options) in ready.items():
            start = time.perf_counter()
            latents(pipeline, recipe, options, [number])
            seconds[name].append(time.perf_counter() - start)
            print(f"round {number}: {name} {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def table(arguments: argparse.Namespace, names: list[str], seconds: dict[str, list[float]]) -> str:
    """The results in Markdown, as far as they are there."""
    reports = {
        name: json.loads(path.read_text()) for name in names if (path := arguments.out / f"{name}.json").exists()
    }
    scored = [key for key in next(iter(reports.values()))["scores"] if "prdc" not in key] if reports else []
    lines = ["| recipe | steps | time | exact | " + " | ".join(scored) + " |", "|" + "---|" * (4 + len(scored))]
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
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin", help="pipeline folder, or builtin")
    parser.add_argument("--data", type=Path, help="folder with train/ class folders")
    parser.add_argument("--seeds", default="0-19", help="seeds of the videos of each class")
    parser.add_argument("--num-real-clips", type=int, default=2048)
    parser.add_argument("--cache", type=Path, help="folder that keeps features; default: OUT/cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", default=",".join(GRID), help="comma separated")
    parser.add_argument("--only-time", action="store_true")
    parser.add_argument("--only-quality", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parse_seeds(arguments.seeds)
    names = arguments.recipes.split(",")
    arguments.cache = arguments.cache or arguments.out / "cache"
    if not arguments.only_time:
        quality(arguments, names)
    times = arguments.out / "times.json"
    if not arguments.only_quality:
        times.write_text(json.dumps(timing(arguments, names), indent=1))
    print(table(arguments, names, json.loads(times.read_text()) if times.exists() else {}))


if __name__ == "__main__":
    main()
