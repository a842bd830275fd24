"""The result of an evaluation: the report, and what a page shows in addition."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lavita.evaluation.classes.clips import ClassVideos
from lavita.evaluation.clips import Selection
from lavita.evaluation.features.compute import pixel_facts
from lavita.evaluation.features.extractors import Extractor
from lavita.evaluation.features.networks import Network
from lavita.evaluation.nearest_clips import Neighbour

NUM_SHOWN = 8
"""Number of nearest and of farthest clips that a report names."""
_NOT_COMPARED = {"split", "seed", "floor"}
"""Fields of the protocol in which two reports may differ: a note; what the digest of the real clips says more exactly;
and whether there is a floor."""


@dataclass(frozen=True)
class Evaluation:
    """A report, and what a page shows in addition."""

    report: dict[str, Any]
    """JSON-able."""
    selection: Selection | None = None
    """The clips, if there are metrics of features."""
    neighbours: Sequence[Neighbour] = ()
    """The nearest real clip of each generated clip, nearest pairs first."""


def class_facts(videos: ClassVideos) -> dict[str, Any]:
    """Facts for the `protocol` of a report with class metrics."""
    real, generated = videos.real.catalog, videos.generated.catalog
    first = generated.videos[0].info
    return {
        "classes": list(videos.class_names),
        "classes_not_generated": sorted(set(real.class_names) - set(videos.class_names)),
        "num_real_videos": len(real.videos),
        "num_real_videos_skipped": len(real.broken),
        "num_generated_clips": len(generated.videos),
        "num_held_out_videos": 0 if videos.held_out is None else len(videos.held_out.catalog.videos),
        "num_frames": videos.num_frames,
        "frame_interval": videos.frame_interval,
        "resolution": videos.resolution,
        "width": first.width,
        "height": first.height,
    }


def feature_report(
    selection: Selection,
    extractors: Mapping[str, Extractor],
    networks: Mapping[str, Network],
    scores: Mapping[str, Any],
    neighbours: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The report of the metrics of features; `comparable` holds what two reports must share to be compared."""
    protocol, sets = selection.protocol, selection.sets
    settings = protocol.model_dump()
    comparable = {
        **{key: value for key, value in settings.items() if key not in _NOT_COMPARED},
        "metrics": sorted(scores),
        "real_clips": sets["real"].digest,
        "every_frame": sets["every_frame"].digest if "every_frame" in sets else None,
        "pixels": pixel_facts(),
        "networks": {name: network.facts() for name, network in sorted(networks.items())},
    }
    return {
        "protocol": {
            "settings": settings,
            "num_frames": protocol.num_frames,
            "frame_interval": protocol.frame_interval,
            "resolution": protocol.resolution,
            "extractors": {name: extractor.network.name for name, extractor in extractors.items()},
            "comparable": {"features": comparable},
        },
        "scores": scores,
        "neighbours": neighbours,
        "sides": {
            **{name: source.facts() for name, source in selection.sources.items()},
            "clips": {name: {"num_clips": len(clips.clips), "digest": clips.digest} for name, clips in sets.items()},
        },
        "warnings": selection.warnings,
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
    }


def versions() -> dict[str, str]:
    """Versions of the software that computes scores."""
    names = ("lavita", "torch", "av", "numpy", "pillow")
    return {"python": platform.python_version(), "platform": sys.platform, **{name: _version(name) for name in names}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
