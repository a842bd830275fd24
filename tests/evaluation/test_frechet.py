"""The Frechet distance against closed forms, scipy, torchmetrics, 50 digits of mpmath, and its intervals' coverage."""

from __future__ import annotations

from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import sqrtm  # type: ignore[import-untyped]

from lavita.evaluation.distances.frechet import frechet_distance, frechet_score

Array = npt.NDArray[np.float64]


def gaussian(seed: int, num: int, dim: int, correlated: bool = True) -> Array:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num, dim))
    return rows @ rng.normal(size=(dim, dim)) + rng.normal(size=dim) if correlated else rows


def exact(mean: Array, deviations: Array, num: int, seed: int) -> Array:
    """Rows whose sample mean and covariance (ddof 0) are exactly the wanted ones."""
    rows = np.random.default_rng(seed).normal(size=(num, len(mean)))
    rows = np.linalg.qr(rows - rows.mean(0))[0] * np.sqrt(num)
    return rows * deviations + mean


def test_diagonal_gaussians_in_closed_form_whatever_the_rotation() -> None:
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(2, 20)), np.exp(rng.normal(size=(2, 20)))
    x, y = (
        exact(mean, deviation, 100, seed) for seed, (mean, deviation) in enumerate(zip(means, deviations, strict=True))
    )
    truth = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    assert frechet_distance(x, y) == pytest.approx(truth, rel=1e-12)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(truth, rel=1e-12)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * truth, rel=1e-12)
    assert frechet_distance(y, x) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize(("num", "dim"), [(200, 20), (10, 40)])
def test_a_set_and_itself_moved(num: int, dim: int) -> None:
    x = gaussian(0, num, dim)
    step = np.random.default_rng(1).normal(size=dim)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x + step) == pytest.approx((step**2).sum(), rel=1e-10)


@pytest.mark.parametrize("ddof", [0, 1])
def test_equals_scipys_root(ddof: int) -> None:
    x, y = gaussian(0, 500, 30), gaussian(1, 400, 30)
    covariances = [np.cov(rows, rowvar=False, ddof=ddof) for rows in (x, y)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(x, y, ddof) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("num_x", "num_y", "dim"), [(6, 5, 12), (6, 40, 12), (13, 13, 12)])
def test_singular_covariances_against_fifty_digits(num_x: int, num_y: int, dim: int) -> None:
    x, y = gaussian(0, num_x, dim), gaussian(1, num_y, dim)
    with mpmath.workdps(50):
        rows = [mpmath.matrix(side.tolist()) for side in (x, y)]
        means = [[mpmath.fsum(side[i, j] for i in range(side.rows)) / side.rows for j in range(dim)] for side in rows]
        covariances = []
        for side, mean in zip(rows, means, strict=True):
            centred = mpmath.matrix([[side[i, j] - mean[j] for j in range(dim)] for i in range(side.rows)])
            covariances.append(centred.T * centred / side.rows)
        values, vectors = mpmath.eigsy(covariances[0])
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        inner = mpmath.eigsy(root * covariances[1] * root, eigvals_only=True)
        traces = sum(covariances[0][i, i] + covariances[1][i, i] for i in range(dim))
        expected = traces - 2 * sum(mpmath.sqrt(max(value, 0)) for value in inner)
        expected += sum((a - b) ** 2 for a, b in zip(*means, strict=True))
    # Roots of 1e-50 are 1e-25: far below what is compared here.
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-12)


class Flat(torch.nn.Module):
    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double()


def test_equals_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric = fid.FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (300, 3, 2, 2), dtype=np.uint8)
    generated = rng.integers(0, 200, (200, 3, 2, 2), dtype=np.uint8)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    ours = frechet_distance(real.reshape(300, -1), generated.reshape(200, -1), ddof=1)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-8)


def test_the_floor_falls_as_one_over_n() -> None:
    # Two samples of one Gaussian do not score 0; twice the samples halve what they score.
    small, large = (frechet_distance(*np.random.default_rng(n).normal(size=(2, n, 100))) for n in (800, 1600))
    assert small / large == pytest.approx(2, rel=0.1)


