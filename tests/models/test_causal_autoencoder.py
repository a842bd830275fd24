"""The causal autoencoder of clips: what it begins as, which frames depend on which, and parts of clips."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_vae
from tiny_data import paint

from lavita.models.autoencoder import (
    AutoencoderTiny,
    decode,
    downsampling,
    encode,
    frames_at_once,
    latent_frames,
    load_autoencoder,
    pixel_frames,
    posterior,
)
from lavita.models.causal_autoencoder import FrameAutoencoder, LavitaCausalAutoencoder, inflate
from lavita.models.fingerprint import encoder_fingerprint, fingerprint
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.models.pooled_autoencoder import LavitaPooledAutoencoder


def make_frames_vae(kind: str, levels: int = 2) -> FrameAutoencoder:
    """An autoencoder of frames with 4 latent channels; `kl`, `tiny`, `pooled` or `patch`."""
    if kind == "kl" and levels == 2:
        return make_tiny_vae()
    if kind == "patch":
        patch = LavitaPatchAutoencoder(2 ** (levels - 1), 4, 8, 1, 1).eval().requires_grad_(False)
        random = torch.Generator().manual_seed(2)
        for parameter in patch.parameters():  # half of them begin as 0
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
        return patch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if kind == "kl":
            vae: Any = type(make_tiny_vae())(
                block_out_channels=(8,) * levels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                latent_channels=4,
                norm_num_groups=4,
            )
        else:
            vae = (AutoencoderTiny if kind == "tiny" else LavitaPooledAutoencoder)(
                encoder_block_out_channels=(8,) * levels,
                decoder_block_out_channels=(8,) * levels,
                num_encoder_blocks=(1,) * levels,
                num_decoder_blocks=(1,) * levels,
            )
    return vae.eval().requires_grad_(False)


def trained(vae: FrameAutoencoder, factor: int) -> LavitaCausalAutoencoder:
    """As if trained: no weight is what it began with, none of the past is 0."""
    causal = inflate(vae, factor).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    for parameter in causal.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return causal


def clips(count: int, frames: int, side: int = 16) -> torch.Tensor:
    return torch.rand(count, frames, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


KINDS = pytest.mark.parametrize("kind", ["kl", "tiny", "pooled", "patch"])
FACTORS = pytest.mark.parametrize("factor", [2, 4])


# --- the start


@KINDS
@FACTORS
@pytest.mark.parametrize("levels", [2, 3])
def test_it_begins_as_the_autoencoder_of_frames(kind: str, factor: int, levels: int) -> None:
    """First frame as there; each latent is that of its group's last frame, which the last frame is decoded from."""
    vae = make_frames_vae(kind, levels)
    causal, pixels = inflate(vae, factor).eval(), clips(2, 1 + 2 * factor)
    with torch.no_grad():
        found = causal.encode(pixels)
        expected = posterior(vae, pixels[:, ::factor].flatten(0, 1))
        assert found.mean.shape == (2, 3, 4, 16 // downsampling(vae), 16 // downsampling(vae))
        torch.testing.assert_close(found.mean.flatten(0, 1), expected.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.std.flatten(0, 1), expected.std, rtol=0, atol=1e-6)
        decoded, frames = causal.decode(found.mean), vae.decode(expected.mean).sample
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded[:, ::factor].flatten(0, 1), frames, rtol=0, atol=5e-6)


@FACTORS
def test_frames_begin_between_those_of_the_latents(factor: int) -> None:
    """Of latents without motion each frame is the first one's; of others, none between is that of either side."""
    causal = inflate(make_tiny_vae(), factor).eval()
    latents = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        still = causal.decode(latents[:, :1].expand(-1, 3, -1, -1, -1))
        moving = causal.decode(latents)
    torch.testing.assert_close(still, still[:, :1].expand_as(still), rtol=0, atol=1e-6)
    for frame in range(1, factor):
        assert (moving[0, frame] - moving[0, 0]).abs().max() > 1e-3
        assert (moving[0, frame] - moving[0, factor]).abs().max() > 1e-3


def test_inflating_leaves_the_original_alone() -> None:
    vae = make_tiny_vae()
    before = fingerprint(vae)
    causal = inflate(vae, 2)
    with torch.no_grad():
        for parameter in causal.parameters():
            parameter.zero_()
    assert fingerprint(vae) == before
    assert all(parameter.requires_grad for parameter in causal.parameters())


# --- causality


@KINDS
@FACTORS
def test_no_latent_depends_on_later_frames(kind: str, factor: int) -> None:
    causal, pixels = trained(make_frames_vae(kind), factor), clips(1, 1 + 2 * factor).requires_grad_()
    mean = causal.encode(pixels).mean
    for number in range(3):
        (gradient,) = torch.autograd.grad(mean[:, number].square().sum(), pixels, retain_graph=True)
        sizes = gradient.abs().amax(dim=(0, 2, 3, 4))
        last = number * factor
        assert sizes[: last + 1].min() > 0, "all frames so far are seen"
        assert not sizes[last + 1 :].any()


