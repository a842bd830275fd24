"""Extractors of features: each turns the output of a network into features. A new one is one entry in `EXTRACTORS`.

Legend: N clips, F frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from lavita.core.seeds import numpy_generator
from lavita.evaluation.features.networks import NETWORKS, NetworkSpec

Array = npt.NDArray[np.float32]
Level = Literal["clip", "frame", "labels"]

_LITE0_FEATURES = 1280
_PROJECTED = 128
# In real clips, changes from frame to frame are this much smaller than differences between clips; without these
# factors, neither change nor trend would have any weight.
_CHANGE_WEIGHT, _TREND_WEIGHT = 4.0, 2.0


@dataclass(frozen=True)
class Extractor:
    """A way to turn the output of a network into features."""

    name: str
    network: NetworkSpec
    level: Level
    """Shape of the features: `clip` (N, D); `frame` (N, F, D); `labels`, class probabilities, (N, K)."""
    read: Callable[[Array], Array]
    """Turns the network's output, (N, ...), into features."""
    num_features: int
    """D or K."""
    sees_order: bool = True
    """Whether the features depend on the order of the frames; otherwise they must not be used to rank videos."""


def _as_is(output: Array) -> Array:
    return output


def _lite0_frames(output: Array) -> Array:
    return output[..., :_LITE0_FEATURES]


@cache
def _projection(stream: str) -> npt.NDArray[np.float64]:
    """A fixed random projection (1280, 128), which preserves distances on average (Johnson & Lindenstrauss 1984)."""
    rng = numpy_generator(0, "efficientnet_lite0", stream)
    return rng.normal(size=(_LITE0_FEATURES, _PROJECTED)) / np.sqrt(_PROJECTED)


def _lite0_mean(output: Array) -> Array:
    return (_lite0_frames(output).mean(1, dtype=np.float64) @ _projection("mean")).astype(np.float32)


def _lite0_video(output: Array) -> Array:
    frames = _lite0_frames(output).astype(np.float64)
    half = frames.shape[1] // 2
    change = _CHANGE_WEIGHT * np.abs(np.diff(frames, axis=1)).mean(1)
    trend = _TREND_WEIGHT * (frames[:, -half:].mean(1) - frames[:, :half].mean(1))
    parts = (frames.mean(1) @ _projection("mean"), change @ _projection("change"), trend @ _projection("trend"))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _lite0_labels(output: Array) -> Array:
    logits = output[..., _LITE0_FEATURES:].mean(1, dtype=np.float64)
    logits -= logits.max(1, keepdims=True)
    weights = np.exp(logits)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


_LITE0 = NETWORKS["efficientnet_lite0"]
EXTRACTORS: dict[str, Extractor] = {
    extractor.name: extractor
    for extractor in (
        Extractor("i3d", NETWORKS["i3d"], "clip", _as_is, 400),
        Extractor("inception", NETWORKS["inception"], "frame", _as_is, 2048, sees_order=False),
        Extractor("inception_stylegan", NETWORKS["inception_stylegan"], "frame", _as_is, 2048, sees_order=False),
        Extractor("c3d", NETWORKS["c3d"], "labels", _as_is, 101),
        Extractor("efficientnet_lite0", _LITE0, "frame", _lite0_frames, _LITE0_FEATURES, sees_order=False),
        Extractor("efficientnet_lite0_mean", _LITE0, "clip", _lite0_mean, _PROJECTED, sees_order=False),
        Extractor("efficientnet_lite0_video", _LITE0, "clip", _lite0_video, 3 * _PROJECTED),
        Extractor("efficientnet_lite0_labels", _LITE0, "labels", _lite0_labels, 1000, sees_order=False),
    )
}
"""`efficientnet_lite0_video` joins the mean over the frames, the mean change between successive frames, and the change
from the first half to the second, with weights 1, 4 and 2, each projected to 128 dimensions; `efficientnet_lite0_mean`
is the first of these alone."""


def get_extractor(field: str, name: str, level: Level) -> Extractor:
    """Finds an extractor by name.

    Raises:
        ValueError: if the name is unknown or of another level; the message names `field`.
    """
    allowed = [known.name for known in EXTRACTORS.values() if known.level == level]
    if name not in allowed:
        raise ValueError(f"{field} is {name!r}; allowed: {', '.join(allowed)}")
    return EXTRACTORS[name]
