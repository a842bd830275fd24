"""Training of causal autoencoders: `temporal_downsampling` of `lavita autoencoder train`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoder_runs import STRUCTURES, tiny_run
from conftest import make_tiny_vae
from run_folders import last_checkpoint
from tiny_data import paint, write_videos

from lavita.core.config import ConfigError, read_yaml
from lavita.models.autoencoder import encode, frame_network, load_autoencoder
from lavita.models.causal_autoencoder import CausalConv, LavitaCausalAutoencoder, inflate
from lavita.training.autoencoder.frames import clips_per_step, draw_clips
from lavita.training.autoencoder.losses import FULL_MOTION, autoencoder_losses, motion_weights
from lavita.training.autoencoder.network import build_autoencoder
from lavita.training.autoencoder.train import train_autoencoder
from lavita.training.checkpoint import list_checkpoints
from lavita.video.reading import iter_frames


@pytest.fixture
def start(tmp_path: Path) -> dict[str, str]:
    """A random autoencoder of frames of each architecture, and videos to train on."""
    write_videos(tmp_path / "videos")
    torch.manual_seed(0)
    for name, structure in STRUCTURES.items():
        build_autoencoder(tiny_run(tmp_path, **structure)).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in STRUCTURES}


@pytest.mark.parametrize(("architecture", "factor"), [("kl", 2), ("tiny", 4), ("patch", 2)])
def test_it_starts_from_frames_and_resumes_to_the_bit(
    architecture: str, factor: int, start: dict[str, str], tmp_path: Path
) -> None:
    """Without the autoencoder that it started from."""
    base = load_autoencoder(start[architecture])
    assert not isinstance(base, LavitaCausalAutoencoder)
    given: dict[str, Any] = {"init_from": start[architecture], "temporal_downsampling": factor}
    config = tiny_run(tmp_path, learning_rate=1e-9, save_dtype="float32", **given)
    folder = train_autoencoder(config)
    made = load_autoencoder(str(folder))
    assert isinstance(made, LavitaCausalAutoencoder)
    assert made.config["temporal_downsampling"] == factor
    for name, weight in inflate(frame_network(base), factor).named_parameters():
        torch.testing.assert_close(made.get_parameter(name), weight, rtol=0, atol=1e-6)
    mean, std = encode(made, paint(1 + 2 * factor, height=8, width=8))
    assert mean.shape == std.shape == (3, made.config["latent_channels"], *mean.shape[2:])

    expected = last_checkpoint(config).read_all()
    shutil.rmtree(list_checkpoints(config.run_dir / "checkpoints")[-1])
    shutil.rmtree(start[architecture])
    assert train_autoencoder(config) == folder
    for name, tensor in last_checkpoint(config).read_all().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_causal_autoencoder_is_a_start_itself(start: dict[str, str], tmp_path: Path) -> None:
    first = tiny_run(tmp_path, name="a", init_from=start["kl"], temporal_downsampling=2, steps=1)
    more = tiny_run(tmp_path, name="b", init_from=str(train_autoencoder(first)), steps=1)
    vae = load_autoencoder(str(train_autoencoder(more)))
    assert vae.config["temporal_downsampling"] == 2
    assert read_yaml(more.run_dir / "config.yaml")["temporal_downsampling"] == 2
    other = tiny_run(tmp_path, name="c", init_from=str(first.run_dir / "autoencoder"), temporal_downsampling=4)
    with pytest.raises(ConfigError, match=r"temporal_downsampling is 4, but that of init_from=.* is 2; leave it out"):
        train_autoencoder(other)


def test_training_lowers_the_loss_and_scales_latents(start: dict[str, str], tmp_path: Path) -> None:
    given: dict[str, Any] = {"init_from": start["tiny"], "temporal_downsampling": 2, "batch_size": 10}
    config = tiny_run(tmp_path, steps=60, learning_rate=1e-2, **given)
    vae = load_autoencoder(str(train_autoencoder(config.model_copy(update={"checkpoint_every": 60}))))
    lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert isinstance(vae, LavitaCausalAutoencoder)
    assert any(layer.weight[:, :, :-1].any() for layer in vae.modules() if isinstance(layer, CausalConv))
    videos = [np.stack(list(iter_frames(video))) for video in sorted((tmp_path / "videos").rglob("*.mp4"))]
    clips = [video[first : first + 5, :8, :8] for video in videos for first in range(5)]
    means = torch.cat([encode(vae, np.ascontiguousarray(clip))[0] for clip in clips])
    assert means.std().item() == pytest.approx(1, abs=0.4)


def test_the_adversarial_term_sees_every_frame(start: dict[str, str], tmp_path: Path) -> None:
    config = tiny_run(tmp_path, init_from=start["kl"], temporal_downsampling=2, steps=1, adversarial_weight=0.1)
    train_autoencoder(config)
    line = json.loads((config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["adaptive_weight"] > 0
    assert np.isfinite(line["adversarial"])


# --- clips


def test_clips_are_successive_frames_alike(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, init_from="builtin", temporal_downsampling=2, batch_size=12, horizontal_flip=False)
    video = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 8, 8, 3))
    firsts = set()
    for step in range(40):
        clips = draw_clips([[video]], config, step).reshape(-1, 5, 8, 8, 3)
        assert len(clips) == clips_per_step(config) == 2
        for clip in clips:
            assert (clip == clip[:1, :1, :1, :1] + np.arange(5, dtype=np.uint8)[:, None, None, None]).all()
            firsts.add(int(clip.flat[0]))
    assert (min(firsts), max(firsts)) == (0, 15)
    assert clips_per_step(config.model_copy(update={"temporal_downsampling": 4, "batch_size": 4})) == 1


def test_a_frame_that_moves_on_either_side_counts() -> None:
    """Of four frames only the last one differs: it and the one before it have the additional weight."""
    still = torch.zeros(3, 8, 8)
    pixels = torch.stack([still, still, still, still + 2 * FULL_MOTION])
    weights = motion_weights(pixels, 3.0, 4)[:, 0, 0, 0]
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 4.0, 4.0]) / 2.5)


def test_the_loss_in_closed_form(tmp_path: Path) -> None:
    """In float64, for two clips of five frames."""
    config = tiny_run(tmp_path, init_from="builtin", temporal_downsampling=2, batch_size=10, kl_weight=0.3)
    config = config.model_copy(update={"edge_weight": 0.0, "motion_weight": 0.0})
    vae = inflate(make_tiny_vae(), 2).double()
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(10, 3, 8, 8, generator=random, dtype=torch.float64) * 2 - 1
    noise = torch.randn(6, 4, 4, 4, generator=random, dtype=torch.float64)
    losses = autoencoder_losses(vae, pixels, noise, config)
    with torch.no_grad():
        output, kl = [], []
        for clip, drawn in zip(pixels.split(5), noise.split(3), strict=True):
            found = vae.encode(clip[None])
            output.append(vae.decode(found.mean + found.std * drawn)[0])
            posterior = torch.distributions.Normal(found.mean, found.std)
            kl.append(torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean().item())
        l1 = (torch.cat(output) - pixels).abs().mean().item()
    assert losses.parts["reconstruction"] == pytest.approx(l1, rel=1e-5)
    assert losses.parts["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert losses.total.item() == pytest.approx(l1 + 0.3 * float(np.mean(kl)), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temporal_downsampling": 2}, "temporal_downsampling is 2, but needs init_from"),
        ({"temporal_downsampling": 3, "init_from": "builtin"}, "temporal_downsampling is 3"),
        ({"temporal_downsampling": 2, "init_from": "builtin", "freeze": "encoder"}, "changes the encoder"),
    ],
    ids=["start", "factor", "freeze"],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **values)


def test_videos_shorter_than_a_clip_are_left_out(tmp_path: Path, start: dict[str, str]) -> None:
    write_videos(tmp_path / "short", ["a.mp4"], 4)
    config = tiny_run(tmp_path, init_from=start["kl"], temporal_downsampling=2, data=[str(tmp_path / "short")])
    with pytest.raises(ValueError, match="a clip needs 5"):
        train_autoencoder(config)
