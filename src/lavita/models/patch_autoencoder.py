"""An autoencoder that works on patches of pixels and starts from their principal components.

All its layers work at the resolution of the latents: encoder and decoder are a linear map between a patch's pixels and
its latent, plus a convolutional network that sees the neighbouring patches and starts as zero. With the linear maps
set to the principal components (Hotelling 1933), which are the best linear autoencoder (Baldi & Hornik 1989), an
untrained network already shows a recognisable picture. docs/results.md has its first minutes beside those of a network
with random weights.

Legend: N frames, H W pixels, p side of a patch, h = H / p, w = W / p, C channels of the latents.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FIRST_LOGVAR = -6.0
"""Logarithm of the posterior's variance before training; that of the latents is 0."""


class LavitaPatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """A variational autoencoder on patches, with `AutoencoderKL`'s interface.

    Args:
        patch_size: side p of a patch in pixels, which is the downsampling.
        latent_channels: channels C of the latents.
        width: channels of the hidden layers.
        num_encoder_blocks: residual blocks of the encoder.
        num_decoder_blocks: residual blocks of the decoder.
        in_channels: channels of the pixels.
        scaling_factor: factor that gives the shifted latents unit variance.
        shift_factor: mean of the latents.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        latent_channels: int = 8,
        width: int = 128,
        num_encoder_blocks: int = 4,
        num_decoder_blocks: int = 8,
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        values = in_channels * patch_size**2
        self.encoder = _Network(values, latent_channels, 2 * latent_channels, width, num_encoder_blocks)
        self.decoder = _Network(latent_channels, values, values, width, num_decoder_blocks)
        with torch.no_grad():
            cast(Tensor, self.encoder.conv_out.bias)[latent_channels:] = FIRST_LOGVAR

    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        """Encodes frames.

        Args:
            pixels: `(N, 3, H, W)` in [-1, 1]; H and W are multiples of p.

        Returns:
            `latent_dist`, a Gaussian over latents `(N, C, h, w)`.
        """
        patches = F.pixel_unshuffle(pixels, self.config["patch_size"])
        mean, logvar = self.encoder.conv_out(self.encoder.hidden(patches)).chunk(2, dim=1)
        return AutoencoderKLOutput(
            latent_dist=DiagonalGaussianDistribution(torch.cat([self.encoder.linear(patches) + mean, logvar], dim=1))
        )

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Decodes latents.

        Args:
            latents: `(N, C, h, w)`.

        Returns:
            `sample`, pixels `(N, 3, H, W)`, about in [-1, 1].
        """
        patches = self.decoder.linear(latents) + self.decoder.conv_out(self.decoder.hidden(latents))
        return DecoderOutput(sample=F.pixel_shuffle(patches, self.config["patch_size"]))

    @torch.no_grad()
    def set_principal_components(self, pixels: Tensor) -> None:
        """Sets the linear maps so that latents are the first C principal components of patches, with unit variance.

        Args:
            pixels: `(N, 3, H, W)` in [-1, 1], with more than `3 p^2` patches.
        """
        patches = F.pixel_unshuffle(pixels, self.config["patch_size"]).movedim(1, -1).flatten(0, -2).double()
        mean = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T, correction=0))
        count = self.config["latent_channels"]
        # Ascending order; a component without variance (such as colour, in grey videos) must not be divided by 0.
        deviations = variances.flip(0)[:count].clamp(min=1e-8).sqrt()
        directions = directions.flip(1)[:, :count]
        for layer, weight, bias in (
            (self.encoder.linear, (directions / deviations).T, -mean @ (directions / deviations)),
            (self.decoder.linear, directions * deviations, mean),
        ):
            layer.weight.copy_(weight[..., None, None])
            cast(Tensor, layer.bias).copy_(bias)


class _Network(nn.Module):
    """A linear map, and beside it a residual convolutional network whose output starts as 0."""

    def __init__(self, channels: int, out: int, network_out: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, out, 1)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(num_blocks)))
        self.conv_out = nn.Conv2d(width, network_out, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(cast(Tensor, self.conv_out.bias))

    def hidden(self, inputs: Tensor) -> Tensor:
        """Hidden channels `(N, width, h, w)`, from which `conv_out` computes what is added to the linear map."""
        result: Tensor = self.blocks(self.conv_in(inputs))
        return result


class _Block(nn.Module):
    """A residual block without normalisation, as in EDSR (Lim et al. 2017); it starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(cast(Tensor, self.conv2.bias))

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps `(N, width, h, w)` to the same shape."""
        result: Tensor = inputs + self.conv2(F.relu(self.conv1(inputs)))
        return result
