"""Numbers: scores of videos, costs of models."""

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
            help="Fields of the protocol, as a=b: num_real_clips=512 frame_interval=1. docs/evaluation.md lists them.",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Folder of real training videos; any tree of them.", show_default=False)
    ] = None,
    generated: Annotated[
        str | None,
        typer.Option(
            help="Folder of generated videos; or a model to sample: pipeline folder, or builtin.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Real videos to check the classifier on, and to score for comparison.", show_default=False),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma separated: accuracy, motion, for class folders; fvd, kvd, fid, kid, is, on the networks that "
            "bear these names; frechet-video, kernel-video, prdc, frechet-image, kernel-image, prdc-image, "
            "inception-score, on any."
        ),
    ] = "accuracy,motion",
    preset: Annotated[
        str | None, typer.Option(help="Protocol: paper, stylegan-v, latte, or offline.", show_default=False)
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Of networks: a folder, or NAME=FILE; may be given several times.", show_default=False),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="JSON of the chosen clips: used where it exists, else written. default: beside --out",
            show_default=False,
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Go on without videos that are broken or too short.")
    ] = False,
    samples: Annotated[
        Path | None,
        typer.Option(help="Of a model: folder for its samples. default: runs/evaluate/samples", show_default=False),
    ] = None,
    recipe: Annotated[
        RecipeName | None, typer.Option(help="Of a model: how it is sampled. default: default", show_default=False)
    ] = None,
    sampler: Annotated[
        SamplerName | None, typer.Option(help="Of a model. default: the recipe's", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Of a model. default: the recipe's; ddpm: 250", show_default=False),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of a model. default: 1.5 with classes", show_default=False)
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="Of a model's samples. default: 0", show_default=False)
    ] = None,
    model_weights: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(help="Which weights were sampled, for the report, where it is not recorded.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps classifier and features.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON, too.", show_default=False)] = None,
    page: Annotated[
        Path | None, typer.Option(help="Folder to write a page with clips into.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Instead, compare two reports of one protocol.", show_default=False),
    ] = None,
) -> None:
    """Score generated videos against real ones. Runs on several processes under torchrun, with the same numbers."""
    if compare is not None:
        if real or generated or overrides:
            raise ValueError("compare is set: it takes two reports and nothing else")
        from lavita.evaluation.report.compare import compare_reports

        compare_reports(*compare)
        return
    if real is None or generated is None:
        raise ValueError("give --real and --generated, or --compare with two reports")
    from lavita.evaluation.command import EvaluateOptions, run_evaluation

    run_evaluation(
        EvaluateOptions(
            real=real,
            generated=generated,
            held_out=held_out,
            metrics=metrics.split(","),
            preset=preset,
            overrides=overrides or [],
            weights=weights or [],
            manifest=manifest,
            skip_broken=skip_broken,
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
