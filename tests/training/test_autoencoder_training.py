"""Training autoencoders: the loss against closed forms, the draws, the scaling factor, exact resuming."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from autoencoder_runs import KL, tiny_run
from run_folders import last_checkpoint, lines_of
from tiny_data import paint, write_videos

from lavita.core.config import ConfigError, load_config
from lavita.data.catalog import scan
from lavita.models.autoencoder import AutoencoderKL, encode, load_autoencoder
from lavita.training.autoencoder import train as module
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.autoencoder.frames import draw_clips, load_frames
from lavita.training.autoencoder.losses import autoencoder_losses, motion_weights
from lavita.training.autoencoder.network import build_autoencoder
from lavita.training.autoencoder.train import learning_rate, train_autoencoder
from lavita.training.checkpoint import list_checkpoints


def make_config(tmp_path: Path, *overrides: str, name: str = "run") -> AutoencoderConfig:
    return tiny_run(tmp_path, *overrides, name=name, **KL)


# --- the loss


def test_motion_weights_in_closed_form() -> None:
    still = torch.zeros(3, 12, 12)
    moved = still.clone()
    moved[1, 5, 5] = 0.4  # full motion: 0.2 on [0, 1] is 0.4 on [-1, 1]
    half = still.clone()
    half[2, 0, 0] = -0.2
    weights = motion_weights(torch.stack([still, moved, half, still]), weight=4.0)

    expected = np.ones((2, 12, 12))
    expected[0, 4:7, 4:7] = 5.0  # and its neighbours
    expected[1, 0:2, 0:2] = 3.0
    expected = (expected / expected.mean()).repeat(2, axis=0)[:, None]
    assert weights.shape == (4, 1, 12, 12)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
    assert weights.mean().item() == pytest.approx(1.0)


def test_motion_beyond_full_counts_as_full_and_stillness_as_one() -> None:
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weights = motion_weights(pixels, 2.0)
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert (weights.max() / weights.min()).item() <= 3.0 + 1e-5
    assert torch.equal(motion_weights(pixels, 0.0), torch.ones(6, 1, 8, 8))
    assert torch.equal(motion_weights(pixels[:1].repeat(4, 1, 1, 1), 2.0), torch.ones(4, 1, 8, 8))


def test_the_loss_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    pixels, output = rng.uniform(-1, 1, (2, 4, 3, 8, 8))
    pixels[1::2] = np.where(rng.random((2, 3, 8, 8)) < 0.1, pixels[1::2], pixels[::2])
    mean, logvar, noise = rng.normal(0, 0.7, (3, 4, 2, 4, 4))
    std = np.exp(logvar / 2)
    decoded = []

    class Fake:
        def encode(self, given: torch.Tensor) -> Any:
            np.testing.assert_allclose(given.numpy(), pixels, rtol=1e-6)
            names = {"mean": mean, "std": std, "logvar": logvar}
            return SimpleNamespace(latent_dist=SimpleNamespace(**{k: torch.tensor(v) for k, v in names.items()}))

        def decode(self, z: torch.Tensor) -> Any:
            decoded.append(z.numpy())
            return SimpleNamespace(sample=torch.tensor(output))

    config = load_config(AutoencoderConfig, {"data": ["x"], "kl_weight": 0.3, "edge_weight": 0.7, "motion_weight": 3})
    losses = autoencoder_losses(
        cast(AutoencoderKL, Fake()),
        torch.tensor(pixels, dtype=torch.float32),
        torch.tensor(noise),
        config,
    )

    np.testing.assert_allclose(decoded[0], mean + std * noise, rtol=1e-6)
    prior, posterior = (
        torch.distributions.Normal(0.0, 1.0),
        torch.distributions.Normal(torch.tensor(mean), torch.tensor(std)),
    )
    kl = torch.distributions.kl_divergence(posterior, prior).mean().item()
    weights = motion_weights(torch.tensor(pixels), 3.0).numpy()
    reconstruction = (weights * np.abs(output - pixels)).mean()
    edges = sum(np.abs(np.diff(output, axis=axis) - np.diff(pixels, axis=axis)).mean() for axis in (-1, -2))
    loss, parts = losses.total, losses.parts
    assert parts["kl"] == pytest.approx(kl, rel=1e-5)
    assert parts["reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    assert loss.item() == pytest.approx(reconstruction + 0.7 * edges + 0.3 * kl, rel=1e-5)
    assert set(parts) == {"kl", "reconstruction"}


def test_the_learning_rate_rises_and_falls() -> None:
    config = load_config(AutoencoderConfig, {"data": ["x"], "learning_rate": 1e-3, "steps": 1000})
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 200)
    assert rates[199] == rates[200] == max(rates) == pytest.approx(1e-3)
    assert rates[600] == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[200:]))


# --- frames


def test_frames_are_read_once_and_shrunk(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos", ["0.mp4", "1.mp4"], num_frames=6, height=48, width=64)
    videos = load_frames(scan(tmp_path / "videos"), 8, memory_gib=1.0, seed=0)
    assert [video.shape for video in videos] == [(6, 16, 21, 3)] * 2, "twice the crops' size is enough"
    assert videos[0].dtype == np.uint8

    small = load_frames(scan(tmp_path / "videos"), 24, memory_gib=1.0, seed=0)
    assert [video.shape for video in small] == [(6, 48, 64, 3)] * 2
    half = load_frames(scan(tmp_path / "videos"), 24, memory_gib=6 * 48 * 64 * 3 / 2**30, seed=0)
    for part, whole in zip(half, small, strict=True):
        assert len(part) == 3
        assert any(np.array_equal(part, whole[start : start + 3]) for start in range(4)), "a stretch of the video"


def test_pairs_are_successive_frames_under_one_crop(tmp_path: Path) -> None:
    columns = np.arange(20, dtype=np.uint8)
    video = np.stack([np.broadcast_to(10 * columns[None, :, None], (16, 20, 3)) + t for t in range(10)])
    config = make_config(tmp_path, "resolution=16", "batch_size=8")
    pairs = np.concatenate([draw_clips([[video]], config, step) for step in range(20)])
    assert pairs.shape == (160, 16, 16, 3)
    assert pairs.dtype == np.uint8
    first, second = pairs[::2].astype(int), pairs[1::2].astype(int)
    assert np.unique(second - first).tolist() == [1], "the next frame, at the same place"
    slopes = np.diff(first[:, 0, :, 0], axis=1)
    flipped = (slopes == -10).all(axis=1)
    assert ((slopes == 10).all(axis=1) | flipped).all()
    assert 0.25 < flipped.mean() < 0.75
    assert set(first.min(axis=(1, 2, 3)) // 10) == {0, 1, 2, 3, 4}, "every place of the crop"
    np.testing.assert_array_equal(draw_clips([[video]], config, 3), pairs[24:32])
    unflipped = draw_clips([[video]], make_config(tmp_path, "resolution=16", "horizontal_flip=false"), 3)
    assert (np.diff(unflipped[:, 0, :, 0].astype(int), axis=1) == 10).all()


def test_folders_are_drawn_by_their_weights(tmp_path: Path) -> None:
    black, white = np.zeros((4, 8, 8, 3), np.uint8), np.full((4, 8, 8, 3), 255, np.uint8)
    config = load_config(
        AutoencoderConfig, {"data": ["x", "y"], "data_weights": [1, 3], "resolution": 8, "batch_size": 400}
    )
    pairs = draw_clips([[black], [white, white]], config, 0)
    assert (pairs[::2] == 255).all(axis=(1, 2, 3)).mean() == pytest.approx(0.75, abs=0.1)


def test_small_videos_are_enlarged(tmp_path: Path) -> None:
    pairs = draw_clips([[paint(3, height=6, width=9)]], make_config(tmp_path, "resolution=16"), 0)
    assert pairs.shape == (4, 16, 16, 3)


# --- training


def last_state(config: AutoencoderConfig) -> dict[str, torch.Tensor]:
    checkpoint = last_checkpoint(config)
    assert checkpoint.step == config.steps
    return checkpoint.read_all()


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = make_config(tmp_path)
    folder = train_autoencoder(config)
    checkpoints = list_checkpoints(config.run_dir / "checkpoints")
    assert [file.name for file in checkpoints] == ["step-00000002", "step-00000004"]
    expected = last_state(config)
    lines = (config.run_dir / "metrics.jsonl").read_text()
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()

    shutil.rmtree(checkpoints[-1])  # as a kill before step 4 would leave it
    assert train_autoencoder(config) == folder
    resumed = last_state(config)
    assert set(resumed) == set(expected) and {name.split(".")[0] for name in resumed} == {"model", "ema", "optimizer"}
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert (config.run_dir / "metrics.jsonl").read_text() == lines
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]) == {"step", "loss", "lr", "grad_norm", "reconstruction", "kl"}

    with pytest.raises(ConfigError, match=r"latent_channels=2, but 3 was asked for; use another run_dir"):
        train_autoencoder(make_config(tmp_path, "latent_channels=3"))


def test_a_run_is_not_resumed_on_other_videos(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    train_autoencoder(make_config(tmp_path, "steps=2"))
    write_videos(tmp_path / "videos", ["a/9.mp4"])
    with pytest.raises(ConfigError, match=r"was trained on other data \(.*videos: 1 added \(a/9\.mp4\)\)"):
        train_autoencoder(make_config(tmp_path, "steps=3"))


def test_what_is_saved_has_unit_variance_and_the_averaged_weights(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = make_config(tmp_path, "steps=3", "save_dtype=float16")
    folder = train_autoencoder(config)
    vae = load_autoencoder(str(folder))

    sources = [load_frames(scan(config.data[0]), 8, 1.0, 0)]
    frames = np.concatenate([draw_clips(sources, config, 1000 + step) for step in range(100)])
    mean, std = encode(vae, frames, "fp32")
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = mean + std * noise
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)
    assert latents.mean().item() == pytest.approx(0.0, abs=0.05)

    averages = last_state(config)
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter, averages[f"ema.{name}"].half().float(), rtol=0, atol=0)
    assert vae.config["latent_channels"] == 2
    assert not (folder / "reconstruction.json").exists()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = make_config(tmp_path, "steps=60", "learning_rate=1e-2", "checkpoint_every=1000")
    train_autoencoder(config)
    losses = [line["loss"] for line in lines_of(config)]
    assert math.isclose(losses[0], losses[1], rel_tol=0.5)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_held_out_videos_are_scored(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    write_videos(tmp_path / "held-out", ["c/0.mp4"])
    config = make_config(tmp_path, "steps=1", f"held_out=[{tmp_path / 'held-out'}]")
    folder = train_autoencoder(config)
    quality = json.loads((folder / "reconstruction.json").read_text())
    assert set(quality[str(tmp_path / "held-out")]) == {"c", "all"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_videos(tmp_path / "videos")
    monkeypatch.setattr(module, "learning_rate", lambda *_: 1e30)
    config = make_config(tmp_path, "checkpoint_every=100")
    with pytest.raises(FloatingPointError, match="at step 2; lower learning_rate"):
        train_autoencoder(config)
    assert not list_checkpoints(config.run_dir / "checkpoints")


def test_the_network_has_the_asked_for_shape(tmp_path: Path) -> None:
    config = make_config(tmp_path, "downsampling=8", "block_out_channels=null", "layers_per_block=2")
    assert config.widths == [32, 64, 128, 256]
    with torch.device("meta"):
        vae = build_autoencoder(make_config(tmp_path, "downsampling=4", "block_out_channels=[8, 8, 16]"))
    assert isinstance(vae, AutoencoderKL)
    assert vae.encode(torch.zeros(1, 3, 16, 16, device="meta")).latent_dist.mean.shape == (1, 2, 4, 4)
