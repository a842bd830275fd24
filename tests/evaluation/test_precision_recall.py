"""Precision, recall, density and coverage against loops over single samples."""

from __future__ import annotations

import numpy as np
import pytest

from lavita.evaluation.distances.precision_recall import nearest, neighbour_scores


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_loops(k: int) -> None:
    rng = np.random.default_rng(k)
    real, generated = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.7 + 0.5

    def radius(rows: np.ndarray, i: int) -> float:
        return float(np.sort(np.linalg.norm(np.delete(rows, i, 0) - rows[i], axis=1))[k - 1])

    real_radii = [radius(real, i) for i in range(40)]
    generated_radii = [radius(generated, i) for i in range(30)]

    def distance(i: int, j: int) -> float:
        return float(np.linalg.norm(real[i] - generated[j]))

    around = [sum(distance(i, j) <= real_radii[i] for i in range(40)) for j in range(30)]
    scores = neighbour_scores(real, generated, k)
    assert scores.precision == pytest.approx(np.mean([number > 0 for number in around]))
    assert scores.density == pytest.approx(sum(around) / (k * 30))
    assert scores.recall == pytest.approx(
        np.mean([any(distance(i, j) <= generated_radii[j] for j in range(30)) for i in range(40)])
    )
    assert scores.coverage == pytest.approx(
        np.mean([any(distance(i, j) <= real_radii[i] for j in range(30)) for i in range(40)])
    )
    indices, distances = nearest(generated, real)
    for j in range(30):
        assert distances[j] == pytest.approx(min(distance(i, j) for i in range(40)), rel=1e-9)
        assert distance(indices[j], j) == pytest.approx(distances[j], rel=1e-9)


def test_what_they_tell_apart() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 4))
    same = neighbour_scores(real, rng.normal(size=(400, 4)))
    assert min(same.precision, same.recall, same.coverage) > 0.9
    assert same.density == pytest.approx(1, abs=0.15)
    collapsed = neighbour_scores(real, rng.normal(size=(400, 4)) * 0.1)
    assert collapsed.precision > 0.95 and collapsed.recall < 0.1 and collapsed.coverage < 0.3
    away = neighbour_scores(real, rng.normal(size=(400, 4)) + 20)
    assert away == type(away)(0, 0, 0, 0, 5)


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 5; allowed: 1 to 3, below the number of generated samples"):
        neighbour_scores(np.ones((8, 2)), np.ones((4, 2)))
