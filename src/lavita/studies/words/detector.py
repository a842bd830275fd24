"""Reads off a clip what it shows: the colours of object and ground, the object's shape, and its direction.

It knows the world (`world.py`), but no model and no learned weights: what differs from the colour of the border is the
object.

Legend: F frames, H W height and width.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lavita.studies.words.world import COLORS, DIRECTIONS, SHAPES, SIZE, Scene, shape_mask
from lavita.video.formats import Frames

LEAST_CONTRAST = 40.0
"""Distance in RGB between ground and object below which there is no object; colours of the world are 113 apart."""
LEAST_SPEED = 0.75
"""Pixels per frame below which nothing moves; a quarter of the speed in the world."""
Array = npt.NDArray[np.float64]


def read_scene(frames: Frames) -> Scene:
    """Names what a clip shows.

    Args:
        frames: uint8 (F, H, W, 3), F >= 2.

    Returns:
        The nearest colours, shape and direction; `none` for what cannot be seen: without an object, its colour, shape
        and direction.
    """
    pixels = frames.astype(np.float64)
    border = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)  # (F, H, W)
    contrast = np.percentile(distance, 97)  # the object takes a tenth of a frame
    if contrast < LEAST_CONTRAST:
        return Scene("none", "none", "none", nearest_color(ground))
    inside = pixels[distance > 0.8 * contrast]
    masks = np.clip(distance / contrast, 0, 1)
    masks = np.where(masks > 0.3, masks, 0)  # noise of the whole ground would pull the centre to the middle
    return Scene(nearest_color(np.median(inside, axis=0)), shape_of(masks), direction_of(masks), nearest_color(ground))


def nearest_color(color: Array) -> str:
    """The name of the colour of the world that is nearest to one in RGB, (3,)."""
    return min(COLORS, key=lambda name: float(np.linalg.norm(color - np.array(COLORS[name]))))


def centers(masks: Array) -> Array:
    """Centre of mass of each frame's mask (F, H, W): row and column, (F, 2); of an empty one that of the frame."""
    rows, columns = (np.arange(size) + 0.5 for size in masks.shape[1:])
    found = np.empty((len(masks), 2))
    for index, mask in enumerate(masks):
        mass = mask.sum()
        found[index] = [mask.sum(1) @ rows / mass, mask.sum(0) @ columns / mass] if mass else [rows.mean()] * 2
    return found


def direction_of(masks: Array) -> str:
    """The direction of the line through the centres of masks (F, H, W), or `none` if it is slower than LEAST_SPEED."""
    places, times = centers(masks), np.arange(len(masks))
    speed = np.array([np.polyfit(times, places[:, axis], 1)[0] for axis in (0, 1)])
    if abs(speed).max() < LEAST_SPEED:
        return "none"
    return max(DIRECTIONS, key=lambda name: float(speed @ np.array(DIRECTIONS[name])))


def shape_of(masks: Array) -> str:
    """The shape whose mask overlaps most with masks (F, H, W) that are moved to the middle and averaged."""
    middle = np.zeros((SIZE, SIZE))
    for mask, place in zip(masks, centers(masks), strict=True):
        middle += _moved(mask, np.array([SIZE / 2, SIZE / 2]) - place) / len(masks)
    scores = {}
    for shape, template in _templates().items():
        # A blurred or cut object has its centre a little off.
        shifts = [np.roll(template, (row, column), (0, 1)) for row in range(-2, 3) for column in range(-2, 3)]
        scores[shape] = max(np.minimum(middle, each).sum() / np.maximum(middle, each).sum() for each in shifts)
    return max(scores, key=scores.__getitem__)


@cache
def _templates() -> dict[str, Array]:
    """The masks of the shapes in the middle of a frame, with corners as round as those of a decoded one."""
    kernel = np.array([1, 4, 6, 4, 1]) / 16  # a standard deviation of one pixel
    found = {}
    for shape in SHAPES:
        mask = shape_mask(shape, SIZE / 2, SIZE / 2).astype(np.float64)
        for axis in (0, 1):
            mask = sum(weight * np.roll(mask, place - 2, axis) for place, weight in enumerate(kernel))
        found[shape] = mask
    return found


def _moved(mask: Array, way: Array) -> Array:
    """A mask (H, W) moved by a fraction of pixels, bilinearly; what leaves the frame comes back on the other side."""
    for axis in (0, 1):
        whole = int(np.floor(way[axis]))
        part = way[axis] - whole
        near, far = (np.roll(mask, whole + extra, axis) for extra in (0, 1))
        mask = (1 - part) * near + part * far
    return mask
