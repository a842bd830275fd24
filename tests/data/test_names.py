"""Names that a Mac decomposes, or that are not UTF-8, in splits, class folders and caches: they meet all the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run
from tiny_data import write_frames, write_videos

from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.clips import ClipDraw
from lavita.data.config import DataConfig
from lavita.data.content_hash import content_hash, source_digest
from lavita.data.datasets import open_dataset
from lavita.data.inspect import inspect_dataset
from lavita.data.latent_cache import encode as encode_module
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.manifest import read_manifest
from lavita.data.latent_cache.reading import CacheSource
from lavita.models.autoencoder import AutoencoderKL
from lavita.training.batches import BatchMaker
from lavita.training.config import TrainConfig

DECOMPOSED, COMPOSED = "cafe\u0301", "caf\xe9"
NOT_UTF8 = os.fsdecode(b"\xff\xfe")
both_ways = pytest.mark.parametrize(("here", "there"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED)])


@both_ways
def test_the_list_of_a_split(here: str, there: str, tmp_path: Path) -> None:
    write_videos(tmp_path, [f"x/{here}.mp4", "x/other.mp4"], 2)
    (tmp_path / "train_list.txt").write_text(f"\ufeffx/{there}.mp4 3\r\n", encoding="utf-8")
    catalog = open_dataset(tmp_path, "taichi_hd", "train")
    assert [video.name for video in catalog.videos] == [f"x/{here}.mp4"]


def test_names_in_the_list_of_a_split_may_end_in_a_number(tmp_path: Path) -> None:
    write_videos(tmp_path, ["clip 7.mp4", "clip 8.mp4", "12.mp4"], 2)
    (tmp_path / "train_list.txt").write_text("clip 7\n12.mp4, 3\n", encoding="utf-8")
    catalog = open_dataset(tmp_path, "taichi_hd", "train")
    assert [video.name for video in catalog.videos] == ["12.mp4", "clip 7.mp4"]
    write_videos(tmp_path, ["clip.mp4"], 2)
    with pytest.raises(ValueError, match=r"line 1 is clip 7, which could be clip 7\.mp4 and clip\.mp4"):
        open_dataset(tmp_path, "taichi_hd", "train")


def test_a_frame_without_a_folder_counts_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["a.mp4"], 2)
    (tmp_path / "train_list.txt").write_text("a\n000.png\n", encoding="utf-8")
    open_dataset(tmp_path, "taichi_hd", "train")
    assert "1 of its videos are not in the folder, such as 000.png" in capsys.readouterr().err


def test_class_folders_of_one_name_are_one_class(tmp_path: Path) -> None:
    write_videos(tmp_path, [f"day/{DECOMPOSED}/0.mp4", f"night/{COMPOSED}/1.mp4", "day/b/2.mp4"], 2)
    catalog = scan(tmp_path, class_folders=True)
    assert catalog.class_names == ("b", COMPOSED)
    assert [video.label for video in catalog.videos] == [0, 1, 1]
    assert inspect_dataset(tmp_path, num_frames=1).classes == {"b": 1, COMPOSED: 2}


@both_ways
def test_images_have_the_classes_of_the_videos(here: str, there: str, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    videos, images = tmp_path / "videos", tmp_path / "images"
    write_videos(videos, [f"{here}/0.mp4", "b/1.mp4"], 2)
    write_frames(images, [there], 1)
    data = DataConfig(
        path=videos, images=images, num_images=1, class_folders=True, num_frames=2, frame_interval=1, resolution=16
    )
    batches = BatchMaker(data, TrainConfig(batch_size=1), tiny_vae, 0.0)
    labels = batches.make(0).class_labels
    assert labels is not None and labels[0, 1] == batches.class_names.index(COMPOSED)


@both_ways
def test_a_cache_of_a_copy_of_the_videos(
    here: str, there: str, tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fits, and encoding again finds nothing to do."""
    videos = write_videos(tmp_path / "videos", [f"{here}/{here}.mp4", "b.mp4"], 3)
    encode_dataset(scan(videos), tmp_path / "cache", tiny_vae, 16, False, "fp32")
    copy = tmp_path / "copy"
    (copy / there).mkdir(parents=True)
    shutil.copy(videos / here / f"{here}.mp4", copy / there / f"{there}.mp4")
    shutil.copy(videos / "b.mp4", copy / "b.mp4")
    CacheSource(tmp_path / "cache").check(tiny_vae, 16, False, copy)
    monkeypatch.setattr(encode_module, "write_shard", None)
    manifest = encode_dataset(scan(copy), tmp_path / "cache", tiny_vae, 16, False, "fp32")
    assert len(manifest["videos"]) == 2
    (copy / there / f"{there}.mp4").unlink()
    with pytest.raises(ValueError, match="is in the cache"):
        CacheSource(tmp_path / "cache").check(tiny_vae, 16, False, copy)


def test_names_that_are_not_utf8_are_encoded_and_read(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    name = f"{NOT_UTF8}/{NOT_UTF8}.mp4"
    videos = write_videos(tmp_path / "videos", [name, "b/1.mp4"], 3)
    catalog = scan(videos, class_folders=True)
    encode_dataset(catalog, tmp_path / "cache", tiny_vae, 16, False, "fp32")
    assert [row["name"] for row in read_manifest(tmp_path / "cache")["videos"]] == ["b/1.mp4", name]
    cache = CacheSource(tmp_path / "cache", class_folders=True)
    cache.check(tiny_vae, 16, False, videos)
    assert cache.catalog.class_names == ("b", NOT_UTF8)
    source = VideoSource(catalog, tiny_vae, 16, "fp32")
    for cached, video in zip(cache.catalog.videos, catalog.videos, strict=True):
        for one, other in zip(
            cache.read(ClipDraw(cached, 1, False), 2, 1), source.read(ClipDraw(video, 1, False), 2, 1), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


def test_frames_whose_names_are_not_utf8_have_digests(tmp_path: Path) -> None:
    folder = write_frames(tmp_path, [NOT_UTF8], 2, f"{NOT_UTF8}{{}}.png") / NOT_UTF8
    assert source_digest(folder) != content_hash(folder)


def test_names_that_are_not_utf8_are_printed_and_written(tmp_path: Path, run: Run) -> None:
    write_videos(tmp_path / "v", [f"{NOT_UTF8}.mp4", "b.mp4"], 3)
    for option in ("--json", "--out=look"):
        code, out, err = run("data", "inspect", tmp_path / "v", "--num-frames", "9", option)
        assert code == 0, err
        assert r"\udcff\udcfe.mp4" in out
    written = json.loads((tmp_path / "look" / "inspection.json").read_text(encoding="utf-8"))
    assert f"{NOT_UTF8}.mp4" in written["too_short"]
