"""Models: videos from them, and other people's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lavita.cli.options import RecipeName, SamplerName, VideoFormat, app


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to write the videos into.")],
    model: Annotated[
        str, typer.Argument(help="Pipeline folder or hub id; builtin is the arcade model of the package.")
    ] = "builtin",
    classes: Annotated[
        str, typer.Option(help="Names or numbers, comma separated, or all. Unused without classes.")
    ] = "all",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="For a model with texts; may be given several times.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Table of prompts: CSV, JSONL or Parquet with `file` and `caption`.", show_default=False),
    ] = None,
    seeds: Annotated[str, typer.Option(help="One video a class or prompt for each seed: 0-7 or 1,5,9.")] = "0-3",
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="How to sample; the options below change parts of it. default: UniPC, 25 steps; paper: DDPM, 250; "
            "fast: 8 stochastic steps."
        ),
    ] = RecipeName.default,
    sampler: Annotated[
        SamplerName | None, typer.Option(help="ddpm is the paper's. default: unipc", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Network evaluations. default: 25; ddpm: 250", show_default=False),
    ] = None,
    spacing: Annotated[
        Literal["trailing", "karras"] | None,
        typer.Option(help="Where the steps lie. default: trailing", show_default=False),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 for no guidance. default: 1.5 with classes or texts", show_default=False)
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Timesteps, least and most, between which there is guidance: 100 900. default: all", show_default=False
        ),
    ] = None,
    cache: Annotated[
        Literal["pab", "fastercache", "taylorseer"] | None,
        typer.Option(
            help="Reuse what earlier steps computed: attention (pab, fastercache) or everything (taylorseer). "
            "default: nothing",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Compute in 8 bits: faster on a CPU, a little less exact. default: no", show_default=False),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model first: for many videos.")] = False,
    num_frames: Annotated[int | None, typer.Option(min=1, help="default: the model's", show_default=False)] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Single images (.png) from the model without its temporal modules.")
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(help="Adapters trained on this model: RUN/pipeline/lora, or peft's.", show_default=False),
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="How much of the adapters. default: 1", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos at once; does not change them.")] = 8,
    video_format: Annotated[VideoFormat, typer.Option("--format", help="mkv is lossless.")] = VideoFormat.mp4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Generate videos: OUT/<class or prompt>/<seed>.mp4. Finished files are left alone.

    Several processes of torchrun share them: torchrun --nproc-per-node 8 -m lavita sample ...
    """
    from lavita.core.processes import processes
    from lavita.sampling.generate import generate
    from lavita.sampling.recipes import find_recipe

    if lora is None and lora_scale is not None:
        raise ValueError(f"--lora-scale is {lora_scale:g}, but has no effect without --lora")
    chosen = find_recipe(recipe.value).changed(
        sampler=None if sampler is None else sampler.value,
        steps=steps,
        spacing=spacing,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        cache=cache,
        quantize=quantize,
        compiled=compiled or None,
    )
    with processes() as team:
        written = generate(
            model,
            out,
            classes=classes,
            prompts=prompt or (),
            prompt_table=prompts,
            seeds=seeds,
            recipe=chosen,
            num_frames=num_frames,
            images=images,
            adapter=lora,
            adapter_scale=1.0 if lora_scale is None else lora_scale,
            batch_size=batch_size,
            suffix=f".{video_format.value}",
            device=device,
            team=team,
        )
        if team.is_first:
            print(f"{out}: {len(written)} {'images' if images else 'videos'}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A Latte file (.pt); or a pipeline folder, to export it.")],
    out: Annotated[Path, typer.Argument(help="Pipeline folder to write; or a file that ends in .pt, to export.")],
    weights: Annotated[
        Literal["ema", "model"] | None,
        typer.Option(help="Needed where the file holds both; ema is the average.", show_default=False),
    ] = None,
    autoencoder: Annotated[
        str,
        typer.Option(help="Of its latents: folder, hub id, builtin, or auto: Stable Diffusion's. Unused to export."),
    ] = "auto",
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="[default: that of the size of its width]", show_default=False)
    ] = None,
    frame_interval: Annotated[int, typer.Option(min=1, help="That of its training clips. Unused to export.")] = 3,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames a second of generated videos. Unused to export.")] = 8.0,
) -> None:
    """Make a pipeline of a Latte file, or a Latte file of a pipeline, and say what became of each tensor."""
    from lavita.sampling.latte_files import convert_latte, export_latte

    if out.suffix == ".pt":
        print(export_latte(source, out))
    else:
        print(convert_latte(source, out, weights, autoencoder, num_heads, frame_interval=frame_interval, fps=fps))
