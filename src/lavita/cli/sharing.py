"""Commands that publish models, and convert adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lavita.cli.options import app, lora_app


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="Folder of a run or of a pipeline.")],
    repo: Annotated[str, typer.Argument(help="Hub id, such as name/model; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license_name: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the weights, such as apache-2.0, for the card.", show_default=False),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the card.", show_default=False)] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Report of lavita evaluate (.json), for the card.", show_default=False)
    ] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Pipeline of LAVITA",
) -> None:
    """Publish a pipeline on the Hugging Face hub, with a model card written from facts.

    The token is that of `hf auth login`, or HF_TOKEN. `lavita sample NAME/MODEL` samples from what was published. The
    card is README.md in the pipeline's folder; what you write below its last line is kept.
    """
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"  # an upload takes long, unlike the look-ups of other commands
    from lavita.sampling.sharing import push as push_pipeline

    print(push_pipeline(source, repo, private, license_name, title, scores, message))


Adapter = Annotated[Path, typer.Argument(help="Folder of peft, such as RUN/pipeline/lora, or a file of diffusers.")]
AdapterOut = Annotated[
    Path, typer.Option(help="A file that ends in .safetensors, in diffusers' form; else a folder, in peft's.")
]


@lora_app.command("merge")
def merge_adapters(
    model: Annotated[str, typer.Argument(help="Pipeline that the adapters were trained on: folder, hub id, builtin.")],
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="Pipeline folder to write.")],
    scale: Annotated[float, typer.Option(help="Weight of the adapters.")] = 1.0,
) -> None:
    """Merge adapters into a pipeline, which then needs no adapters."""
    from lavita.models.adapters import apply_adapter
    from lavita.models.packaged import model_source
    from lavita.sampling.pipeline import load_pipeline
    from lavita.sampling.pipeline_folder import save_pipeline

    pipeline = load_pipeline(model_source(model))
    apply_adapter(pipeline.transformer, adapter, scale)
    save_pipeline(pipeline, out)
    print(out)


@lora_app.command("extract")
def extract_adapters(
    model: Annotated[str, typer.Argument(help="Pipeline that the adapters will be for: folder, hub id, builtin.")],
    tuned: Annotated[str, typer.Argument(help="Pipeline that was fine-tuned from it.")],
    out: AdapterOut,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
) -> None:
    """Extract adapters from a fine-tuned pipeline: the best ones of a rank, and what they leave out."""
    from lavita.models.adapter_files import write_changes
    from lavita.models.adapters import extract_changes
    from lavita.models.packaged import model_source
    from lavita.sampling.pipeline import load_pipeline

    base, other = (load_pipeline(model_source(source)).transformer for source in (model, tuned))
    changes, left_out = extract_changes(base, other, rank)
    if not changes:
        raise ValueError(f"{tuned}: has the same weights as {model}; there is nothing to extract")
    write_changes(out, changes)
    worst = max(left_out, key=lambda layer: left_out[layer])
    mean = sum(left_out.values()) / len(left_out)
    print(
        f"{out}: {len(changes)} layers; left out {mean:.1%} of the change on average, {left_out[worst]:.1%} of {worst}"
    )


@lora_app.command("convert")
def convert_adapters(adapter: Adapter, out: AdapterOut) -> None:
    """Convert adapters from peft's form to diffusers' or back."""
    from lavita.models.adapter_files import read_changes, write_changes

    changes = read_changes(adapter)
    write_changes(out, changes)
    print(f"{out}: {len(changes)} layers")
