"""A full evaluation with the offline extractor: wall time by stage, without and with cached features.

Cuts the generated side, lossless clips of 16 frames, from held-out videos; then scores it twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lavita.core.processes import processes
from lavita.evaluation.clips import choose_clips, read_pixels
from lavita.evaluation.evaluate import EvaluationOptions, evaluate
from lavita.evaluation.report.table import print_scores, write_scores
from lavita.evaluation.sources import VideoFolder
from lavita.video.writing import write_video

METRICS = ["frechet-video", "kernel-video", "prdc", "frechet-image", "kernel-image", "prdc-image", "inception-score"]


def time_evaluation(
    data: Path, out: Path, num_clips: int, resolution: int, metrics: Sequence[str] | None, floor: bool
) -> None:
    """Scores held-out clips against training clips twice and prints the seconds of each stage.

    Args:
        data: folder with train/ and heldout/, each with one folder per class.
        out: folder for the clips, the cached features and the reports; clips that are there are used again.
        num_clips: clips per side.
        resolution: height and width of the clips.
        metrics: names of metrics; by default `METRICS`.
        floor: whether real clips are scored against real ones, too.
    """
    generated = out / "generated"
    with processes() as team:
        if team.is_first and not generated.exists():
            chosen = choose_clips(VideoFolder(data / "heldout").usable(16), num_clips, 16, 1, seed=99)
            for number, clip in enumerate(chosen.clips):
                pixels = read_pixels(chosen, clip, resolution)
                write_video(generated / str(clip.label) / f"{number:05}.mkv", pixels, fps=15)
        team.gather(None)
        splits = [] if num_clips == 2048 else ["inception_score=custom", "inception_splits=2"]
        overrides = [f"num_real_clips={num_clips}", f"num_generated_clips={num_clips}", "frame_interval=1", *splits]
        options = EvaluationOptions(
            data / "train",
            generated,
            data / "heldout",
            metrics or METRICS,
            preset="offline",
            overrides=[*overrides, f"floor={floor}"],
            cache=out / "cache",
            device="cpu",
        )
        for name in ("first", "cached"):
            report = evaluate(options, team).report
            if team.is_first:
                print_scores(report)
                print(name, json.dumps(report["seconds"], indent=1))
                write_scores(report, out / f"{name}.json")
