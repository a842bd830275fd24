"""The reference of a configuration, as commented YAML or Markdown, read from the classes that declare its fields."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lavita.core.config import StrictConfig, to_yaml
from lavita.core.sizes import Size

WIDTH = 100
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}


@dataclass(frozen=True)
class FieldReference:
    """One field of a configuration."""

    name: str
    description: str
    allowed: str
    """Type and range in words, or the list of allowed values."""
    default: Any
    """What JSON or YAML can hold; None if `required`."""
    required: bool
    section: type[StrictConfig] | None
    """The class of a nested section."""


def fields_of(cls: type[StrictConfig]) -> Iterator[FieldReference]:
    """The fields of a configuration class, in the order of their declaration."""
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        section = annotation if isinstance(annotation, type) and issubclass(annotation, StrictConfig) else None
        default = None if field.is_required() else _plain(field.get_default(call_default_factory=True))
        yield FieldReference(
            name,
            " ".join((field.description or "").split()),
            _allowed(field) if section is None else "",
            default,
            field.is_required(),
            section,
        )


def commented_yaml(cls: type[StrictConfig], values: Mapping[str, Any]) -> str:
    """A configuration as YAML that can be passed to `--config`, with a comment above each field.

    Args:
        cls: the configuration class.
        values: the value of each field, nested, as `model_dump(mode="json")` gives them; a required field that is
            missing is written as a comment.

    Returns:
        YAML. The comment has the description, the allowed values, and the default if the value differs from it.
    """
    return "\n".join(_yaml_lines(cls, values, "")) + "\n"


def _yaml_lines(cls: type[StrictConfig], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for field in fields_of(cls):
        if field.section is not None:
            yield ""
            yield from _comment(" ".join((field.section.__doc__ or "").split()), indent)
            yield f"{indent}{field.name}:"
            yield from _yaml_lines(field.section, values.get(field.name, {}), indent + "  ")
            continue
        value = values.get(field.name, field.default)
        facts = [field.allowed]
        if field.required:
            facts.append("required")
        elif value != field.default:
            facts.append(f"default: {_yaml(field.default)}")
        yield from _comment(f"{field.description} [{'; '.join(facts)}]", indent)
        if field.required and field.name not in values:
            yield f"{indent}# {field.name}:"
        else:
            yield f"{indent}{field.name}: {_yaml(value)}"


def markdown(cls: type[StrictConfig], prefix: str = "") -> str:
    """The fields of a configuration class and its sections as Markdown: one list item per field, 100 columns wide."""
    blocks = []
    for field in fields_of(cls):
        if field.section is not None:
            heading = f"\n### `{prefix}{field.name}`\n\n" + _wrap(" ".join((field.section.__doc__ or "").split()), "")
            blocks.append(f"{heading}\n\n{markdown(field.section, f'{prefix}{field.name}.')}")
            continue
        default = "required" if field.required else f"default `{_yaml(field.default)}`"
        blocks.append(_wrap(f"- **`{prefix}{field.name}`** ({field.allowed}; {default}): {field.description}", "  "))
    return "\n".join(blocks)


def _allowed(field: FieldInfo) -> str:
    words = _type_words(field.annotation)
    bounds = [
        f"{text} {getattr(rule, key)}" for rule in field.metadata for key, text in _BOUNDS.items() if hasattr(rule, key)
    ]
    shortest = [rule.min_length for rule in field.metadata if hasattr(rule, "min_length")]
    if shortest:
        bounds.append(f"at least {shortest[0]} of them")
    return ", ".join([words, *bounds])


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *others, last = map(_yaml, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is Annotated:
        positive = any(getattr(rule, "gt", None) == 0 for rule in annotation.__metadata__)
        return ("positive " if positive else "") + _type_words(arguments[0])
    if origin in (Union, types.UnionType):
        parts = [_type_words(part) for part in arguments if part is not type(None)]
        return " or ".join([*parts, "null"] if type(None) in arguments else parts)
    if origin is list:
        return f"list of {_type_words(arguments[0])}"
    if hasattr(annotation, "FORMAT"):
        return str(annotation.FORMAT)
    return {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}[annotation]


def _plain(value: Any) -> Any:
    if isinstance(value, StrictConfig):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, (Path, Size)) else value


def _yaml(value: Any) -> str:
    """A value on one line of YAML."""
    return to_yaml(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").rstrip("\n")


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False):
        yield f"{indent}# {line}"


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
