"""Shapes of clips that a transformer was trained on, in latents: what its fields say about them.

Legend: F frames, h w latent size, P patch, T tokens in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
import torch

from lavita.models.embeddings import frame_positions, spatial_table

Shape = tuple[int, int, int]
"""(F, h, w)."""


def sample_grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width (h, w) of a model's latents, from its field `sample_size`."""
    size = config["sample_size"]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def sample_size_field(height: int, width: int) -> int | list[int]:
    """The field `sample_size` of latents (h, w)."""
    return height if height == width else [height, width]


def parse_latent_size(text: str) -> int | list[int]:
    """Reads `32`, or height x width: `12x20`, as the field `sample_size`; ValueError for another text."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    if match is None:
        raise ValueError(
            f"sample_size is {text!r}, but must be a side of the latents, or height x width, such as 12x20"
        )
    return sample_size_field(int(match[1]), int(match[2] or match[1]))


def trained_shapes(config: Mapping[str, Any]) -> list[Shape]:
    """The shapes (F, h, w) of the training clips, the one of samples first."""
    if not config.get("trained_shapes"):
        return [(config["num_frames"], *sample_grid(config))]
    return [(int(frames), int(height), int(width)) for frames, height, width in config["trained_shapes"]]


def trained_range(config: Mapping[str, Any]) -> Shape:
    """The most frames, the largest height and the largest width of the training clips."""
    frames, heights, widths = zip(*trained_shapes(config), strict=True)
    return max(frames), max(heights), max(widths)


def largest_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model whose only shape is the largest one of `config`, which takes the most memory."""
    if not config.get("trained_shapes"):
        return dict(config)
    frames, height, width = max(trained_shapes(config), key=lambda shape: (np.prod(shape), shape))
    size = sample_size_field(height, width)
    return {**config, "num_frames": frames, "sample_size": size, "trained_shapes": None}


def default_frames(config: Mapping[str, Any], grid: tuple[int, int]) -> int:
    """Latent frames of a sample with latents (h, w): the most that were trained in this size, else the model's."""
    return max(
        (frames for frames, *size in trained_shapes(config) if tuple(size) == grid), default=config["num_frames"]
    )


def shape_warning(config: Mapping[str, Any], shape: Shape, pixels: int) -> str | None:
    """What to say about a sample of a shape (F, h, w) that the model was not trained on; None if it was.

    Shorter clips than those of a model with one shape are no reason to say anything. `pixels` is the side of a latent
    in pixels.
    """

    def named(frames: int, height: int, width: int) -> str:
        return f"{frames} x {height * pixels}x{width * pixels}"

    trained = trained_shapes(config)
    several = bool(config.get("trained_shapes"))
    if shape in trained or (not several and shape[1:] == trained[0][1:]):
        return None
    _, height, width = trained_range(config)
    beyond = shape[1] > height or shape[2] > width
    how = "; its positions in space are interpolated" if beyond else ""
    return (
        f"{named(*shape)} was asked for (latent frames x height x width in pixels), but the model was trained on "
        f"{', '.join(named(*each) for each in trained)}{how}"
    )


def grid_positions(config: Mapping[str, Any], grid: tuple[int, int]) -> torch.Tensor:
    """Positions in space of a grid of patches (h / P, w / P) in any shape, float32 (1, h / P * w / P, D).

    They are coordinates from the top left corner, as in DiT: within the trained range they are 0, 1, 2, ..., whatever
    the shape; a side beyond it is compressed evenly into it, as `frame_positions` does for time.
    """
    _, height, width = trained_range(config)
    patch = config["patch_size"]
    return torch.from_numpy(_table(*grid, height // patch, width // patch, config["hidden_size"])).float()[None]


@lru_cache(maxsize=16)
def _table(rows: int, columns: int, trained_rows: int, trained_columns: int, width: int) -> np.ndarray:
    """The positions of a grid, float64 (rows * columns, D), computed once: a run with buckets needs them in every step.

    Not a tensor, which could be one without data, of a rehearsal on fake tensors.
    """
    return spatial_table(frame_positions(rows, trained_rows), frame_positions(columns, trained_columns), width)


def stored_grid(config: Mapping[str, Any], count: int) -> tuple[int, int]:
    """Rows and columns of `count` positions in space that weights hold: a square, unless their fields say otherwise."""
    size, patch = config.get("sample_size"), config.get("patch_size")
    if isinstance(size, (list, tuple)) and patch:
        return int(size[0]) // int(patch), int(size[1]) // int(patch)
    return isqrt(count), isqrt(count)


def check_shapes(config: Mapping[str, Any], tube: int) -> None:
    """Checks the fields `sample_size` and `trained_shapes`; ValueError names what is wrong."""
    size, patch = config["sample_size"], config["patch_size"]
    if isinstance(size, bool) or not (isinstance(size, int) or _are_counts(size, 2)):
        raise ValueError(f"sample_size is {size!r}, but must be a whole number, or a list of a height and a width")
    if min(sample_grid(config)) < 1:
        raise ValueError(f"sample_size is {size}, but must be at least 1")
    if any(side % patch for side in sample_grid(config)):
        raise ValueError(f"sample_size is {size}, but must be a multiple of patch_size ({patch})")
    if (shapes := config["trained_shapes"]) is None:
        return
    if not isinstance(shapes, (list, tuple)) or not shapes or not all(_are_counts(shape, 3) for shape in shapes):
        raise ValueError(f"trained_shapes is {shapes!r}, but must be a list of frames, height and width each, or null")
    for frames, *sides in shapes:
        if frames % tube or any(side % patch for side in sides):
            raise ValueError(
                f"trained_shapes has {[frames, *sides]}, but must have multiples of patch_size ({patch})"
                + (f" and of tube_size ({tube})" if tube > 1 else "")
            )


def _are_counts(values: Any, number: int) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == number
    return is_list and all(type(value) is int and value >= 1 for value in values)
