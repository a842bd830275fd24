"""The classifier: it recognises shapes, is blind to colours, and survives the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import (
    HUES,
    SHAPES,
    SIZE,
    Frames,
    disk_of_a_hue,
    make_clips,
    paint_shape,
    shape_in_any_colour,
    write_set,
)

from lavita.data.catalog import scan
from lavita.evaluation.classes import classifier as classifier_module
from lavita.evaluation.classes.classifier import (
    Classifier,
    cached_classifier,
    recolour,
    shuffle_patches,
    train_classifier,
)
from lavita.video.writing import write_video


def share_recognised(classifier: Classifier, shown: list[tuple[str, Frames]]) -> float:
    return float(np.mean([classifier.recognise(frames) == name for name, frames in shown]))


def test_recolouring_changes_colours_and_keeps_structure() -> None:
    frames = paint_shape("disk", np.array([(10, 20, 30), (200, 100, 50)]), np.random.default_rng(0))
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


def test_classifier_recognises_shapes_in_any_colours(shape_classifier: Classifier) -> None:
    assert shape_classifier.class_names == SHAPES
    unseen = make_clips(SHAPES, shape_in_any_colour, count=16, seed=1)
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


@pytest.mark.slow
def test_classifier_is_blind_to_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hues = tuple(HUES)
    catalog = scan(write_set(tmp_path, hues, disk_of_a_hue, count=8, seed=0), class_folders=True)
    unseen = make_clips(hues, disk_of_a_hue, count=8, seed=1)

    def belief_in_truth(classifier: Classifier) -> float:
        beliefs = [np.exp(classifier.log_probabilities(frames))[:3] for _, frames in unseen]
        rows = [row[hues.index(name)] / row.sum() for row, (name, _) in zip(beliefs, unseen, strict=True)]
        return float(np.mean(rows))

    blind = train_classifier(catalog, SIZE, num_steps=80)
    assert belief_in_truth(blind) == pytest.approx(1 / 3, abs=0.05)
    # The same classes are easy for the same network if colours are left alone.
    monkeypatch.setattr(classifier_module, "augment", lambda pixels, rng: pixels)
    seeing = train_classifier(catalog, SIZE, num_steps=80)
    assert share_recognised(seeing, unseen) == 1
    assert belief_in_truth(seeing) > 0.8


def test_same_seed_same_classifier(shapes: Path) -> None:
    state = torch.random.get_rng_state()
    catalog = scan(shapes, class_folders=True)
    first, again, other = (train_classifier(catalog, SIZE, seed=seed, num_steps=2) for seed in (3, 3, 4))
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
    _, frames = make_clips(("disk",), shape_in_any_colour, count=1, seed=5)[0]
    assert np.array_equal(loaded.log_probabilities(frames), shape_classifier.log_probabilities(frames))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 0}))
    with pytest.raises(ValueError, match="version 0"):
        Classifier.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "class_names": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json"):
        Classifier.load(folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="does not hold a readable classifier"):
        Classifier.load(folder)


def test_what_training_refuses(tmp_path: Path, shapes: Path) -> None:
    catalog = scan(shapes, class_folders=True)
    with pytest.raises(ValueError, match="resolution is 8"):
        train_classifier(catalog, 8)
    with pytest.raises(ValueError, match="num_steps is 0"):
        train_classifier(catalog, SIZE, num_steps=0)
    one = scan(write_set(tmp_path, ("disk",), shape_in_any_colour, count=1, seed=0), class_folders=True)
    with pytest.raises(ValueError, match="at least two classes"):
        train_classifier(one, SIZE)


def test_a_classifier_is_trained_once_for_the_same_videos(tmp_path: Path, trained: list[int]) -> None:
    real = write_set(tmp_path / "real", SHAPES, shape_in_any_colour, count=1, seed=0)

    def ask(resolution: int = SIZE, seed: int = 0) -> None:
        cached_classifier(scan(real, class_folders=True), resolution, seed, tmp_path / "cache")

    ask()
    ask()
    assert trained == [0]
    ask(seed=1)
    ask(SIZE * 2)
    assert trained == [0, 1, 0]
    # Another video under the same name, and an additional name.
    write_video(real / "disk" / "0.mp4", shape_in_any_colour("disk", np.random.default_rng(5)), fps=8)
    ask()
    write_video(real / "disk" / "1.mp4", shape_in_any_colour("disk", np.random.default_rng(6)), fps=8)
    ask()
    ask()
    assert trained == [0, 1, 0, 0, 0]
    for weights in (tmp_path / "cache").glob("*/model.safetensors"):
        weights.write_bytes(b"broken")
    ask()
    ask()
    assert trained == [0, 1, 0, 0, 0, 0]