@KINDS
@FACTORS
def test_no_frame_depends_on_later_latents(kind: str, factor: int) -> None:
    causal = trained(make_frames_vae(kind), factor)
    latents = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = causal.decode(latents)
    for frame in range(1 + 2 * factor):
        (gradient,) = torch.autograd.grad(pixels[:, frame].square().sum(), latents, retain_graph=True)
        sizes = gradient.abs().amax(dim=(0, 2, 3, 4))
        last = -(-frame // factor)
        assert sizes[: last + 1].min() > 0
        assert not sizes[last + 1 :].any()


@FACTORS
def test_later_frames_change_no_value(factor: int) -> None:
    causal, pixels = trained(make_tiny_vae(), factor), clips(1, 1 + 2 * factor)
    other = pixels.clone()
    other[:, 1 + factor :] = -other[:, 1 + factor :]
    first, second = causal.encode(pixels).mean, causal.encode(other).mean
    torch.testing.assert_close(first[:, :2], second[:, :2], rtol=0, atol=1e-6)
    assert (first[:, 2] - second[:, 2]).abs().max() > 1e-3
    torch.testing.assert_close(causal.encode(pixels[:, :1]).mean, first[:, :1], rtol=0, atol=1e-6)


def test_clips_of_a_batch_and_threads_are_apart() -> None:
    causal, pixels = trained(make_tiny_vae(), 2), clips(3, 5)
    together = causal.encode(pixels).mean
    alone = [causal.encode(clip[None]).mean for clip in pixels]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    found: dict[int, torch.Tensor] = {}

    def work(count: int) -> None:
        for _ in range(5):
            found[count] = causal.encode(pixels[:count]).mean

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count, mean in found.items():
        torch.testing.assert_close(mean, together[:count], rtol=1e-5, atol=1e-5)


# --- clips of frames


@KINDS
@FACTORS
def test_parts_of_a_clip_are_the_clip(kind: str, factor: int) -> None:
    """`encode` and `decode` go through a clip of 41 frames in parts; the network takes it as a whole."""
    causal = trained(make_frames_vae(kind), factor)
    causal.register_to_config(scaling_factor=0.5, shift_factor=0.3)
    frames = paint(41, height=16, width=16)
    assert frames_at_once(causal.device, 16) < 41
    mean, std = encode(causal, frames, "fp32")
    pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    whole = causal.encode(pixels[None])
    torch.testing.assert_close(mean, (whole.mean[0] - 0.3) * 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, whole.std[0] * 0.5, rtol=1e-4, atol=1e-5)
    assert len(mean) == latent_frames(causal.config, 41) == 1 + 40 // factor
    video = decode(causal, torch.stack([mean, mean.flip(0)])[:, None], "fp32")
    assert video.shape == (2, 1, 41, 16, 16, 3)
    expected = causal.decode(whole.mean)[0].movedim(1, -1).add(1).mul(127.5).round().clamp(0, 255)
    assert np.abs(video[0, 0] - expected.numpy()).max() <= 1
    np.testing.assert_array_equal(decode(causal, mean, "fp32"), video[0, 0])


def test_numbers_of_frames() -> None:
    config = inflate(make_tiny_vae(), 4).config
    assert [latent_frames(config, frames) for frames in (1, 5, 9)] == [1, 2, 3]
    assert [pixel_frames(config, latents) for latents in (1, 2, 3)] == [1, 5, 9]
    assert latent_frames({}, 7) == pixel_frames({}, 7) == 7
    problem = "data.num_frames is 16, but must be 1 more than a multiple of 4, such as 13 or 17"
    with pytest.raises(ValueError, match=problem):
        latent_frames(config, 16, "data.num_frames")
    with pytest.raises(ValueError, match="the number of frames is 4, but must be 1 more than a multiple of 2"):
        inflate(make_tiny_vae(), 2).encode(clips(1, 4))


# --- files


@KINDS
def test_it_loads_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    vae = make_frames_vae(kind)
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.2)
    causal = trained(vae, 4)
    assert (causal.config["scaling_factor"], causal.config["shift_factor"]) == (1.5, 0.2)
    causal.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert isinstance(loaded, LavitaCausalAutoencoder)
    assert type(loaded.network) is type(vae)
    assert fingerprint(loaded) == fingerprint(causal)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_cache_depends_on_its_encoder_alone() -> None:
    """Of images there may be one, see `encoder_fingerprint`."""
    causal = inflate(make_tiny_vae(), 2).requires_grad_(False)
    before = encoder_fingerprint(causal)
    causal.get_parameter("network.decoder.conv_in.weight").add_(1)
    assert encoder_fingerprint(causal) == before
    causal.get_parameter("network.quant_conv.weight").add_(1)
    changed = encoder_fingerprint(causal)
    causal.get_parameter("network.encoder.conv_in.weight").add_(1)
    assert len({before, changed, encoder_fingerprint(causal)}) == 3


def test_what_cannot_be_made_is_said() -> None:
    vae = make_tiny_vae()
    with pytest.raises(ValueError, match="temporal_downsampling is 3, but must be 2 or 4"):
        inflate(vae, 3)
    with pytest.raises(ValueError, match="of the class LavitaCausalAutoencoder is not one of frames alone"):
        inflate(inflate(vae, 2), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frame_autoencoder is of the class 'Popen'; allowed: AutoencoderKL"):
        LavitaCausalAutoencoder({"_class_name": "Popen"})
    with pytest.raises(ValueError, match="latent_channels is 5, but frame_autoencoder has 4"):
        LavitaCausalAutoencoder({**vae.config, "_class_name": "AutoencoderKL"}, latent_channels=5)
    for kind in ("kl", "tiny"):
        with pytest.raises(ValueError, match="the autoencoder of frames keeps their size"):
            inflate(make_frames_vae(kind, 1), 2)
