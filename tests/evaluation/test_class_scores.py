"""Scores of generated videos, against closed forms, scipy and data sets whose classes differ in one thing only."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats

from lavita.evaluation.classes import classifier as classifier_module
from lavita.evaluation.classes.classifier import (
    Classifier,
    cached_classifier,
    recolour,
    shuffle_patches,
    train_classifier,
)
from lavita.evaluation.classes.clips import compare, cut_clips
from lavita.evaluation.classes.motion import compare_motion, motion
from lavita.evaluation.classes.scores import wilson_interval
from lavita.evaluation.evaluate import METRICS, score
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.report.table import print_scores, write_scores
from lavita.video.reading import read_clip
from lavita.video.writing import write_video

SIZE, NUM_FRAMES = 32, 8
HUES = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}
SHAPES = ("checkers", "disk", "stripes")

Frames = npt.NDArray[np.uint8]
Paint = Callable[[str, np.random.Generator], Frames]


def paint(shape: str, colours: npt.NDArray[Any], rng: np.random.Generator, num_frames: int = NUM_FRAMES) -> Frames:
    """A shape of the second colour that drifts over the first, one pixel a frame."""
    y, x = np.mgrid[:SIZE, :SIZE]
    phase = rng.integers(8)
    frames = []
    for time in range(num_frames):
        if shape == "stripes":
            mask = (y + phase + time) % 8 < 4
        elif shape == "checkers":
            mask = ((x + phase + time) // 4 + y // 4) % 2 == 0
        else:
            mask = (x - 10 - phase - time % 4) ** 2 + (y - 12 - phase) ** 2 < 64
        frames.append(colours[mask.astype(int)])
    return np.stack(frames).astype(np.uint8)


def shape_in_any_colour(name: str, rng: np.random.Generator) -> Frames:
    while True:
        colours = rng.integers(0, 256, (2, 3))
        if np.abs(colours[0] - colours[1]).max() > 80:
            return paint(name, colours, rng)


def disk_of_a_hue(name: str, rng: np.random.Generator) -> Frames:
    return paint("disk", np.array([(128, 128, 128), HUES[name]]), rng)


def drawn(seed: int, number: int) -> np.random.Generator:
    """The same for every class, so that classes differ in nothing but what `painter` makes of their names."""
    return np.random.default_rng([seed, number])


def write_set(root: Path, names: tuple[str, ...], painter: Paint, count: int, seed: int) -> Path:
    for name in names:
        for number in range(count):
            write_video(root / name / f"{number}.mp4", painter(name, drawn(seed, number)), fps=8)
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shapes"), SHAPES, shape_in_any_colour, count=16, seed=0)


@pytest.fixture(scope="module")
def shape_classifier(shapes: Path) -> Classifier:
    return train_classifier(shapes, SIZE, num_steps=130)


def clips(names: tuple[str, ...], painter: Paint, count: int, seed: int) -> list[tuple[str, Frames]]:
    return [(name, painter(name, drawn(seed, number))) for name in names for number in range(count)]


def share_recognised(classifier: Classifier, shown: list[tuple[str, Frames]]) -> float:
    return float(np.mean([classifier.recognise(frames) == name for name, frames in shown]))


# Motion


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


# Protocol


def write_numbered(folder: Path, num_frames: int, size: tuple[int, int] = (SIZE, SIZE)) -> None:
    folder.mkdir(parents=True)
    for number in range(num_frames):
        Image.new("RGB", size, (number, number, number)).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("num_frames", "interval", "expected"),
    [
        (4, 1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (4, 3, [[0, 3, 6, 9]]),
        (3, 2, [[0, 2, 4], [5, 7, 9]]),
        (13, 1, [list(range(13))]),
        (14, 1, []),
    ],
)
def test_clips_of_a_real_video(tmp_path: Path, num_frames: int, interval: int, expected: list[list[int]]) -> None:
    write_numbered(tmp_path / "video", 13)
    found = [clip[:, 0, 0, 0].tolist() for clip in cut_clips(tmp_path / "video", num_frames, interval, SIZE)]
    assert found == expected


def test_real_motion_is_measured_at_the_frame_interval(tmp_path: Path) -> None:
    write_numbered(tmp_path / "real" / "ramp" / "0", 40)  # one step of grey a frame
    write_numbered(tmp_path / "generated" / "ramp" / "0", 5)
    for interval in (1, 3):
        report = score(
            tmp_path / "real", tmp_path / "generated", metrics=["motion"], protocol=Protocol(frame_interval=interval)
        ).report
        row = report["motion"]["per_class"]["ramp"]
        assert (row["real"], row["generated"]) == (interval, 1)
        assert row["num_real_clips"] == 40 // (4 * interval + 1)
        assert row["within_factor_two"] == (interval == 1)


# Wilson's interval


def test_wilson_interval_equals_scipy() -> None:
    for total in (1, 2, 8, 64, 1000):
        for correct in {0, 1, total // 3, total - 1, total}:
            for confidence in (0.8, 0.95):
                expected = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
                found = wilson_interval(correct, total, confidence)
                assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    with pytest.raises(ValueError, match="correct is 3, total 2"):
        wilson_interval(3, 2)


# Controls


def test_recolouring_changes_colours_and_keeps_structure() -> None:
    frames = paint("disk", np.array([(10, 20, 30), (200, 100, 50)]), np.random.default_rng(0))
    recoloured = recolour(frames, np.random.default_rng(1))
    assert recoloured.shape == frames.shape and recoloured.dtype == np.uint8
    assert np.array_equal(recoloured, recolour(frames, np.random.default_rng(1)))
    assert not np.array_equal(recoloured, frames)
    inside = (frames == frames.max(axis=(0, 1, 2))).all(-1)
    for region in (inside, ~inside):
        assert len(np.unique(recoloured[region], axis=0)) == 1
    assert np.abs(recoloured[inside][0].astype(int) - recoloured[~inside][0]).max() > 100
    recolour(np.zeros((2, 8, 8, 3), np.uint8), np.random.default_rng(0))  # one colour: nothing to divide by


def test_shuffling_moves_whole_patches() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 16, 3), dtype=np.uint8)
    shuffled = shuffle_patches(frames, np.random.default_rng(1))

    def patches(frame: Frames) -> list[bytes]:
        return [frame[y : y + 8, x : x + 8].tobytes() for y in (0, 8) for x in (0, 8)]

    for before, after in zip(frames, shuffled, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
        assert np.array_equal(before[16:], after[16:])  # less than a patch
    assert not np.array_equal(frames, shuffled)


# The classifier


def test_classifier_recognises_shapes_in_any_colours(shape_classifier: Classifier) -> None:
    assert shape_classifier.class_names == SHAPES
    unseen = clips(SHAPES, shape_in_any_colour, count=16, seed=1)
    assert share_recognised(shape_classifier, unseen) >= 0.95
    rng = np.random.default_rng(2)
    assert share_recognised(shape_classifier, [(name, recolour(frames, rng)) for name, frames in unseen]) >= 0.9


def test_augmentation_favours_no_colour() -> None:
    frame = np.full((16, 16, 3), 128, np.uint8)
    for hue in HUES.values():
        frame[:, :8] = hue
        pixels = torch.from_numpy(frame).permute(2, 0, 1).float()[None] / 255
        pixels = classifier_module.augment(pixels.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
        contrast = pixels[:, :, 4:12, 2:5].mean((2, 3)) - pixels[:, :, 4:12, 11:14].mean((2, 3))  # (4000, 3)
        # Nearly 0.5 in each frame, in a direction that is uniform over the sphere and so zero on average.
        assert contrast.norm(dim=1).mean() > 0.3
        assert contrast.mean(0).abs().max() < 0.03


def test_classifier_is_blind_to_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hues = tuple(HUES)
    root = write_set(tmp_path, hues, disk_of_a_hue, count=8, seed=0)
    unseen = clips(hues, disk_of_a_hue, count=8, seed=1)

    def belief_in_truth(classifier: Classifier) -> float:
        beliefs = [np.exp(classifier.log_probabilities(frames))[:3] for _, frames in unseen]
        rows = [row[hues.index(name)] / row.sum() for row, (name, _) in zip(beliefs, unseen, strict=True)]
        return float(np.mean(rows))

    blind = train_classifier(root, SIZE, num_steps=80)
    assert belief_in_truth(blind) == pytest.approx(1 / 3, abs=0.05)
    # The same classes are easy for the same network where colours are left alone.
    monkeypatch.setattr(classifier_module, "augment", lambda pixels, rng: pixels)
    seeing = train_classifier(root, SIZE, num_steps=150)
    assert share_recognised(seeing, unseen) == 1
    assert belief_in_truth(seeing) > 0.8


def test_same_seed_same_classifier(shapes: Path) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (train_classifier(shapes, SIZE, seed=seed, num_steps=2) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.head.weight, other.head.weight)


def test_classifier_survives_the_disk(tmp_path: Path, shape_classifier: Classifier) -> None:
    folder = tmp_path / "a" / "classifier"
    shape_classifier.save(folder)
    shape_classifier.save(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["classifier"]
    loaded = Classifier.load(folder)
    assert (loaded.class_names, loaded.resolution) == (SHAPES, SIZE)
    _, frames = clips(("disk",), shape_in_any_colour, count=1, seed=5)[0]
    assert np.array_equal(loaded.log_probabilities(frames), shape_classifier.log_probabilities(frames))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 0}))
    with pytest.raises(ValueError, match="version 0"):
        Classifier.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "class_names": ["a", "b"]}))
    with pytest.raises(ValueError, match="weights are not those"):
        Classifier.load(folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable classifier"):
        Classifier.load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 8}, "resolution is 8"),
        ({"resolution": SIZE, "num_steps": 0}, "num_steps is 0"),
    ],
)
def test_training_refuses(shapes: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_classifier(shapes, **arguments)


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, ("disk",), shape_in_any_colour, count=1, seed=0)
    with pytest.raises(ValueError, match="at least two classes"):
        train_classifier(tmp_path, SIZE)


# The whole score


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, shape_classifier: Classifier) -> list[int]:
    """Trainings asked for; each is answered with the classifier that is there already."""
    seeds: list[int] = []

    def answer(catalog: Any, resolution: int, seed: int, num_steps: int) -> Classifier:
        seeds.append(seed)
        return shape_classifier

    monkeypatch.setattr(classifier_module, "_train", answer)
    return seeds


def test_score(tmp_path: Path, shapes: Path, trained: list[int]) -> None:
    rng = np.random.default_rng(7)
    generated = write_set(tmp_path / "generated", ("disk", "stripes"), shape_in_any_colour, count=3, seed=8)
    write_video(generated / "stripes" / "3.mp4", shape_in_any_colour("checkers", rng), fps=8)
    still = np.repeat(shape_in_any_colour("disk", rng)[:1], NUM_FRAMES, axis=0)
    for number in range(3):
        write_video(generated / "disk" / f"{number}.mp4", still, fps=8)
    held_out = write_set(tmp_path / "heldout", SHAPES, shape_in_any_colour, count=4, seed=9)

    report = score(shapes, generated, held_out).report
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


def test_score_without_held_out_videos(tmp_path: Path, shapes: Path, trained: list[int]) -> None:
    report = score(shapes, shapes, metrics=["accuracy"]).report
    assert set(report) == {"protocol", "accuracy"}
    assert report["accuracy"]["controls"] is None
    stream = io.StringIO()
    print_scores(report, Console(file=stream, width=200))
    assert "not checked" in stream.getvalue()


def test_classifier_is_trained_once_for_the_same_videos(tmp_path: Path, trained: list[int]) -> None:
    real = write_set(tmp_path / "real", SHAPES, shape_in_any_colour, count=1, seed=0)
    cache = tmp_path / "cache"
    for _ in range(2):
        cached_classifier(real, SIZE, 0, cache)
    assert trained == [0]
    cached_classifier(real, SIZE, 1, cache)
    cached_classifier(real, SIZE * 2, 0, cache)
    assert trained == [0, 1, 0]
    # Another video under the same name, and a name more.
    write_video(real / "disk" / "0.mp4", shape_in_any_colour("disk", np.random.default_rng(5)), fps=8)
    cached_classifier(real, SIZE, 0, cache)
    write_video(real / "disk" / "1.mp4", shape_in_any_colour("disk", np.random.default_rng(6)), fps=8)
    cached_classifier(real, SIZE, 0, cache)
    cached_classifier(real, SIZE, 0, cache)
    assert trained == [0, 1, 0, 0, 0]
    for weights in cache.glob("*/model.safetensors"):
        weights.write_bytes(b"broken")
    cached_classifier(real, SIZE, 0, cache)
    cached_classifier(real, SIZE, 0, cache)
    assert trained == [0, 1, 0, 0, 0, 0]


def test_unknown_metrics_are_named(shapes: Path) -> None:
    with pytest.raises(ValueError, match=f"metrics is 'psnr'; allowed: {', '.join(METRICS)}"):
        score(shapes, shapes, metrics=["motion", "psnr"])
    with pytest.raises(ValueError, match="metrics is empty"):
        score(shapes, shapes, metrics=[])


def test_folders_that_cannot_be_compared(tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "empty").mkdir()
    frames = shape_in_any_colour("disk", np.random.default_rng(0))
    write_video(tmp_path / "flat" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "other" / "bananas" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "lengths" / "disk" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "lengths" / "disk" / "1.mp4", frames[:4], fps=8)
    write_video(tmp_path / "sizes" / "disk" / "0.mp4", frames, fps=8)
    write_video(tmp_path / "sizes" / "disk" / "1.mp4", frames[:, :16], fps=8)
    for real, generated, held_out, message in (
        (shapes, "missing", None, "missing: no such folder"),
        (shapes, "empty", None, "empty: no usable videos"),
        ("empty", shapes, None, "empty: no usable videos"),
        (shapes, "flat", None, "lies in no class folder"),
        ("flat", shapes, None, "lies in no class folder"),
        (shapes, "other", None, "other: has the class 'bananas'.*checkers, disk, stripes"),
        (shapes, shapes, "other", "other: has the class 'bananas'"),
        (shapes, "lengths", None, "1.mp4: has 4 frames .* has 8 "),
        (shapes, "sizes", None, "1.mp4: has 8 frames of 32x16, but .* of 32x32"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(
                real if isinstance(real, Path) else tmp_path / real,
                generated if isinstance(generated, Path) else tmp_path / generated,
                None if held_out is None else tmp_path / held_out,
            )
    with pytest.raises(ValueError, match="frame_interval is 0"):
        compare(shapes, shapes, frame_interval=0)
    with pytest.raises(ValueError, match="no usable videos"):
        compare(shapes, shapes, frame_interval=2)  # real videos are shorter than 8 frames at interval 2


@pytest.mark.slow
def test_classifier_on_arcade_games(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    from lavita.demo.games import render_dataset

    render_dataset(tmp_path, train_episodes=8, heldout_episodes=2, num_frames=64)
    for video in (tmp_path / "heldout").glob("*/*.mp4"):
        clip = read_clip(video, 20)
        write_video(tmp_path / "generated" / video.parent.name / video.name, clip, fps=15)
    report = score(tmp_path / "train", tmp_path / "generated", tmp_path / "heldout").report
    controls = report["accuracy"]["controls"]
    assert report["accuracy"]["accuracy"] >= 0.98
    assert controls["held_out"] >= 0.98
    assert controls["recoloured"] >= 0.9
    assert controls["shuffled"] <= 0.6
    assert report["motion"]["num_within_factor_two"] == report["motion"]["num_classes"] == 8
