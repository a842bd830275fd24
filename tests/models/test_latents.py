"""Frames to latents and back: ranges, scale and shift, and the fingerprint of an autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import paint

from lavita.models.autoencoder import AutoencoderKL, decode, encode, to_frames, to_pixels
from lavita.models.fingerprint import fingerprint


@pytest.fixture
def vae(tiny_vae: AutoencoderKL) -> AutoencoderKL:
    tiny_vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    return tiny_vae


def test_pixels_and_frames_are_inverse() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (2, 3, 8, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    np.testing.assert_array_equal(to_frames(pixels), frames)
    assert to_frames(torch.full((3, 2, 2), 7.0)).tolist() == [[[255] * 3] * 2] * 2
    assert to_frames(torch.full((3, 2, 2), -7.0)).tolist() == [[[0] * 3] * 2] * 2


def test_latents_are_shifted_and_scaled(vae: AutoencoderKL) -> None:
    frames = paint(5, width=16)
    mean, std = encode(vae, frames, "fp32")
    posterior = vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2).double().float() / 127.5 - 1).latent_dist
    assert mean.shape == std.shape == (5, 4, 8, 8)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, (posterior.mean - 0.2) * 0.7, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.7, rtol=1e-4, atol=1e-5)


def test_decoding_undoes_shift_and_scale(vae: AutoencoderKL) -> None:
    unscaled = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = decode(vae, (unscaled - 0.2) * 0.7, "fp32")
    assert frames.shape == (2, 3, 16, 16, 3)
    assert frames.dtype == np.uint8
    expected = torch.stack([vae.decode(video).sample for video in unscaled])
    exact = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 1, 3, 4, 2).numpy()
    assert np.abs(frames - exact).max() <= 0.51


def test_the_fingerprint_is_of_weights_and_configuration(vae: AutoencoderKL, tmp_path: Path) -> None:
    before = fingerprint(vae)
    vae.save_pretrained(tmp_path)
    assert fingerprint(AutoencoderKL.from_pretrained(tmp_path)) == before
    vae.register_to_config(scaling_factor=0.71)
    rescaled = fingerprint(vae)
    vae.register_to_config(scaling_factor=0.7)
    vae.encoder.conv_in.weight.data[0] += 1e-3
    assert len({before, rescaled, fingerprint(vae)}) == 3
