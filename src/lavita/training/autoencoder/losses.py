"""The loss of an autoencoder: a reconstruction loss that weights moving pixels, and what keeps the latents small.

Legend: P pairs of successive frames, C channels of the latents, H W pixels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.models.autoencoder import Autoencoder, AutoencoderTiny
from lavita.training.config import AutoencoderConfig

FULL_MOTION = 0.2
"""Change of a pixel, on [0, 1], that counts as full motion."""


@dataclass(frozen=True)
class Losses:
    """The terms of a step's loss, each a 0-dim tensor with its weight included."""

    output: torch.Tensor
    """The reconstructed frames, `(2 P, 3, H, W)`."""
    on_output: torch.Tensor
    """The terms that depend on the output alone: L1, edges and the perceptual distance."""
    on_latents: torch.Tensor
    """The KL divergence of the latents."""
    parts: dict[str, float]
    """Values without weights: `reconstruction` (L1), `kl`, and `perceptual` if it has a weight."""

    @property
    def total(self) -> torch.Tensor:
        """The loss."""
        return self.on_output + self.on_latents


def motion_weights(pixels: torch.Tensor, weight: float) -> torch.Tensor:
    """The weight of each pixel: 1 where the frames of a pair agree, up to `1 + weight` where they differ, with mean 1.

    Args:
        pixels: `(2 P, 3, H, W)` in [-1, 1], pairs of successive frames.
        weight: additional weight of full motion.

    Returns:
        `(2 P, 1, H, W)`, scaled to mean 1 over all pixels; the frames of a pair have the same weights.
    """
    pairs = pixels.unflatten(0, (-1, 2))
    moved = (pairs[:, 0] - pairs[:, 1]).abs().amax(dim=1, keepdim=True) / (2 * FULL_MOTION)
    moved = F.max_pool2d(moved.clamp(max=1.0), kernel_size=3, stride=1, padding=1)
    weights = 1.0 + weight * moved
    return (weights / weights.mean()).repeat_interleave(2, dim=0)


def autoencoder_losses(
    vae: Autoencoder,
    pixels: torch.Tensor,
    noise: torch.Tensor,
    config: AutoencoderConfig,
    distance: FeatureDistance | None = None,
) -> Losses:
    """Motion-weighted L1, L1 of the image gradients, the perceptual distance, and KL(q(z|x) || N(0, 1)).

    The KL divergence is that of Kingma & Welling 2014, App. B. A tiny autoencoder gives latents without a standard
    deviation. It is trained as if this were a constant: nothing is drawn, and of the divergence there remains
    `mean^2 / 2`, which keeps the latents where the decoder, which clamps them to -3..3 by a tanh, can tell them apart.

    Args:
        vae: the autoencoder.
        pixels: `(2 P, 3, H, W)` in [-1, 1], pairs of successive frames.
        noise: standard normal `(2 P, C, h, w)`, for the reparametrized sample.
        config: the weights of the terms.
        distance: the perceptual distance, needed if it has a weight.
    """
    if isinstance(vae, AutoencoderTiny):
        z = vae.encode(pixels).latents
        kl = 0.5 * z.float().square().mean()
    else:
        posterior = vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * noise
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    output = vae.decode(z).sample.float()
    weights = motion_weights(pixels, config.motion_weight)
    reconstruction = (weights * (output - pixels).abs()).mean()
    edges = sum((torch.diff(output, dim=dim) - torch.diff(pixels, dim=dim)).abs().mean() for dim in (-1, -2))
    on_output = reconstruction + config.edge_weight * edges
    parts = {"reconstruction": reconstruction.item(), "kl": kl.item()}
    if config.perceptual_weight:
        assert distance is not None
        perceptual = distance(output, pixels).mean()
        on_output = on_output + config.perceptual_weight * perceptual
        parts["perceptual"] = perceptual.item()
    return Losses(output, on_output, config.kl_weight * kl, parts)
