"""The autoencoder on patches: its start against a singular value decomposition, its shapes, saving and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lavita.models.autoencoder import decode, downsampling, encode, load_autoencoder
from lavita.models.patch_autoencoder import FIRST_LOGVAR, LavitaPatchAutoencoder


def small(patch_size: int = 4, latent_channels: int = 6) -> LavitaPatchAutoencoder:
    torch.manual_seed(0)
    return LavitaPatchAutoencoder(patch_size, latent_channels, width=8, num_encoder_blocks=1, num_decoder_blocks=2)


def smooth_pixels(count: int, side: int) -> torch.Tensor:
    coarse = torch.rand((count, 3, side // 4, side // 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    fine = torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(1)) - 0.5
    return (torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic") + 0.2 * fine).clamp(-1, 1)


def trained(vae: LavitaPatchAutoencoder) -> LavitaPatchAutoencoder:
    """With random weights wherever training starts from 0."""
    generator = torch.Generator().manual_seed(3)
    for weights in vae.parameters():
        weights.data += 0.05 * torch.randn(weights.shape, generator=generator)
    return vae.eval()


def test_it_starts_as_the_best_linear_autoencoder() -> None:
    pixels = smooth_pixels(12, 16)
    vae = small().eval()
    vae.set_principal_components(pixels)

    posterior = vae.encode(pixels).latent_dist
    output = vae.decode(posterior.mean).sample
    # An oracle with other means: numpy's SVD of the patches, cut out by hand.
    patches = np.stack(
        [
            pixels[n, :, top : top + 4, left : left + 4].numpy().astype(np.float64).ravel()
            for n in range(12)
            for top in range(0, 16, 4)
            for left in range(0, 16, 4)
        ]
    )
    singular = np.linalg.svd(patches - patches.mean(axis=0), compute_uv=False)
    lost = (singular[6:] ** 2).sum() / patches.size
    assert (output - pixels).square().mean().item() == pytest.approx(lost, rel=1e-4)

    latents = posterior.mean.detach().movedim(1, -1).flatten(0, -2).double()
    np.testing.assert_allclose(latents.mean(dim=0), 0, atol=1e-5)
    np.testing.assert_allclose(torch.cov(latents.T, correction=0), np.eye(6), atol=1e-4)
    assert torch.equal(posterior.logvar, torch.full_like(posterior.logvar, FIRST_LOGVAR))


def test_grey_videos_lack_components_but_stay_finite() -> None:
    vae = small(latent_channels=24)  # 16 values of a grey patch have at most 16 components
    grey = smooth_pixels(12, 16).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    vae.set_principal_components(grey)
    output = vae.decode(vae.encode(grey).latent_dist.mean).sample
    assert (output - grey).abs().max().item() < 1e-3


@pytest.mark.parametrize("patch_size", [2, 8])
def test_shapes_follow_the_patch_size(patch_size: int) -> None:
    vae = small(patch_size)
    assert downsampling(vae) == patch_size
    latents = vae.encode(torch.zeros(2, 3, 16, 32)).latent_dist.mean
    assert latents.shape == (2, 6, 16 // patch_size, 32 // patch_size)
    assert vae.decode(latents).sample.shape == (2, 3, 16, 32)


def test_it_loads_as_it_was_saved(tmp_path: Path) -> None:
    vae = trained(small())
    vae.register_to_config(scaling_factor=0.8, shift_factor=0.1)
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(str(tmp_path / "vae"))
    assert isinstance(loaded, LavitaPatchAutoencoder)

    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    mean, std = encode(loaded, frames, "fp32")
    pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(mean / 0.8 + 0.1).sample
    torch.testing.assert_close(mean, (posterior.mean - 0.1) * 0.8, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.8, atol=1e-6, rtol=1e-5)
    expected = ((output.clamp(-1, 1) + 1) * 127.5).movedim(1, -1).numpy()
    assert np.abs(decode(loaded, mean, "fp32") - expected).max() <= 0.51, "but for rounding to bytes"
