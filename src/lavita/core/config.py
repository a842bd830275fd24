"""Strict configurations: defaults in one place, then a YAML file, then `a.b=c` on the command line.

An unknown key is an error at every level. The resolved configuration of a run is saved in its folder.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from lavita.core.files import write_text
from lavita.core.sizes import Size
from lavita.core.text import read_text


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, its value and what is allowed."""


class StrictConfig(BaseModel):
    """Base of all configuration sections: immutable, and unknown keys and numbers that are not finite are refused.

    The docstring under a field is its description (`Section.model_fields[name].description`); `lavita config` and the
    documentation are generated from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _type_is_not_changed(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses texts and `true` as numbers, which pydantic would convert, and says how a number becomes a text."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        types, words = _scalar_types(annotation), _words(annotation)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if types & {int, float}:
                if isinstance(item, str) and not types & {str, Path, Size} and item not in words:
                    raise ValueError(", or ".join(["must be a number, without quotes or leading zeros", *words]))
                if isinstance(item, bool) and bool not in types:
                    raise ValueError("must be a number")
            elif types & {str, Path} and isinstance(item, (int, float)):
                raise ValueError("must be a text; put one that looks like a number or like true in quotes")
        return value


Config = TypeVar("Config", bound=StrictConfig)


class _Loader(yaml.SafeLoader):
    """Reads what a person means: the plain words of YAML 1.2, and each key once.

    PyYAML follows YAML 1.1, where `no` and `off` are false, 010 is 8, 1:30 is 90, a date is an object, 1e-4 is a text,
    and of a key that is there twice the last one wins.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping whose keys are all different."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts every text in quotes that `_Loader` would read as something else."""


_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
for _type, _pattern, _first in (
    ("merge", r"<<", ["<"]),
    ("null", r"(~|null|Null|NULL)?", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),  # 007 is a name rather than a number
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(rf"(?:{_pattern})\Z"), _first)


def to_yaml(value: Any, **options: Any) -> str:
    """A value as YAML that `read_yaml` reads back as the same value; `options` are those of `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, **options)


def load_config(
    cls: type[Config], values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = ""
) -> Config:
    """Builds a configuration from values and dotted overrides; all other fields have their defaults.

    Args:
        cls: the configuration class.
        values: nested fields, as `read_yaml` gives them.
        overrides: `a.b=c` strings, which win over the values and over those before them; the right side is parsed as
            YAML.
        source: where the values come from, for error messages.

    Raises:
        ConfigError: for an unknown key, or a value that does not fit.
    """
    merged = combine(values, overrides, source or cls.__name__)
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_first_error(cls, error, source)) from error


def combine(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """Values and dotted overrides as nested fields, before any of them is checked; see `load_config`.

    Raises:
        ConfigError: for an override that is none, or values that contain themselves.
    """
    merged: dict[str, Any] = {}
    try:
        merge(merged, values)
    except RecursionError as error:  # an anchor of YAML can be part of itself
        raise ConfigError(f"{source}: a value contains itself, or is nested too deeply") from error
    for override in overrides:
        key, value = _parse(override)
        nested: dict[str, Any] = {}
        inner = nested
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
        merge(merged, nested)
    return merged


def check_given_once(overrides: Sequence[str]) -> None:
    """Refuses overrides of one command that set a field twice; ConfigError names both, or one that is no override."""
    given: dict[str, str] = {}
    for override in overrides:
        fields = list(_leaves(*_parse(override)))
        for field in fields:
            for other in given:
                if f"{field}.".startswith(f"{other}.") or f"{other}.".startswith(f"{field}."):
                    raise ConfigError(f"{min(field, other, key=len)} is given twice: {given[other]!r} and {override!r}")
        given |= dict.fromkeys(fields, override)


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping; ConfigError if the file is missing or is not one."""
    try:
        text = read_text(Path(file))
    except FileNotFoundError as error:
        raise ConfigError(f"{str(file).strip() or repr(str(file))}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({error})") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        values = yaml.load(text, _Loader)
    except yaml.constructor.ConstructorError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{file}: cannot be read as YAML ({line}{error.problem})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold `key: value` lines, found {type(values).__name__}")
    return values


def save_config(config: StrictConfig, file: Path) -> None:
    """Writes every field of a configuration as YAML."""
    write_text(file, to_yaml(config.model_dump(mode="json"), sort_keys=False))


def _scalar_types(annotation: Any) -> set[type]:
    """The types that a field may have, or the items of its list; of a choice without text, which is never converted."""
    if get_origin(annotation) is Literal:
        return {type(choice) for choice in get_args(annotation)} - {str}
    if get_origin(annotation) is Annotated:
        return _scalar_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType, list):
        return set().union(*map(_scalar_types, get_args(annotation)))
    return {annotation}


def _words(annotation: Any) -> list[str]:
    """The texts that a field may have by name, such as `auto` in place of a number."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [word for part in get_args(annotation) for word in _words(part)]


def _parse(override: str) -> tuple[str, Any]:
    """The dotted name and the value of an override."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r} is not of the form key=value, for example train.steps=1000")
    if not text.strip():
        raise ConfigError(f"{override!r} has no value; write {key}=null for none")
    try:
        return key, yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from error


def _leaves(key: str, value: Any) -> Iterator[str]:
    """The dotted names of the fields that an override sets."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Sets nested fields, one by one, in nested fields: those that `values` does not name stay.

    Args:
        into: changed in place.
        values: the fields that win.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = into.get(key)
            into[key] = inner = inner if isinstance(inner, dict) else {}
            merge(inner, value)
        else:
            into[key] = value


def _place(cls: Any, location: Sequence[int | str]) -> Iterator[int | str]:
    """The fields and positions in a location of pydantic's, without the types that it tried for a field of several."""
    for part in location:
        is_section = isinstance(cls, type) and issubclass(cls, StrictConfig)
        if is_section or isinstance(part, int):
            yield part
        cls = cls.model_fields[part].annotation if is_section and part in cls.model_fields else None


def _first_error(cls: type[StrictConfig], error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, _place(cls, first["loc"])))
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
