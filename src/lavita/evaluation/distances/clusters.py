"""Rows that are not independent, such as the frames of one clip, count as one draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def cluster_numbers(field: str, clusters: npt.ArrayLike | None, count: int) -> npt.NDArray[np.int64]:
    """Names of clusters to numbers from 0.

    Args:
        field: for messages.
        clusters: a name for each row (N,), or None where every row is a cluster of its own.
        count: N.

    Raises:
        ValueError: where there are not N names.
    """
    if clusters is None:
        return np.arange(count)
    names = np.asarray(clusters)
    if names.shape != (count,):
        raise ValueError(f"clusters of {field} have shape {names.shape}; allowed: ({count},), one a row")
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def num_clusters(numbers: npt.NDArray[np.int64]) -> int:
    """How many clusters the numbers of `cluster_numbers` tell apart."""
    return int(numbers.max()) + 1 if len(numbers) else 0


def variance_of_mean(values: npt.NDArray[np.float64], numbers: npt.NDArray[np.int64]) -> float:
    """Variance of the mean of values (N,), whose deviations add up within a cluster (Liang & Zeger 1986)."""
    count = num_clusters(numbers)
    if count < 2:
        return float("nan")
    sums = np.bincount(numbers, values - values.mean())
    return float((sums**2).sum() / len(values) ** 2 * count / (count - 1))
