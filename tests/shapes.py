"""Videos of drifting shapes in class folders: classes that differ in one thing only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lavita.video.writing import write_video

SIZE, NUM_FRAMES = 32, 8
HUES = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}
SHAPES = ("checkers", "disk", "stripes")

Frames = npt.NDArray[np.uint8]
Paint = Callable[[str, np.random.Generator], Frames]


def paint_shape(shape: str, colours: npt.NDArray[Any], rng: np.random.Generator) -> Frames:
    """A shape of the second colour that drifts over the first, by one pixel per frame."""
    y, x = np.mgrid[:SIZE, :SIZE]
    phase = rng.integers(8)
    frames = []
    for time in range(NUM_FRAMES):
        if shape == "stripes":
            mask = (y + phase + time) % 8 < 4
        elif shape == "checkers":
            mask = ((x + phase + time) // 4 + y // 4) % 2 == 0
        else:
            mask = (x - 10 - phase - time % 4) ** 2 + (y - 12 - phase) ** 2 < 64
        frames.append(colours[mask.astype(int)])
    return np.stack(frames).astype(np.uint8)


def shape_in_any_colour(name: str, rng: np.random.Generator) -> Frames:
    while True:
        colours = rng.integers(0, 256, (2, 3))
        if np.abs(colours[0] - colours[1]).max() > 80:
            return paint_shape(name, colours, rng)


def disk_of_a_hue(name: str, rng: np.random.Generator) -> Frames:
    return paint_shape("disk", np.array([(128, 128, 128), HUES[name]]), rng)


def make_clips(names: Sequence[str], painter: Paint, count: int, seed: int) -> list[tuple[str, Frames]]:
    """Clips of each class; generators are the same for all classes, which so differ only by their names."""
    return [(name, painter(name, np.random.default_rng([seed, number]))) for name in names for number in range(count)]


def write_set(root: Path, names: Sequence[str], painter: Paint, count: int, seed: int) -> Path:
    """Writes `make_clips` as `<class>/<number>.mp4`."""
    for index, (name, frames) in enumerate(make_clips(names, painter, count, seed)):
        write_video(root / name / f"{index % count}.mp4", frames, fps=8)
    return root
