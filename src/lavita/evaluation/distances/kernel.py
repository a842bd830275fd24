"""The kernel distance of two sets of features: an unbiased estimate of the squared MMD with a cubic kernel.

Legend: N and M rows of the two sets, D features, C clusters of a set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lavita.evaluation.distances.clusters import cluster_numbers, num_clusters
from lavita.evaluation.distances.frechet import Z_95, check_features

Array = npt.NDArray[np.float64]
MIN_SAMPLES = 3
"""Fewest independent samples of a set."""
_ROWS = 1024  # rows of a kernel matrix in memory at a time


@dataclass(frozen=True)
class KernelScore:
    """A kernel distance and its uncertainty."""

    value: float
    """Unbiased: 0 on average if both sets come from one distribution, and then about as often negative as positive."""
    standard_error: float
    """Jackknife over clusters, exact for this statistic to first order."""
    interval_95: tuple[float, float]
    """Covers the distance of the distributions."""


def kernel_score(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    clusters_x: npt.ArrayLike | None = None,
    clusters_y: npt.ArrayLike | None = None,
) -> KernelScore:
    """`mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, `k(a, b) = (a.b / D + 1)^3` (Binkowski et al. 2018, Sec. 4).

    Means are over all pairs of rows of different clusters, so that frames of one clip do not count as independent.

    Args:
        x: features (N, D).
        y: features (M, D).
        clusters_x: the cluster of each row (N,), equal for rows that are not independent; by default all are.
        clusters_y: the same for y.

    Raises:
        ValueError: for arrays of another shape, features that are not finite, or fewer than 3 clusters.
    """
    sets = [check_features("x", x), check_features("y", y)]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"y has {sets[1].shape[1]} features per row, but x {sets[0].shape[1]}")
    numbers = [cluster_numbers("x", clusters_x, len(sets[0])), cluster_numbers("y", clusters_y, len(sets[1]))]
    for field, number in zip("xy", numbers, strict=True):
        if num_clusters(number) < MIN_SAMPLES:
            raise ValueError(
                f"{field} has {num_clusters(number)} independent samples; a kernel distance needs {MIN_SAMPLES}"
            )
    sizes = [np.bincount(number).astype(np.float64) for number in numbers]
    cross = _cluster_sums(sets[0], sets[1], numbers[0], numbers[1])  # (C_x, C_y)
    total_cross = cross.sum()
    value, variance = -2 * total_cross / (len(sets[0]) * len(sets[1])), 0.0
    for index in (0, 1):
        own, size, count = sets[index], sizes[index], float(len(sets[index]))
        within = _cluster_sums(own, own, numbers[index], numbers[index])
        np.fill_diagonal(within, 0)
        rows, total = within.sum(1), within.sum()
        pairs = count**2 - (size**2).sum()
        value += total / pairs
        # The value without each cluster in turn.
        left_pairs = pairs - 2 * size * (count - size)
        left = (total - 2 * rows) / left_pairs
        crossing = cross.sum(1 - index)
        left -= 2 * (total_cross - crossing) / ((count - size) * len(sets[1 - index]))
        variance += (len(size) - 1) / len(size) * ((left - left.mean()) ** 2).sum()
    error = float(np.sqrt(variance))
    value = float(value)
    return KernelScore(value, error, (value - Z_95 * error, value + Z_95 * error))


def _cluster_sums(x: Array, y: Array, clusters_x: npt.NDArray[np.int64], clusters_y: npt.NDArray[np.int64]) -> Array:
    """Sums the kernel over all pairs of rows of each pair of clusters, (C_x, C_y)."""
    order = np.argsort(clusters_y, kind="stable")
    y, starts = y[order], np.searchsorted(clusters_y[order], np.arange(num_clusters(clusters_y)))
    sums = np.zeros((num_clusters(clusters_x), len(starts)))
    for first in range(0, len(x), _ROWS):
        part = slice(first, first + _ROWS)
        kernel = (x[part] @ y.T / x.shape[1] + 1) ** 3
        np.add.at(sums, clusters_x[part], np.add.reduceat(kernel, starts, axis=1))
    return sums
