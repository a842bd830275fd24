import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavita.evaluation import reconstruction
from lavita.video.writing import write_video


@pytest.fixture
def moving_square(tmp_path: Path) -> Path:
    """One video of a white square that moves over black, in a folder of its own."""
    frames = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[8:16, 4 * number : 4 * number + 8] = 255
    write_video(tmp_path / "squares" / "0.gif", frames, 10)
    return tmp_path


NO_AUTOENCODER: Any = None  # encoding and decoding are replaced


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


def test_the_report_is_written(tmp_path: Path) -> None:
    quality = {"videos": {"all": {"psnr": 30.0, "moving_psnr": None, "frames": 4}}}
    reconstruction.show_quality(quality, tmp_path / "deep" / "quality.json")
    assert json.loads((tmp_path / "deep" / "quality.json").read_text()) == quality
