"""Do the 95% intervals cover? Repeats on Gaussians of known distance, for the Frechet and the kernel distance.

The interval of a value should cover the mean value over all repeats; that of the limit, and that of the kernel
distance, should cover the distance of the distributions. `alike` draws both sides from the same distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lavita.core.files import write_text
from lavita.evaluation.distances.frechet import frechet_score
from lavita.evaluation.distances.kernel import kernel_score

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[Array, Array]]
# Features, samples per side, frames per clip (rows of one cluster).
CASES = ((8, 128, 1), (16, 256, 1), (64, 256, 1), (64, 1024, 1), (400, 2048, 1), (16, 256, 8))
HEADINGS = (
    "features",
    "samples per side",
    "sides",
    "distance",
    "mean score",
    "score's interval covers",
    "mean limit",
    "limit's interval covers",
    "kernel's interval covers",
    "s",
)


def make_draw(dim: int, num: int, rows: int, alike: bool) -> tuple[Draw, float]:
    """Draws a pair of sides with falling spectra, like those of features; also their exact Frechet distance."""
    rng = np.random.default_rng(dim)
    spectrum = 1 / np.sqrt(np.arange(1, dim + 1))
    stretch = np.ones(dim) if alike else np.exp(rng.normal(0, 0.2, dim))
    shift = np.zeros(dim) if alike else rng.normal(0, 0.3, dim) * spectrum
    truth = float((shift**2).sum() + ((spectrum - spectrum * stretch) ** 2).sum())

    def side(rng: np.random.Generator) -> Array:
        # Half of the variance is between clips, half between the frames of a clip.
        clips = rng.normal(size=(num, 1, dim))
        frames = rng.normal(size=(num, rows, dim))
        return clips[:, 0] if rows == 1 else ((clips + frames) / np.sqrt(2)).reshape(num * rows, dim)

    return lambda rng: (side(rng) * spectrum, side(rng) * spectrum * stretch + shift), truth


def covered(intervals: list[tuple[float, float]], truth: float) -> str:
    """The share of the intervals that cover a value."""
    return f"{np.mean([low <= truth <= high for low, high in intervals]):.1%}"


def study(dim: int, num: int, rows: int, alike: bool, repeats: int) -> list[str]:
    """One line of the table."""
    draw, truth = make_draw(dim, num, rows, alike)
    clusters = np.repeat(np.arange(num), rows)
    start = time.monotonic()
    frechet, kernel = [], []
    for repeat in range(repeats):
        x, y = draw(np.random.default_rng([dim, num, repeat]))
        frechet.append(frechet_score(x, y, 0, clusters, clusters))
        kernel.append(kernel_score(x, y, clusters, clusters))
    mean = float(np.mean([score.value for score in frechet]))
    limits = [score.infinity_interval_95 for score in frechet if score.infinity_interval_95 is not None]
    kernel_truth = 0.0 if alike else float(np.mean([score.value for score in kernel]))
    return [
        f"{dim}",
        f"{num}" + (f" x {rows}" if rows > 1 else ""),
        "alike" if alike else "apart",
        f"{truth:.4f}",
        f"{mean:.4f}",
        covered([score.interval_95 for score in frechet], mean),
        f"{np.mean([score.infinity for score in frechet if score.infinity is not None]):.4f}",
        covered(limits, truth),
        covered([score.interval_95 for score in kernel], kernel_truth),
        f"{time.monotonic() - start:.0f}",
    ]


def study_coverage(repeats: int, max_dim: int, out: Path | None) -> None:
    """Prints a line per case with at most `max_dim` features, and writes the table as Markdown if `out` is given."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    print("\n".join(lines), flush=True)
    for dim, num, rows in CASES:
        for alike in (False, True):
            if dim <= max_dim:
                lines.append("| " + " | ".join(study(dim, num, rows, alike, repeats)) + " |")
                print(lines[-1], flush=True)
    if out is not None:
        write_text(out, f"{repeats} repeats per line.\n\n" + "\n".join(lines) + "\n")
