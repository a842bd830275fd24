"""Stable Diffusion's autoencoder in float32 on a CPU: the same weights, fewer products and fewer copies.

Measured against diffusers' own forward passes by `benchmarks/speed/autoencoder.py`. B frames, C channels, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from lavita.core.precision import Precision


def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Mean and log-variance of unscaled latents: those of `vae.encode`, to the bit, faster where `is_covered`.

    Args:
        vae: the autoencoder.
        pixels: (B, 3, H, W) in [-1, 1].
        precision: that of the autocast around it, never `auto`.

    Returns:
        (B, 2C, h, w).
    """
    if precision != "fp32" or not is_covered(vae):
        return vae.encode(pixels).latent_dist.parameters
    encoder: Any = vae.encoder
    hidden = encoder.conv_in(pixels)  # (B, C, H, W)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = _resnet(resnet, hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)  # (B, C, H/2, W/2)
    hidden = _last(encoder, _middle(encoder.mid_block, hidden))  # (B, 2C, h, w)
    return hidden if vae.quant_conv is None else vae.quant_conv(hidden)


def decode_pixels(vae: AutoencoderKL, latents: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Pixels of unscaled latents: those of `vae.decode`, up to rounding, faster where `is_covered`.

    Args:
        vae: the autoencoder.
        latents: (B, C, h, w).
        precision: that of the autocast around it, never `auto`.

    Returns:
        (B, 3, H, W), nominally in [-1, 1].
    """
    if precision != "fp32" or not is_covered(vae):
        return vae.decode(latents).sample
    decoder: Any = vae.decoder
    # Convolutions take channels-last activations as they are, and otherwise copy them into blocks and back. The weights
    # stay as they were read: laid out anew, they would no longer be shared with the file.
    hidden = latents.contiguous(memory_format=torch.channels_last)
    hidden = decoder.conv_in(hidden if vae.post_quant_conv is None else vae.post_quant_conv(hidden))  # (B, C, h, w)
    hidden = _middle(decoder.mid_block, hidden)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _resnet(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = upsample(hidden, upsampler.conv.weight, upsampler.conv.bias)  # (B, C, 2H, 2W)
    return _last(decoder, hidden)


def is_covered(vae: AutoencoderKL) -> bool:
    """Whether the autoencoder computes here what this file does: on a CPU, in Stable Diffusion's layout."""
    config = vae.config
    return (
        vae.device.type == "cpu"
        and vae.dtype == torch.float32
        and not vae.training
        and {*config["down_block_types"], *config["up_block_types"]} == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        and config["act_fn"] == "silu"
        and not (vae.use_tiling or vae.use_slicing or hasattr(vae, "_hf_hook"))
    )


def upsample(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour upsampling by 2 and then a 3 x 3 convolution, at 4/9 of its products.

    Above a repeated pixel two or three of the kernel's nine weights meet the same value and can be summed first, so
    that each of the four phases of the output is a 2 x 2 convolution of the input (Shi et al. 2016, "Is the
    deconvolution layer the same as a convolutional layer?"). All four are one convolution, whose row r has input rows
    r - 1 and r.

    Args:
        hidden: (B, C, H, W).
        weight: (O, C, 3, 3), of a convolution with padding 1.
        bias: (O,).

    Returns:
        (B, O, 2H, 2W).
    """
    batch, _, height, width = hidden.shape
    num_out = len(weight)
    kernels = [kernel for rows in _phases(weight, 2) for kernel in _phases(rows, 3)]  # 4 x (O, C, 2, 2)
    mixed = F.conv2d(hidden, torch.cat(kernels), bias.repeat(4), padding=1)  # (B, 4O, H + 1, W + 1)
    output = hidden.new_empty(batch, height, 2, width, 2, num_out)
    for phase, part in enumerate(mixed.split(num_out, dim=1)):
        row, column = divmod(phase, 2)
        output[:, :, row, :, column] = part[:, :, row : row + height, column : column + width].movedim(1, -1)
    return output.view(batch, 2 * height, 2 * width, num_out).movedim(-1, 1)


def _phases(weight: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What 3 weights along an axis become for even pixels and for odd ones, 2 each."""
    first, second, third = weight.split(1, dim)
    return torch.cat([first, second + third], dim), torch.cat([first + second, third], dim)


def _resnet(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    inner = block.conv1(F.silu(block.norm1(hidden), inplace=True))  # (B, C, H, W)
    inner = block.conv2(F.silu(block.norm2(inner), inplace=True))
    return inner.add_(hidden if block.conv_shortcut is None else block.conv_shortcut(hidden))


def _middle(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    hidden = _resnet(block.resnets[0], hidden)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            # One by one: a matrix product's last bits may depend on the number of its rows.
            hidden = torch.cat([attention(frame) for frame in hidden.split(1)])
        hidden = _resnet(resnet, hidden)
    return hidden


def _last(network: Any, hidden: torch.Tensor) -> torch.Tensor:
    return network.conv_out(F.silu(network.conv_norm_out(hidden), inplace=True))
