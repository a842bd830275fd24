"""The real clips that are nearest to generated ones."""

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
    """A generated clip and the real clip that it resembles most."""

    generated: int
    """Index into the generated side."""
    real: int
    """Index into the real side."""
    distance: float


def neighbour_report(extractor: Extractor, samples: Samples, num_shown: int) -> tuple[dict[str, Any], list[Neighbour]]:
    """Whether generated clips are nearer to the real ones than other real clips are: is the model copying?

    Args:
        extractor: of clips.
        samples: both sides, and other real clips.
        num_shown: how many of the nearest and of the farthest are listed.

    Returns:
        A JSON-able part of the report, and every generated clip's neighbour, nearest first.
    """
    real, generated = samples.real.features(extractor), samples.generated.features(extractor)
    indices, distances = nearest(generated, real)
    order = np.lexsort((np.arange(len(distances)), distances))
    rows = [Neighbour(int(i), int(indices[i]), float(distances[i])) for i in order]
    floor = None
    if samples.floor is not None:
        others = np.sort(nearest(samples.floor.features(extractor), real)[1])
        # The chance that a generated clip is nearer than another real one is; ties count half.
        below, not_above = np.searchsorted(others, distances), np.searchsorted(others, distances, side="right")
        nearer = 1 - (below + not_above) / (2 * len(others))
        fifth = float(np.quantile(others, 0.05))
        floor = {
            "median_distance": float(np.median(others)),
            "chance_that_generated_is_nearer": float(nearer.mean()),
            "share_below_5th_percentile": float((distances < fifth).mean()),
        }

    def listed(neighbours: Sequence[Neighbour]) -> list[dict[str, Any]]:
        clips = samples.generated.side.clips, samples.real.side.clips
        return [
            {
                "generated": clips[0][row.generated].name,
                "real": clips[1][row.real].name,
                "real_start": clips[1][row.real].start,
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
