"""Do the 95% intervals cover? Repeats on Gaussians of known distance, for the Frechet and the kernel distance.

    python benchmarks/evaluation/coverage.py --repeats 400 --out benchmarks/results/coverage-YYYY-MM-DD.md

The interval of a value should cover the mean value over all repeats; those of the limit and of the kernel distance
should cover the distance of the distributions. `alike` draws both sets from one distribution.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lavita.evaluation.distances.frechet import frechet_score
from lavita.evaluation.distances.kernel import kernel_score

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[Array, Array]]
# Number of features, samples of each set, frames per clip (rows of one cluster).
CASES = ((8, 128, 1), (16, 256, 1), (64, 256, 1), (64, 1024, 1), (400, 2048, 1), (16, 256, 8))


def make_draw(dim: int, num: int, rows: int, alike: bool) -> tuple[Draw, float]:
    """A pair of sides with falling spectra, as features have them, and their Frechet distance in closed form."""
    rng = np.random.default_rng(dim)
    spectrum = 1 / np.sqrt(np.arange(1, dim + 1))
    stretch = np.ones(dim) if alike else np.exp(rng.normal(0, 0.2, dim))
    shift = np.zeros(dim) if alike else rng.normal(0, 0.3, dim) * spectrum
    truth = float((shift**2).sum() + ((spectrum - spectrum * stretch) ** 2).sum())

    def side(rng: np.random.Generator) -> Array:
        # Half of the variance is the clip's, half the frame's.
        clips = rng.normal(size=(num, 1, dim))
        frames = rng.normal(size=(num, rows, dim))
        return clips[:, 0] if rows == 1 else ((clips + frames) / np.sqrt(2)).reshape(num * rows, dim)

    return lambda rng: (side(rng) * spectrum, side(rng) * spectrum * stretch + shift), truth


def covered(intervals: list[tuple[float, float]], truth: float) -> str:
    return f"{np.mean([low <= truth <= high for low, high in intervals]):.1%}"


def study(dim: int, num: int, rows: int, alike: bool, repeats: int) -> list[str]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--max-dim", type=int, default=400, help="leave out cases of more features")
    parser.add_argument("--out", type=Path, help="write the table as Markdown, too")
    arguments = parser.parse_args()
    heads = [
        "features",
        "samples per set",
        "sides",
        "distance",
        "mean score",
        "score's interval covers",
        "mean limit",
        "limit's interval covers",
        "kernel's interval covers",
        "s",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    print("\n".join(lines), flush=True)
    for dim, num, rows in CASES:
        for alike in (False, True):
            if dim <= arguments.max_dim:
                lines.append("| " + " | ".join(study(dim, num, rows, alike, arguments.repeats)) + " |")
                print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(f"{arguments.repeats} repeats a line.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
