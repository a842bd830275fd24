import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lavita.evaluation import reconstruction
from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.evaluation.sources import find_interval
from lavita.models.autoencoder import AutoencoderKL, decode, encode, to_pixels
from lavita.video.reading import probe, read_clip
from lavita.video.writing import write_video


@pytest.fixture
def moving_square(tmp_path: Path) -> Path:
    """One video of a white square that moves over black, in a folder of its own."""
    frames = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[8:16, 4 * number : 4 * number + 8] = 255
    write_video(tmp_path / "squares" / "0.gif", frames, 10)
    return tmp_path


NO_AUTOENCODER: Any = SimpleNamespace(config={})  # encoding and decoding are replaced


def fake_autoencoder(monkeypatch: pytest.MonkeyPatch, everywhere: int, bright: int) -> None:
    """Replaces the autoencoder by one whose error is known: so much everywhere, so much more on bright pixels."""

    def encode(vae: object, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(frames), torch.zeros(1)

    def decode(vae: object, latents: torch.Tensor) -> np.ndarray:
        frames = latents.numpy().astype(np.int64)
        error = everywhere + bright * (frames > 128)
        return np.where(frames > 128, frames - error, frames + error).astype(np.uint8)

    monkeypatch.setattr(reconstruction, "encode", encode)
    monkeypatch.setattr(reconstruction, "decode", decode)


def test_psnr_of_a_known_error(moving_square: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_autoencoder(monkeypatch, everywhere=5, bright=0)
    quality = reconstruction.reconstruction_quality(NO_AUTOENCODER, moving_square, 32)
    expected = 20 * math.log10(255 / 5)
    assert set(quality) == {"squares", "all"}
    assert quality["all"]["frames"] == 6
    assert quality["all"]["psnr"] == pytest.approx(expected, abs=0.01)
    assert quality["all"]["moving_psnr"] == pytest.approx(expected, abs=0.01)


def test_moving_pixels_are_scored_apart(moving_square: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_autoencoder(monkeypatch, everywhere=1, bright=40)
    row = reconstruction.reconstruction_quality(NO_AUTOENCODER, moving_square, 32)["all"]
    assert row["moving_psnr"] < row["psnr"] - 6


def test_a_pixel_moves_if_it_differs_from_the_frame_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar that grows: pixels that have just become white, and black ones that are about to."""
    frames = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[:, : 4 * number + 4] = 255
    write_video(tmp_path / "0.gif", frames, 10)
    fake_autoencoder(monkeypatch, everywhere=1, bright=40)
    row = reconstruction.reconstruction_quality(NO_AUTOENCODER, tmp_path, 32)["all"]
    # Five times four columns become white, with an error of 41, and as many are about to, with an error of 1.
    assert row["moving_psnr"] == pytest.approx(10 * math.log10(255**2 / ((41**2 + 1) / 2)), abs=0.01)
    squared = np.mean([(41**2 * white + 32 - white) / 32 for white in range(4, 28, 4)])
    assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / squared), abs=0.01)


def test_no_error_and_no_motion_have_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "still.gif", np.zeros((4, 32, 32, 3), dtype=np.uint8), 10)
    fake_autoencoder(monkeypatch, everywhere=0, bright=0)
    row = reconstruction.reconstruction_quality(NO_AUTOENCODER, tmp_path, 32)["all"]
    assert row["psnr"] is None and row["moving_psnr"] is None


def test_the_feature_distance_is_the_mean_over_frames(moving_square: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_autoencoder(monkeypatch, everywhere=20, bright=0)
    monkeypatch.setattr(reconstruction, "frames_at_once", lambda device, side: 4)  # 6 frames in two calls
    distance = FeatureDistance.load()
    assert distance is not None
    row = reconstruction.reconstruction_quality(NO_AUTOENCODER, moving_square, 32, distance)["all"]
    ((_, real, made),) = reconstruction.reconstructions(NO_AUTOENCODER, moving_square, 32)
    expected = [distance(to_pixels(a[None]), to_pixels(b[None])).item() for a, b in zip(made, real, strict=True)]
    assert row["feature_distance"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert row["feature_distance"] > 0.01
    assert reconstruction.reconstruction_quality(NO_AUTOENCODER, moving_square, 32)["all"]["feature_distance"] is None


def test_several_resolutions_are_several_rows(
    moving_square: Path, tiny_vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = reconstruction.quality_at(tiny_vae, [moving_square], [16, 32], None)
    assert list(quality) == [f"{moving_square} at 16 px", f"{moving_square} at 32 px"]
    for side in (16, 32):
        expected = reconstruction.reconstruction_quality(tiny_vae, moving_square, side)
        assert quality[f"{moving_square} at {side} px"] == expected
    assert list(reconstruction.quality_at(tiny_vae, [moving_square], [16], None)) == [str(moving_square)]
    with pytest.raises(ValueError, match="resolution is 17, but this autoencoder needs a multiple of"):
        reconstruction.quality_at(tiny_vae, [moving_square], [16, 17], None)


def test_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quality = {"videos": {"all": {"psnr": 30.0, "moving_psnr": None, "feature_distance": None, "frames": 4}}}
    reconstruction.show_quality(quality, tmp_path / "deep" / "quality.json")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "30.00" in line]
    assert line.replace("│", " ").split() == ["videos", "all", "30.00", "-", "-", "4"]
    assert json.loads((tmp_path / "deep" / "quality.json").read_text()) == quality


def test_reconstructed_clips_are_a_folder_that_can_be_scored(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "a" / "one.mkv", frames, 12)
    clips = tmp_path / "clips"
    quality = reconstruction.reconstruction_quality(tiny_vae, tmp_path / "videos", 16, frame_interval=4, clips=clips)
    assert quality["all"]["frames"] == 3
    made = decode(tiny_vae, encode(tiny_vae, frames[::4])[0])
    file = clips / "a" / "one.mkv.mkv"
    assert np.array_equal(read_clip(file, 0, 3), made)
    assert probe(file).fps == pytest.approx(3)
    assert find_interval(clips, None) == 4
    reconstruction.reconstruction_quality(tiny_vae, tmp_path / "videos", 16, frame_interval=4, clips=clips)
    with pytest.raises(ValueError, match="holds videos made with frame_interval=4, not 2; use another folder"):
        reconstruction.reconstruction_quality(tiny_vae, tmp_path / "videos", 16, frame_interval=2, clips=clips)
    with pytest.raises(ValueError, match="holds files, but not reconstructed clips"):
        reconstruction.reconstruction_quality(tiny_vae, tmp_path / "videos", 16, clips=tmp_path)
    with pytest.raises(ValueError, match="takes those of one folder of videos at one resolution"):
        reconstruction.quality_at(tiny_vae, [tmp_path / "videos"], [16, 32], None, clips=clips)
