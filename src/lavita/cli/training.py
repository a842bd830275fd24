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
    from lavita.training.config import AutoencoderConfig, RunConfig


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
    from lavita.training.config import AutoencoderConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = [str(path) for path in data]
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: AutoencoderConfig = _load(AutoencoderConfig, config, overrides, chosen)
    from lavita.training.autoencoder import train_autoencoder

    _train(train_autoencoder, settings)


@autoencoder_app.command("evaluate")
def autoencoder_evaluate(
    data: Annotated[list[Path], typer.Option(help="Folder of videos; may be given several times.")],
    autoencoder: Annotated[str, typer.Argument(help="Folder, hub id, or builtin.")] = "builtin",
    resolution: Annotated[int, typer.Option(min=8, help="Side of the frames in pixels.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.", show_default=False)] = None,
) -> None:
    """PSNR of reconstructed frames: the whole picture, and the pixels that move."""
    from lavita.core.files import check_outside
    from lavita.evaluation.reconstruction import reconstruction_quality, show_quality
    from lavita.models.autoencoder import load_autoencoder
    from lavita.models.packaged import autoencoder_source

    if out is not None:
        check_outside("out", out, *data)
    vae = load_autoencoder(autoencoder_source(autoencoder, resolution))
    show_quality({str(root): reconstruction_quality(vae, root, resolution) for root in data}, out)


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[Path | None, typer.Option(help="Folder of videos.", show_default=False)] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Open the data, take two steps in memory and print what the run needs and takes; write nothing.",
        ),
    ] = False,
) -> None:
    """Train a model. Run the same command again to resume; Ctrl-C saves a checkpoint first.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m lavita train ... (docs/training.md).
    """
    from lavita.training.config import RunConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = {"path": str(data)}
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: RunConfig = _load(RunConfig, config, overrides, chosen)
    if dry_run:
        from lavita.studies.dry_run import dry_run as rehearse
        from lavita.studies.dry_run import print_dry_run

        print_dry_run(settings, rehearse(settings))
        return
    from lavita.training.train import train as run

    _train(run, settings)


def _train(run: Callable[[Any], Path], settings: Any) -> None:
    from lavita.training.run_folder import Stopped

    try:
        result = run(settings)
        if os.environ.get("RANK", "0") == "0":
            print(result)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from stopped


def _load(cls: Any, config: str | None, overrides: list[str] | None, chosen: dict[str, Any]) -> Any:
    """The options of a command win over its configuration file, `a.b=c` over both."""
    from lavita.core.config import ConfigError, check_given_once, load_config, read_yaml

    words = overrides or []
    check_given_once(words)
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
