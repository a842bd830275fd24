"""The paper's data sets: each layout gives the right videos, splits and classes, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run
from tiny_data import write_avi, write_broken, write_frames, write_videos

from lavita.core.config import ConfigError, load_config
from lavita.core.names import DataSetName
from lavita.data.catalog import Catalog, scan
from lavita.data.clip_sources import open_validation
from lavita.data.config import DataConfig
from lavita.data.datasets import guess_dataset, list_dataset, open_dataset
from lavita.data.ucf101 import CLASSES
from lavita.models.autoencoder import AutoencoderKL
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig

# Names as they are in the real sets.
FACES = {
    "train": ["aS62n5PdTIU_1_8WGsQ0Y7uyU_1", "qEnKi82wWgE_2_rJPM8EdWShs_1"],
    "val": ["-0hJZqCTTHA_0_bLR4iFUCr34_0"],
    "test": ["0XGhXzgnBKg_1_X3eV2p2-sjE_0"],
}
SKY = {"train": ["2KikwLp-PUI/2KikwLp-PUI_1", "2KikwLp-PUI/2KikwLp-PUI_2"], "test": ["07lQ8B5cVwc/07lQ8B5cVwc_1"]}
TAICHI = {"train": ["u6rJiF-gPx8#000080#000300", "u6rJiF-gPx8#000575#000717"], "test": ["NBGys-uxScs#000134#000312"]}
ACTIONS = [
    "HammerThrow/v_HammerThrow_g01_c01.avi",
    "HammerThrow/v_HammerThrow_g08_c01.avi",
    "Hammering/v_Hammering_g08_c01.avi",
    "HandstandPushups/v_HandStandPushups_g01_c01.avi",
    "HandstandPushups/v_HandStandPushups_g08_c02.avi",
    "YoYo/v_YoYo_g09_c03.avi",
]


def names_of(catalog: Catalog) -> list[str]:
    return sorted(video.name for video in catalog.videos)


def class_of(catalog: Catalog) -> dict[str, str]:
    """The class of each video, by the last part of its name."""
    return {v.name.split("/")[-1]: catalog.class_names[v.label] for v in catalog.videos if v.label is not None}


# --- FaceForensics, SkyTimelapse, Taichi-HD


def faces_original(root: Path) -> dict[str, list[str]]:
    """train/original/*.avi, next to forged copies and masks."""
    for split, names in FACES.items():
        for kind in ("original", "altered", "mask"):
            write_avi(root, [f"{split}/{kind}/{name}.avi" for name in names])
    return {split: [f"{split}/original/{name}.avi" for name in names] for split, names in FACES.items()}


def faces_of_the_public_code(root: Path) -> dict[str, list[str]]:
    """Videos, their frames for joint training, and the list of these; the training split only."""
    names = FACES["train"]
    write_videos(root, [f"train/videos/{name}.mp4" for name in names], 4)
    write_frames(root, [f"train/images/{name}" for name in names])
    (root / "train_list.txt").write_text("".join(f"{name}/000001.jpg\n" for name in names))
    return {"train": [f"train/videos/{name}.mp4" for name in names]}


def faces_as_frames(root: Path) -> dict[str, list[str]]:
    """One folder of frames a video, whose split only a list of frames tells."""
    write_frames(root, [name for names in FACES.values() for name in names])
    lines = [f"{name}/{number:06}.jpg" for name in FACES["train"] for number in (3, 0)]
    (root / "train_list.txt").write_text("\n".join(lines))
    return {"train": FACES["train"], "all": sorted(name for names in FACES.values() for name in names)}


def sky_original(root: Path) -> dict[str, list[str]]:
    placed = {split: [f"sky_{split}/{name}" for name in names] for split, names in SKY.items()}
    for names in placed.values():
        write_frames(root, names, pattern="2KikwLp-PUI_frames_{:08d}.jpg")
    (root / "video_folder.py").write_text("")
    return placed


def sky_in_a_parent(root: Path) -> dict[str, list[str]]:
    """The archive has a folder of its own."""
    return {s: [f"sky_timelapse/{n}" for n in names] for s, names in sky_original(root / "sky_timelapse").items()}


def taichi_original(root: Path) -> dict[str, list[str]]:
    placed = {split: [f"{split}/{name}.mp4" for name in names] for split, names in TAICHI.items()}
    for names in placed.values():
        write_videos(root, names, 4)
    return placed


def taichi_as_frames(root: Path) -> dict[str, list[str]]:
    """The authors' script names folders of PNG frames like videos; the hub's copy lies deeper and has no #."""
    placed = {
        "train": [f"taichi-256/frames/train/{name.replace('#', '_')}" for name in TAICHI["train"]],
        "test": [f"taichi-256/frames/test/{name}.mp4" for name in TAICHI["test"]],
    }
    for names in placed.values():
        write_frames(root, names, pattern="{:07d}.png")
    return placed


def taichi_twice(root: Path) -> dict[str, list[str]]:
    """As videos and as frames."""
    write_frames(root, [f"frames/train/{name.replace('#', '_')}" for name in TAICHI["train"]])
    return taichi_original(root)


@pytest.mark.parametrize(
    ("dataset", "build"),
    [
        ("faceforensics", faces_original),
        ("faceforensics", faces_of_the_public_code),
        ("faceforensics", faces_as_frames),
        ("sky_timelapse", sky_original),
        ("sky_timelapse", sky_in_a_parent),
        ("taichi_hd", taichi_original),
        ("taichi_hd", taichi_as_frames),
        ("taichi_hd", taichi_twice),
    ],
)
def test_a_layout_gives_its_splits(
    dataset: DataSetName, build: Callable[[Path], dict[str, list[str]]], tmp_path: Path
) -> None:
    placed = build(tmp_path)
    everything = placed.setdefault("all", sorted(name for names in placed.values() for name in names))
    for split, names in placed.items():
        catalog = open_dataset(tmp_path, dataset, split)
        assert names_of(catalog) == sorted(names)
        assert all(video.info.path == tmp_path / video.name for video in catalog.videos)
        assert all(video.info.num_frames == 4 and video.label is None for video in catalog.videos)
        assert (catalog.class_names, catalog.broken) == ((), ())
    assert names_of(open_dataset(tmp_path, dataset)) == sorted(placed["train"]), "the paper trains on the train split"
    if "test" not in placed:
        message = rf"does not show which of its {len(everything)} videos are in split 'test' of {dataset}"
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path, dataset, "test")
    assert guess_dataset(everything) == dataset


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces_original(tmp_path / "a")
    open_dataset(tmp_path / "a", "faceforensics")
    assert "a: 8 altered videos and masks of faceforensics are left out" in capsys.readouterr().err
    faces_of_the_public_code(tmp_path / "b")
    open_dataset(tmp_path / "b", "faceforensics")
    assert "b: 2 videos exist both as files and as frames; the files are used" in capsys.readouterr().err


def test_a_folder_that_is_a_split_tells_it(tmp_path: Path) -> None:
    sky_original(tmp_path)
    assert names_of(open_dataset(tmp_path / "sky_train", "sky_timelapse")) == SKY["train"]
    with pytest.raises(ValueError, match=r"found train \(2\); split=all takes every video"):
        open_dataset(tmp_path / "sky_train", "sky_timelapse", "test")
    faces_of_the_public_code(tmp_path)
    videos = open_dataset(tmp_path / "train" / "videos", "faceforensics")
    assert names_of(videos) == [f"{name}.mp4" for name in FACES["train"]]


def test_a_folder_in_a_folder_called_test_is_no_split(tmp_path: Path) -> None:
    write_videos(tmp_path / "test" / "faces", [f"{name}.mp4" for name in FACES["train"]], 4)
    assert list_dataset(tmp_path / "test" / "faces", "faceforensics").splits == {}


def test_clips_of_one_name_in_different_videos_stay_apart(tmp_path: Path) -> None:
    names = ["sky_train/aaaaaaaaaaa/1", "sky_train/bbbbbbbbbbb/1"]
    write_frames(tmp_path, names)
    assert names_of(open_dataset(tmp_path, "sky_timelapse")) == names


def test_an_image_next_to_the_videos_is_not_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taichi_original(tmp_path)
    write_frames(tmp_path, [".", "train"], 1)
    assert names_of(open_dataset(tmp_path, "taichi_hd")) == [f"train/{name}.mp4" for name in TAICHI["train"]]
    assert capsys.readouterr().err.splitlines()[:1] == [
        f"{tmp_path}: left out: 2 images next to videos, such as 000000.jpg"
    ]


def test_lists_may_have_labels_counts_suffixes_and_names_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, [name for names in SKY.values() for name in names])
    first, second = SKY["train"]
    file = tmp_path / "train_256_list.txt"
    file.write_text(f"{first} 120 3\n\n{second}.mp4,7\nSKY/gone_1/000.png\n", encoding="utf-8")
    assert names_of(open_dataset(tmp_path, "sky_timelapse")) == [first, second]
    assert f"{file}: 1 of its videos are not in the folder, such as SKY/gone_1" in capsys.readouterr().err
    file.write_text("nothing/here\n")
    with pytest.raises(ValueError, match=r"lists no video that is in the folder; it begins with 'nothing/here'"):
        open_dataset(tmp_path, "sky_timelapse")
    write_frames(tmp_path, ["a/1", "b/1"])
    file.write_text("1\n")
    with pytest.raises(ValueError, match="line 1 is 1, which could be a/1 and b/1"):
        open_dataset(tmp_path, "sky_timelapse")
    file.write_bytes(b"a/1\n\xe9\n")
    with pytest.raises(ValueError, match=r"train_256_list\.txt: line 2 is not UTF-8 \(byte 1 is 0xe9\)"):
        open_dataset(tmp_path, "sky_timelapse")


# --- UCF101


def write_lists(folder: Path) -> None:
    """The first two splits, as they are published: labels in the training lists only, and no video in both."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = [name for name in ACTIONS if "_g01_" in name], [name for name in ACTIONS if "_g09_" in name]
    for number, held_out in enumerate((first, second), 1):
        train = [f"{name} 1" for name in ACTIONS if name not in held_out]
        (folder / f"trainlist0{number}.txt").write_text("\r\n".join(train) + "\r\n")
        (folder / f"testlist0{number}.txt").write_text("\n".join(held_out) + "\n")
    (folder / "classInd.txt").write_text("1 YoYo\n2 Hammering\n3 HammerThrow\n4 HandstandPushups\n")


@pytest.mark.parametrize("lists", ["ucfTrainTestlist", "UCF-101/ucfTrainTestlist", "UCF-101"])
def test_ucf101_as_it_is_published(lists: str, tmp_path: Path) -> None:
    root = write_avi(tmp_path / "UCF-101", ACTIONS)
    write_lists(tmp_path / lists)
    catalog = open_dataset(root, "ucf101")
    assert names_of(catalog) == sorted(ACTIONS), "the paper trains on both splits"
    assert catalog.class_names == ("HammerThrow", "Hammering", "HandstandPushups", "YoYo")
    assert class_of(catalog) == {name.split("/")[1]: name.split("/")[0] for name in ACTIONS}
    expected = {
        "train": [name for name in ACTIONS if "_g01_" not in name],
        "test": [name for name in ACTIONS if "_g01_" in name],
        "train01": [name for name in ACTIONS if "_g01_" not in name],
        "test02": [name for name in ACTIONS if "_g09_" in name],
        "train02": [name for name in ACTIONS if "_g09_" not in name],
    }
    for split, names in expected.items():
        assert names_of(open_dataset(root, "ucf101", split)) == sorted(names)
    with pytest.raises(ValueError, match=r"split 'train03' of ucf101: looked for ucfTrainTestlist/trainlist01\.txt"):
        open_dataset(root, "ucf101", "train03")


def test_ucf101_above_its_two_folders(tmp_path: Path) -> None:
    write_avi(tmp_path / "UCF-101", ACTIONS)
    write_lists(tmp_path / "ucfTrainTestlist")
    names = names_of(open_dataset(tmp_path, "ucf101", "test"))
    assert names == [f"UCF-101/{name}" for name in ACTIONS if "_g01_" in name]


def test_ucf101_as_flat_frames_has_the_classes_of_the_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stems = [Path(name).stem for name in ACTIONS]
    write_frames(tmp_path / "images", stems)
    write_lists(tmp_path / "images")
    flat = open_dataset(tmp_path / "images", "ucf101")
    assert names_of(flat) == sorted(stems)
    assert class_of(flat) == {Path(name).stem: name.split("/")[0] for name in ACTIONS}
    assert names_of(open_dataset(tmp_path / "images", "ucf101", "test")) == [s for s in stems if "_g01_" in s]

    write_avi(tmp_path / "videos", ACTIONS)
    both = open_dataset(tmp_path, "ucf101")
    assert names_of(both) == sorted(f"videos/{name}" for name in ACTIONS), "no video twice"
    assert "6 videos exist both as files and as frames" in capsys.readouterr().err


def test_ucf101_in_folders_of_its_splits(tmp_path: Path) -> None:
    write_avi(tmp_path, [f"{'test' if '_g01_' in name else 'train'}/{name}" for name in ACTIONS])
    assert names_of(open_dataset(tmp_path, "ucf101", "test")) == [f"test/{n}" for n in ACTIONS if "_g01_" in n]
    assert len(open_dataset(tmp_path, "ucf101").videos) == len(ACTIONS)


def test_ucf101_without_classes(tmp_path: Path) -> None:
    write_avi(tmp_path, ACTIONS)
    catalog = open_dataset(tmp_path, "ucf101", use_classes=False)
    assert catalog.class_names == () and {video.label for video in catalog.videos} == {None}


def test_videos_of_no_class_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_avi(tmp_path, [*ACTIONS, "trailer.avi", "YoYo/mine.avi"])
    catalog = open_dataset(tmp_path, "ucf101")
    assert catalog.broken == ("trailer.avi: is not named like the videos of ucf101; see docs/data.md",)
    assert f"skipped: {catalog.broken[0]}" in capsys.readouterr().err
    assert class_of(catalog)["mine.avi"] == "YoYo", "the folder of a class is enough"
    with pytest.raises(ValueError, match=r"trailer\.avi: is not named"):
        open_dataset(tmp_path, "ucf101", broken="error")


def test_the_lists_may_name_videos_that_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_avi(tmp_path, ACTIONS[:-1])
    write_lists(tmp_path)
    assert len(open_dataset(tmp_path, "ucf101", "train").videos) == 3
    assert "1 videos in the list of train are missing, such as v_yoyo_g09_c03" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"split 'test02' of ucf101"):
        open_dataset(tmp_path, "ucf101", "test02")


def test_the_classes_are_101_in_the_order_of_sorted_folders() -> None:
    assert len(set(CLASSES)) == 101
    assert list(CLASSES) == sorted(CLASSES)


# --- any folder, and what is wrong


def test_a_plain_folder_is_scanned(tmp_path: Path) -> None:
    write_videos(tmp_path)
    assert open_dataset(tmp_path) == scan(tmp_path)
    assert open_dataset(tmp_path, class_folders=True, min_frames=3) == scan(tmp_path, True, 3)
    assert guess_dataset(video.name for video in scan(tmp_path).videos) is None


def test_broken_and_short_videos_of_a_named_set(tmp_path: Path) -> None:
    taichi_original(tmp_path)
    write_videos(tmp_path, ["train/u6rJiF-gPx8#001257#001550.mp4"], 6)
    write_broken(tmp_path / "train" / "noise.mp4")
    write_broken(tmp_path / "test" / "not_asked_for.mp4")
    catalog = open_dataset(tmp_path, "taichi_hd", min_frames=5)
    assert names_of(catalog) == ["train/u6rJiF-gPx8#001257#001550.mp4"]
    assert {message.split(": ")[0] for message in catalog.broken} == {
        "train/noise.mp4",
        *(f"train/{name}.mp4" for name in TAICHI["train"]),
    }
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        open_dataset(tmp_path, "taichi_hd", broken="error")


@pytest.mark.parametrize("dataset", ["faceforensics", "sky_timelapse", "ucf101", "taichi_hd"])
def test_a_folder_without_the_data_set_is_refused(dataset: DataSetName, tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}").mkdir()
    with pytest.raises(ValueError, match=rf"holds no video of {dataset}; looked for .*; found 0/, 1/.* and 2 more"):
        open_dataset(tmp_path, dataset)
    with pytest.raises(ValueError, match="missing: no such folder"):
        open_dataset(tmp_path / "missing", dataset)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    taichi_original(tmp_path)
    with pytest.raises(ConfigError, match="split is 'val'; allowed for dataset=taichi_hd: train, test, all"):
        open_dataset(tmp_path, "taichi_hd", "val")


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    taichi_original(tmp_path)
    with pytest.raises(ValueError, match="dataset=folder has no splits: name the subfolder in path"):
        open_dataset(tmp_path, split="train")
    with pytest.raises(ValueError, match="class_folders is set, but works only with dataset=folder"):
        open_dataset(tmp_path, "taichi_hd", class_folders=True)
    with pytest.raises(ValueError, match="images is set, but works only with dataset=folder"):
        open_dataset(tmp_path, "taichi_hd", images=True)
    with pytest.raises(ConfigError, match="dataset is 'taichi'; allowed: folder, faceforensics"):
        open_dataset(tmp_path, "taichi")  # type: ignore[arg-type]


# --- in a run


def batches(root: Path, vae: AutoencoderKL, *overrides: str) -> BatchMaker:
    values = {
        "data": {"path": str(root), "dataset": "ucf101", "num_frames": 2, "frame_interval": 1, "resolution": 16},
        "model": {"preset": "tiny/4"},
        "train": {"batch_size": 16, "precision": "fp32"},
    }
    config = load_config(RunConfig, values, overrides)
    return BatchMaker(config.data, config.train, vae, config.model.class_dropout)


def test_a_run_has_the_classes_of_ucf101_or_none(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    root = write_avi(tmp_path, ACTIONS)
    write_lists(tmp_path)
    maker = batches(root, tiny_vae, "model.class_dropout=0", "data.split=test")
    assert maker.class_names == ("HammerThrow", "HandstandPushups")
    labels = maker.make(0).class_labels
    drawn = [maker.sampler.draw(0, index).video.name.split("/")[0] for index in range(16)]
    assert labels is not None and [maker.class_names[label] for label in labels.tolist()] == drawn
    without = batches(root, tiny_vae, "data.use_classes=false")
    assert without.class_names == () and without.make(0).class_labels is None
    assert len(without.source.catalog.videos) == len(ACTIONS)


def test_a_cache_of_another_split_is_refused(tmp_path: Path, tiny_vae: AutoencoderKL, run: Run) -> None:
    root = write_avi(tmp_path / "UCF-101", ACTIONS)
    write_lists(tmp_path / "ucfTrainTestlist")
    tiny_vae.save_pretrained(tmp_path / "vae")
    cache = tmp_path / "cache"
    command = ["encode", "--data", root, "--out", cache, "--autoencoder", tmp_path / "vae", "--resolution", "16"]
    code, _, err = run(*command, "--dataset", "ucf101", "--split", "test")
    assert code == 0, err
    manifest = json.loads((cache / "manifest.json").read_text())
    assert sorted(row["name"] for row in manifest["videos"]) == [name for name in ACTIONS if "_g01_" in name]
    maker = batches(root, tiny_vae, f"data.latent_cache={cache}", "data.split=test")
    assert maker.class_names == ("HammerThrow", "HandstandPushups")
    with pytest.raises(ConfigError, match=r"cache: holds HammerThrow/.*, which is not in split 'train' of .*UCF-101"):
        batches(root, tiny_vae, f"data.latent_cache={cache}", "data.split=train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split=train"], "split is 'train', but dataset=folder has no splits"),
        (["dataset=ucf-101"], "data.dataset is 'ucf-101'"),
        (["dataset=sky_timelapse", "split=val"], "split is 'val'; allowed for dataset=sky_timelapse: train, test, all"),
        (["dataset=ucf101", "class_folders=true"], "class_folders is set, but dataset=ucf101 has its own classes"),
        (["use_classes=false"], "has no effect: dataset=folder has no classes"),
        (["dataset=taichi_hd", "use_classes=false"], "has no effect: dataset=taichi_hd has no classes"),
        (["dataset=ucf101", "captions=a.csv"], "a model has either texts or classes: set use_classes=false"),
        (["dataset=taichi_hd", "latent_cache=a"], "dataset is 'taichi_hd', but has no effect without path"),
        (["dataset=ucf101", "latent_cache=a", "split=test"], "split is 'test', but has no effect without path"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, {}, [f"data.{override}" for override in overrides])
    assert message in str(caught.value)


def test_scores_need_a_plain_folder() -> None:
    with pytest.raises(ConfigError, match=r"train\.score_every is 5, but needs data\.dataset=folder"):
        load_config(RunConfig, {}, ["data.dataset=taichi_hd", "data.path=a", "train.score_every=5"])


def test_held_out_videos_have_the_layout_of_the_training_videos(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    sky_original(tmp_path)
    data = DataConfig(
        path=tmp_path, dataset="sky_timelapse", validation=tmp_path / "sky_test", num_frames=2, resolution=16
    )
    assert names_of(open_validation(data, tiny_vae, "fp32").catalog) == SKY["test"]
