"""The loss of an autoencoder: a reconstruction loss that weights moving pixels, and what keeps the latents small.

Legend: P clips of L successive frames, pairs but for a causal autoencoder, K latents of a clip, C channels of the
latents, H W pixels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.models.autoencoder import Autoencoder, posterior, reconstruct
from lavita.models.causal_autoencoder import LavitaCausalAutoencoder
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.autoencoder.frames import clip_length

FULL_MOTION = 0.2
"""Change of a pixel, on [0, 1], that counts as full motion."""


@dataclass(frozen=True)
class Losses:
    """The terms of a step's loss, each a 0-dim tensor with its weight included."""

    output: torch.Tensor
    """The reconstructed frames, `(P L, 3, H, W)`."""
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


def motion_weights(pixels: torch.Tensor, weight: float, length: int = 2) -> torch.Tensor:
    """The weight of each pixel: 1 where a frame agrees with those next to it, up to `1 + weight` where it differs.

    Args:
        pixels: `(P L, 3, H, W)` in [-1, 1], clips of successive frames.
        weight: additional weight of full motion.
        length: L.

    Returns:
        `(P L, 1, H, W)`, scaled to mean 1 over all pixels; the frames of a pair have the same weights.
    """
    clips = pixels.unflatten(0, (-1, length))
    moved = (clips[:, :-1] - clips[:, 1:]).abs().amax(dim=2).flatten(0, 1)[:, None] / (2 * FULL_MOTION)
    moved = F.max_pool2d(moved.clamp(max=1.0), kernel_size=3, stride=1, padding=1)
    changes = (1.0 + weight * moved).unflatten(0, (-1, length - 1))
    if length == 2:
        return (changes / changes.mean()).repeat_interleave(2, dim=1).flatten(0, 1)
    before, after = (torch.cat(parts, dim=1) for parts in ((changes[:, :1], changes), (changes, changes[:, -1:])))
    weights = torch.maximum(before, after).flatten(0, 1)
    return weights / weights.mean()


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
        pixels: `(P L, 3, H, W)` in [-1, 1], clips of successive frames.
        noise: standard normal `(P K, C, h, w)`, for the reparametrized sample; K = L but for a causal autoencoder.
        config: the weights of the terms.
        distance: the perceptual distance, needed if it has a weight.
    """
    length = clip_length(config)
    found = posterior(vae, pixels.unflatten(0, (-1, length)) if isinstance(vae, LavitaCausalAutoencoder) else pixels)
    mean = found.mean.float()
    if found.logvar is None:
        z = found.mean
        kl = 0.5 * mean.square().mean()
    else:
        z = found.mean + found.std * noise.view_as(found.mean)
        logvar = found.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    output = reconstruct(vae, z).reshape(pixels.shape).float()
    weights = motion_weights(pixels, config.motion_weight, length)
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
