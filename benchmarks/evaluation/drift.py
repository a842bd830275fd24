"""Do long videos drift? Each stretch of them is scored by itself against real clips.

A video that was rolled out in windows is made from its own frames again and again, so its faults may add up. One that
was made at once, at squeezed positions, has none, but its model never saw such positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lavita.core.files import write_json
from lavita.evaluation.classes.classifier import Classifier, cached_classifier
from lavita.evaluation.classes.motion import motion
from lavita.evaluation.classes.scores import wilson_interval
from lavita.evaluation.clips import ClipSet, choose_clips, iter_pixels, make_clip
from lavita.evaluation.distances.kernel import kernel_score
from lavita.evaluation.feature_metrics import Sample
from lavita.evaluation.features.compute import compute_outputs
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.features.networks import NETWORKS, load_network
from lavita.evaluation.sources import VideoFolder, find_interval

EXTRACTOR = EXTRACTORS["efficientnet_lite0_video"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Stretch:
    """The score of the clips that begin at the same frame of each long video."""

    start: int
    """First frame, from 0."""
    distance: float
    """Kernel distance of the clips from real ones."""
    distance_interval: Interval
    right_class: float
    """Share of the clips that the classifier recognises as the class of their folder."""
    right_class_interval: Interval
    motion: float
    """Mean motion of the clips, relative to that of real clips of the same classes."""


def study_drift(
    real: Path,
    generated: Sequence[Path],
    num_frames: int,
    num_real_clips: int,
    resolution: int,
    cache: Path | None,
    out: Path | None,
) -> None:
    """Prints the scores of successive stretches of the videos of each folder, with 95% intervals.

    Args:
        real: folder of real videos with one folder per class.
        generated: folders of long videos, each with one folder per class.
        num_frames: frames of a stretch.
        num_real_clips: real clips to compare with.
        resolution: side of the clips in pixels.
        cache: folder of trained classifiers, as in `lavita evaluate --cache`.
        out: JSON file, or None.

    Raises:
        ValueError: if a folder holds no video of this length, or videos without a class.
    """
    for folder in (real, *generated):
        if not all(video.info.path.parent != folder for video in VideoFolder(folder).catalog().videos):
            raise ValueError(f"{folder}: holds videos without a class; there must be one folder per class")
    interval = find_interval(generated[0], None) or 1
    source = VideoFolder(real).usable((num_frames - 1) * interval + 1)
    reference = choose_clips(source, num_real_clips, num_frames, interval, 0)
    known = cached_classifier(VideoFolder(real).catalog(), resolution, 0, cache)
    real_sample = _sample(reference, resolution)
    moving = _motion_by_class(reference, resolution)
    rows = {}
    for folder in generated:
        rows[str(folder)] = stretches = [
            score_stretch(clips, real_sample, moving, known, resolution) for clips in cut(folder, num_frames)
        ]
        table = Table("frames", "kernel distance", "right class", "motion", title=str(folder))
        for row in stretches:
            table.add_row(
                f"{row.start} to {row.start + num_frames - 1}",
                "{:.3f} ({:.3f} to {:.3f})".format(row.distance, *row.distance_interval),
                "{:.1%} ({:.0%} to {:.0%})".format(row.right_class, *row.right_class_interval),
                f"{row.motion:.2f}",
            )
        Console().print(table)
    print(f"{num_real_clips} real clips; kernel distance on {EXTRACTOR.name}; motion relative to real clips")
    if out is not None:
        write_json(out, {folder: [asdict(row) for row in stretches] for folder, stretches in rows.items()})


def cut(folder: Path, num_frames: int) -> list[ClipSet]:
    """Cuts all videos of a folder at the same frames: one set of clips for each stretch that every video has."""
    source = VideoFolder(folder).usable(num_frames)
    shortest = min(video.info.num_frames for video in source.catalog.videos)
    return [
        ClipSet(folder, tuple(make_clip(source, video, start, num_frames) for video in source.catalog.videos), 1)
        for start in range(0, shortest - num_frames + 1, num_frames)
    ]


def score_stretch(
    clips: ClipSet, real: Sample, moving: dict[str | None, float], known: Classifier, resolution: int
) -> Stretch:
    """Scores clips against a sample of real ones, whose motion is given by class."""
    made = _sample(clips, resolution)
    score = kernel_score(
        real.features(EXTRACTOR), made.features(EXTRACTOR), real.videos(EXTRACTOR), made.videos(EXTRACTOR)
    )
    right = sum(known.recognise(frames) == clip.label for clip, frames in iter_pixels(clips, resolution))
    own = _motion_by_class(clips, resolution)
    return Stretch(
        clips.clips[0].start,
        score.value,
        score.interval_95,
        right / len(clips.clips),
        wilson_interval(right, len(clips.clips)),
        float(np.mean([own[label] / moving[label] for label in own])),
    )


def _sample(clips: ClipSet, resolution: int) -> Sample:
    return Sample(clips, compute_outputs(clips, [load_network(NETWORKS["efficientnet_lite0"])], resolution))


def _motion_by_class(clips: ClipSet, resolution: int) -> dict[str | None, float]:
    found: dict[str | None, list[float]] = {}
    for clip, frames in iter_pixels(clips, resolution):
        found.setdefault(clip.label, []).append(motion(frames))
    return {label: float(np.mean(values)) for label, values in found.items()}
