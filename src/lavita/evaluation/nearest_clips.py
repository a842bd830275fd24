"""The nearest real clip of each generated clip: is the model copying?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavita.evaluation.distances.precision_recall import nearest
from lavita.evaluation.feature_metrics import Samples
from lavita.evaluation.features.extractors import Extractor


@dataclass(frozen=True)
class Neighbour:
    """A generated clip and the real clip nearest to it."""

    generated: int
    """Index into the generated clips."""
    real: int
    """Index into the real clips."""
    distance: float
    """Euclidean, in feature space."""


def neighbour_report(extractor: Extractor, samples: Samples, num_shown: int) -> tuple[dict[str, Any], list[Neighbour]]:
    """Compares how near generated clips, and other real clips, are to the real clips.

    Args:
        extractor: an extractor of clip features.
        samples: generated, real and, if there are any, other real clips.
        num_shown: number of nearest and of farthest clips to list.

    Returns:
        A JSON-able part of the report, and the neighbour of every generated clip, nearest first.
    """
    real_features = samples.real.features(extractor)
    indices, distances = nearest(samples.generated.features(extractor), real_features)
    order = np.lexsort((np.arange(len(distances)), distances))
    rows = [Neighbour(int(i), int(indices[i]), float(distances[i])) for i in order]
    floor = None
    if samples.floor is not None:
        others = np.sort(nearest(samples.floor.features(extractor), real_features)[1])
        # The chance that a generated clip is nearer than another real clip; ties count half.
        below, not_above = np.searchsorted(others, distances), np.searchsorted(others, distances, side="right")
        nearer = 1 - (below + not_above) / (2 * len(others))
        fifth = float(np.quantile(others, 0.05))
        floor = {
            "median_distance": float(np.median(others)),
            "chance_that_generated_is_nearer": float(nearer.mean()),
            "share_below_5th_percentile": float((distances < fifth).mean()),
        }

    def listed(neighbours: Sequence[Neighbour]) -> list[dict[str, Any]]:
        generated, real = samples.generated.clips.clips, samples.real.clips.clips
        return [
            {
                "generated": generated[row.generated].name,
                "real": real[row.real].name,
                "real_start": real[row.real].start,
                "distance": row.distance,
            }
            for row in neighbours
        ]

    report = {
        "extractor": extractor.name,
        "median_distance": float(np.median(distances)),
        "other_real": floor,
        "nearest": listed(rows[:num_shown]),
        "farthest": listed(rows[::-1][:num_shown]),
    }
    return report, rows
