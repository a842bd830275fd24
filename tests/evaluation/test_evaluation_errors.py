"""What `lavita evaluate` refuses: one line, exit code 2, before any work is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_data import write_videos

FEW = ("num_real_clips=12", "num_generated_clips=9", "frame_interval=2")
# "{}" stands for the folder of `world`, "@" for its real and generated videos and the metric kvd.
REFUSED: list[tuple[Sequence[str], str]] = [
    ([], "give --real and --generated, or --compare with two reports"),
    (["--real", "{}/nowhere", "--generated", "{}/generated", *FEW], "nowhere: no such folder"),
    (["--real", "{}/weights", "--generated", "{}/generated", *FEW], "weights: no usable videos (found none)"),
    (["--real", "{}/real", "--generated", "{}/weights", *FEW], "weights: no usable videos (found none)"),
    (["--real", "{}/real", "--generated", "{}/generated", "--metrics", "fwd"], "metrics is 'fwd'; allowed: accuracy"),
    (
        ["@", "num_generated_clips=11", "num_real_clips=9", "frame_interval=1"],
        "num_generated_clips is 11, but its 10 videos",
    ),
    (
        ["@", "num_real_clips=500", "num_generated_clips=9", "frame_interval=2"],
        "num_real_clips is 500, but its 8 videos",
    ),
    (["@", "num_real_clips=9", "num_generated_clips=9"], "frame_interval is not set, and"),
    (["@", *FEW, "num_frames=17"], "has 16 frames, but a clip needs 17"),
    (["@", "num_real_clips=12", "num_generated_clips=9", "frame_interval=3"], "has 40 frames, but a clip needs 46"),
    (["@", *FEW, "num_frames=8"], "num_frames is 8, but i3d needs at least 10"),
    (["@", *FEW, "resolution=32"], "resolution is 32, but the videos of"),
    (["@", *FEW, "resolutoin=8"], "unknown key 'resolutoin'; known here: dataset"),
    (["@", *FEW, "video_extractor=i4d"], "video_extractor is 'i4d'; allowed: i3d"),
    (["@", *FEW, "inception_splits=3"], "inception_splits is 3"),
    (["@", *FEW, "--preset", "papre"], "preset is 'papre'; allowed: paper, stylegan-v, latte, offline"),
    (["@", *FEW, "--metrics", "fvd"], "num_real_clips gives 12 samples, but fvd on the 400 features of i3d needs more"),
    (["@", *FEW, "--metrics", "is"], "num_generated_clips is 9, but inception_score=stylegan-v takes 2048"),
    (["@", *FEW, "--weights", "i3d={}/weights/c3d_ucf101.pt"], "c3d_ucf101.pt: is not i3d"),
    (["@", *FEW, "--weights", "i4d=x"], "weights is 'i4d=x'; allowed names: i3d"),
    (["@", *FEW, "--weights", "{}/real"], "i3d needs the file i3d_torchscript.pt, published by StyleGAN-V"),
    (["@", "--metrics", "accuracy", "--page", "p"], "page is set, but has no effect"),
    (["@", *FEW, "--sampler", "ddim"], "sampler is set, but has no effect"),
    (["@", *FEW, "neighbours=3"], "neighbours is set, but has no effect on kvd"),
    (["@", *FEW, "--metrics", "prdc", "neighbours=9"], "generated: it has 9 samples, but prdc needs more than neigh"),
    (["@", "num_real_clips=12", "num_generated_clips=2", "frame_interval=2"], "generated: its clips are from 2 videos"),
    (["@", *FEW, "--metrics", "accuracy"], "num_real_clips is set, but has no effect without a metric of features"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_input_is_one_line(
    refuse: Callable[..., None], world: Path, weights: Path, arguments: Sequence[str], message: str
) -> None:
    filled = [text.format(world).replace(f"{world}/weights", str(weights)) for text in arguments]
    if filled[:1] == ["@"]:
        filled = ["--real", f"{world}/real", "--generated", f"{world}/generated", "--metrics", "kvd", *filled[1:]]
    if filled and "--metrics" not in filled:
        filled += ["--metrics", "kvd"]
    refuse(filled, message)


def test_mixed_sizes_and_recorded_intervals_are_refused(
    refuse: Callable[..., None], world: Path, tmp_path: Path
) -> None:
    write_videos(tmp_path / "mixed", ["0.mp4", "1.mp4"], 16, 16, 16)
    write_videos(tmp_path / "mixed", ["2.mp4"], 16, 16, 20)
    arguments = ("--real", world / "real", "--generated", "mixed", "--metrics", "kvd", *FEW)
    refuse(arguments, "2.mp4: is 20x16, but", "generated clips must all be of one size")
    shutil.copytree(world / "generated", tmp_path / "recorded")
    (tmp_path / "recorded" / "generation.json").write_text(json.dumps({"frame_interval": 3}))
    arguments = ("--real", world / "real", "--generated", "recorded", "--metrics", "kvd", *FEW)
    refuse(arguments, "frame_interval is 2, but the model of recorded has 3")
