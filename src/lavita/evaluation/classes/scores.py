"""Class metrics: do generated clips show the class that was asked for, and move as much as real ones?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any

from lavita.core.seeds import numpy_generator
from lavita.evaluation.classes.classifier import VERSION, Classifier, cached_classifier, recolour, shuffle_patches
from lavita.evaluation.classes.clips import ClassVideos
from lavita.evaluation.classes.motion import compare_motion, motion
from lavita.evaluation.clips import ClipSet, iter_pixels

ClassMetric = Callable[[ClassVideos, Path | None], dict[str, Any]]
"""Computes a JSON-able report; the folder, if any, is the cache of trained classifiers."""

MAX_CLASSIFIER_RESOLUTION = 64
"""Larger frames are shrunk to this side for the classifier: enough to tell classes, and it trains in seconds."""


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927).

    Args:
        correct: successes, 0 to `total`.
        total: trials, >= 1.
        confidence: above 0 and below 1.

    Returns:
        Lower and upper end, 0 to 1.

    Raises:
        ValueError: a number out of its range.
    """
    if total < 1 or not 0 <= correct <= total or not 0 < confidence < 1:
        raise ValueError(
            f"correct is {correct}, total {total}, confidence {confidence}; allowed: 0 <= correct <= total, "
            "total >= 1, 0 < confidence < 1"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    # Exactly 0 and 1 at the ends, where rounding would leave a trace.
    low = 0.0 if correct == 0 else center - reach
    return low, 1.0 if correct == total else center + reach


def accuracy(videos: ClassVideos, cache_dir: Path | None = None) -> dict[str, Any]:
    """Measures how often a classifier trained on the real videos recognises the class that a clip was asked to show.

    Args:
        videos: the videos to compare.
        cache_dir: folder of trained classifiers.

    Returns:
        `accuracy` with its Wilson `interval_95`; both per class; `confusion` {class asked for: {class recognised:
        number of clips}}, where a clip may be recognised as none of the classes; `mistakes`; and `controls`: the
        accuracy on held-out real clips as they are, recoloured, and with shuffled patches, or None without held-out
        videos.
    """
    resolution = min(videos.resolution, MAX_CLASSIFIER_RESOLUTION)
    # The classifier learns from all real videos, even those that are too short for a clip.
    classifier = cached_classifier(videos.real.folder.catalog(), resolution, videos.seed, cache_dir)
    confusion: dict[str, Counter[str]] = {name: Counter() for name in videos.class_names}
    mistakes = []
    for clip, frames in iter_pixels(videos.generated_clips(), videos.resolution):
        assert clip.label is not None
        recognised = classifier.recognise(frames)
        confusion[clip.label][recognised] += 1
        if recognised != clip.label:
            mistakes.append({"clip": clip.name, "recognised": recognised})
    correct = {name: row[name] for name, row in confusion.items()}
    total = {name: row.total() for name, row in confusion.items()}
    all_correct, all_total = sum(correct.values()), sum(total.values())
    return {
        "accuracy": all_correct / all_total,
        "interval_95": list(wilson_interval(all_correct, all_total)),
        "num_clips": all_total,
        "chance": 1 / len(classifier.class_names),
        "per_class": {name: correct[name] / total[name] for name in confusion},
        "per_class_interval_95": {name: list(wilson_interval(correct[name], total[name])) for name in confusion},
        "per_class_num_clips": total,
        "confusion": {name: dict(sorted(row.items())) for name, row in confusion.items()},
        "mistakes": mistakes,
        "controls": _controls(classifier, videos),
        "classifier": {"version": VERSION, "resolution": resolution, "seed": videos.seed},
    }


def _controls(classifier: Classifier, videos: ClassVideos) -> dict[str, Any] | None:
    if videos.held_out is None:
        return None
    # Eighths of the frame (8 of 64 pixels): the classifier was not trained to reject patches of this size.
    patch = max(1, videos.resolution // 8)
    hits: Counter[str] = Counter()
    num_clips = 0
    clips = videos.real_clips(videos.held_out, classifier.class_names)
    for number, (clip, frames) in enumerate(iter_pixels(clips, videos.resolution)):
        rng = numpy_generator(videos.seed, "controls", number)
        hits["held_out"] += classifier.recognise(frames) == clip.label
        hits["recoloured"] += classifier.recognise(recolour(frames, rng)) == clip.label
        hits["shuffled"] += classifier.recognise(shuffle_patches(frames, rng, patch)) == clip.label
        num_clips += 1
    return {
        "num_clips": num_clips,
        **{kind: hits[kind] / num_clips for kind in ("held_out", "recoloured", "shuffled")},
    }


def motion_ratio(videos: ClassVideos, cache_dir: Path | None = None) -> dict[str, Any]:
    """Compares how much moves in generated clips and in real ones of the same length and frame interval, by class.

    Args:
        videos: the videos to compare.
        cache_dir: not used by this metric.

    Returns:
        `per_class` {class: real and generated motion in 1/255, their ratio, whether it is within a factor of two},
        and `num_within_factor_two` of `num_classes`.
    """
    rows = compare_motion(
        _motion_by_class(videos.real_clips(videos.real, videos.class_names), videos.resolution),
        _motion_by_class(videos.generated_clips(), videos.resolution),
    )
    return {
        "num_within_factor_two": sum(row.within_factor_two for row in rows.values()),
        "num_classes": len(rows),
        "per_class": {name: asdict(row) for name, row in rows.items()},
    }


def _motion_by_class(clips: ClipSet, resolution: int) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for clip, frames in iter_pixels(clips, resolution):
        assert clip.label is not None
        result.setdefault(clip.label, []).append(motion(frames))
    return result


CLASS_METRICS: dict[str, ClassMetric] = {"accuracy": accuracy, "motion": motion_ratio}
"""By name; these need folders of class folders."""
