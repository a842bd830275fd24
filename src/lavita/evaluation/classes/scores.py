"""Scores of classes: is what was asked for recognised, and does it move as the real thing does?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any

from lavita.core.seeds import numpy_generator
from lavita.evaluation.classes.classifier import VERSION, Classifier, cached_classifier, recolour, shuffle_patches
from lavita.evaluation.classes.clips import Comparison
from lavita.evaluation.classes.motion import compare_motion, motion

ClassMetric = Callable[[Comparison, Path | None], dict[str, Any]]
"""Makes a JSON-able report of a comparison, with a folder to keep what can be used again, or None."""

MAX_CLASSIFIER_RESOLUTION = 64
"""The classifier reads larger frames shrunk to this side: classes show there already, and it trains in seconds."""


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


def accuracy(comparison: Comparison, cache_dir: Path | None = None) -> dict[str, Any]:
    """How often a classifier trained on the real videos recognises the class that a clip was asked to show.

    Args:
        comparison: what is compared.
        cache_dir: where trained classifiers are kept.

    Returns:
        `accuracy` with its Wilson `interval_95`, the same by class, `confusion` {asked for: {recognised: clips}}
        where a clip may be recognised as none of the classes,
        the `mistakes`, and `controls`: accuracy on held-out real clips as they are, recoloured, and with their
        patches shuffled, or None without held-out videos.
    """
    resolution = min(comparison.resolution, MAX_CLASSIFIER_RESOLUTION)
    classifier = cached_classifier(comparison.real.root, resolution, comparison.seed, cache_dir)
    confusion: dict[str, Counter[str]] = {name: Counter() for name in comparison.class_names}
    mistakes = []
    for name, video, frames in comparison.generated_clips():
        recognised = classifier.recognise(frames)
        confusion[name][recognised] += 1
        if recognised != name:
            mistakes.append({"clip": video.name, "recognised": recognised})
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
        "controls": _controls(classifier, comparison),
        "classifier": {"version": VERSION, "resolution": resolution, "seed": comparison.seed},
    }


def _controls(classifier: Classifier, comparison: Comparison) -> dict[str, Any] | None:
    if comparison.held_out is None:
        return None
    # Eighths of the frame, 8 of 64 pixels, are patches that the classifier has not been trained to reject.
    patch = max(1, comparison.resolution // 8)
    hits: Counter[str] = Counter()
    num_clips = 0
    shown = comparison.real_clips(comparison.held_out, classifier.class_names)
    for number, (name, frames) in enumerate(shown):
        rng = numpy_generator(comparison.seed, "controls", number)
        hits["held_out"] += classifier.recognise(frames) == name
        hits["recoloured"] += classifier.recognise(recolour(frames, rng)) == name
        hits["shuffled"] += classifier.recognise(shuffle_patches(frames, rng, patch)) == name
        num_clips += 1
    return {
        "num_clips": num_clips,
        **{kind: hits[kind] / num_clips for kind in ("held_out", "recoloured", "shuffled")},
    }


def motion_ratio(comparison: Comparison, cache_dir: Path | None = None) -> dict[str, Any]:
    """How much moves in generated clips against real ones of the same length and frame interval, by class.

    Args:
        comparison: what is compared.
        cache_dir: not needed by this metric.

    Returns:
        `per_class` {class: real and generated motion in 1/255, their ratio, whether it is within a factor of two},
        and `num_within_factor_two` of `num_classes`.
    """
    real: dict[str, list[float]] = {}
    for name, frames in comparison.real_clips(comparison.real, comparison.class_names):
        real.setdefault(name, []).append(motion(frames))
    generated: dict[str, list[float]] = {}
    for name, _, frames in comparison.generated_clips():
        generated.setdefault(name, []).append(motion(frames))
    rows = compare_motion(real, generated)
    return {
        "num_within_factor_two": sum(row.within_factor_two for row in rows.values()),
        "num_classes": len(rows),
        "per_class": {name: asdict(row) for name, row in rows.items()},
    }


CLASS_METRICS: dict[str, ClassMetric] = {"accuracy": accuracy, "motion": motion_ratio}
"""By name; these need folders of class folders."""
