"""Sizes of frames, in pixels: a number for a square, or height x width, always in this order; buckets of clips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import core_schema

LEAST_SIDE, MOST_SIDE = 8, 2**14
_FORMAT = "a side in pixels, such as 64, or height x width, such as 96x160"


@dataclass(frozen=True)
class Size:
    """Height and width of frames in pixels."""

    FORMAT: ClassVar[str] = "height x width"
    """What the text of such a value is, for the reference of a configuration."""

    height: int
    width: int

    @classmethod
    def of(cls, size: AnySize) -> Size:
        """The size itself, or that of a square with this side."""
        return cls(size, size) if isinstance(size, int) else size

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    def __str__(self) -> str:
        """Height x width: `96x160`, and `64x64` for a square."""
        return f"{self.height}x{self.width}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Lets a configuration hold a size, which is saved as its text."""
        return core_schema.is_instance_schema(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )


AnySize = int | Size
"""The side of a square, or height and width."""


def plain_size(size: Size) -> AnySize:
    """The side of a square; another size as it is."""
    return size.height if size.height == size.width else size


def parse_size(text: str, field: str = "resolution") -> AnySize:
    """Reads `64` or `96x160` (height x width); a square is the int of its side.

    Raises:
        ValueError: for another text, or a side out of range; names the field.
    """
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip())
    if match is None:
        raise ValueError(f"{field} is {text!r}, but must be {_FORMAT}")
    size = Size(int(match[1]), int(match[2] or match[1]))
    if (problem := _out_of_range(size)) is not None:
        raise ValueError(f"{field} is {text}, but {problem}")
    return plain_size(size)


def _out_of_range(size: Size) -> str | None:
    if not all(LEAST_SIDE <= side <= MOST_SIDE for side in (size.height, size.width)):
        return f"each side must be in {LEAST_SIDE}..{MOST_SIDE} pixels"
    return None


def _field_value(value: Any) -> Any:
    """The value of a configuration's field: checked here, because a union of types would give an error for each."""
    if isinstance(value, str):
        try:
            if "x" not in value:  # as for other numbers in quotes
                raise ValueError
            return parse_size(value)
        except ValueError as error:
            raise ValueError(str(error).partition(", but ")[2] or f"must be {_FORMAT}, without quotes") from None
    if isinstance(value, int) and not isinstance(value, bool):
        value = Size(value, value)
    if not isinstance(value, Size):
        raise ValueError(f"must be {_FORMAT}")
    if (problem := _out_of_range(value)) is not None:
        raise ValueError(problem)
    return plain_size(value)


SizeField = Annotated[AnySize, BeforeValidator(_field_value)]
"""The type of a configuration's field that holds a size."""


@dataclass(frozen=True)
class Bucket:
    """The shape of some of the clips of a run: all clips of a batch are of one bucket."""

    FORMAT: ClassVar[str] = "frames x height x width"

    num_frames: int
    size: Size

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Reads frames x height x width: `16x64x64`.

        Raises:
            ValueError: for another text, or a number out of range.
        """
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text.strip())
        if match is None or not int(match[1]):
            raise ValueError(f"{text!r} is no bucket: write frames x height x width, such as 16x64x64")
        size = Size(int(match[2]), int(match[3]))
        if (problem := _out_of_range(size)) is not None:
            raise ValueError(f"{text!r} is no bucket: {problem}")
        return cls(int(match[1]), size)

    def __str__(self) -> str:
        """Frames x height x width."""
        return f"{self.num_frames}x{self.size}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Lets a configuration hold a bucket, which is read from its text and saved as it."""

        def read(value: Any) -> Bucket:
            return value if isinstance(value, cls) else cls.parse(str(value))

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )


def listed_sizes(sizes: Sequence[Size]) -> str:
    """Different sizes, separated by commas: `64x64, 48x80`."""
    return ", ".join(map(str, dict.fromkeys(sizes)))
