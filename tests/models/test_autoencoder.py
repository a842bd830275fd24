"""The autoencoder on a CPU: the frames of a batch do not influence each other, and weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lavita.models.autoencoder import (
    Autoencoder,
    AutoencoderKL,
    AutoencoderTiny,
    decode,
    encode,
    frames_at_once,
    load_autoencoder,
)
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


@pytest.fixture(params=["narrow", "builtin", "tiny"])
def vae(request: pytest.FixtureRequest, make_vae: Callable[..., AutoencoderKL]) -> Autoencoder:
    if request.param == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            tiny = AutoencoderTiny(
                encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=4
            )
        return tiny.eval().requires_grad_(False)
    return make_vae() if request.param == "narrow" else load_autoencoder(autoencoder_source("builtin", 64))


def test_weights_stay_as_they_are(vae: Autoencoder) -> None:
    before = fingerprint(vae)
    layouts = [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()]
    decode(vae, encode(vae, pictures(2, 32), "fp32")[0], "fp32")
    assert fingerprint(vae) == before
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()] == layouts


# --- a frame among others


def test_frames_at_once_are_a_number_of_pixels() -> None:
    assert [frames_at_once(CPU, side) for side in (16, 32, 64, 128, 256, 512)] == [16, 16, 4, 1, 1, 1]
    assert [frames_at_once(torch.device("cuda"), side) for side in (64, 512)] == [16, 16]


@pytest.mark.parametrize(
    ("vae", "side", "count"), [("narrow", 32, 18), ("tiny", 32, 18), ("builtin", 64, 6)], indirect=["vae"]
)
def test_a_frame_does_not_depend_on_the_others(side: int, count: int, vae: Autoencoder) -> None:
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


def test_pixels_do_not_depend_on_the_place_in_a_piece(vae: Any) -> None:
    latents = noise(4, vae.config["latent_channels"], 16, 16)
    pixels = vae.decode(latents).sample
    order = [2, 0, 3, 1]
    assert torch.equal(vae.decode(latents[order]).sample, pixels[order])
    alone = torch.cat([latents[2:3]] * 4)
    assert torch.equal(vae.decode(alone).sample[0], pixels[2])
