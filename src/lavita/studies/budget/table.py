"""What the choices rest on: one row for each size of model, and the limits between one choice and another.

A new measurement goes in here, with the place where it is written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavita.core.names import TrainingRecipe


@dataclass(frozen=True)
class Row:
    """How a model of one size is trained."""

    size: str
    """Of the preset, see `models.presets.SIZES`; the patch follows from the latents."""
    batch_size: int
    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    steps: int
    """Steps of `batch_size` clips after which its samples are useful."""
    least_clips: int
    """Clips without common frames in the data, below which the next smaller model is enough."""
    measured: str
    """Where the row was measured; empty if it was not."""


RECIPE: TrainingRecipe = "modern"
"""The objective, and how latents are normalised."""

# The rate of a row that was not measured is that of `mini` times the ratio of the widths, as in the recipe.
ROWS = (
    Row("mini", 8, "muon", 3e-3, 1_000, 0, "docs/results.md, The demo: arcade, velocity prediction, 16 tokens a frame"),
    Row("small", 8, "muon", 1.5e-3, 1_080, 100, "docs/results.md, Real footage: faces, flow, 16 tokens a frame"),
    Row("S", 8, "muon", 1e-3, 20_000, 1_000, ""),
    Row("B", 8, "muon", 5e-4, 100_000, 10_000, ""),
)
"""From the smallest to the largest."""

TOKENS, FEW_TOKENS = 64, 16
"""Tokens of a frame that the patch is chosen for; the smaller number is for a short training on a CPU."""
SIDES = (8, 16, 24, 32, 48, 64, 96, 128)
"""Resolutions that are chosen."""
SMALL_SIDE = 64
"""Resolution of a short training on a CPU."""
LONG_SECONDS = 2 * 3600.0
"""A CPU gets the largest resolution from this time on, a GPU always."""
CLIP_FRAMES = 16
CLIP_RATE = 9.0
"""Frames per second of a clip: the paper's interval of 3 at 25 to 30 frames per second."""

MIN_SECONDS = 120.0
"""Shortest budget of the command: looking, measuring, samples and page take up to a minute of it."""
MAX_SECONDS = 366 * 24 * 3600.0
CACHE_SHARE = 0.25
"""Most of the budget that encoding may take."""
LEAST_CACHED = 20
"""Fewest videos that are encoded if not all can be; below that, clips are encoded while training."""
FEW_VIDEOS = 20
"""Below this many videos the model memorises them, and clips are not mirrored."""
POOR_PSNR, GOOD_PSNR = 26.0, 33.0
"""Reconstruction in dB below which another autoencoder is advised, and from which on nothing is said."""

NUM_SAMPLES = (8, 4, 2)
"""Videos of a set of samples: as many as take at most `SAMPLE_SHARE` of the time."""
NUM_SAMPLE_SETS = 4
SAMPLE_SHARE = 0.1
"""Most of the time that one set of samples takes, and most of the training that all of them take."""
NUM_CHECKPOINTS = 8
CHECKPOINT_SECONDS = 600.0
"""Longest time between two checkpoints."""
NUM_LOGS = 400
WARMUP_SHARE, MOST_WARMUP = 0.05, 200
FILES_SECONDS = 2.0
"""Time of writing samples, a checkpoint and a pipeline; the first time that a run writes them, it is measured."""
PAGE_SECONDS = 2.0
"""Time of the page: twice the 0.6 to 1.0 s that one with four sets of samples took on one core."""
