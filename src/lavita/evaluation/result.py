"""The result of an evaluation, and the facts recorded beside its scores."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lavita.evaluation.classes.clips import Comparison
from lavita.evaluation.clips import (
    Side,
)
from lavita.evaluation.nearest_clips import Neighbour

NUM_SHOWN = 8
"""Nearest and farthest clips that a report names."""


@dataclass(frozen=True)
class Evaluation:
    """A report, and what a page shows of it."""

    report: dict[str, Any]
    """JSON-able."""
    real: Side | None = None
    generated: Side | None = None
    neighbours: Sequence[Neighbour] = ()
    resolution: int = 0


def _class_facts(comparison: Comparison) -> dict[str, Any]:
    first = comparison.generated.videos[0].info
    return {
        "classes": list(comparison.class_names),
        "classes_not_generated": sorted(set(comparison.real.class_names) - set(comparison.class_names)),
        "num_real_videos": len(comparison.real.videos),
        "num_real_videos_skipped": len(comparison.real.broken),
        "num_generated_clips": len(comparison.generated.videos),
        "num_held_out_videos": 0 if comparison.held_out is None else len(comparison.held_out.videos),
        "num_frames": comparison.num_frames,
        "frame_interval": comparison.frame_interval,
        "resolution": comparison.resolution,
        "width": first.width,
        "height": first.height,
    }


def _versions() -> dict[str, str]:
    names = ("lavita", "torch", "av", "numpy", "pillow")
    return {"python": platform.python_version(), "platform": sys.platform, **{name: _version(name) for name in names}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
