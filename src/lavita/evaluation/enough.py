"""Whether there are enough videos, clips and frames for a metric, before hours are spent on features."""

from __future__ import annotations

from collections.abc import Sequence

from lavita.evaluation.clips import ClipSet
from lavita.evaluation.distances.kernel import MIN_SAMPLES
from lavita.evaluation.feature_metrics import FEATURE_METRICS
from lavita.evaluation.protocol import Protocol

FEW_SAMPLES = 2048
"""With fewer clips a Frechet distance is mostly bias, and the report warns."""


def check_enough(name: str, protocol: Protocol, num_real: int) -> list[str]:
    """Checks that there are enough samples for a metric.

    Args:
        name: name in `FEATURE_METRICS`.
        protocol: numbers of clips and frames, without gaps.
        num_real: number of real samples: clips, or frames for an extractor of frames.

    Returns:
        Warnings.

    Raises:
        ValueError: if there are not; the message names the field of the protocol.
    """
    num_frames = protocol.num_frames
    assert num_frames is not None
    metric = FEATURE_METRICS[name]
    extractor = metric.extractor(protocol, name)
    least = extractor.network.min_frames
    if num_frames < least:
        raise ValueError(f"num_frames is {num_frames}, but {extractor.name} needs at least {least}")
    num_generated = protocol.num_generated_clips * (num_frames if extractor.level == "frame" else 1)
    if metric.kind == "frechet":
        for field, count in (("num_real_clips", num_real), ("num_generated_clips", num_generated)):
            if count <= extractor.num_features:
                raise ValueError(
                    f"{field} gives {count} samples, but {name} on the {extractor.num_features} features of "
                    f"{extractor.name} needs more than {extractor.num_features}; kernel distances need only a few"
                )
        fewest = min(protocol.num_real_clips, protocol.num_generated_clips)
        if fewest < FEW_SAMPLES:
            return [f"{name}: {fewest} clips; below {FEW_SAMPLES:,} the bias is large, see the floor and the limit"]
    if metric.kind == "inception-score":
        variant = protocol.inception_variant
        if protocol.num_generated_clips != variant.num_samples:
            raise ValueError(
                f"num_generated_clips is {protocol.num_generated_clips}, but inception_score="
                f"{protocol.inception_score} takes {variant.num_samples}; allowed otherwise: inception_score=custom "
                "inception_splits=K"
            )
    return []


def drop_small_floor(metrics: Sequence[str], protocol: Protocol, sets: dict[str, ClipSet]) -> list[str]:
    """Checks the chosen clips, and removes the floor if a metric cannot be computed on it.

    Args:
        metrics: names in `FEATURE_METRICS`.
        protocol: decides the formulas.
        sets: the clips by name, see `clips.choose_all`; `floor` may be removed.

    Returns:
        Warnings.

    Raises:
        ValueError: if another set is too small for a metric.
    """
    for name in metrics:
        of_frames = FEATURE_METRICS[name].extractor(protocol, name).level == "frame"
        unused = "real" if of_frames and "every_frame" in sets else "every_frame"
        for called in ("real", "every_frame", "generated"):
            if called in sets and called != unused and (problem := _too_few(name, protocol, sets[called])):
                raise ValueError(f"{sets[called].root}: {problem}")
        if "floor" in sets and (problem := _too_few(name, protocol, sets["floor"])):
            del sets["floor"]
            return [f"no floor: {problem}; --held-out with more videos gives one"]
    return []


def _too_few(name: str, protocol: Protocol, clips: ClipSet) -> str | None:
    """Why a set of clips is too small for a metric; None if it is not."""
    metric = FEATURE_METRICS[name]
    if metric.kind == "kernel" and (count := len({clip.name for clip in clips.clips})) < MIN_SAMPLES:
        return f"its clips are from {count} videos, but {name} needs {MIN_SAMPLES}"
    if metric.kind == "prdc":
        of_frames = metric.extractor(protocol, name).level == "frame"
        rows = sum(min(protocol.frames_a_clip, clip.num_frames) if of_frames else 1 for clip in clips.clips)
        if rows <= protocol.neighbours:
            return f"it has {rows} samples, but {name} needs more than neighbours={protocol.neighbours}"
    return None
