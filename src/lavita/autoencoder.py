"""Frames <-> latents: diffusers' `AutoencoderKL`, which owns its scaling factor.

Tensor order: frames uint8 `(..., H, W, 3)` outside, latents float32 `(..., C, h, w)`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from lavita.runtime import Precision, autocast, without_fp16

Frames = npt.NDArray[np.uint8]

BUILTIN = "builtin"
STABLE_DIFFUSION = "stabilityai/sd-vae-ft-ema"


def autoencoder_source(name: str, resolution: int) -> str:
    """The path or hub id that a configuration's name stands for.

    Args:
        name: a path or hub id; `builtin`; or `auto`: `builtin` up to 128 pixels, Stable Diffusion's above.
        resolution: side of the frames in pixels.
    """
    if name == "auto":
        name = BUILTIN if resolution <= 128 else STABLE_DIFFUSION
    return str(files("lavita") / "weights" / "autoencoder") if name == BUILTIN else name


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


@torch.no_grad()
def encode(
    vae: AutoencoderKL, frames: Frames, precision: Precision = "auto", chunk: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes frames to the mean and standard deviation of their scaled latents.

    A latent is `mean + std * noise` (Rombach et al. 2022, Sec. 3.1), already shifted and scaled, so that
    the latents of the data set have about unit variance.

    Args:
        vae: the autoencoder.
        frames: uint8 `(N, H, W, 3)`.
        precision: see `runtime.low_precision`; fp16 is taken for fp32.
        chunk: frames that go through the network at once.

    Returns:
        Two float32 tensors `(N, C, h, w)` on the CPU.
    """
    scale, shift = _scale_and_shift(vae)
    means, stds = [], []
    for start in range(0, len(frames), chunk):
        with autocast(vae.device, without_fp16(vae.device, precision)):
            posterior = vae.encode(to_pixels(frames[start : start + chunk], vae.device)).latent_dist
        means.append(((posterior.mean.float() - shift) * scale).cpu())
        stds.append((posterior.std.float() * scale).cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, precision: Precision = "auto", chunk: int = 16) -> Frames:
    """Decodes scaled latents `(..., C, h, w)` to frames, uint8 `(..., H, W, 3)`."""
    scale, shift = _scale_and_shift(vae)
    flat = latents.flatten(0, -4)
    pieces = []
    for start in range(0, len(flat), chunk):
        with autocast(vae.device, without_fp16(vae.device, precision)):
            unscaled = flat[start : start + chunk].to(vae.device).float() / scale + shift
            pieces.append(to_frames(vae.decode(unscaled).sample))
    frames = np.concatenate(pieces)
    return frames.reshape(*latents.shape[:-3], *frames.shape[1:])


def _scale_and_shift(vae: AutoencoderKL) -> tuple[float, float]:
    return float(vae.config["scaling_factor"]), float(vae.config["shift_factor"] or 0.0)
