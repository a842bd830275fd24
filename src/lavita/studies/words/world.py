"""A world of one moving object: clips with captions that name its colour, its shape, its direction and the ground.

The captions name two colours, so a model must know which of them belongs to what. A quarter of the combinations of
colour, shape and direction is held out; every colour, shape and direction, and every pair of them, is trained on.

Legend: F frames, H W height and width.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lavita.core.files import replacing, write_json
from lavita.core.seeds import numpy_generator
from lavita.video.formats import Frames
from lavita.video.writing import write_video

SIZE, NUM_FRAMES, FPS = 32, 4, 4.0
SPEED = 3.0
"""Pixels per frame."""
AREA = 150.0
"""Pixels of every shape, so that its area does not tell which one it is."""
JITTER = 0.5
"""Largest distance, along rows and columns, of the middle of the object's way from the middle of the frame."""
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (45, 165, 65),
    "blue": (45, 80, 215),
    "yellow": (235, 210, 55),
    "purple": (150, 55, 180),
    "white": (240, 240, 240),
}
SHAPES = ("square", "circle", "triangle", "cross")
DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Steps along rows and columns."""
_PHRASES = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
TEMPLATES = (
    "a {color} {shape} moves {direction} on a {ground} ground",
    "on a {ground} ground, a {color} {shape} goes {direction}",
    "{ground} background, and a {color} {shape} that moves {direction}",
    "the {shape} is {color}, the background is {ground}, it moves {direction}",
)
ATTRIBUTES = ("color", "shape", "direction", "ground")


class Scene(NamedTuple):
    """What a clip shows, and its caption says."""

    color: str
    shape: str
    direction: str
    ground: str
    """Colour of the ground, another than the object's."""

    @property
    def held_out(self) -> bool:
        """Whether its combination of colour, shape and direction is never trained on."""
        places = (list(COLORS).index(self.color), SHAPES.index(self.shape), list(DIRECTIONS).index(self.direction))
        return sum(places) % len(DIRECTIONS) == 0

    def caption(self, template: int) -> str:
        """The caption by one of `TEMPLATES`."""
        words = {**self._asdict(), "direction": _PHRASES[self.direction]}
        return TEMPLATES[template].format(**words)


def scenes(held_out: bool) -> list[Scene]:
    """All scenes that are held out, or all others."""
    everything = (Scene(*values) for values in product(COLORS, SHAPES, DIRECTIONS, COLORS))
    return [scene for scene in everything if scene.color != scene.ground and scene.held_out == held_out]


def shape_mask(shape: str, row: float, column: float, size: int = SIZE, samples: int = 4) -> npt.NDArray[np.float32]:
    """How much of each pixel a shape covers, float32 (size, size) in 0..1.

    Args:
        shape: one of `SHAPES`.
        row: row of its centre of mass, in pixels from the upper border.
        column: column of its centre of mass.
        size: height and width of the frame.
        samples: points per pixel and axis.

    Raises:
        ValueError: for another shape.
    """
    points = (np.arange(size * samples) + 0.5) / samples
    y, x = points[:, None] - row, points[None] - column
    if shape == "square":
        inside = np.maximum(abs(x), abs(y)) < np.sqrt(AREA) / 2
    elif shape == "circle":
        inside = x**2 + y**2 < AREA / np.pi
    elif shape == "triangle":
        side = np.sqrt(4 * AREA / np.sqrt(3))
        height = side * np.sqrt(3) / 2
        below = y + 2 * height / 3  # distance from the upper corner
        inside = (below > 0) & (below < height) & (abs(x) < below / np.sqrt(3))
    elif shape == "cross":
        arm = np.sqrt(AREA / 5)  # five squares
        inside = np.minimum(abs(x), abs(y)) < arm / 2
        inside &= np.maximum(abs(x), abs(y)) < 1.5 * arm
    else:
        raise ValueError(f"shape is {shape!r}; allowed: {', '.join(SHAPES)}")
    return inside.reshape(size, samples, size, samples).mean((1, 3)).astype(np.float32)


def render(scene: Scene, random: np.random.Generator) -> Frames:
    """Draws a clip of a scene, uint8 (F, H, W, 3): the middle of its way is drawn near that of the frame."""
    step = np.array(DIRECTIONS[scene.direction]) * SPEED
    start = SIZE / 2 + random.uniform(-JITTER, JITTER, 2) - step * (NUM_FRAMES - 1) / 2
    ground, color = (np.array(COLORS[name], dtype=np.float32) for name in (scene.ground, scene.color))
    frames = []
    for index in range(NUM_FRAMES):
        mask = shape_mask(scene.shape, *(start + index * step))[..., None]
        frames.append((ground + mask * (color - ground)).round().astype(np.uint8))
    return np.stack(frames)


def write_clips(folder: Path, clips_per_scene: int, seed: int = 0) -> None:
    """Writes the training clips of all scenes that are not held out, with `captions.csv` beside them.

    Every clip has two captions, by two of the templates. A folder that is complete already is left as it is.

    Args:
        folder: gets `train/` with the clips, and `captions.csv`.
        clips_per_scene: clips of each scene, at different places.
        seed: seed of the places and of the templates.

    Raises:
        ValueError: if the folder holds other clips.
    """
    facts = {"clips_per_scene": clips_per_scene, "seed": seed, "size": SIZE, "frames": NUM_FRAMES}
    record = folder / "clips.json"
    if record.exists():
        if (found := json.loads(record.read_text(encoding="utf-8"))) != facts:
            raise ValueError(f"{folder}: holds the clips of {found}, but {facts} were asked for; use another out")
        return
    rows = []
    for number, scene in enumerate(scenes(held_out=False)):
        for clip in range(clips_per_scene):
            random = numpy_generator(seed, "words", number, clip)
            name = f"{'-'.join(scene)}-{clip}.mp4"
            write_video(folder / "train" / name, render(scene, random), FPS)
            for template in random.choice(len(TEMPLATES), 2, replace=False):
                rows.append((name, scene.caption(int(template))))
    _write_table(folder / "captions.csv", rows)
    write_json(record, facts)


def prompts(most_seen: int) -> dict[str, tuple[Scene, str]]:
    """What a trained model is asked for, by the name of the sample without its seed.

    Args:
        most_seen: how many of the scenes that are trained on, at equal distances in their list.

    Returns:
        Every scene that is held out, named `held-out/...`, and some of the others, `seen/...`, with a caption each.
    """
    trained = scenes(held_out=False)
    places = np.linspace(0, len(trained) - 1, min(most_seen, len(trained))).round().astype(int)
    groups = {"held-out": scenes(held_out=True), "seen": [trained[place] for place in places]}
    return {
        f"{group}/{'-'.join(scene)}": (scene, scene.caption(number % len(TEMPLATES)))
        for group, chosen in groups.items()
        for number, scene in enumerate(chosen)
    }


def write_prompts(file: Path, asked: Mapping[str, tuple[Scene, str]]) -> None:
    """Writes a table for `lavita sample --prompts`."""
    _write_table(file, [(f"{name}.mp4", caption) for name, (_, caption) in asked.items()])


def _write_table(file: Path, rows: Sequence[tuple[str, str]]) -> None:
    with replacing(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file", "caption"), *rows])
