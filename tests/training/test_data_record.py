"""A run that is resumed on other videos than it was started on says so, instead of drawing other clips."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeConfig
from run_folders import lines_of
from tiny_data import write_frames, write_videos
from tiny_text import CLIP, save_text_encoder
from transformers import CLIPTextModelWithProjection

from lavita.core.config import ConfigError
from lavita.data.catalog import scan
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import load_autoencoder
from lavita.studies.dry_run import dry_run
from lavita.training.config import RunConfig
from lavita.training.train import train


def add(videos: Path) -> None:
    write_videos(videos, ["b/3.mp4"])


def remove(videos: Path) -> None:
    (videos / "a" / "1.mp4").unlink()


def change(videos: Path) -> None:
    write_videos(videos, ["b/2.mp4"], num_frames=11)


def rename(videos: Path) -> None:
    (videos / "a" / "1.mp4").rename(videos / "a" / "4.mp4")


CHANGES = [
    (add, "videos: 1 added (b/3.mp4)"),
    (remove, "videos: 1 removed (a/1.mp4)"),
    (change, "videos: 1 changed (b/2.mp4)"),
    (rename, "videos: 1 added (a/4.mp4), 1 removed (a/1.mp4)"),
]


@pytest.mark.parametrize(("alter", "said"), CHANGES)
def test_videos_that_were_added_removed_or_changed(
    make_config: MakeConfig, tmp_path: Path, alter: Callable[[Path], None], said: str
) -> None:
    train(make_config("run", "train.steps=2"))
    resumed = make_config("run", "train.steps=3")
    metrics = (resumed.run_dir / "metrics.jsonl").read_text()
    alter(tmp_path / "videos")
    for go_on in (train, dry_run):
        with pytest.raises(ConfigError, match=rf"run was trained on other data \({re.escape(said)}\), so that it "):
            go_on(resumed)
    assert (resumed.run_dir / "metrics.jsonl").read_text() == metrics

    record = resumed.run_dir / "videos.json"
    record.unlink()  # as the message says
    train(resumed)
    assert [line["step"] for line in lines_of(resumed)] == [1, 2, 3]
    train(make_config("run", "train.steps=4"))
    assert json.loads(record.read_text())["videos"].keys() == {v.name for v in scan(tmp_path / "videos").videos}


def test_a_run_without_checkpoints_begins_anew(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("run", "train.steps=1")
    config.run_dir.mkdir()
    (config.run_dir / "videos.json").write_text('{"videos": {"gone.mp4": [1, 2]}}')
    train(config)
    assert "gone.mp4" not in (config.run_dir / "videos.json").read_text()


def test_a_damaged_record_is_named(make_config: MakeConfig) -> None:
    config = make_config("run", "train.steps=1")
    train(config)
    for content in ("{", "[]", '{"videos": 3}'):
        (config.run_dir / "videos.json").write_text(content)
        with pytest.raises(ConfigError, match=r"videos\.json: damaged; use another run_dir, or delete .*videos\.json"):
            train(config)


def cached(make_config: MakeConfig, tmp_path: Path, steps: int) -> RunConfig:
    config = make_config("run", f"train.steps={steps}", f"data.latent_cache={tmp_path / 'cache'}", "data.path=null")
    encode_dataset(scan(tmp_path / "videos"), tmp_path / "cache", load_autoencoder(config.autoencoder), 16, True)
    return config


def test_a_cache_that_was_updated(make_config: MakeConfig, tmp_path: Path) -> None:
    train(cached(make_config, tmp_path, 1))
    train(cached(make_config, tmp_path, 2))
    add(tmp_path / "videos")
    with pytest.raises(ConfigError, match=r"videos: 1 added \(b/3\.mp4\)"):
        train(cached(make_config, tmp_path, 3))


def test_images_and_captions_count_too(make_config: MakeConfig, tmp_path: Path) -> None:
    write_frames(tmp_path / "images", ["x"], 2)
    save_text_encoder(CLIPTextModelWithProjection(CLIP), tmp_path / "text")
    table, image_table = tmp_path / "t.csv", tmp_path / "i.csv"
    table.write_text("file,caption\na/0.mp4,one\na/1.mp4,two\nb/2.mp4,three\n")
    image_table.write_text("file,caption\nx/000000.jpg,four\nx/000001.jpg,five\n")
    fields = [
        "data.class_folders=false",
        f"data.captions={table}",
        f"data.images={tmp_path / 'images'}",
        f"data.image_captions={image_table}",
        "data.num_images=1",
        f"model.text_encoder={tmp_path / 'text'}",
    ]
    train(make_config("run", "train.steps=1", *fields))
    resumed = make_config("run", "train.steps=2", *fields)
    whole = table.read_text()
    table.write_text(whole.replace("two", "2"))
    with pytest.raises(ConfigError, match=r"\(videos: 1 changed \(a/1\.mp4\)\)"):
        train(resumed)
    table.write_text(whole)
    write_frames(tmp_path / "images", ["y"], 1)
    image_table.write_text(image_table.read_text() + "y/000000.jpg,six\n")
    with pytest.raises(ConfigError, match=r"\(images: 1 added \(y/000000\.jpg\)\)"):
        train(resumed)
