"""The kernel distance against torchmetrics, a plain double sum, and its interval's coverage."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lavita.evaluation.distances.kernel import kernel_score

Array = npt.NDArray[np.float64]
Clusters = npt.NDArray[np.int64]


def plain(x: Array, y: Array, clusters_x: Clusters, clusters_y: Clusters) -> float:
    def mean(a: Array, b: Array, apart: npt.NDArray[np.bool_]) -> float:
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        return float(kernel[apart].mean())

    return (
        mean(x, x, clusters_x[:, None] != clusters_x)
        + mean(y, y, clusters_y[:, None] != clusters_y)
        - 2 * mean(x, y, np.ones((len(x), len(y)), dtype=bool))
    )


def test_equals_a_plain_double_sum() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(37, 5)), rng.normal(size=(23, 5)) + 0.3
    each_x, each_y = np.arange(37), np.arange(23)
    assert kernel_score(x, y).value == pytest.approx(plain(x, y, each_x, each_y), rel=1e-12)
    some_x, some_y = rng.integers(0, 9, 37), rng.integers(0, 6, 23)
    assert kernel_score(x, y, some_x, some_y).value == pytest.approx(plain(x, y, some_x, some_y), rel=1e-12)


def test_the_error_is_a_jackknifes() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(24, 4)) + 0.3
    some_x, some_y = np.arange(30) // 3, np.arange(24) // 2
    variance = 0.0
    for rows, clusters, first in ((x, some_x, True), (y, some_y, False)):
        left = []
        for cluster in np.unique(clusters):
            kept = clusters != cluster
            if first:
                left.append(plain(rows[kept], y, clusters[kept], some_y))
            else:
                left.append(plain(x, rows[kept], some_x, clusters[kept]))
        variance += (len(left) - 1) / len(left) * ((np.array(left) - np.mean(left)) ** 2).sum()
    assert kernel_score(x, y, some_x, some_y).standard_error == pytest.approx(np.sqrt(variance), rel=1e-10)


class Flat(torch.nn.Module):
    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double()


def test_equals_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    rng = np.random.default_rng(0)
    real, generated = (rng.integers(0, high, (60, 3, 2, 2), dtype=np.uint8) for high in (256, 200))
    # One subset of all samples is what a full sum is.
    metric = kid.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=60)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    expected = float(metric.compute()[0])
    ours = kernel_score(real.reshape(60, -1), generated.reshape(60, -1)).value
    assert ours == pytest.approx(expected, rel=1e-6)


def exact_between_gaussians(dim: int, shift: float) -> float:
    """The distance of N(0, I) and N(shift, I), from the moments of the products of their samples."""
    square = dim * shift**2  # |mean|^2 of the second

    def mean_kernel(cross: float, squares: float) -> float:
        """Of samples a and b, where `cross` is the product of their means and `squares` the sum of |mean|^2."""
        second = cross**2 + squares + dim
        third = cross**3 + 3 * cross * (squares + dim) + 6 * cross
        return 1 + 3 * cross / dim + 3 * second / dim**2 + third / dim**3

    return mean_kernel(0, 0) + mean_kernel(square, 2 * square) - 2 * mean_kernel(0, square)


def test_unbiased_and_the_interval_covers() -> None:
    rng = np.random.default_rng(1)
    null = [kernel_score(*rng.normal(size=(2, 40, 6))).value for _ in range(300)]
    assert np.mean(null) == pytest.approx(0, abs=3 * np.std(null) / np.sqrt(300))
    assert np.mean(np.array(null) < 0) > 0.3
    shift = 0.4
    truth = exact_between_gaussians(6, shift)
    scores = [kernel_score(rng.normal(size=(150, 6)), rng.normal(size=(150, 6)) + shift) for _ in range(200)]
    covered = np.mean([score.interval_95[0] <= truth <= score.interval_95[1] for score in scores])
    assert 0.9 <= covered <= 0.99
    values = [score.value for score in scores]
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / np.sqrt(200))


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 2 independent samples; a kernel distance needs 3"):
        kernel_score(np.ones((8, 2)), np.ones((8, 2)), [0] * 4 + [1] * 4)
    with pytest.raises(ValueError, match="y has 3 features per row, but x 2"):
        kernel_score(np.ones((8, 2)), np.ones((8, 3)))
