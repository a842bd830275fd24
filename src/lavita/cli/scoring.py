"""Numbers: scores of videos, costs of models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lavita.cli.options import RecipeName, SamplerName, app


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
        from lavita.evaluation.report import compare_reports

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
            recipe=None if recipe is None else recipe.value,
            sampler=None if sampler is None else sampler.value,
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


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Preset, S/2 to XL/8, tiny, mini, small; or folder of a transformer, pipeline or run; or builtin.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[int | None, typer.Option(help="1 to 4. Default: 2.", show_default=False)] = None,
    patch_embedding: Annotated[
        str | None, typer.Option(help="uniform or compression. Default: uniform.", show_default=False)
    ] = None,
    conditioning: Annotated[
        str | None, typer.Option(help="s_adaln or all_tokens. Default: s_adaln.", show_default=False)
    ] = None,
    temporal_position: Annotated[
        str | None, typer.Option(help="absolute or rope. Default: absolute.", show_default=False)
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Default: 0.", show_default=False)] = None,
    text_dim: Annotated[
        int | None, typer.Option(min=0, help="Width of text embeddings. Default: 0.", show_default=False)
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents. Default: 32.", show_default=False)
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Of a clip. Default: 16, or the folder's.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips. Default: 1.", show_default=False)] = None,
    num_images: Annotated[
        int | None, typer.Option(min=0, help="Images after a clip. Default: 0.", show_default=False)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Of training: adamw or muon. Default: adamw.", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[
        Literal["true", "cheap"] | None, typer.Option(help="Of training. Default: none.", show_default=False)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp32 and bf16.", show_default=False)
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Batches of a training step. Default: 1.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Of training, each with the batch. Default: 1.", show_default=False),
    ] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP2 over the processes instead of DDP.")] = False,
    table: Annotated[
        int | None, typer.Option(help="3: instead, the paper's Table 3 beside our count.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count a model's parameters and multiply-accumulates, and predict the memory of training and sampling.

    Options from --variant to --sample-size are for presets: a folder has its own.
    """
    fields: dict[str, Any] = {
        "variant": variant,
        "patch_embedding": patch_embedding,
        "conditioning": conditioning,
        "temporal_position": temporal_position,
        "num_classes": num_classes,
        "text_dim": text_dim,
        "sample_size": sample_size,
    }
    batch: dict[str, Any] = {"batch_size": batch_size, "num_frames": num_frames, "num_images": num_images}
    training: dict[str, Any] = {
        "optimizer": optimizer,
        "gradient_checkpointing": {None: None, "true": True, "cheap": "cheap"}[gradient_checkpointing],
        "precision": precision,
        "accumulation": accumulation,
        "processes": processes,
        "sharded": sharded or None,
    }
    fields, batch, training = (
        {key: value for key, value in given.items() if value is not None} for given in (fields, batch, training)
    )
    if table not in (None, 3):
        raise ValueError(f"table is {table}; allowed: 3")
    if (table is None) == (model is None) or (table is not None and (fields or batch or training)):
        raise ValueError("give either a model, with options, or --table 3 alone")
    from lavita.studies import complexity, memory

    if model is None:
        rows = complexity.table3()
        if as_json:
            print(json.dumps(complexity.table3_to_json(rows), indent=1))
        else:
            complexity.print_table3(rows)
        return
    config = complexity.model_config(model, fields, num_frames)
    setting = memory.Setting(**training)
    cost = complexity.measure(config, **batch)
    settings = [setting] if precision else [replace(setting, precision=name) for name in ("fp32", "bf16")]
    peaks = {f"training, {each.precision}": memory.training_memory(config, **batch, setting=each) for each in settings}
    sampled = {key: value for key, value in batch.items() if key != "num_images"}
    guidance = bool(cost.config["num_classes"] or cost.config["text_dim"])
    autoencoder = memory.autoencoder_config(model, cost.config["in_channels"])
    peaks[f"sampling, {setting.precision}"] = memory.sampling_memory(
        config, **sampled, guidance=guidance, precision=setting.precision, autoencoder=autoencoder
    )
    if as_json:
        predicted = {name: peak.to_json() for name, peak in peaks.items()}
        print(json.dumps({"model": model, **cost.to_json(), "memory_bytes": predicted}, indent=1))
    else:
        complexity.print_complexity(model, cost)
        memory.print_memory(peaks, setting)