def test_intervals_cover() -> None:
    repeats, num, dim = 120, 256, 8
    rng = np.random.default_rng(3)
    deviations, shift = np.exp(rng.normal(0, 0.3, dim)), rng.normal(0, 0.3, dim)
    truth = (shift**2).sum() + ((1 - deviations) ** 2).sum()
    scores = [
        frechet_score(rng.normal(size=(num, dim)), rng.normal(size=(num, dim)) * deviations + shift)
        for _ in range(repeats)
    ]
    mean = np.mean([score.value for score in scores])
    assert mean > truth  # the bias that `infinity` takes off
    covered = np.mean([score.interval_95[0] <= mean <= score.interval_95[1] for score in scores])
    assert 0.9 <= covered <= 0.99
    intervals = [score.infinity_interval_95 for score in scores]
    assert all(interval is not None for interval in intervals)
    covered = np.mean([low <= truth <= high for low, high in intervals])  # type: ignore[misc]
    assert 0.88 <= covered <= 0.99
    limits = np.array([score.infinity for score in scores], dtype=np.float64)
    assert limits.mean() == pytest.approx(truth, abs=3 * limits.std() / np.sqrt(repeats))


def test_intervals_are_too_wide_where_both_sides_are_alike() -> None:
    # The distance then has no first-order part, and an influence function counts the second-order part twice
    # (Efron & Stein 1981), which errs on the safe side.
    samples = (np.random.default_rng(repeat).normal(size=(2, 128, 16)) for repeat in range(200))
    scores = [frechet_score(x, y, num_halvings=0) for x, y in samples]
    values = np.array([score.value for score in scores])
    assert 1.4 < np.mean([score.standard_error**2 for score in scores]) / values.var() < 2.8
    assert np.mean([low <= values.mean() <= high for low, high in (score.interval_95 for score in scores)]) >= 0.97


def test_no_limit_from_halves_that_are_too_small() -> None:
    assert frechet_score(gaussian(0, 18, 8), gaussian(1, 40, 8)).infinity is not None
    assert frechet_score(gaussian(0, 16, 8), gaussian(1, 40, 8)).infinity is None
    assert frechet_score(gaussian(0, 40, 8), gaussian(1, 40, 8), num_halvings=0).infinity is None


def test_rows_of_one_cluster_are_one_draw() -> None:
    x, y = gaussian(0, 200, 4), gaussian(1, 200, 4)
    once = frechet_score(x, y)
    copies = frechet_score(
        x.repeat(5, 0), y.repeat(5, 0), clusters_x=np.arange(200).repeat(5), clusters_y=np.arange(200).repeat(5)
    )
    assert copies.value == pytest.approx(once.value, rel=1e-12)
    assert copies.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    naive = frechet_score(x.repeat(5, 0), y.repeat(5, 0))
    assert naive.standard_error == pytest.approx(once.standard_error / np.sqrt(5), rel=0.01)


def test_influence_function_equals_a_jackknife() -> None:
    x, y = gaussian(0, 300, 3), gaussian(1, 250, 3)
    variance = 0.0
    for rows in (x, y):
        left = []
        for i in range(len(rows)):
            kept = np.delete(rows, i, axis=0)
            left.append(frechet_distance(kept, y) if rows is x else frechet_distance(x, kept))
        variance += (len(rows) - 1) / len(rows) * ((np.array(left) - np.mean(left)) ** 2).sum()
    assert frechet_score(x, y).standard_error == pytest.approx(np.sqrt(variance), rel=0.02)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.zeros(5), np.zeros((5, 2)), {}, r"x has shape \(5,\); features are \(N, D\) with N >= 2"),
        (np.zeros((5, 2)), np.zeros((1, 2)), {}, r"y has shape \(1, 2\)"),
        (np.zeros((5, 2)), np.full((5, 2), np.nan), {}, "y has features that are not finite"),
        (np.zeros((5, 2)), np.zeros((5, 3)), {}, "y has 3 features per row, but x 2"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"ddof": 2}, "ddof is 2; allowed: 0, 1"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"clusters_y": ["a"] * 5}, "y has 1 independent sample"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"clusters_x": [0, 1]}, r"clusters of x have shape \(2,\)"),
    ],
)
def test_what_is_refused(x: Array, y: Array, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_score(x, y, **options)
