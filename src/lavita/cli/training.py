"""Training: models, autoencoders, studies, and what became of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavita.cli.options import (
    ConfigFile,
    Overrides,
    TrainingRecipeOption,
    app,
    autoencoder_app,
    find_recipe,
)
from lavita.core.names import TrainingRecipe

if TYPE_CHECKING:
    from lavita.training.autoencoder.config import AutoencoderConfig
    from lavita.training.config import RunConfig


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
    from lavita.training.autoencoder.config import AutoencoderConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = [str(path) for path in data]
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: AutoencoderConfig = _load(AutoencoderConfig, config, overrides, chosen)
    from lavita.training.autoencoder.train import train_autoencoder

    _train(train_autoencoder, settings)


@autoencoder_app.command("evaluate")
def autoencoder_evaluate(
    data: Annotated[list[Path], typer.Option(help="Folder of videos; may be given several times.")],
    autoencoder: Annotated[str, typer.Argument(help="Folder, hub id, builtin or arcade.")] = "builtin",
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            min=8, help="Side of the frames in pixels; may be given several times. default: 64", show_default=False
        ),
    ] = None,
    frame_interval: Annotated[int, typer.Option(min=1, help="Step from one frame to the next.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.", show_default=False)] = None,
    clips: Annotated[
        Path | None,
        typer.Option(
            help="Write the reconstructed clips to this folder, which lavita evaluate can then score.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score reconstructed frames: PSNR of the whole picture and of the pixels that move, and a feature distance.

    The distance of the feature maps of a network needs the extra `evaluate`; without it a dash stands in its place.
    """
    from lavita.core.files import check_outside
    from lavita.evaluation.features.perceptual import FeatureDistance
    from lavita.evaluation.reconstruction import quality_at, show_quality
    from lavita.models.autoencoder import load_autoencoder
    from lavita.models.packaged import autoencoder_source

    for name, path in (("out", out), ("clips", clips)):
        if path is not None:
            check_outside(name, path, *data)
    sides = list(dict.fromkeys(resolution or [64]))
    vae = load_autoencoder(autoencoder_source(autoencoder, max(sides)))
    show_quality(quality_at(vae, data, sides, FeatureDistance.load(), frame_interval, clips), out)


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[Path | None, typer.Option(help="Folder of videos.", show_default=False)] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
    recipe: TrainingRecipeOption = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Finish within this time, and choose everything that is not given: encode, train, and write samples "
            "and a page.",
            show_default=False,
        ),
    ] = None,
    hours: Annotated[float | None, typer.Option(help="The same in hours.", show_default=False)] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Open the data, take two steps in memory and print what the run needs and takes; write nothing. With "
            "--minutes: print the choices.",
        ),
    ] = False,
) -> None:
    """Train a model. Run the same command again to resume; Ctrl-C saves a checkpoint first.

    With --minutes or --hours, a folder of videos is enough: everything else is chosen for this time (docs/training.md).

    On several GPUs or machines: torchrun --nproc-per-node 8 -m lavita train ... (docs/training.md).
    """
    started = time.monotonic()
    from lavita.training.config import RunConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = {"path": str(data)}
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    if minutes is not None or hours is not None:
        _train_within(minutes, hours, _values(config, overrides, chosen, recipe)[0], overrides or [], dry_run, started)
        return
    settings: RunConfig = _load(RunConfig, config, overrides, chosen, recipe)
    if dry_run:
        from lavita.studies.dry_run import dry_run as rehearse
        from lavita.studies.dry_run import print_dry_run

        print_dry_run(settings, rehearse(settings))
        return
    from lavita.training.train import train as run

    _train(run, settings)


@app.command()
def average(
    run: Annotated[Path, typer.Argument(help="Folder of a run that was trained with train.power_ema=[0.05,0.1].")],
    sigma_rel: Annotated[
        float, typer.Option(help="Length of the average, as a share of the steps before its end: 0.01 to 0.28.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline.")],
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Step at which the average ends. default: the last snapshot's", show_default=False),
    ] = None,
) -> None:
    """Average the weights of a finished run over another length, and write the pipeline of it (post-hoc EMA)."""
    from lavita.training.power_ema import write_reconstruction

    found = write_reconstruction(run, sigma_rel, out, step)
    print(
        f"{out}: average of relative length {sigma_rel:g} up to step {found.step:,}, from {found.num_snapshots} "
        f"snapshots, whose profiles approach it within {found.error:.1%}"
    )


def _train(run: Callable[[Any], Path | None], settings: Any) -> None:
    from lavita.training.run_folder import Stopped

    try:
        result = run(settings)
        if result is not None and os.environ.get("RANK", "0") == "0":
            print(result)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from stopped


def _train_within(
    minutes: float | None, hours: float | None, values: dict[str, Any], words: list[str], dry_run: bool, started: float
) -> None:
    from lavita.studies.budget.run import budget_seconds, train_within

    seconds = budget_seconds(minutes, hours)
    assert seconds is not None
    _train(lambda _: train_within(values, words, seconds, dry_run, started=started), None)


def _load(
    cls: Any,
    config: str | None,
    overrides: list[str] | None,
    chosen: dict[str, Any],
    recipe: TrainingRecipe | None = None,
) -> Any:
    """The configuration file wins over the recipe, the options of a command over the file, `a.b=c` over all."""
    from lavita.core.config import load_config

    values, source = _values(config, overrides, chosen, recipe)
    return load_config(cls, values, overrides or [], source=source)


def _values(
    config: str | None, overrides: list[str] | None, chosen: dict[str, Any], recipe: TrainingRecipe | None
) -> tuple[dict[str, Any], str]:
    """What is given besides the overrides, and the file that it comes from."""
    from lavita.core.config import ConfigError, check_given_once, merge, read_yaml

    words = overrides or []
    check_given_once(words)
    if config is None and not chosen and not words:
        raise ConfigError("nothing to train on: give --config FILE or --data DIR")
    values: dict[str, Any] = {} if recipe is None else read_yaml(find_recipe(recipe))
    file = None
    if config is not None:
        packaged = Path(str(files("lavita") / "configs" / f"{config}.yaml"))
        file = packaged if "/" not in config and packaged.exists() else Path(config)
        merge(values, read_yaml(file))
    merge(values, chosen)
    return values, str(file) if file else ""
