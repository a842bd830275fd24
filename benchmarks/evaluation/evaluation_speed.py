"""A full evaluation with the offline extractor: wall time by stage, without and with cached features.

Cuts the generated side, lossless clips of 16 frames, from held-out videos; then scores it twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lavita.core.processes import processes
from lavita.evaluation.clips import choose_clips, read_source
from lavita.evaluation.evaluate import Options, score
from lavita.evaluation.features.compute import read_pixels
from lavita.evaluation.protocol import make_protocol
from lavita.evaluation.report.table import print_scores, write_scores
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
            source = read_source(data / "heldout", 16, skip_broken=False)
            side = choose_clips(source, num_clips, 16, 1, seed=99)
            for number, clip in enumerate(side.clips):
                pixels = read_pixels(side, clip, resolution)
                write_video(generated / str(clip.label) / f"{number:05}.mkv", pixels, fps=15)
        team.gather(None)
        splits = [] if num_clips == 2048 else ["inception_score=custom", "inception_splits=2"]
        overrides = [f"num_real_clips={num_clips}", f"num_generated_clips={num_clips}", "frame_interval=1", *splits]
        protocol = make_protocol("offline", overrides, floor=floor)
        for name in ("first", "cached"):
            options = Options(cache_dir=out / "cache", processes=team)
            report = score(
                data / "train", generated, data / "heldout", list(metrics or METRICS), protocol, options
            ).report
            if team.is_first:
                print_scores(report)
                print(name, json.dumps(report["seconds"], indent=1))
                write_scores(report, out / f"{name}.json")
