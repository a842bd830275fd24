"""Nearest neighbours in feature space: precision, recall, density, coverage, and the nearest real samples.

Legend: N real rows, M generated rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lavita.evaluation.distances.frechet import check_features

Array = npt.NDArray[np.float64]
_ROWS = 1024  # rows of a distance matrix in memory at a time


@dataclass(frozen=True)
class NeighbourScores:
    """Shares of samples of one set that lie among those of the other."""

    precision: float
    """Share of generated samples within the radius of a real one (Kynkaanniemi et al. 2019), 0 to 1: quality."""
    recall: float
    """Share of real samples within the radius of a generated one, 0 to 1: variety."""
    density: float
    """Mean number of real neighbourhoods that a generated sample is in, over k (Naeem et al. 2020); 1 for real ones."""
    coverage: float
    """Share of real samples with a generated one in their neighbourhood, 0 to 1."""
    k: int
    """Number of neighbours that defines a neighbourhood."""


def neighbour_scores(real: npt.ArrayLike, generated: npt.ArrayLike, k: int = 5) -> NeighbourScores:
    """Computes precision, recall, density and coverage.

    The radius of a sample is its distance to the k-th nearest other sample of the same set.

    Args:
        real: features (N, D), N > k.
        generated: features (M, D), M > k.
        k: number of neighbours, >= 1; 3 for Kynkaanniemi's precision and recall, 5 for Naeem's density and coverage.

    Raises:
        ValueError: for arrays of another shape, features that are not finite, or too few rows.
    """
    x, y = check_features("real", real), check_features("generated", generated)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"generated has {y.shape[1]} features per row, but real {x.shape[1]}")
    for field, rows in (("real", x), ("generated", y)):
        if not 1 <= k < len(rows):
            raise ValueError(f"k is {k}; allowed: 1 to {len(rows) - 1}, below the number of {field} samples")
    real_radii, generated_radii = _radii(x, k), _radii(y, k)
    num_around = np.zeros(len(y))
    recalled, covered = np.zeros(len(x), dtype=bool), np.zeros(len(x), dtype=bool)
    for first in range(0, len(x), _ROWS):
        part = slice(first, first + _ROWS)
        distances = _squared_distances(x[part], y)
        inside = distances <= real_radii[part, None]
        num_around += inside.sum(0)
        covered[part] = inside.any(1)
        recalled[part] = (distances <= generated_radii).any(1)
    return NeighbourScores(
        precision=float((num_around > 0).mean()),
        recall=float(recalled.mean()),
        density=float(num_around.mean() / k),
        coverage=float(covered.mean()),
        k=k,
    )


def nearest(queries: npt.ArrayLike, references: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Array]:
    """Finds the nearest reference of each query.

    Args:
        queries: features (M, D).
        references: features (N, D).

    Returns:
        Index of the reference (M,), the first one of a tie, and its Euclidean distance (M,).
    """
    x, y = check_features("queries", queries), check_features("references", references)
    indices, distances = np.zeros(len(x), dtype=np.int64), np.zeros(len(x))
    for first in range(0, len(x), _ROWS):
        part = slice(first, first + _ROWS)
        squared = _squared_distances(x[part], y)
        indices[part] = squared.argmin(1)
        distances[part] = np.sqrt(squared.min(1))
    return indices, distances


def _radii(rows: Array, k: int) -> Array:
    """Squared distance of each row to the k-th nearest other row, (N,)."""
    radii = np.zeros(len(rows))
    for first in range(0, len(rows), _ROWS):
        part = slice(first, first + _ROWS)
        distances = _squared_distances(rows[part], rows)
        # Rounding must not make another row nearer to a row than itself.
        distances[np.arange(len(distances)), np.arange(first, first + len(distances))] = 0
        radii[part] = np.partition(distances, k, axis=1)[:, k]
    return radii


def _squared_distances(x: Array, y: Array) -> Array:
    squared: Array = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.maximum(squared, 0)
