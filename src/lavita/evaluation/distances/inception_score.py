"""The Inception Score, in the three variants of papers on video generation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Variant:
    """Numbers of samples and splits of a published variant."""

    num_samples: int
    num_splits: int


VARIANTS = {
    "tgan": Variant(9_984, 1),
    "tganv2": Variant(20_480, 10),
    "stylegan-v": Variant(2_048, 10),
}
"""TGAN (Saito et al. 2017): one split. TGANv2 (Saito et al. 2020): ten splits of 2,048. StyleGAN-V (Skorokhodov et al.
2022): 2,048 in ten splits, which cannot exceed 76 for 101 balanced classes."""


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over splits; a score means nothing without the numbers of samples and splits."""

    value: float
    std_of_splits: float
    num_samples: int
    num_splits: int


def inception_score(probabilities: npt.ArrayLike, num_splits: int) -> InceptionScore:
    """`exp(mean_x KL(p(y|x) || p(y)))` of each split (Salimans et al. 2016), in float64, without an epsilon.

    Args:
        probabilities: (N, K), each row sums to 1; 0 log 0 is 0.
        num_splits: number of successive parts of the rows, each of N / num_splits rows, rounded.

    Raises:
        ValueError: if the rows are not probabilities, or fewer than the splits.
    """
    rows = np.asarray(probabilities, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all() or (rows < 0).any() or (abs(rows.sum(1) - 1) > 1e-3).any():
        raise ValueError("probabilities are not (N, K) with rows that are at least 0 and sum to 1")
    if not 1 <= num_splits <= len(rows):
        raise ValueError(f"num_splits is {num_splits}; allowed: 1 to {len(rows)}, the number of samples")
    # Rows of float32 sum to 1 only within 1e-6; in float64 the difference would show.
    rows = rows / rows.sum(1, keepdims=True)
    scores = []
    for split in range(num_splits):
        part = rows[len(rows) * split // num_splits : len(rows) * (split + 1) // num_splits]
        mean = part.mean(0)
        logs = np.log(np.where(part > 0, part, 1)) - np.log(np.where(mean > 0, mean, 1))
        scores.append(np.exp((part * logs).sum(1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(rows), num_splits)
