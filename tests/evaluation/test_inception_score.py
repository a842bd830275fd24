"""The Inception Score against closed forms and the numbers that a perfect classifier is known to give."""

from __future__ import annotations

import numpy as np
import pytest

from lavita.evaluation.distances.inception_score import VARIANTS, inception_score


def test_closed_forms() -> None:
    assert inception_score(np.full((30, 7), 1 / 7), 1).value == pytest.approx(1, rel=1e-12)
    assert inception_score(np.tile(np.eye(7), (4, 1)), 1).value == pytest.approx(7, rel=1e-12)
    confidence, classes = 0.8, 5
    rest = (1 - confidence) / (classes - 1)
    rows = np.full((classes, classes), rest)
    np.fill_diagonal(rows, confidence)
    entropy = -confidence * np.log(confidence) - (classes - 1) * rest * np.log(rest)
    score = inception_score(np.tile(rows, (6, 1)), 3)
    assert score.value == pytest.approx(np.exp(np.log(classes) - entropy), rel=1e-12)
    assert score.std_of_splits == pytest.approx(0, abs=1e-12)
    assert (score.num_samples, score.num_splits) == (30, 3)


@pytest.mark.parametrize(("size", "known"), [(204, 76.3), (2_048, 98.6), (10_000, 100.5)])
def test_a_perfect_classifier_of_balanced_classes(size: int, known: float) -> None:
    rng = np.random.default_rng(0)
    rows = np.eye(101)[rng.integers(0, 101, 20 * size)]
    assert inception_score(rows, 20).value == pytest.approx(known, abs=0.4)


def test_published_variants() -> None:
    assert {name: (variant.num_samples, variant.num_splits) for name, variant in VARIANTS.items()} == {
        "tgan": (9_984, 1),
        "tganv2": (2_048 * 10, 10),
        "stylegan-v": (2_048, 10),
    }


def test_what_is_refused() -> None:
    for rows in (np.ones((4, 3)), np.ones(4), np.array([[2.0, -1.0]]), np.array([[np.nan, 1.0]])):
        with pytest.raises(ValueError, match="probabilities are not"):
            inception_score(rows, 1)
    with pytest.raises(ValueError, match="num_splits is 5; allowed: 1 to 4"):
        inception_score(np.full((4, 2), 0.5), 5)
