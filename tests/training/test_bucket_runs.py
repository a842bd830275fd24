"""Runs on clips of several shapes: each batch has one of them, and nothing else about training changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_folders import last_checkpoint, lines_of
from tiny_data import write_videos
from training.parallel_runs import assert_alike, torchrun

from lavita.core.config import ConfigError, load_config
from lavita.core.sizes import parse_size
from lavita.data.buckets import BucketSampler
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import load_autoencoder
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import load_pipeline
from lavita.studies.dry_run import dry_run, print_dry_run
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig
from lavita.training.train import train
from lavita.video.reading import read_clip

BUCKETS = ["2x16x16", "4x16x24", "1x24x16"]
SEED = 29
"""With it, the first steps have all three shapes."""
LATENTS = [[2, 8, 8], [4, 8, 12], [1, 12, 8]]


@pytest.fixture
def make(tmp_path: Path, tiny_vae: Any) -> Any:
    """Makes configurations of runs on squares, wide videos, and tall ones that are single frames."""
    write_videos(tmp_path / "videos", ["a/0.mp4", "b/1.mp4"], 4, 20, 20)
    write_videos(tmp_path / "videos", ["a/2.mp4", "b/3.mp4", "a/4.mp4"], 9, 16, 26)
    write_videos(tmp_path / "videos", ["b/5.mkv", "a/6.mkv"], 2, 30, 20)
    tiny_vae.save_pretrained(tmp_path / "vae")

    def make(name: str, *overrides: str) -> RunConfig:
        values = {
            "run_dir": str(tmp_path / name),
            "autoencoder": str(tmp_path / "vae"),
            "data": {"path": str(tmp_path / "videos"), "class_folders": True, "frame_interval": 1},
            "model": {"preset": "tiny/4"},
            "train": {"batch_size": 4, "precision": "fp32", "log_every": 1, "sample_every": 0, "steps": 6},
        }
        values["data"] |= {"fit": "bucket", "buckets": BUCKETS}  # type: ignore[operator]
        values["train"] |= {"learning_rate": 1e-3, "device": "cpu", "seed": SEED}  # type: ignore[operator]
        return load_config(RunConfig, values, overrides)

    return make


def maker(config: RunConfig) -> BatchMaker:
    return BatchMaker(config.data, config.train, load_autoencoder(config.autoencoder), 0.1)


def model_config(config: RunConfig) -> dict[str, Any]:
    return dict(json.loads((config.run_dir / "pipeline/transformer/config.json").read_text()))


def test_each_batch_has_one_shape_by_its_share_of_the_clips(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    batches = maker(make("run"))
    assert "buckets: 2x16x16 2 videos, 4x16x24 3 videos, 1x24x16 2 videos" in capfd.readouterr().err
    assert isinstance(batches.sampler, BucketSampler)
    # Clips: 2 videos of 4 frames with 3 starts, 3 of 9 frames with 6 starts, 2 with 2 starts.
    assert [sampler.num_clips for sampler in batches.sampler.samplers] == [6, 18, 4]
    shapes = [list(batches.make(step, range(1)).latents.shape[1:]) for step in range(20)]
    assert {tuple(shape) for shape in shapes} == {(2, 4, 8, 8), (4, 4, 8, 12), (1, 4, 12, 8)}
    chosen = np.bincount([batches.sampler.choose(step) for step in range(2800)])
    expected = np.array([600, 1800, 400])
    assert ((chosen - expected) ** 2 / expected).sum() < 13.8  # chi-squared with 2 degrees: p = 0.001
    whole = batches.make(3)
    assert all(draw.video.bucket == whole.draws[0].video.bucket for draw in whole.draws)


def test_a_killed_run_goes_on_and_accumulation_agrees(make: Any) -> None:
    whole, cut = make("whole"), make("cut")
    train(whole)
    batches = maker(whole)
    shapes = {batches.make(step, range(1)).latents.shape for step in range(6)}
    assert len(shapes) == 3, "the run has seen three shapes"
    train(make("cut", "train.steps=3"))
    train(cut)
    assert [line["loss"] for line in lines_of(cut)] == [line["loss"] for line in lines_of(whole)]
    resumed, expected = last_checkpoint(cut).read_all(), last_checkpoint(whole).read_all()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    train(parts := make("parts", "train.accumulation=2"))
    assert_alike(parts, whole)


@pytest.mark.slow
def test_two_processes_train_as_one(make: Any) -> None:
    one = make("one", "data.num_images=1")
    train(one)
    torchrun(2, two := make("two", "data.num_images=1", "train.accumulation=2"))
    assert_alike(two, one)


def test_every_shape_is_sampled(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make("run", "train.steps=2", "train.sample_every=2", "train.num_samples=4")
    train(config)
    config_of_model = model_config(config)
    assert config_of_model["trained_shapes"] == LATENTS
    assert (config_of_model["num_frames"], config_of_model["sample_size"]) == (2, 8)
    folder = config.run_dir / "samples/step-00000002"
    during = [read_clip(folder / f"{i}.mp4", 0, frames).shape for i, frames in enumerate((2, 4, 1, 2))]
    assert during == [(2, 16, 16, 3), (4, 16, 24, 3), (1, 24, 16, 3), (2, 16, 16, 3)]

    def sampled(name: str, size: str | None, num_frames: int | None = None) -> tuple[int, ...]:
        asked = None if size is None else parse_size(size)
        out, model = tmp_path / name, str(config.run_dir / "pipeline")
        (file,) = generate(model, out, classes="a", seeds="0", suffix=".mkv", size=asked, num_frames=num_frames)
        frames = json.loads((out / "generation.json").read_text())["num_frames"]
        return read_clip(file, 0, frames).shape

    caplog.clear()
    assert sampled("first", None) == (2, 16, 16, 3)
    assert sampled("wide", "16x24") == (4, 16, 24, 3)
    assert sampled("tall", "24x16") == (1, 24, 16, 3)
    assert "was asked for" not in caplog.text
    assert sampled("other", "32x16", 3) == (3, 32, 16, 3)
    assert "3 x 32x16 was asked for" in caplog.text
    assert "trained on 2 x 16x16, 4 x 16x24, 1 x 24x16; its positions in space are" in caplog.text
    with pytest.raises(ValueError, match="height is 18, but must be a multiple of 8"):
        sampled("wrong", "18x16")


def test_a_cache_of_buckets_gives_the_same_run(make: Any, tmp_path: Path) -> None:
    config = make("videos", "data.normalize_latents=true", "data.horizontal_flip=false")
    vae = load_autoencoder(config.autoencoder)
    catalog = maker(config).source.catalog
    data = config.data
    assert isinstance(data.resolution, int)
    encode_dataset(
        catalog, tmp_path / "cache", vae, 16, False, "fp32", fit="bucket", buckets=data.buckets, frame_interval=1
    )
    cached = make("cached", f"data.latent_cache={tmp_path / 'cache'}", "data.horizontal_flip=false")
    plain, from_cache = maker(make("plain", "data.horizontal_flip=false")), maker(cached)
    for step in range(8):
        torch.testing.assert_close(from_cache.make(step).latents, plain.make(step).latents, rtol=0, atol=1e-5)
    train(cached)
    with pytest.raises(ValueError, match="has no mirrored frames"):
        maker(make("x", f"data.latent_cache={tmp_path / 'cache'}"))
    other = ("data.buckets=[2x16x16,4x16x32,1x24x16]", "data.horizontal_flip=false")
    with pytest.raises(ValueError, match="made for buckets of 16x16, 16x24, 24x16, but those of this"):
        maker(make("x", f"data.latent_cache={tmp_path / 'cache'}", *other))
    square = ("data={fit: crop, buckets: [], num_frames: 2, resolution: 16}", "data.horizontal_flip=false")
    with pytest.raises(ValueError, match=r"made with fit=bucket, but data\.fit is crop"):
        maker(make("x", f"data.latent_cache={tmp_path / 'cache'}", *square))


def test_validation_given_frames_and_images_work_with_buckets(make: Any, tmp_path: Path) -> None:
    write_videos(tmp_path / "held", ["a/7.mp4", "b/8.mp4"], 9, 16, 26)
    write_videos(tmp_path / "held", ["a/9.mp4"], 4, 20, 20)
    watched = (f"data.validation={tmp_path / 'held'}", "train.validate_every=2", "train.validation_clips=5")
    train(config := make("run", "data.num_images=1", "model.given_frames=[first]", "train.steps=2", *watched))
    assert len(lines_of(config, "validation.jsonl")) == 1
    batches = maker(make("x", "data.num_images=2"))
    for step in range(6):
        batch = batches.make(step)
        frames = batch.draws[0].video.bucket
        assert frames is not None and batch.latents.shape[1] == frames.num_frames + 2


def test_a_dry_run_measures_every_shape(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make("run")
    found = dry_run(config)
    assert found.num_clips == 28 and found.step_seconds is not None and not config.run_dir.exists()
    square = dry_run(make("x", "data={fit: crop, buckets: [], num_frames: 2, resolution: 16}"))
    assert found.memory.total > square.memory.total, "of the largest shape"
    print_dry_run(config, found)
    assert "28 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.buckets=[]", "fit is bucket, but buckets is empty"),
        ("data.fit=crop", "buckets is set, but has no effect with fit=crop"),
        ("data.resolution=64", "num_frames is 2 and resolution 64, but the first of buckets is 2x16x16"),
        ("data.num_frames=3", "num_frames is 3 and resolution 16, but the first"),
        ("data.start_span=9", "start_span is 9, but has no effect with buckets"),
        ("data.buckets=[2x16x16,2x16x16]", "must name each shape once"),
        ("data.buckets=[16x16]", "'16x16' is no bucket: write frames x height x width"),
        ("data.buckets=[2x4x16]", r"'2x4x16' is no bucket: each side must be in 8\.\."),
        ("train.score_every=1", "scores compare squares"),
        ("model.patch_embedding=compression", "must be a multiple of model.tube_size"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("run", override)


def test_buckets_without_videos(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no video is nearest to 2x64x16, the first of data\.buckets"):
        maker(make("run", "data.buckets=[2x64x16,1x16x16]"))
    capfd.readouterr()
    batches = maker(make("run", "data.buckets=[1x16x16,2x16x128]"))
    assert "1x16x16 7 videos, 2x16x128 NONE" in capfd.readouterr().err
    assert isinstance(batches.sampler, BucketSampler) and len(batches.sampler.samplers) == 1


def test_sizes_that_the_autoencoder_does_not_divide(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.buckets has 2x16x20, but 20 must be a multiple of 8, such as 16"):
        train(make("run", "data.buckets=[2x16x16,2x16x20]"))
    rectangle = "data={fit: pad, buckets: [], num_frames: 2, resolution: 16x20}"
    with pytest.raises(ConfigError, match=r"data\.resolution is 16x20, but 20 must be a multiple of 8"):
        train(make("run", rectangle))


def test_a_rectangle_from_start_to_sample(make: Any, tmp_path: Path) -> None:
    one_shape = "data={fit: pad, buckets: [], num_frames: 2, resolution: 16x24}"
    train(config := make("run", one_shape, "train.steps=2", "train.sample_every=2", "train.num_samples=1"))
    assert model_config(config)["sample_size"] == [8, 12] and model_config(config)["trained_shapes"] is None
    assert "resolution: 16x24\n" in (config.run_dir / "config.yaml").read_text()
    train(make("run", one_shape, "train.steps=4", "train.sample_every=2", "train.num_samples=1"))
    pipeline = load_pipeline(config.run_dir / "pipeline")
    frames = pipeline(class_labels=["a"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 2, 16, 24, 3)
    tuned = make("tuned", f"train.init_from={config.run_dir}", "train.steps=1")
    train(tuned)
    assert "recomputed" in (tuned.run_dir / "init.txt").read_text()
