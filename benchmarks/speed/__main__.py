"""Speed and memory on the machine at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lavita.cli.options import app


@app.command()
def bench(
    sections: Annotated[
        list[str] | None,
        typer.Argument(
            help="Of forward, training, sampling, autoencoder, data, evaluation, scaling. Default: all.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Of the model: S/2 to XL/8, tiny, mini, small.")] = "S/2",
    num_frames: Annotated[int, typer.Option(min=1, help="Of a clip.")] = 16,
    sample_size: Annotated[int, typer.Option(min=1, help="Side of the latents.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16; auto is bf16 where it is fast.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which the candidates take turns.")] = 5,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Of a sampler's loop.")] = 10,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether compiled models take part; they take a minute each.")
    ] = True,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Whether peak memory is measured, in processes of their own.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write result.json, table.md and pictures into.", show_default=False),
    ] = None,
) -> None:
    """Measure how near to the machine's limits everything runs, beside other implementations.

    Each figure is a ratio of things that took turns; the floor is the matrix products of the same pass alone.
    """
    from benchmarks.speed.command import run_bench
    from benchmarks.speed.setup import Setup, resolve_precision
    from lavita.core.precision import pick_device

    place = pick_device(device)
    setup = Setup(
        preset=preset,
        num_frames=num_frames,
        sample_size=sample_size,
        batch_size=batch_size,
        precision=resolve_precision(precision, place),
        repeats=repeats,
        steps=steps,
        compiled=compiled,
        memory=memory,
        device=str(place),
    )
    run_bench(setup, sections or (), out)
