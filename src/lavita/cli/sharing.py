"""Commands that publish models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lavita.cli.options import app


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
