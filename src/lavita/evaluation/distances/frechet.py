"""The Frechet distance of two sets of features, in float64, with an interval and a limit for infinitely many samples.

Legend: N rows of a set, D features, r = min(N, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lavita.evaluation.distances.clusters import cluster_numbers, num_clusters, variance_of_mean

Array = npt.NDArray[np.float64]
Z_95 = 1.959963984540054
"""Half the width of a 95% interval in standard errors of a normal distribution."""


@dataclass(frozen=True)
class FrechetScore:
    """A Frechet distance and its uncertainty."""

    value: float
    """Distance of these samples. It is biased upwards, and more so with fewer samples."""
    standard_error: float
    """Standard error of `value` around its mean over other samples of the same size, from its influence function."""
    interval_95: tuple[float, float]
    """Covers the mean of `value` over other samples of the same size, not the distance of the distributions."""
    infinity: float | None
    """Estimate for infinitely many samples, which may be below 0; None if half of the samples are no more than the
    features."""
    infinity_interval_95: tuple[float, float] | None
    """Covers the distance of the distributions, as far as the bias falls as 1/N."""


@dataclass(frozen=True)
class _Moments:
    """Mean (D,), and the QR decomposition of the centred rows over sqrt(N - ddof): covariance = r' r."""

    mean: Array
    q: Array  # (N, r), orthonormal columns
    r: Array  # (r, D)


def frechet_distance(x: npt.ArrayLike, y: npt.ArrayLike, ddof: int = 0) -> float:
    """`|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))` (Dowson & Landau 1982; Heusel et al. 2017, Eq. 6).

    The trace of the root is the sum of the singular values of `A_x A_y'` for any factors `S = A' A`. With factors from
    a QR decomposition of the rows it is exact to rounding even for singular covariances, unlike roots of eigenvalues.

    Args:
        x: features (N, D), finite.
        y: features (M, D).
        ddof: 0 divides covariances by N (StyleGAN-V), 1 by N - 1 (clean-fid).

    Raises:
        ValueError: for arrays of another shape, features that are not finite, or fewer than 2 rows.
    """
    first, second = _moments("x", x, ddof), _moments("y", y, ddof)
    singular = np.linalg.svd(_overlap(first, second), compute_uv=False).astype(np.float64)
    return _distance(first, second, singular)


def frechet_score(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    ddof: int = 0,
    clusters_x: npt.ArrayLike | None = None,
    clusters_y: npt.ArrayLike | None = None,
    num_halvings: int = 4,
    seed: int = 0,
) -> FrechetScore:
    """Computes a Frechet distance with its interval and limit.

    The standard error is that of the mean of the influence function: a row with deviation `d` from the mean contributes
    `2 d (m_x - m_y) + d' (I - T) d`, where T is the optimal transport map between the two Gaussians. Rows of one
    cluster, such as frames of one clip, count as one draw. The limit is `2 F(N) - F(N / 2)` with both sets halved: it
    is free of the part of the bias that falls as 1/N (Chong & Forsyth 2020 shrink only one set).

    Args:
        x: features (N, D).
        y: features (M, D).
        ddof: as for `frechet_distance`.
        clusters_x: the cluster of each row (N,), equal for rows that are not independent; by default all are.
        clusters_y: the same for y.
        num_halvings: number of random halvings to average for the limit; 0 for no limit.
        seed: seed of the halvings.

    Raises:
        ValueError: as `frechet_distance`, or for clusters of another length.
    """
    first, second = _moments("x", x, ddof), _moments("y", y, ddof)
    left, singular, right = np.linalg.svd(_overlap(first, second), full_matrices=False)
    value = _distance(first, second, singular)
    numbers = (cluster_numbers("x", clusters_x, len(first.q)), cluster_numbers("y", clusters_y, len(second.q)))
    for field, number in zip("xy", numbers, strict=True):
        if num_clusters(number) < 2:
            raise ValueError(f"{field} has 1 independent sample (one video); an interval needs at least 2")
    variance = 0.0
    for own, other, vectors, cluster in ((first, second, left, numbers[0]), (second, first, right.T, numbers[1])):
        count = len(own.q)
        scaled = own.q @ (vectors * np.sqrt(singular))  # (N, r)
        rows = own.q @ own.r  # (N, D), centred, over sqrt(N - ddof)
        root = np.sqrt(count - ddof)
        influence = 2 * root * rows @ (own.mean - other.mean)
        influence += (count - ddof) * ((rows**2).sum(1) - (scaled**2).sum(1))
        variance += variance_of_mean(influence, cluster)
    error = float(np.sqrt(variance))
    halves = _halved(np.asarray(x), np.asarray(y), ddof, *numbers, num_halvings, seed)
    infinity = interval = None
    if halves is not None:
        infinity = 2 * value - float(halves.mean())
        # The assignment of rows to halves adds to the variance, by an amount that one halving cannot show.
        spread = float(halves.var(ddof=1)) / len(halves) if len(halves) > 1 else 0.0
        reach = Z_95 * float(np.sqrt(variance + spread))
        interval = (infinity - reach, infinity + reach)
    return FrechetScore(value, error, (value - Z_95 * error, value + Z_95 * error), infinity, interval)


