"""Strict configurations: defaults in one place, then a YAML file, then `a.b=c` on the command line.

An unknown key is an error at every level. The resolved configuration of a run is saved in its folder.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lavita.core.files import write_text


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, its value and what is allowed."""


class StrictConfig(BaseModel):
    """Base of all configuration sections: immutable, and unknown keys are refused.

    The docstring under a field is its description (`Section.model_fields[name].description`); `lavita config` and the
    documentation are generated from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Config = TypeVar("Config", bound=StrictConfig)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does; PyYAML follows YAML 1.1 and reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(
    cls: type[Config], values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = ""
) -> Config:
    """Builds a configuration from values and dotted overrides; all other fields have their defaults.

    Args:
        cls: the configuration class.
        values: nested fields, as `read_yaml` gives them.
        overrides: `a.b=c` strings, which win over the values; the right side is parsed as YAML.
        source: where the values come from, for error messages.

    Raises:
        ConfigError: for an unknown key, or a value that does not fit.
    """
    merged: dict[str, Any] = {}
    try:
        _merge(merged, values)
    except RecursionError as error:  # an anchor of YAML can be part of itself
        raise ConfigError(f"{source or cls.__name__}: a value contains itself, or is nested too deeply") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r} is not of the form key=value, for example train.steps=1000")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML") from error
        nested: dict[str, Any] = {}
        inner = nested
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
        _merge(merged, nested)
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_first_error(cls, error, source)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping; ConfigError if the file is missing or is not one."""
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold `key: value` lines, found {type(values).__name__}")
    return values


def save_config(config: StrictConfig, file: Path) -> None:
    """Writes every field of a configuration as YAML."""
    write_text(file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = into.get(key)
            into[key] = inner = inner if isinstance(inner, dict) else {}
            _merge(inner, value)
        else:
            into[key] = value


def _first_error(cls: type[StrictConfig], error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    where = f"{source}: " if source else ""
    if first["type"] == "extra_forbidden":
        section: Any = cls
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        known = ", ".join(sorted(section.model_fields))
        return f"{where}unknown key {field!r}; known here: {known}"
    if first["type"] == "missing":
        return f"{where}{field!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{field} is {_SHOWN.repr(first['input'])}: {message}" if field else f"{where}{message}"


# A few anchors of YAML can make a value of gigabytes.
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict, _SHOWN.maxstring, _SHOWN.maxother = 4, 10, 10, 200, 200
