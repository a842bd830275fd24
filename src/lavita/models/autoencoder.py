"""Frames <-> latents: diffusers' `AutoencoderKL`, which owns its scaling factor.

Tensor order: frames uint8 `(..., H, W, 3)` outside, latents float32 `(..., C, h, w)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from lavita.core.precision import Precision, autocast, without_fp16
from lavita.models.autoencoder_cpu import decode_pixels, encode_moments

# The architecture of Stable Diffusion's autoencoder, the paper's, whose latents a preset is for.
STABLE_DIFFUSION_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}

Frames = npt.NDArray[np.uint8]

BUILTIN = "builtin"
PIXELS_AT_ONCE = 2**14
MOST_AT_ONCE = 16


def load_autoencoder(source: str, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Loads an autoencoder in float32, for inference.

    Args:
        source: a folder (one with the model, or a pipeline's with it in `vae/`) or a hub id.
        device: where it goes.

    Raises:
        ValueError: where there is none, or its file lacks weights.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists() and (folder / "vae").is_dir():
        folder = folder / "vae"
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"{source}: holds no autoencoder (no config.json in it)")
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"{source}: no such folder; an autoencoder is a folder, a hub id, or `builtin`")
    try:
        vae, report = AutoencoderKL.from_pretrained(
            str(folder) if folder.exists() else source, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"{source}: cannot load an autoencoder ({' '.join(str(error).split())[:200]})") from error
    if report["missing_keys"]:
        raise ValueError(f"{source}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return vae.eval().requires_grad_(False).to(device)


def downsampling(vae: AutoencoderKL) -> int:
    """Pixels of a latent pixel's side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def latent_size(vae: AutoencoderKL, resolution: int) -> int:
    """Side of the latents of frames of a resolution; ValueError where it is not a whole number."""
    factor = downsampling(vae)
    if resolution % factor:
        raise ValueError(f"resolution is {resolution}, but this autoencoder needs a multiple of {factor}")
    return resolution // factor


def to_pixels(frames: Frames, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 `(..., H, W, 3)` in 0..255 to float32 `(..., 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, -3).float().div(127.5).sub(1.0)


def to_frames(pixels: torch.Tensor) -> Frames:
    """Float `(..., 3, H, W)` in [-1, 1] to uint8 `(..., H, W, 3)`, rounded."""
    scaled = pixels.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def frames_at_once(device: torch.device, resolution: int) -> int:
    """Frames that go through a network at once: on a CPU so many pixels that their activations stay near the cache."""
    return min(MOST_AT_ONCE, max(1, PIXELS_AT_ONCE // resolution**2)) if device.type == "cpu" else MOST_AT_ONCE


def pieces(count: int, size: int, device: torch.device) -> Iterator[list[int]]:
    """The numbers of `count` frames, up to `size` at once.

    On a CPU the last one is repeated until there are `size`: the kernels that libraries choose for a shape differ in
    their last bits, so that a frame is the same among any others only where all pieces have one shape.
    """
    for start in range(0, count, size):
        stop = start + size if device.type == "cpu" else min(start + size, count)
        yield [min(number, count - 1) for number in range(start, stop)]


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: Frames, precision: Precision = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes frames to the mean and standard deviation of their scaled latents.

    A latent is `mean + std * noise` (Rombach et al. 2022, Sec. 3.1), already shifted and scaled, so that
    the latents of the data set have about unit variance. On a CPU it depends on its own frame alone, to the bit.

    Args:
        vae: the autoencoder.
        frames: uint8 `(N, H, W, 3)`.
        precision: see `runtime.low_precision`; fp16 is taken for fp32.

    Returns:
        Two float32 tensors `(N, C, h, w)` on the CPU.
    """
    scale, shift = _scale_and_shift(vae)
    precision = without_fp16(vae.device, precision)
    means, stds = [], []
    for numbers in pieces(len(frames), frames_at_once(vae.device, frames.shape[1]), vae.device):
        with autocast(vae.device, precision):
            moments = encode_moments(vae, to_pixels(frames[numbers], vae.device), precision)
            posterior = DiagonalGaussianDistribution(moments)
        means.append(((posterior.mean.float() - shift) * scale).cpu())
        stds.append((posterior.std.float() * scale).cpu())
    return torch.cat(means)[: len(frames)], torch.cat(stds)[: len(frames)]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, precision: Precision = "auto") -> Frames:
    """Decodes scaled latents `(..., C, h, w)` to frames, uint8 `(..., H, W, 3)`.

    On a CPU a frame depends on its own latents alone, to the bit.
    """
    scale, shift = _scale_and_shift(vae)
    precision = without_fp16(vae.device, precision)
    flat = latents.flatten(0, -4)
    parts = []
    for numbers in pieces(len(flat), frames_at_once(vae.device, flat.shape[-1] * downsampling(vae)), vae.device):
        unscaled = flat[numbers].to(vae.device).float() / scale + shift
        with autocast(vae.device, precision):
            parts.append(to_frames(decode_pixels(vae, unscaled, precision)))
    frames = np.concatenate(parts)[: len(flat)]
    return frames.reshape(*latents.shape[:-3], *frames.shape[1:])


def _scale_and_shift(vae: AutoencoderKL) -> tuple[float, float]:
    return float(vae.config["scaling_factor"]), float(vae.config["shift_factor"] or 0.0)
