"""How the cost of a forward pass grows with frames, resolution, batch and width: measured, and by the formula."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.speed.setup import NUM_CLASSES, Setup
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.progress import Progress
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.complexity import measure

HEAD_WIDTH = 32
BLOCKS = 4


@dataclass(frozen=True)
class Point:
    """Sizes of a small model and of its input."""

    num_frames: int = 8
    sample_size: int = 16
    batch_size: int = 1
    hidden_size: int = 256

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the model's constructor."""
        return {
            "num_frames": self.num_frames,
            "sample_size": self.sample_size,
            "patch_size": 2,
            "hidden_size": self.hidden_size,
            "num_heads": self.hidden_size // HEAD_WIDTH,
            "num_blocks": BLOCKS,
            "num_classes": NUM_CLASSES,
        }


AXES: dict[str, list[Point]] = {
    "frames": [Point(num_frames=number) for number in (4, 8, 16, 32)],
    "tokens per frame": [Point(sample_size=size) for size in (8, 16, 32, 48)],
    "batch": [Point(batch_size=size) for size in (1, 2, 4, 8)],
    "width": [Point(hidden_size=width) for width in (128, 256, 512, 768)],
}
_FIELDS = {"frames": "num_frames", "tokens per frame": "sample_size", "batch": "batch_size", "width": "hidden_size"}


def axis_value(axis: str, point: Point) -> int:
    """The position of a point on an axis."""
    value: int = getattr(point, _FIELDS[axis])
    return (value // 2) ** 2 if axis == "tokens per frame" else value


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent of a power law fitted to costs by least squares of their logarithms.

    Raises:
        ValueError: for fewer than two sizes or values that are not positive.
    """
    if len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(f"sizes are {list(sizes)} and costs {list(costs)}, but must be at least two, and positive")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def run(setup: Setup) -> Section:
    """Measures the times of all points, and the exponent of each axis."""
    points = list(dict.fromkeys(point for axis in AXES.values() for point in axis))
    device = setup.torch_device
    runs = {_name(point): _forward(setup, point) for point in points}
    macs = {point: measure(point.config, point.batch_size).macs for point in points}
    progress = Progress("scaling: run", num_timings(len(runs), setup.repeats))
    seconds = interleave(runs, setup.repeats, device, progress)
    rows = [Row(_name(point), seconds[_name(point)], macs[point]) for point in points]
    axes: dict[str, Any] = {}
    for axis, chosen in AXES.items():
        sizes = [axis_value(axis, point) for point in chosen]
        costs = [seconds[_name(point)] for point in chosen]
        medians = [statistics.median(values) for values in costs]
        rounds = [exponent(sizes, values) for values in zip(*costs, strict=True)]
        axes[axis] = {
            "sizes": sizes,
            "seconds": medians,
            "macs": [macs[point] for point in chosen],
            "measured": statistics.median(rounds),
            "measured_range": [min(rounds), max(rounds)],
            "theory": exponent(sizes, [macs[point] for point in chosen]),
        }
    lines = [
        f"{axis}: exponent {values['measured']:.2f} measured ({values['measured_range'][0]:.2f} to "
        f"{values['measured_range'][1]:.2f}), {values['theory']:.2f} by the multiply-accumulates"
        for axis, values in axes.items()
    ]
    notes = [
        f"Eager models of {BLOCKS} blocks; along each axis, the other sizes stay at {_name(Point())}. Exponents are "
        "fitted to the logarithms of the times in each round; those of the theory to the multiply-accumulates that "
        "`lavita info` counts, attention included, at the same points.",
        *lines,
    ]
    return Section("scaling", "Scaling", "one evaluation", rows, {"axes": axes}, notes)


def _name(point: Point) -> str:
    return (
        f"{point.batch_size} x {point.num_frames} frames of {point.sample_size} x {point.sample_size}, "
        f"width {point.hidden_size}"
    )


def _forward(setup: Setup, point: Point) -> Any:
    model: LavitaTransformer3DModel = LavitaTransformer3DModel.from_config(point.config)
    model = model.eval().requires_grad_(False).to(setup.torch_device)
    side = point.sample_size
    latents = torch.randn(point.batch_size, point.num_frames, 4, side, side, device=setup.torch_device)
    timesteps = torch.full((point.batch_size,), 300, device=setup.torch_device)
    labels = torch.zeros(point.batch_size, dtype=torch.long, device=setup.torch_device)

    def run() -> Any:
        with torch.no_grad(), setup.autocast():
            return model(latents, timesteps, labels).sample

    return run
