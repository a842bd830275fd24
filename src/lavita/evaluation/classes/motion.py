"""How much moves in a clip, and whether generated clips move as much as real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

FACTOR = 2.0
"""Generated motion agrees with real motion if it is from half to twice as much, both included."""


def motion(frames: Frames) -> float:
    """Measures the mean absolute difference of successive frames.

    Args:
        frames: uint8 `(F, H, W, 3)`, F >= 2.

    Returns:
        The mean over pixels, channels and pairs of frames, in 1/255 of the range: 0 to 255.

    Raises:
        ValueError: for another dtype or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2 or 0 in frames.shape:
        raise ValueError(f"frames is {frames.dtype} {frames.shape}; motion needs uint8 (F, H, W, 3), F >= 2")
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


@dataclass(frozen=True)
class ClassMotion:
    """Motion of one class, in 1/255."""

    real: float
    """Mean over the real clips."""
    generated: float
    """Mean over the generated clips."""
    ratio: float | None
    """Generated over real; None if nothing moves in the real clips."""
    within_factor_two: bool
    num_real_clips: int
    num_generated_clips: int


def compare_motion(
    real: Mapping[str, Sequence[float]], generated: Mapping[str, Sequence[float]]
) -> dict[str, ClassMotion]:
    """Compares the motion of generated clips with that of real ones, class by class.

    Args:
        real: motion of each real clip, by class.
        generated: motion of each generated clip, by class.

    Returns:
        A comparison for each class of `generated`, sorted by name.

    Raises:
        ValueError: for a class without real or generated clips.
    """
    result = {}
    for name in sorted(generated):
        for kind, clips in (("real", real.get(name, ())), ("generated", generated[name])):
            if not len(clips):
                raise ValueError(f"class {name!r} has no {kind} clips to measure the motion of")
        real_mean, generated_mean = float(np.mean(real[name])), float(np.mean(generated[name]))
        result[name] = ClassMotion(
            real=real_mean,
            generated=generated_mean,
            ratio=generated_mean / real_mean if real_mean else None,
            # Not computed from the ratio, so that still clips match a still class.
            within_factor_two=real_mean / FACTOR <= generated_mean <= real_mean * FACTOR,
            num_real_clips=len(real[name]),
            num_generated_clips=len(generated[name]),
        )
    return result
