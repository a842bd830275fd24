"""A full evaluation with the offline extractor: wall time by stage, without and with the cache.

    python benchmarks/evaluation/evaluation_speed.py --data runs/demo/data --num-clips 2048 --out runs/evaluation-speed

Cuts the generated side, lossless clips of 16 frames, from held-out videos; then scores it twice. Under
`torchrun --nproc-per-node 2 benchmarks/evaluation/evaluation_speed.py ...` two processes share the work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lavita.core.processes import processes
from lavita.evaluation.clips import choose_clips, read_pixels
from lavita.evaluation.evaluate import EvaluationOptions, evaluate
from lavita.evaluation.report.table import print_scores, write_scores
from lavita.evaluation.sources import VideoFolder
from lavita.video.writing import write_video

METRICS = ["frechet-video", "kernel-video", "prdc", "frechet-image", "kernel-image", "prdc-image", "inception-score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/ class folders")
    parser.add_argument("--num-clips", type=int, default=2048)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--no-floor", action="store_true", help="leave out real against real")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    generated = arguments.out / "generated"
    with processes() as team:
        if team.is_first and not generated.exists():
            source = VideoFolder(arguments.data / "heldout").usable(16)
            clips = choose_clips(source, arguments.num_clips, 16, 1, seed=99)
            for number, clip in enumerate(clips.clips):
                pixels = read_pixels(clips, clip, arguments.resolution)
                write_video(generated / str(clip.label) / f"{number:05}.mkv", pixels, fps=15)
        team.gather(None)
        splits = [] if arguments.num_clips == 2048 else ["inception_score=custom", "inception_splits=2"]
        num = arguments.num_clips
        overrides = [f"num_real_clips={num}", f"num_generated_clips={num}", "frame_interval=1", *splits]
        options = EvaluationOptions(
            arguments.data / "train",
            generated,
            arguments.data / "heldout",
            arguments.metrics.split(","),
            preset="offline",
            overrides=[*overrides, f"floor={not arguments.no_floor}"],
            cache=arguments.out / "cache",
            device="cpu",
        )
        for name in ("first", "cached"):
            report = evaluate(options, team).report
            if team.is_first:
                print_scores(report)
                print(name, json.dumps(report["seconds"], indent=1))
                write_scores(report, arguments.out / f"{name}.json")


if __name__ == "__main__":
    main()
