"""Options and fields of all commands: numbers that are not finite are refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from conftest import Run
from typer.models import OptionInfo

from lavita import cli
from lavita.cli.options import Command
from lavita.core.config import ConfigError, StrictConfig, load_config
from lavita.models.config import ModelConfig
from lavita.sampling.recipes import Recipe
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.config import RunConfig, TrainConfig


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = list(commands(typer.main.get_command(cli.app)))


def with_number(value: str) -> Iterator[tuple[str, list[str]]]:
    """Each option of any command that is a number, and arguments that set it, with all that is required."""
    for path, command in ALL:
        function = inspect.unwrap(command.callback)
        hints = get_type_hints(function, include_extras=True)
        needed = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is parameter.empty:
                is_option = isinstance(hints[parameter.name].__metadata__[0], OptionInfo)
                option = f"--{parameter.name.replace('_', '-')}"
                needed += [option, "x"] if is_option else ["x"]
        for name, hint in hints.items():
            if count := str(hint.__origin__ if hasattr(hint, "__metadata__") else hint).count("float"):
                option = f"--{name.replace('_', '-')}"
                yield option, [*path, *needed, option, *([value] * count)]


def test_every_command_checks_its_options() -> None:
    assert len(ALL) >= 12
    assert [path for path, command in ALL if not isinstance(command, Command)] == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_options_that_are_not_finite_are_refused(value: str, run: Run, tmp_path: Path) -> None:
    lines = dict(with_number(value))
    assert lines.keys() >= {"--guidance-scale", "--guidance-interval", "--lora-scale", "--fps", "--minutes"}
    for name, line in with_number(value):
        code, stdout, stderr = run(*line)
        assert (code, stdout) == (2, ""), line
        finite = f"error: {name} is {float(value)}, but must be a finite number"
        # An option with a least value may already be refused by that.
        assert finite in stderr or f"Invalid value for '{name}'" in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["1e38", "-1e5", "1001"])
def test_guidance_beyond_all_use_is_refused(value: str, run: Run, tmp_path: Path) -> None:
    code, _, stderr = run("sample", "--out", tmp_path / "out", "--guidance-scale", value)
    assert code == 2 and stderr.startswith("error: guidance_scale is ") and "must be in -1000..1000" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e38])
def test_a_recipe_has_a_finite_guidance(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale is"):
        Recipe(guidance_scale=scale)


def float_fields(cls: type[StrictConfig]) -> list[str]:
    return [name for name, field in cls.model_fields.items() if field.annotation in (float, float | None)]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan"])
@pytest.mark.parametrize(
    ("cls", "prefix", "section", "needed"),
    [
        (RunConfig, "train.", TrainConfig, {}),
        (RunConfig, "model.", ModelConfig, {}),
        (AutoencoderConfig, "", AutoencoderConfig, {"data": ["x"]}),
    ],
)
def test_fields_that_are_not_finite_are_refused(
    cls: type[StrictConfig], prefix: str, section: type[StrictConfig], needed: dict[str, Any], value: str
) -> None:
    names = float_fields(section)
    assert names
    for name in names:
        with pytest.raises(ConfigError, match=f"{prefix}{name}.* is .*(nan|inf)"):
            load_config(cls, needed, [f"{prefix}{name}={value}"])
