"""Training: models, autoencoders, studies, and what became of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavita.cli.options import ConfigFile, Overrides, app, autoencoder_app

if TYPE_CHECKING:
    from lavita.config import AutoencoderConfig, RunConfig


@autoencoder_app.command("train")
def autoencoder_train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of videos; may be given several times.", show_default=False),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
) -> None:
    """Train an autoencoder on frames of videos. Run the same command again to resume; Ctrl-C saves a checkpoint."""
    from lavita.config import AutoencoderConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = [str(path) for path in data]
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: AutoencoderConfig = _load(AutoencoderConfig, config, overrides, chosen)
    from lavita.train_autoencoder import train_autoencoder

    _train(train_autoencoder, settings)


@autoencoder_app.command("evaluate")
def autoencoder_evaluate(
    data: Annotated[list[Path], typer.Option(help="Folder of videos; may be given several times.")],
    autoencoder: Annotated[str, typer.Argument(help="Folder, hub id, or builtin.")] = "builtin",
    resolution: Annotated[int, typer.Option(min=8, help="Side of the frames in pixels.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.", show_default=False)] = None,
) -> None:
    """PSNR of reconstructed frames: the whole picture, and the pixels that move."""
    from lavita.autoencoder import autoencoder_source, load_autoencoder
    from lavita.evaluation.reconstruction import reconstruction_quality, show_quality

    vae = load_autoencoder(autoencoder_source(autoencoder, resolution))
    show_quality({str(root): reconstruction_quality(vae, root, resolution) for root in data}, out)


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[Path | None, typer.Option(help="Folder of videos.", show_default=False)] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
) -> None:
    """Train a model. Run the same command again to resume; Ctrl-C saves a checkpoint first.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m lavita train ... (docs/training.md).
    """
    from lavita.config import RunConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = {"path": str(data)}
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: RunConfig = _load(RunConfig, config, overrides, chosen)
    from lavita.train import train as run

    _train(run, settings)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are shown side by side.")],
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("runs/report"),
) -> None:
    """Write a page of training runs: configuration, curves, samples over time. Works while they run."""
    from lavita.report.page import write_report

    print(write_report(runs, out))


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="frame-interval, temporal-position, variant, patch-embedding, conditioning (Fig. 5), joint-training, "
            "pretraining, or combinations: every variant with every embedding, conditioning and position."
        ),
    ],
    config: Annotated[str, typer.Option(help="Of all arms: YAML file, or the name of a packaged one.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    overrides: Overrides = None,
    steps: Annotated[
        str, typer.Option(help="Length of each arm; several, rising: it is sampled and scored at each.")
    ] = "1000",
    real: Annotated[
        Path | None, typer.Option(help="Class folders of real videos to score against.", show_default=False)
    ] = None,
    metrics: Annotated[str, typer.Option(help="Of `lavita evaluate`; with --real.")] = "accuracy,motion",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Field of its protocol, as num_real_clips=256; may be given several times."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of the samples, one a class for each seed.")] = "0-3",
    sample_steps: Annotated[int, typer.Option(min=1, max=1000, help="Network evaluations of a sample.")] = 20,
    weights: Annotated[
        str | None, typer.Option(help="Of the image model, for pretraining.", show_default=False)
    ] = None,
) -> None:
    """Train configurations that differ in one field alike, and compare them. Run it again to go on."""
    from lavita.commands import CommandFailed
    from lavita.studies.ablation import STUDIES, StudyPlan, pretraining_arms, run_study

    if name not in (*STUDIES, "pretraining"):
        raise ValueError(f"name is {name!r}; allowed: {', '.join((*STUDIES, 'pretraining'))}")
    if (weights is None) == (name == "pretraining"):
        raise ValueError("--weights goes with the study pretraining, which needs it")
    if protocol and real is None:
        raise ValueError(f"protocol is {protocol}, but has no effect without --real")
    if not all(part.strip().isdigit() for part in steps.split(",")):
        raise ValueError(f"steps is {steps!r}; allowed: numbers such as 1000 or 500,1000")
    arms = STUDIES[name] if weights is None else pretraining_arms(weights)
    points = tuple(int(part) for part in steps.split(","))
    plan = StudyPlan(
        out, config, tuple(overrides or ()), points, seeds, sample_steps, real, metrics, tuple(protocol or ())
    )
    try:
        run_study(arms, plan)
    except CommandFailed as failed:
        raise typer.Exit(failed.code) from failed


def _train(run: Callable[[Any], Path], settings: Any) -> None:
    from lavita.runtime import Stopped

    try:
        result = run(settings)
        if os.environ.get("RANK", "0") == "0":
            print(result)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from stopped


def _load(cls: Any, config: str | None, overrides: list[str] | None, chosen: dict[str, Any]) -> Any:
    """The options of a command win over its configuration file, `a.b=c` over both."""
    from lavita.strict_config import ConfigError, load_config, read_yaml

    words = overrides or []
    if config is None and not chosen and not words:
        raise ConfigError("nothing to train on: give --config FILE or --data DIR")
    values: dict[str, Any] = {}
    file = None
    if config is not None:
        packaged = Path(str(files("lavita") / "configs" / f"{config}.yaml"))
        file = packaged if "/" not in config and packaged.exists() else Path(config)
        values = read_yaml(file)
    for key, value in chosen.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    return load_config(cls, values, words, source=str(file) if file else "")
