"""Class accuracy and motion, against closed forms, scipy, and sets of videos whose classes are known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats  # type: ignore[import-untyped]
from shapes import NUM_FRAMES, SHAPES, SIZE, shape_in_any_colour, write_set
from tiny_data import write_numbered

from lavita.evaluation.classes.clips import ClassVideos, select_videos
from lavita.evaluation.classes.motion import compare_motion, motion
from lavita.evaluation.classes.scores import wilson_interval
from lavita.evaluation.evaluate import METRICS, EvaluationOptions, evaluate
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.report.table import print_scores, write_scores
from lavita.evaluation.sources import VideoFolder
from lavita.video.reading import read_clip
from lavita.video.writing import write_video


def test_motion_of_known_clips() -> None:
    still = np.full((5, 16, 16, 3), 77, np.uint8)
    assert motion(still) == 0
    ramp = np.arange(0, 50, 3, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    assert motion(ramp) == 3
    assert motion(ramp[::-1]) == 3  # uint8 differences must not wrap around
    flicker = np.zeros((4, 8, 8, 3), np.uint8)
    flicker[1::2] = 255
    assert motion(flicker) == 255
    # A white bar that moves by a pixel changes two columns of 40.
    bar = np.zeros((10, 8, 40, 3), np.uint8)
    for time, frame in enumerate(bar):
        frame[:, time + 3 : time + 9] = 255
    assert motion(bar) == pytest.approx(2 * 255 / 40)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 8, 8), np.uint8)],
)
def test_motion_refuses_other_arrays(frames: Any) -> None:
    with pytest.raises(ValueError, match=r"frames is .*uint8 \(F, H, W, 3\), F >= 2"):
        motion(frames)


def test_motion_ratio_by_class() -> None:
    rows = compare_motion(
        {"a": [1.0, 3.0], "b": [2.0], "c": [2.0], "d": [2.0], "still": [0.0], "unused": [1.0]},
        {"a": [3.0], "b": [4.0], "c": [4.1], "d": [0.9], "still": [0.0, 0.0]},
    )
    assert list(rows) == ["a", "b", "c", "d", "still"]
    assert (rows["a"].real, rows["a"].generated, rows["a"].ratio) == (2.0, 3.0, 1.5)
    assert (rows["a"].num_real_clips, rows["a"].num_generated_clips) == (2, 1)
    within = {name: row.within_factor_two for name, row in rows.items()}
    assert within == {"a": True, "b": True, "c": False, "d": False, "still": True}
    assert rows["still"].ratio is None
    with pytest.raises(ValueError, match="'b' has no real clips"):
        compare_motion({"a": [1.0]}, {"b": [1.0]})


def test_real_motion_is_measured_at_the_frame_interval(tmp_path: Path) -> None:
    write_numbered(tmp_path / "real" / "ramp" / "0", 40)  # one step of grey per frame
    write_numbered(tmp_path / "generated" / "ramp" / "0", 5)
    for interval in (1, 3):
        options = EvaluationOptions(
            tmp_path / "real",
            tmp_path / "generated",
            metrics=["motion"],
            overrides=[f"frame_interval={interval}"],
        )
        report = evaluate(options).report
        row = report["motion"]["per_class"]["ramp"]
        assert (row["real"], row["generated"]) == (interval, 1)
        assert row["num_real_clips"] == 40 // (4 * interval + 1)
        assert row["within_factor_two"] == (interval == 1)


def test_wilson_interval_equals_scipy() -> None:
    for total in (1, 2, 8, 64, 1000):
        for correct in {0, 1, total // 3, total - 1, total}:
            for confidence in (0.8, 0.95):
                expected = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
                found = wilson_interval(correct, total, confidence)
                assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    with pytest.raises(ValueError, match="correct is 3, total 2"):
        wilson_interval(3, 2)


def test_score(tmp_path: Path, shapes: Path, trained: list[int]) -> None:
    rng = np.random.default_rng(7)
    generated = write_set(tmp_path / "generated", ("disk", "stripes"), shape_in_any_colour, count=3, seed=8)
    write_video(generated / "stripes" / "3.mp4", shape_in_any_colour("checkers", rng), fps=8)
    still = np.repeat(shape_in_any_colour("disk", rng)[:1], NUM_FRAMES, axis=0)
    for number in range(3):
        write_video(generated / "disk" / f"{number}.mp4", still, fps=8)
    held_out = write_set(tmp_path / "heldout", SHAPES, shape_in_any_colour, count=4, seed=9)

    report = evaluate(EvaluationOptions(shapes, generated, held_out)).report
    accuracy, moved, protocol = report["accuracy"], report["motion"], report["protocol"]
    assert (accuracy["num_clips"], accuracy["accuracy"]) == (7, pytest.approx(6 / 7))
    assert accuracy["interval_95"] == pytest.approx(wilson_interval(6, 7))
    assert accuracy["per_class"] == {"disk": 1.0, "stripes": 0.75}
    assert accuracy["per_class_num_clips"] == {"disk": 3, "stripes": 4}
    assert accuracy["per_class_interval_95"]["stripes"] == pytest.approx(wilson_interval(3, 4))
    assert accuracy["confusion"] == {"disk": {"disk": 3}, "stripes": {"checkers": 1, "stripes": 3}}
    assert accuracy["mistakes"] == [{"clip": "stripes/3.mp4", "recognised": "checkers"}]
    assert accuracy["chance"] == pytest.approx(1 / 3)
    assert accuracy["controls"]["num_clips"] == 3 * 4
    assert accuracy["controls"]["held_out"] >= 0.85
    assert set(accuracy["controls"]) == {"num_clips", "held_out", "recoloured", "shuffled"}
    assert not moved["per_class"]["disk"]["within_factor_two"]
    assert moved["per_class"]["disk"]["ratio"] < 0.1
    assert (protocol["num_frames"], protocol["frame_interval"], protocol["width"]) == (NUM_FRAMES, 1, SIZE)
    assert protocol["classes_not_generated"] == ["checkers"]

    write_scores(report, tmp_path / "new" / "scores.json")
    read = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert read == report
    stream = io.StringIO()
    print_scores(read, Console(file=stream, width=80))
    for text in ("stripes", "75.0%", "85.7%", "held-out", f"{moved['num_within_factor_two']} of 2"):
        assert text in stream.getvalue()


def test_names_with_brackets_are_printed_as_they_are() -> None:
    classes, interval = ["[/b]", "[red]"], [0.5, 1.0]
    report: dict[str, Any] = {
        "protocol": {
            **{"generated": "out [/x]", "real": "[bold]", "num_frames": 2, "frame_interval": 1},
            "classes": classes,
        },
        "accuracy": {
            **{"accuracy": 1.0, "num_clips": 2, "interval_95": interval, "controls": None, "chance": 0.5},
            "per_class": dict.fromkeys(classes, 1.0),
            "per_class_num_clips": dict.fromkeys(classes, 1),
            "per_class_interval_95": dict.fromkeys(classes, interval),
        },
    }
    stream = io.StringIO()
    print_scores(report, Console(file=stream, width=80))
    for text in (*classes, "out [/x] against [bold]"):
        assert text in stream.getvalue()


def test_score_without_held_out_videos(tmp_path: Path, shapes: Path, trained: list[int]) -> None:
    report = evaluate(EvaluationOptions(shapes, shapes, metrics=["accuracy"])).report
    assert set(report) == {"protocol", "accuracy"}
    assert report["accuracy"]["controls"] is None
    stream = io.StringIO()
    print_scores(report, Console(file=stream, width=200))
    assert "not checked" in stream.getvalue()


def test_unknown_metrics_are_named(shapes: Path) -> None:
    with pytest.raises(ValueError, match=f"metrics is 'psnr'; allowed: {', '.join(METRICS)}"):
        evaluate(EvaluationOptions(shapes, shapes, metrics=["motion", "psnr"]))
    with pytest.raises(ValueError, match="metrics is empty"):
        evaluate(EvaluationOptions(shapes, shapes, metrics=[]))


def test_folders_that_cannot_be_compared(tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "empty").mkdir()
    frames = shape_in_any_colour("disk", np.random.default_rng(0))
    write_video(tmp_path / "flat" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "other" / "bananas" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "lengths" / "disk" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "lengths" / "disk" / "1.mp4", frames[:4], fps=8)
    write_video(tmp_path / "sizes" / "disk" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "sizes" / "disk" / "1.mp4", frames[:, :16], fps=8)

    def select(real: str | Path, generated: str | Path, held_out: str | None = None) -> ClassVideos:
        folders = [None if folder is None else VideoFolder(tmp_path / folder) for folder in (real, generated, held_out)]
        assert folders[0] is not None and folders[1] is not None
        return select_videos(folders[0], folders[1], folders[2], Protocol())

    for real, generated, held_out, message in (
        (shapes, "missing", None, "missing: no such folder"),
        (shapes, "empty", None, "empty: no usable videos"),
        ("empty", shapes, None, "empty: no usable videos"),
        (shapes, "flat", None, "flat.*0.mp4: is not in a class folder"),
        ("flat", shapes, None, "flat.*0.mp4: is not in a class folder"),
        (shapes, "other", None, "other: has the class 'bananas'.*checkers, disk, stripes"),
        (shapes, shapes, "other", "other: has the class 'bananas'"),
        (shapes, "lengths", None, "1.mp4: has 4 frames .* has 8 "),
        (shapes, "sizes", None, "1.mp4: has 8 frames of 32x16, but .* of 32x32"),
    ):
        with pytest.raises(ValueError, match=message):
            select(real, generated, held_out)
    with pytest.raises(ValueError, match="no usable videos"):
        # At interval 2 the real videos are shorter than 8 frames.
        select_videos(VideoFolder(shapes), VideoFolder(shapes), None, Protocol(frame_interval=2))


@pytest.mark.slow
def test_classifier_on_arcade_games(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    from lavita.demo.games import render_dataset

    render_dataset(tmp_path, train_episodes=8, heldout_episodes=2, num_frames=64)
    for video in (tmp_path / "heldout").glob("*/*.mp4"):
        clip = read_clip(video, 20)
        write_video(tmp_path / "generated" / video.parent.name / video.name, clip, fps=15)
    report = evaluate(EvaluationOptions(tmp_path / "train", tmp_path / "generated", tmp_path / "heldout")).report
    controls = report["accuracy"]["controls"]
    assert report["accuracy"]["accuracy"] >= 0.98
    assert controls["held_out"] >= 0.98
    assert controls["recoloured"] >= 0.9
    assert controls["shuffled"] <= 0.6
    assert report["motion"]["num_within_factor_two"] == report["motion"]["num_classes"] == 8
