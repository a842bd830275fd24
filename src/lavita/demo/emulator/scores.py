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
OBJECTS: Mapping[str, Sequence[Sprite]] = {
    "freeway": (
        Sprite(
            "freeway",
            "chicken",  # (252, 252, 84); the cars of the lane beside it are yellow too, (210, 210, 64)
            lambda r, g, b: (r > 212) & (g > 212) & (b < 160),
            columns=(24, 48),
            least_pixels=3,
        ),
    ),
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


def summarize_clips(values: Array, as_psnr: bool = False) -> list[list[float | None]]:
    """Mean over seeds and clips at each horizon, how sure it is, and how many clips it rests on.

    The bootstrap draws clips, each with its values of all seeds: the seeds share the clips, so their values of one clip
    are not independent.

    Args:
        values: (seeds, clips, horizons), NaN where there is no value.
        as_psnr: the values are squared errors, whose mean is turned into a PSNR.

    Returns:
        For each horizon the mean, the lower and upper end of its 95% interval over the clips, the standard deviation of
        the seeds' means (None unless all of two or more seeds have a value), and the number of clips with a value. Mean
        and ends are None where there is no clip.
    """
    finish = psnr if as_psnr else np.asarray
    num_seeds, num_clips, _ = values.shape
    known = ~np.isnan(values)
    filled, counts = np.where(known, values, 0.0), known.astype(np.float64)
    sums, numbers = filled.sum(0), counts.sum(0)  # (clips, horizons)
    picks = np.random.default_rng(0).integers(0, num_clips, (BOOTSTRAPS, num_clips))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = finish(sums.sum(0) / numbers.sum(0))
        drawn = finish(sums[picks].sum(1) / numbers[picks].sum(1))  # (bootstraps, horizons)
        of_seeds = finish(filled.sum(1) / counts.sum(1))  # (seeds, horizons)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a horizon at which no clip has a value
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    spread = of_seeds.std(axis=0, ddof=1) if num_seeds > 1 else np.full_like(mean, np.nan)
    rows = zip(mean, low, high, spread, known.any(0).sum(0), strict=True)
    return [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in rows]
