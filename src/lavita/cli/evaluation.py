"""`lavita evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lavita.cli.options import app
from lavita.core.names import RecipeName, SamplerName


@app.command()
def evaluate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Fields of the protocol, such as num_real_clips=512 frame_interval=1; docs/evaluation.md lists them.",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Folder of real videos, the training set.", show_default=False)
    ] = None,
    generated: Annotated[
        str | None,
        typer.Option(
            help="Folder of generated videos, or a model to sample: a pipeline folder, or builtin.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of other real videos: to check the classifier, and to be scored for comparison.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated list. For class folders: accuracy, motion. On the networks that the names stand for: "
            "fvd, kvd, fid, kid, is. On any network: frechet-video, kernel-video, prdc, frechet-image, kernel-image, "
            "prdc-image, inception-score."
        ),
    ] = "accuracy,motion",
    preset: Annotated[
        str | None,
        typer.Option(help="Preset of the protocol: paper, stylegan-v, latte, or offline.", show_default=False),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of network weights, or NAME=FILE for one network; may be repeated.", show_default=False
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of the chosen clips: used if it exists, else written. default: next to --out",
            show_default=False,
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out videos that are broken or too short, and count them.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Table of prompts for a model with texts, as for lavita sample.", show_default=False),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Folder for the samples of a model. default: runs/evaluate/samples", show_default=False),
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="Recipe for sampling a model. default: paper with --preset paper, else default", show_default=False
        ),
    ] = None,
    sampler: Annotated[
        SamplerName | None, typer.Option(help="Sampler for a model. default: the recipe's", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Sampling steps for a model. default: the recipe's; ddpm: 250", show_default=False
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale for a model. default: the recipe's; 1.5 with classes or texts", show_default=False
        ),
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first sample of a model. default: 0", show_default=False)
    ] = None,
    model_weights: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(
            help="Which weights were sampled: a note for the report, if it is not recorded.", show_default=False
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps classifiers and features for later evaluations.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the report to.", show_default=False)] = None,
    page: Annotated[
        Path | None, typer.Option(help="Folder to write a web page with clips to.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Compare two reports of the same protocol, and nothing else.", show_default=False),
    ] = None,
) -> None:
    """Score generated videos against real ones. Under torchrun several processes share the work."""
    if compare is not None:
        if real or generated or overrides:
            raise ValueError("compare is set: it takes two reports and no other options")
        from lavita.evaluation.report.compare import compare_reports

        compare_reports(*compare)
        return
    if real is None or generated is None:
        raise ValueError("give --real and --generated, or --compare with two reports")
    from lavita.core.config import check_given_once
    from lavita.evaluation.evaluate import EvaluationOptions, run_evaluation

    check_given_once(overrides or [])
    run_evaluation(
        EvaluationOptions(
            real=real,
            generated=generated,
            held_out=held_out,
            metrics=metrics.split(","),
            preset=preset,
            overrides=overrides or [],
            weights=weights or [],
            manifest=manifest,
            skip_broken=skip_broken,
            prompts=prompts,
            samples=samples,
            recipe=recipe,
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            first_seed=first_seed,
            model_weights=model_weights,
            cache=cache,
            out=out,
            page=page,
            device=device,
        )
    )
