"""Commands that generate videos and convert weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lavita.cli.options import app
from lavita.core.names import CacheName, RecipeName, SamplerName, Spacing, VideoFormat


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder for the videos.")],
    model: Annotated[
        str, typer.Argument(help="Pipeline folder or hub id; builtin: the arcade model in the package.")
    ] = "builtin",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or numbers, separated by commas, or all; may be repeated, as for a name with a comma in it. "
            "A name wins over a number. default: all",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text for a text-conditional model; may be repeated.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Table of prompts: CSV, JSONL or Parquet with `file` and `caption`.", show_default=False),
    ] = None,
    seeds: Annotated[str, typer.Option(help="One video per seed and class or prompt: 0-7 or 1,5,9.")] = "0-3",
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="Preset, parts of which the options below change. default: UniPC, 25 steps; paper: DDPM, 250 steps; "
            "fast: 8 stochastic steps, with which fine detail may vary less (docs/speed.md)."
        ),
    ] = "default",
    sampler: Annotated[
        SamplerName | None,
        typer.Option(
            help="Sampler; ddpm is the paper's; euler and heun are for flows only, ddim and ddpm for others. "
            "default: unipc",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Number of steps. default: 25; with ddpm: 250", show_default=False),
    ] = None,
    spacing: Annotated[
        Spacing | None,
        typer.Option(help="Spacing of the steps. default: trailing", show_default=False),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1 for none. default: 1.5 with classes or texts", show_default=False
        ),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest timestep with guidance: 100 900. default: all", show_default=False),
    ] = None,
    cache: Annotated[
        CacheName | None,
        typer.Option(
            help="Reuse what earlier steps computed: attention (pab, fastercache) or everything (taylorseer). "
            "default: nothing",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Compute in 8 bits: faster on a CPU, slightly less exact. default: no", show_default=False),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model first; pays off for many videos.")
    ] = False,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Length of the videos. default: the model's", show_default=False)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the videos in pixels: 64, or height x width: 96x160; with a warning if the model was not "
            "trained on it. default: the model's, the first of several",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Single images (.png) from the model without its temporal modules.")
    ] = False,
    image: Annotated[
        Path | None,
        typer.Option(
            help="First frame of the videos, an image or video; for a model trained with model.given_frames.",
            show_default=False,
        ),
    ] = None,
    last_image: Annotated[Path | None, typer.Option(help="Last frame of the videos.", show_default=False)] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Video to go on with; or a folder of videos, for one video of each: OUT/<path>-<seed>.mp4.",
            show_default=False,
        ),
    ] = None,
    keep_frames: Annotated[
        int | None, typer.Option(help="First frames of --video that are given. default: 1", show_default=False)
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Give every n-th frame of --video instead.", show_default=False)
    ] = None,
    guide_frames: Annotated[
        bool, typer.Option("--guide-frames", help="Guide towards the given frames, too, not only the class or prompt.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Given frames keep their pixels, instead of being decoded from latents.")
    ] = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="With a folder of videos: give the model frames, but no class.")
    ] = False,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames of longer videos, made in windows that go on from each other; for a model trained with "
            "model.given_frames=[start]. A stopped command goes on.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="--length in seconds.", show_default=False)] = None,
    overlap: Annotated[
        int | None, typer.Option(min=1, help="Frames that windows have in common. default: 4", show_default=False)
    ] = None,
    actions: Annotated[
        Path | None,
        typer.Option(
            help="File with the action of each frame, separated by white space; for a model trained with data.actions.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(
            help="Folder of adapters trained on this model: RUN/pipeline/lora, or one of peft.", show_default=False
        ),
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="Weight of the adapters. default: 1", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos per batch; does not change them.")] = 8,
    sequence_parallel: Annotated[
        int,
        typer.Option(
            min=1, help="Successive processes of torchrun that share each video, for videos too long for one device."
        ),
    ] = 1,
    video_format: Annotated[VideoFormat, typer.Option("--format", help="mkv is lossless.")] = "mp4",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Generate videos: OUT/<class or prompt>/<seed>.mp4. Files of the same videos that are there already are kept.

    Several processes share the work: torchrun --nproc-per-node 8 -m lavita sample ...
    """
    from lavita.core.processes import processes
    from lavita.core.sizes import parse_size
    from lavita.sampling.generate import generate
    from lavita.sampling.given_files import GivenFiles
    from lavita.sampling.recipes import find_recipe

    if lora is None and lora_scale is not None:
        raise ValueError(f"--lora-scale is {lora_scale:g}, but has no effect without --lora")
    chosen = find_recipe(recipe).changed(
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        cache=cache,
        quantize=quantize,
        compiled=compiled or None,
    )
    given = GivenFiles(image, last_image, video, keep_frames, keep_every, guide_frames, exact, not unlabelled)
    with processes(members=sequence_parallel) as team:
        written = generate(
            model,
            out,
            classes=classes or "all",
            prompts=prompt or (),
            prompt_table=prompts,
            seeds=seeds,
            recipe=chosen,
            num_frames=num_frames,
            images=images,
            adapter=lora,
            adapter_scale=1.0 if lora_scale is None else lora_scale,
            batch_size=batch_size,
            suffix=f".{video_format}",
            device=device,
            team=team,
            given=given,
            length=length,
            seconds=seconds,
            overlap=overlap,
            actions=actions,
            size=None if size is None else parse_size(size, "size"),
        )
        if team.is_first:
            print(f"{out}: {len(written)} {'images' if images else 'videos'}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Latte file (.pt); or pipeline to export: folder, hub id, builtin.")],
    out: Annotated[Path, typer.Argument(help="Pipeline folder to write; or, to export, a file that ends in .pt.")],
    weights: Annotated[
        Literal["ema", "model"] | None,
        typer.Option(help="Required if the file holds both; ema: the averaged weights.", show_default=False),
    ] = None,
    autoencoder: Annotated[
        str,
        typer.Option(help="Autoencoder: folder, hub id, builtin, or auto: Stable Diffusion's. Not for export."),
    ] = "auto",
    num_heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Attention heads. default: those of the published size of this width", show_default=False
        ),
    ] = None,
    sample_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the latents, for a file without pos_embed: 32 at 256 pixels.", show_default=False
        ),
    ] = None,
    frame_interval: Annotated[
        int, typer.Option(min=1, help="Frame interval of its training clips. Not for export.")
    ] = 3,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second of generated videos. Not for export.")] = 8.0,
) -> None:
    """Convert a Latte file to a pipeline, or a pipeline to a Latte file, and report what became of each tensor."""
    from lavita.sampling.latte_files import convert_latte, export_latte

    if out.suffix == ".pt":
        print(export_latte(source, out))
    else:
        report = convert_latte(source, out, weights, autoencoder, num_heads, None, frame_interval, fps, sample_size)
        print(report)
