"""`lavita demo`, and `lavita data arcade`, which renders its data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lavita.cli.options import app, data_app


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, the model, the samples and the page.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[
        float,
        typer.Option(
            min=0.1, help="Approximate training time; everything else takes about twice as long on two cores."
        ),
    ] = 6.0,
) -> None:
    """Render arcade videos, train a small model on them, generate new ones, and show all of it on a page."""
    from lavita.core.commands import CommandFailed
    from lavita.demo.stages import run_demo

    try:
        run_demo(out, minutes)
    except CommandFailed as failed:
        raise typer.Exit(failed.code) from failed


@data_app.command("arcade")
def data_arcade(
    out: Annotated[Path, typer.Argument(help="Folder to write train/<game>/ and heldout/<game>/ into.")],
    train_episodes: Annotated[int, typer.Option(min=0, help="Training videos per game.")] = 24,
    heldout_episodes: Annotated[int, typer.Option(min=0, help="Held-out videos per game.")] = 6,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames per video, at 15 frames per second.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scripted players.")] = 0,
) -> None:
    """Render the arcade data set: 8 games, 64x64 pixels, H.264, with captions. Needs the extra `demo`."""
    from lavita.core.progress import Progress
    from lavita.demo.captions import write_captions
    from lavita.demo.games import render_dataset

    progress = Progress("rendering video", 8 * (train_episodes + heldout_episodes))
    render_dataset(out, train_episodes, heldout_episodes, num_frames, seed, lambda done, total: progress.update(done))
    write_captions(out)
    print(out)
