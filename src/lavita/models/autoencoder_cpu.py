"""Faster float32 passes on a CPU through an autoencoder of Stable Diffusion's architecture.

They use the modules and weights of diffusers' `AutoencoderKL`, but
- fuse each upsampling with the convolution after it, at 4/9 of the products;
- keep the decoder's activations in channels-last layout, which saves copies in every convolution;
- compute SiLU in place and add the residual in place, which saves memory traffic;
- send frames through the attention one by one, so that a frame does not depend on the others of its batch.

`benchmarks/speed/autoencoder.py` measures them against diffusers' own passes.

Legend: B frames, C channels, H W pixels, h w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from lavita.core.precision import Precision


def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Computes mean and log-variance of the unscaled latents, equal to those of `vae.encode` to the bit.

    Faster than `vae.encode` if `precision` is fp32 and `is_covered`; otherwise it calls it.

    Args:
        vae: the autoencoder.
        pixels: (B, 3, H, W) in [-1, 1].
        precision: precision of the surrounding autocast, but not `auto`.

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
    """Computes the pixels of unscaled latents, equal to those of `vae.decode` up to rounding.

    Faster than `vae.decode` if `precision` is fp32 and `is_covered`; otherwise it calls it.

    Args:
        vae: the autoencoder.
        latents: (B, C, h, w).
        precision: precision of the surrounding autocast, but not `auto`.

    Returns:
        (B, 3, H, W), nominally in [-1, 1].
    """
    if precision != "fp32" or not is_covered(vae):
        return vae.decode(latents).sample
    decoder: Any = vae.decoder
    # Convolutions use channels-last activations directly; in another layout they copy them into blocks and back. The
    # weights keep their layout: a copy of them would no longer share the memory of the mapped file.
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
    """Whether these passes apply: float32 inference on a CPU, with the blocks of Stable Diffusion's architecture."""
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
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution, at 4/9 of its products.

    After the upsampling several of the kernel's nine weights meet copies of the same input pixel and can be summed
    first. Each of the four phases of the output (even or odd row, even or odd column) is then a 2 x 2 convolution of
    the input (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). All four run as one
    convolution, whose output row r depends on the input rows r - 1 and r.

    Args:
        hidden: (B, C, H, W).
        weight: (O, C, 3, 3), weight of the convolution, whose padding is 1.
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
    """Sums the 3 weights along an axis to 2 weights for even output pixels and 2 for odd ones."""
    first, second, third = weight.split(1, dim)
    return torch.cat([first, second + third], dim), torch.cat([first + second, third], dim)


def _resnet(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A residual block of diffusers, with SiLU and the addition in place."""
    inner = block.conv1(F.silu(block.norm1(hidden), inplace=True))  # (B, C, H, W)
    inner = block.conv2(F.silu(block.norm2(inner), inplace=True))
    return inner.add_(hidden if block.conv_shortcut is None else block.conv_shortcut(hidden))


def _middle(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The blocks at the latents' resolution: residual blocks with attention between them."""
    hidden = _resnet(block.resnets[0], hidden)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            # Frame by frame: the last bits of a matrix product may depend on its number of rows.
            hidden = torch.cat([attention(frame) for frame in hidden.split(1)])
        hidden = _resnet(resnet, hidden)
    return hidden


def _last(network: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Norm, SiLU and convolution at the end of encoder or decoder."""
    return network.conv_out(F.silu(network.conv_norm_out(hidden), inplace=True))
