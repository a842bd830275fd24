"""Groups of commands, and the options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lavita.core.names import DataSetName, TrainingRecipe


class Group(TyperGroup):
    """A group whose help lists each command with the whole first sentence of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list."""
        with formatter.section("Commands"):
            names = self.list_commands(ctx)
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])


class Command(TyperCommand):
    """A command whose options are finite numbers."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; ValueError for an option that is infinite or not a number."""
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{parameter.opts[-1]} is {number}, but must be a finite number")
        return super().invoke(ctx)


class App(typer.Typer):
    """A group of commands of the class `Command`."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """See `typer.Typer.command`."""
        return super().command(name, **{"cls": Command, **settings})


app = App(
    cls=Group,
    name="lavita",
    help="Train, sample and evaluate latent video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would double the time of `--help`
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 200},
)
data_app = App(cls=Group, help="Inspect data sets, and make some.", no_args_is_help=True, rich_markup_mode=None)
autoencoder_app = App(cls=Group, help="Train and score autoencoders.", no_args_is_help=True, rich_markup_mode=None)
lora_app = App(
    cls=Group, help="Merge, extract and convert low-rank adapters.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
app.add_typer(autoencoder_app, name="autoencoder")
app.add_typer(lora_app, name="lora")


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields of the configuration, such as train.steps=1000", show_default=False),
]
DataSet = Annotated[DataSetName, typer.Option(help="Layout of the folder: any videos, or a data set of the paper.")]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="Split of a named data set: train, test, all, ... default: the one that the paper trains on",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", help="YAML file, or the name of a packaged one (lavita config --help)", show_default=False
    ),
]
TrainingRecipeOption = Annotated[
    TrainingRecipe | None,
    typer.Option(
        "--recipe",
        help="Settings to start from; everything else that you set wins. paper: the paper's training to the letter, "
        "XL/2 (docs/paper.md); modern: a rectified flow, normalised latents and Muon",
        show_default=False,
    ),
]


def find_recipe(recipe: TrainingRecipe) -> Path:
    """The YAML file of a recipe of training."""
    return Path(str(files("lavita") / "configs" / "recipes" / f"{recipe}.yaml"))


def find_config(source: str) -> Path:
    """The YAML file that a name stands for: a packaged configuration, a file, or the one in a run's folder."""
    packaged = Path(str(files("lavita") / "configs" / f"{source}.yaml"))
    if "/" not in source and packaged.exists():
        return packaged
    path = Path(source)
    return path / "config.yaml" if path.is_dir() else path
