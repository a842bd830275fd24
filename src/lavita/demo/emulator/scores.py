"""Scores of predicted videos against what the game did: pixels, positions of objects, and whether they are there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lavita.demo.sprites import SPRITES, Sprite, number_areas
from lavita.video.formats import Frames

Array = npt.NDArray[np.float64]
BOOTSTRAPS = 1000
LINE = (37, 42)
"""Rows of freeway's yellow line, which has the chicken's colour."""
OBJECTS: Mapping[str, Sequence[Sprite]] = {
    "freeway": (Sprite("freeway", "chicken", lambda r, g, b: (r > 180) & (g > 180) & (b < 150), columns=(24, 48)),),
    "boxing": tuple(replace(sprite, least_pixels=8) for sprite in SPRITES if sprite.game == "boxing"),
}
"""Objects of some games of which there is at most one, and which can be told by their colour."""


def locate(sprite: Sprite, frames: Frames) -> Array:
    """The place of an object in each frame: the centre of the largest area in its colours.

    Args:
        sprite: the object.
        frames: uint8 (N, 64, 64, 3) of its game.

    Returns:
        Row and column in pixels, (N, 2); NaN where there is none.
    """
    red, green, blue = np.moveaxis(frames.astype(np.int16), -1, 0)
    mask = np.zeros(frames.shape[:3], dtype=bool)
    inside = (slice(None), slice(*sprite.rows), slice(*sprite.columns))
    mask[inside] = sprite.is_colored(red, green, blue)[inside]
    if sprite.name == "chicken":
        mask[:, slice(*LINE)] = False
    places = np.full((len(frames), 2), np.nan)
    for index, areas in enumerate(number_areas(mask)):
        names, sizes = np.unique(areas[areas > 0], return_counts=True)
        if len(sizes) and sizes.max() >= sprite.least_pixels:
            places[index] = np.argwhere(areas == names[sizes.argmax()]).mean(axis=0)
    return places


def squared_errors(made: Frames, true: Frames) -> Array:
    """Mean squared error of each frame, (clips, frames), of clips (clips, frames, H, W, 3)."""
    return np.asarray(((made.astype(np.float64) - true) ** 2).mean(axis=(2, 3, 4)))


def psnr(error: npt.ArrayLike) -> Array:
    """Peak signal-to-noise ratio in dB of mean squared errors of 8-bit frames."""
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 1e-10)))


def object_scores(sprite: Sprite, made: Frames, true: Frames) -> tuple[Array, Array]:
    """How far an object is from its true place, and whether it is there, wherever it truly is.

    Returns:
        The distance in pixels, NaN where it is in one of the two only or in neither; and 1 or 0 where it truly is, NaN
        elsewhere; both (clips, frames).
    """
    shape = true.shape[:2]
    there, here = (locate(sprite, clips.reshape(-1, *clips.shape[2:])).reshape(*shape, 2) for clips in (true, made))
    exists, found = ~np.isnan(there[..., 0]), ~np.isnan(here[..., 0])
    return np.linalg.norm(there - here, axis=-1), np.where(exists, found, np.nan).astype(np.float64)


def mean_interval(values: Array, as_psnr: bool = False) -> tuple[Array, Array, Array]:
    """Mean over clips at each horizon, with the 95% interval of a bootstrap over the clips.

    Args:
        values: (clips, horizons), NaN where there is no value.
        as_psnr: the values are squared errors, whose mean is turned into a PSNR.

    Returns:
        Mean, lower and upper end, each (horizons,); NaN where no clip has a value.
    """
    finish = psnr if as_psnr else np.asarray
    picks = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAPS, len(values)))
    known = ~np.isnan(values)
    filled, counts = np.where(known, values, 0.0), known.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = finish(filled.sum(0) / counts.sum(0))
        drawn = finish(filled[picks].sum(1) / counts[picks].sum(1))  # (bootstraps, horizons)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a horizon at which no clip has a value
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return mean, low, high
