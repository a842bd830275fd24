"""`lavita config`: every field of a configuration, with its description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lavita.cli.options import TrainingRecipeOption, app, find_config, find_recipe

if TYPE_CHECKING:
    from lavita.core.config import StrictConfig

Kind = Literal["train", "autoencoder", "evaluation"]


@app.command("config")
def show_config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE] [A.B=C]...",
            help="A packaged configuration (demo, faces, autoencoder), a YAML file, or the folder of a run; "
            "without one, the defaults. Then fields to change.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="What is configured. Default: what SOURCE holds, or train.", show_default=False),
    ] = None,
    recipe: TrainingRecipeOption = None,
) -> None:
    """Print a full configuration as commented YAML: every field, what it does, its allowed values, its default.

    The output can be saved and passed to `lavita train --config FILE`.
    """
    from lavita.core.config import ConfigError, check_given_once, load_config, merge, read_yaml
    from lavita.core.config_reference import commented_yaml, fields_of

    sources = [word for word in words or [] if "=" not in word]
    overrides = [word for word in words or [] if "=" in word]
    check_given_once(overrides)
    if len(sources) > 1:
        raise ConfigError(f"give one SOURCE, not {len(sources)}: {', '.join(sources)}")
    file = find_config(sources[0]) if sources else None
    values: dict[str, Any] = {} if recipe is None else read_yaml(find_recipe(recipe))
    merge(values, read_yaml(file) if file else {})
    cls = _class_of(kind) if kind else _guess(values)
    required = [field.name for field in fields_of(cls) if field.required]
    if missing := [name for name in required if name not in values and not _is_set(name, overrides)]:
        # Nothing to check without them; they are printed as comments.
        stand_in = {name: ["DATA"] for name in missing}
        config = load_config(cls, {**values, **stand_in}, overrides, source=str(file or ""))
        shown = {key: value for key, value in config.model_dump(mode="json").items() if key not in missing}
    else:
        shown = load_config(cls, values, overrides, source=str(file or "")).model_dump(mode="json")
    print(commented_yaml(cls, shown), end="")


def _is_set(name: str, overrides: list[str]) -> bool:
    return any(word.partition("=")[0] == name for word in overrides)


def _class_of(kind: Kind) -> type[StrictConfig]:
    if kind == "evaluation":
        from lavita.evaluation.protocol import Protocol

        return Protocol
    from lavita.training.autoencoder.config import AutoencoderConfig
    from lavita.training.config import RunConfig

    return AutoencoderConfig if kind == "autoencoder" else RunConfig


def _guess(values: dict[str, Any]) -> type[StrictConfig]:
    """The class whose fields the values are: a training run's, unless they are all those of another one."""
    for kind in ("train", "autoencoder", "evaluation"):
        cls = _class_of(kind)
        sections_fit = not isinstance(values.get("data"), list) if kind == "train" else True
        if values.keys() <= cls.model_fields.keys() and sections_fit:
            return cls
    return _class_of("train")
