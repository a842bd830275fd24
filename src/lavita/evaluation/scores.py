"""The scores of generated videos: one call, one report that says how it was made."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.console import Console
from rich.table import Table

from lavita.data.catalog import read_generation
from lavita.evaluation.classifier import VERSION, Classifier, cached_classifier, recolour, shuffle_patches
from lavita.evaluation.motion import compare_motion, motion
from lavita.evaluation.protocol import Comparison, compare
from lavita.runtime import numpy_generator

Metric = Callable[[Comparison, Path | None], dict[str, Any]]
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


METRICS: dict[str, Metric] = {"accuracy": accuracy, "motion": motion_ratio}
"""What `score` can compute, by name."""


def score(
    real: Path,
    generated: Path,
    held_out: Path | None = None,
    metrics: Sequence[str] = ("accuracy", "motion"),
    frame_interval: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Scores generated videos against real ones.

    The length and size of all clips are those of the generated ones; real videos are cut into clips like them.

    Args:
        real: folder of class folders of the videos that the model was trained on.
        generated: folder of class folders, named as the real ones, of clips of one size: `<class>/<seed>.mp4`.
        held_out: like `real`, of videos that the model was not trained on; they check the classifier.
        metrics: names in `METRICS`.
        frame_interval: that of the model: frames of a real video from one frame of a clip to the next; by default
            the recorded one (see `protocol.compare`).
        seed: of the classifier and its checks.
        cache_dir: trained classifiers are kept here, so that the next call with the same videos has one.

    Returns:
        A JSON-able report: `protocol`, and a part for each metric under its name.

    Raises:
        ValueError: an unknown metric or none, or folders that cannot be compared (see `protocol.compare`).
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        given = repr(unknown[0]) if unknown else "empty"
        raise ValueError(f"metrics is {given}; allowed: {', '.join(METRICS)}")
    comparison = compare(real, generated, held_out, frame_interval, seed)
    return {
        "protocol": _protocol(comparison, held_out, list(metrics)),
        **{name: METRICS[name](comparison, cache_dir) for name in metrics},
    }


def _protocol(comparison: Comparison, held_out: Path | None, metrics: list[str]) -> dict[str, Any]:
    first = comparison.generated.videos[0].info
    return {
        "real": str(comparison.real.root),
        "generated": str(comparison.generated.root),
        "generation": read_generation(comparison.generated.root),
        "held_out": None if held_out is None else str(held_out),
        "metrics": metrics,
        "classes": list(comparison.class_names),
        "classes_not_generated": sorted(set(comparison.real.class_names) - set(comparison.class_names)),
        "num_real_videos": len(comparison.real.videos),
        "num_real_videos_skipped": len(comparison.real.broken),
        "num_generated_clips": len(comparison.generated.videos),
        "num_held_out_videos": 0 if comparison.held_out is None else len(comparison.held_out.videos),
        "num_frames": comparison.num_frames,
        "frame_interval": comparison.frame_interval,
        "width": first.width,
        "height": first.height,
        "seed": comparison.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("lavita", "torch", "av", "numpy", "pillow")},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_scores(scores: Mapping[str, Any], out: Path) -> None:
    """Writes a report of `score` as JSON; missing folders are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")


def print_scores(scores: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a report of `score` as a table, a class a line.

    Args:
        scores: what `score` returned, or what was read from its JSON.
        console: where to print; standard output by default.
    """
    console = console or Console()
    recognised, moved, protocol = scores.get("accuracy"), scores.get("motion"), scores["protocol"]
    table = Table(
        title=f"{protocol['generated']} against {protocol['real']}",
        caption=f"clips of {protocol['num_frames']} frames at interval {protocol['frame_interval']}",
    )
    table.add_column("class")
    if recognised:
        for heading in ("clips", "recognised", "95%\ninterval"):
            table.add_column(heading, justify="right")
    if moved:
        for heading in ("motion\nreal / gen.", "ratio", "within\n2x"):
            table.add_column(heading, justify="right")
    for name in protocol["classes"]:
        cells = [name]
        if recognised:
            cells += _accuracy_cells(
                recognised["per_class_num_clips"][name],
                recognised["per_class"][name],
                recognised["per_class_interval_95"][name],
            )
        if moved:
            row = moved["per_class"][name]
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            within = "yes" if row["within_factor_two"] else "no"
            cells += [f"{row['real']:.2f} / {row['generated']:.2f}", ratio, within]
        table.add_row(*cells)
    table.add_section()
    total = ["all"]
    if recognised:
        total += _accuracy_cells(recognised["num_clips"], recognised["accuracy"], recognised["interval_95"])
    if moved:
        total += ["", "", f"{moved['num_within_factor_two']} of {moved['num_classes']}"]
    table.add_row(*total)
    console.print(table)
    if recognised:
        console.print(_describe_controls(recognised))


def _accuracy_cells(num_clips: int, share: float, interval: Sequence[float]) -> list[str]:
    return [str(num_clips), f"{share:.1%}", f"{100 * interval[0]:.0f}-{interval[1]:.0%}"]


def _describe_controls(recognised: Mapping[str, Any]) -> str:
    controls = recognised["controls"]
    if controls is None:
        return "The classifier was not checked: give held-out videos."
    return (
        f"The classifier on {controls['num_clips']} held-out real clips: {controls['held_out']:.1%}; recoloured "
        f"{controls['recoloured']:.1%}; with patches shuffled {controls['shuffled']:.1%} "
        f"(chance {recognised['chance']:.1%})."
    )
