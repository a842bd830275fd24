"""Clusters: rows of features that are not independent, such as the frames of one clip, count as one draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def cluster_numbers(field: str, clusters: npt.ArrayLike | None, count: int) -> npt.NDArray[np.int64]:
    """Numbers the clusters from 0.

    Args:
        field: name of the set of rows, for messages.
        clusters: the cluster of each row (N,), as names or numbers; None if every row is a cluster of its own.
        count: number of rows N.

    Returns:
        The number of the cluster of each row (N,).

    Raises:
        ValueError: if `clusters` does not have N entries.
    """
    if clusters is None:
        return np.arange(count)
    names = np.asarray(clusters)
    if names.shape != (count,):
        raise ValueError(f"clusters of {field} have shape {names.shape}; allowed: ({count},), one per row")
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def num_clusters(numbers: npt.NDArray[np.int64]) -> int:
    """Counts the clusters in the result of `cluster_numbers`."""
    return int(numbers.max()) + 1 if len(numbers) else 0


def variance_of_mean(values: npt.NDArray[np.float64], numbers: npt.NDArray[np.int64]) -> float:
    """Estimates the variance of the mean of values (N,) whose clusters are independent (Liang & Zeger 1986)."""
    count = num_clusters(numbers)
    if count < 2:
        return float("nan")
    sums = np.bincount(numbers, values - values.mean())
    return float((sums**2).sum() / len(values) ** 2 * count / (count - 1))