def _moments(field: str, rows: npt.ArrayLike, ddof: int) -> _Moments:
    values = check_features(field, rows)
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; allowed: 0, 1")
    mean = values.mean(0)
    q, r = np.linalg.qr((values - mean) / np.sqrt(len(values) - ddof))
    return _Moments(mean, q, r)


def _overlap(x: _Moments, y: _Moments) -> Array:
    """`r_x r_y'`, whose singular values sum to the trace of the root."""
    if x.r.shape[1] != y.r.shape[1]:
        raise ValueError(f"y has {y.r.shape[1]} features per row, but x {x.r.shape[1]}")
    overlap: Array = x.r @ y.r.T
    return overlap


def _distance(x: _Moments, y: _Moments, singular: Array) -> float:
    traces = float((x.r**2).sum() + (y.r**2).sum())
    # Rounding can make the distance of equal sets slightly negative.
    return max(float(((x.mean - y.mean) ** 2).sum()) + traces - 2 * float(singular.sum()), 0.0)


def _halved(
    x: Array,
    y: Array,
    ddof: int,
    clusters_x: npt.NDArray[np.int64],
    clusters_y: npt.NDArray[np.int64],
    num: int,
    seed: int,
) -> Array | None:
    """Distances of halves (num,), each the mean over the two halves; None if a half is too small."""
    if not num or min(num_clusters(clusters_x), num_clusters(clusters_y)) < 4:
        return None
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(num):
        picked = []
        for clusters in (clusters_x, clusters_y):
            count = num_clusters(clusters)
            first = np.zeros(count, dtype=bool)
            first[rng.permutation(count)[: count // 2]] = True
            picked.append(first[clusters])
        halves = [(x[picked[0]], y[picked[1]]), (x[~picked[0]], y[~picked[1]])]
        # Singular covariances have a bias of another kind, which this does not remove.
        if min(len(part) for half in halves for part in half) <= x.shape[1]:
            return None
        distances.append(np.mean([frechet_distance(*half, ddof=ddof) for half in halves]))
    return np.array(distances)


def check_features(field: str, rows: npt.ArrayLike) -> Array:
    """Converts features to float64 (N, D), N >= 2.

    Raises:
        ValueError: for another shape or values that are not finite; the message names `field`.
    """
    values = np.asarray(rows, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not values.shape[1]:
        raise ValueError(f"{field} has shape {values.shape}; features are (N, D) with N >= 2")
    if not np.isfinite(values).all():
        raise ValueError(f"{field} has features that are not finite numbers")
    return values
