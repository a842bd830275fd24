"""The autoencoder on a CPU against diffusers' own forward passes and float64; frames against their neighbours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lavita.models import autoencoder_cpu
from lavita.models.autoencoder import (
    AutoencoderKL,
    decode,
    encode,
    frames_at_once,
    load_autoencoder,
    to_frames,
    to_pixels,
)
from lavita.models.autoencoder_cpu import decode_pixels, encode_moments, is_covered, upsample
from lavita.models.fingerprint import fingerprint
from lavita.models.packaged import autoencoder_source

CPU = torch.device("cpu")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def pictures(count: int, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def make_vae() -> Callable[..., AutoencoderKL]:
    """A narrow one of Stable Diffusion's layout, with attention: 32 pixels to 4 x 4 x 4."""

    def make(**fields: Any) -> AutoencoderKL:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            vae = AutoencoderKL(
                **{
                    "block_out_channels": (8, 16, 16, 16),
                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4,
                    "layers_per_block": 2,
                    "latent_channels": 4,
                    "norm_num_groups": 4,
                    **fields,
                }
            )
        return vae.eval().requires_grad_(False)

    return make


@pytest.fixture(params=["narrow", "builtin"])
def vae(request: pytest.FixtureRequest, make_vae: Callable[..., AutoencoderKL]) -> AutoencoderKL:
    return make_vae() if request.param == "narrow" else load_autoencoder(autoencoder_source("builtin", 64))


# --- what the CPU computes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_and_its_convolution_in_one(layout: torch.memory_format) -> None:
    hidden, weight, bias = noise(2, 5, 6, 7).double(), noise(3, 5, 3, 3).double(), noise(3).double()
    plain = F.conv2d(F.interpolate(hidden, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    fast = upsample(hidden.contiguous(memory_format=layout), weight, bias)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_moments_are_diffusers_to_the_bit(vae: AutoencoderKL) -> None:
    assert is_covered(vae)
    pixels = to_pixels(pictures(3, 32))
    assert torch.equal(encode_moments(vae, pixels, "fp32"), vae.encode(pixels).latent_dist.parameters)


def test_pixels_are_as_near_to_float64_as_diffusers(vae: AutoencoderKL) -> None:
    latents = noise(3, 4, 8, 8)
    exact = copy.deepcopy(vae).double().decode(latents.double()).sample

    def error(pixels: torch.Tensor) -> float:
        return float((pixels - exact).norm() / exact.norm())

    assert is_covered(vae)
    fast, plain = error(decode_pixels(vae, latents, "fp32")), error(vae.decode(latents).sample)
    assert fast < max(1.5 * plain, 1e-6) and fast < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda vae: vae.enable_slicing(),
        lambda vae: vae.train(),
        lambda vae: vae.register_to_config(act_fn="gelu"),
        lambda vae: vae.register_to_config(up_block_types=["AttnUpDecoderBlock2D"] * 4),
        lambda vae: vae.double(),
    ],
    ids=["slices", "training", "activation", "blocks", "float64"],
)
def test_anything_else_is_left_to_diffusers(
    change: Callable[[AutoencoderKL], Any], make_vae: Callable[..., AutoencoderKL], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make_vae()
    change(vae)
    assert not is_covered(vae)
    monkeypatch.setattr(autoencoder_cpu, "_resnet", None)
    latents, pixels = noise(2, 4, 4, 4).to(vae.dtype), noise(2, 3, 32, 32).to(vae.dtype)
    assert torch.equal(decode_pixels(vae, latents, "fp32"), vae.decode(latents).sample)
    assert torch.equal(encode_moments(vae, pixels, "fp32"), vae.encode(pixels).latent_dist.parameters)


def test_other_precisions_are_left_to_diffusers(
    make_vae: Callable[..., AutoencoderKL], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, latents = make_vae(), noise(16, 4, 4, 4)
    monkeypatch.setattr(autoencoder_cpu, "_resnet", None)
    vae.register_to_config(scaling_factor=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = to_frames(vae.decode(latents).sample)
    np.testing.assert_array_equal(decode(vae, latents, "bf16"), expected)


def test_weights_stay_as_they_are(vae: AutoencoderKL) -> None:
    before = fingerprint(vae)
    layouts = [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()]
    decode(vae, encode(vae, pictures(2, 32), "fp32")[0], "fp32")
    assert fingerprint(vae) == before
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()] == layouts


# --- a frame among others


def test_frames_at_once_are_a_number_of_pixels() -> None:
    assert [frames_at_once(CPU, side) for side in (16, 32, 64, 128, 256, 512)] == [16, 16, 4, 1, 1, 1]
    assert [frames_at_once(torch.device("cuda"), side) for side in (64, 512)] == [16, 16]


@pytest.mark.parametrize(("vae", "side", "count"), [("narrow", 32, 18), ("builtin", 64, 6)], indirect=["vae"])
def test_a_frame_does_not_depend_on_the_others(side: int, count: int, vae: AutoencoderKL) -> None:
    """`count` frames make two pieces, of which the second is not full."""
    assert 1 < count / frames_at_once(CPU, side) < 2
    frames = pictures(count, side)
    mean, std = encode(vae, frames, "fp32")
    assert mean.shape[0] == std.shape[0] == count
    video = decode(vae, mean, "fp32")
    for some in ([0], [count - 1], [3, 2, 1], list(range(count - 1)), list(range(count))[::-1]):
        found = encode(vae, frames[some], "fp32")
        assert torch.equal(found[0], mean[some])
        assert torch.equal(found[1], std[some])
        np.testing.assert_array_equal(decode(vae, mean[some], "fp32"), video[some])


def test_pixels_do_not_depend_on_the_place_in_a_piece(vae: AutoencoderKL) -> None:
    latents = noise(4, 4, 16, 16)
    pixels = decode_pixels(vae, latents, "fp32")
    order = [2, 0, 3, 1]
    assert torch.equal(decode_pixels(vae, latents[order], "fp32"), pixels[order])
    alone = torch.cat([latents[2:3]] * 4)
    assert torch.equal(decode_pixels(vae, alone, "fp32")[0], pixels[2])
