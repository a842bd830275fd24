"""Models of the latents of a causal autoencoder: from clips to samples, with the numbers of frames of both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig, Run, make_tiny_vae
from PIL import Image
from tiny_data import paint, write_videos

from lavita.core.config import ConfigError
from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.clips import ClipDraw, read_pixels
from lavita.data.latent_cache.reading import LatentClip
from lavita.evaluation.reconstruction import reconstruction_quality
from lavita.models.autoencoder import encode
from lavita.models.causal_autoencoder import LavitaCausalAutoencoder, inflate
from lavita.sampling.pipeline import load_pipeline
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig
from lavita.video.reading import iter_frames

FACTOR = 2
COMMON = [
    *("autoencoder=causal", "data.resolution=16", "data.num_frames=5", "data.frame_interval=2"),
    *("model.preset=tiny/4", "train.steps=1"),
]


@pytest.fixture
def vae() -> LavitaCausalAutoencoder:
    """From clips of 16 pixels to latents of 4 x 8 x 8, with weights that see the past."""
    causal = inflate(make_tiny_vae(), FACTOR).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    for parameter in causal.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    causal.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    return causal


@pytest.fixture
def make(make_config: MakeConfig, vae: LavitaCausalAutoencoder, tmp_path: Path) -> Callable[..., RunConfig]:
    """Configurations of runs on the latents of `vae`: 5 frames, 3 latents."""
    vae.save_pretrained(tmp_path / "causal")

    def config(name: str, *overrides: str) -> RunConfig:
        return make_config(name, f"autoencoder={tmp_path / 'causal'}", "data.num_frames=5", *overrides)

    return config


def test_a_batch_has_the_latents_of_clips_and_images(
    make: Callable[..., RunConfig], vae: LavitaCausalAutoencoder
) -> None:
    config = make("a", "data.num_images=2")
    batches = BatchMaker(config.data, config.train, vae, 0.0)
    batch = batches.make(0)
    assert batch.latents.shape == (4, 3 + 2, 4, 8, 8)
    for row, draw in enumerate(batch.draws):
        mean, std = encode(vae, read_pixels(draw, 5, config.data.frame_interval, 16))
        assert ((batch.latents[row, :3] - mean) / std).abs().max() < 7, "a sample of this clip's posterior"
    draw = batches.image_sampler.draw(0, 0)
    mean, std = encode(vae, read_pixels(draw, 1, 1, 16))
    assert ((batch.latents[0, 3] - mean[0]) / std[0]).abs().max() < 7, "a first frame alone"


def test_training_to_samples(make: Callable[..., RunConfig], run: Run, tmp_path: Path) -> None:
    overrides = ["data.num_images=1", "data.normalize_latents=true", "train.num_samples=2", "train.steps=2"]
    config = make("run", *overrides)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    code, _, error = run("train", "--config", tmp_path / "run.yaml")
    assert code == 0, error
    folder = tmp_path / "run" / "pipeline"
    pipeline = load_pipeline(folder)
    assert isinstance(pipeline.vae, LavitaCausalAutoencoder)
    assert pipeline.transformer.config["num_frames"] == 3
    for video in sorted((tmp_path / "run" / "samples").rglob("*.mp4")):
        assert len(list(iter_frames(video))) == 5
    labels = ["a", "b"] if pipeline.transformer.config["num_classes"] else None
    options: dict[str, Any] = {"class_labels": labels, "num_inference_steps": 2}
    assert pipeline(**options).frames.shape[1:] == (5, 16, 16, 3)
    assert pipeline(num_frames=7, **options).frames.shape[1:] == (7, 16, 16, 3)
    assert pipeline(output_type="latent", **options).frames.shape[1:] == (3, 4, 8, 8)
    with pytest.raises(ValueError, match="num_frames is 6, but must be 1 more than a multiple of 2, such as 5 or 7"):
        pipeline(num_frames=6, **options)

    code, _, error = run("sample", folder, "--out", "sampled", "--seeds", "0", "--num-frames", "3")
    assert code == 0, error
    assert {len(list(iter_frames(video))) for video in (tmp_path / "sampled").rglob("*.mp4")} == {3}
    code, _, error = run("sample", folder, "--out", "more", "--seeds", "0", "--num-frames", "4")
    assert (code, "num_frames is 4" in error, (tmp_path / "more").exists()) == (2, True, False)
    code, _, error = run("sample", folder, "--out", "images", "--seeds", "0", "--images")
    assert code == 0, error
    assert all(Image.open(file).size == (16, 16) for file in (tmp_path / "images").rglob("*.png"))

    code, out, error = run("info", folder, "--num-frames", "9")
    assert code == 0, error
    assert "merges groups of 2 frames: 5 latents are 9 frames" in out
    assert run("info", folder, "--num-frames", "8")[0] == 2


def test_images_without_time_are_decoded_one_by_one(make: Callable[..., RunConfig], run: Run, tmp_path: Path) -> None:
    config = make("run", "train.steps=1")
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    assert run("train", "--config", tmp_path / "run.yaml")[0] == 0
    pipeline = load_pipeline(tmp_path / "run" / "pipeline")
    options: dict[str, Any] = {
        "class_labels": ["a"],
        "num_inference_steps": 2,
        "use_temporal": False,
        "precision": "fp32",
    }
    latents = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = pipeline(latents=latents, **options).frames
    assert together.shape == (1, 3, 16, 16, 3)
    for number in range(3):
        alone = pipeline(latents=latents[:, number : number + 1], num_frames=1, **options).frames
        np.testing.assert_array_equal(alone[:, 0], together[:, number])


def test_caches_of_videos_are_refused(
    make: Callable[..., RunConfig], vae: LavitaCausalAutoencoder, run: Run, tmp_path: Path
) -> None:
    config = make("a")
    assert config.data.path is not None
    encoder = ["encode", "--out", tmp_path / "cache", "--autoencoder", tmp_path / "causal", "--resolution", "16"]
    code, _, error = run(*encoder, "--data", config.data.path)
    assert code == 2
    assert "cannot hold the latents of videos by an autoencoder that merges groups of 2 frames" in error
    assert not (tmp_path / "cache").exists()
    plain = [*encoder[:4], tmp_path / "vae", *encoder[5:]]
    assert run(*plain, "--data", config.data.path)[0] == 0
    held_out = [f"data.validation={tmp_path / 'cache'}", "train.validate_every=1"]
    for overrides in ([f"data.latent_cache={tmp_path / 'cache'}"], held_out):
        code, _, error = run("train", "--run-dir", "b", f"data.path={config.data.path}", *overrides, *COMMON)
        assert code == 2
        assert "a latent cache, but this autoencoder merges groups of 2 frames" in error.replace("\n", " ")


def test_a_time_is_not_kept_with_it(make: Callable[..., RunConfig], run: Run, tmp_path: Path) -> None:
    videos = make("a").data.path
    assert videos is not None
    code, _, error = run("train", "--minutes", "5", "--data", videos, "--run-dir", "b", "autoencoder=causal")
    assert code == 2
    assert "merges groups of 2 frames, but a time is only kept" in error.replace("\n", " ")
    assert not (tmp_path / "b").exists()


def test_a_cache_of_images_is_as_good_as_the_images(
    make: Callable[..., RunConfig],
    vae: LavitaCausalAutoencoder,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAVITA_BF16", "off")  # the command, which takes what the processor has, as the run in fp32
    for number, frame in enumerate(paint(3, height=16, width=16)):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "images" / "a" / f"{number}.png")
    make("a")
    encoder = ["encode", "--images", "--data", tmp_path / "images", "--out", tmp_path / "cache"]
    code, _, error = run(*encoder, "--autoencoder", tmp_path / "causal", "--resolution", "16")
    assert code == 0, error
    found = []
    for source in ("images", "cache"):
        config = make("a", "data.num_images=1", f"data.images={tmp_path / source}")
        found.append(BatchMaker(config.data, config.train, vae, 0.0).make(0).latents)
    assert torch.equal(*found)


def test_other_numbers_of_frames_are_refused(make: Callable[..., RunConfig], vae: LavitaCausalAutoencoder) -> None:
    config = make("a", "data.num_frames=4")
    with pytest.raises(ValueError, match=r"data\.num_frames is 4, but must be 1 more than a multiple of 2") as caught:
        BatchMaker(config.data, config.train, vae, 0.0)
    assert not isinstance(caught.value, ConfigError) or "\n" not in str(caught.value)


def test_statistics_are_those_of_clips(
    make: Callable[..., RunConfig], vae: LavitaCausalAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all latents of a clip, not only of first frames: 7 of 10 frames, and one where there are no more."""
    config = make("a")
    assert config.data.path is not None
    write_videos(config.data.path, ["a/short.mp4"], 2)
    source, read, lengths = VideoSource(scan(config.data.path), vae, 16), VideoSource.read, set()

    def watched(self: VideoSource, draw: ClipDraw, num_frames: int, frame_interval: int) -> LatentClip:
        assert draw.start + num_frames <= draw.video.info.num_frames
        lengths.add((draw.video.name, num_frames))
        return read(self, draw, num_frames, frame_interval)

    monkeypatch.setattr(VideoSource, "read", watched)
    assert len(source.statistics().mean) == 4
    assert lengths == {("a/0.mp4", 7), ("a/1.mp4", 7), ("b/2.mp4", 7), ("a/short.mp4", 1)}


def test_reconstruction_takes_what_frames_fit(make: Callable[..., RunConfig], vae: LavitaCausalAutoencoder) -> None:
    """9 of the 10 frames of each of three videos."""
    config = make("a")
    assert config.data.path is not None
    assert reconstruction_quality(vae, config.data.path, 16)["all"]["frames"] == 27
