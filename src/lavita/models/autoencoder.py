"""The autoencoder between frames and latents: diffusers' `AutoencoderKL` or `AutoencoderTiny`.

The configuration of each holds the scaling factor of its latents.

Legend: N frames, H W pixels, C channels of the latents, h w latent size. Frames are uint8 (..., H, W, 3), latents
float32 (..., C, h, w).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# mypy knows these classes by their own modules only: diffusers' lazy `__init__` hides them. Import them from here.
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as AutoencoderTiny

from lavita.core.precision import Precision, autocast, without_fp16
from lavita.models.finite import check_finite
from lavita.models.hub import cannot_load, hub_options
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.models.pooled_autoencoder import LavitaPooledAutoencoder, load_tiny_files, tiny_files

Autoencoder = AutoencoderKL | AutoencoderTiny | LavitaPatchAutoencoder
"""An autoencoder of any class that loads."""
AUTOENCODERS: dict[str, type[Autoencoder]] = {
    kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, LavitaPatchAutoencoder, LavitaPooledAutoencoder)
}
"""The classes by the names that configurations hold."""

# diffusers saves a field of AutoencoderTiny that it does not take back, and warns of it whenever one is loaded.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: not record.getMessage().startswith("The config attributes {'block_out_channels': ")
)

# On a CPU so few pixels go through the network at once that their activations stay near the cache.
PIXELS_AT_ONCE = 2**14
MOST_FRAMES_AT_ONCE = 16


def load_autoencoder(source: str, device: torch.device | str = "cpu") -> Autoencoder:
    """Loads an autoencoder in float32, for inference.

    Args:
        source: a hub id, the folder of an autoencoder, or that of a pipeline, which has one in `vae/`. The folder may
            also hold the two `.pth` files of a tiny autoencoder, see `load_tiny_files`.
        device: device to load it to.

    Raises:
        ValueError: if the source holds no autoencoder or one of another class than `AUTOENCODERS`, or its file lacks
            weights or has some that are not finite.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists() and (folder / "vae").is_dir():
        folder = folder / "vae"
    if folder.exists() and not (folder / "config.json").exists():
        if (files := tiny_files(folder)) is None:
            raise ValueError(f"{source}: holds no autoencoder (no config.json in it)")
        vae = load_tiny_files(*files)
        check_autoencoder(source, vae)
        return vae.eval().requires_grad_(False).to(device)
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"{source}: no such folder; an autoencoder is a folder, a hub id, or `builtin`")
    path = str(folder) if folder.exists() else source
    options = hub_options(path)
    try:
        kind = autoencoder_class(AutoencoderKL.load_config(path, **options))
        vae, report = kind.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        raise cannot_load(source, "an autoencoder", error, options) from error
    if report["missing_keys"]:
        raise ValueError(f"{source}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    check_autoencoder(source, vae)
    return vae.float().eval().requires_grad_(False).to(device)


def autoencoder_class(config: Mapping[str, Any]) -> type[Autoencoder]:
    """The class that a configuration names, `AutoencoderKL` if none; ValueError for one not in `AUTOENCODERS`."""
    name = config.get("_class_name", AutoencoderKL.__name__)
    if not isinstance(name, str) or name not in AUTOENCODERS:
        raise ValueError(f"config.json names the class {name!r}; allowed: {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]


def check_autoencoder(source: str, vae: Autoencoder) -> None:
    """Checks that frames can be computed with weights, scale and levels; ValueError names what is wrong."""
    check_finite(source, vae.state_dict())
    scale, shift = _scale_and_shift(vae)
    if not (math.isfinite(scale) and scale and math.isfinite(shift)):
        raise ValueError(f"{source}: scaling_factor is {scale} and shift_factor {shift}, but must be finite, and not 0")
    if isinstance(vae, AutoencoderTiny):
        levels = len(vae.config["decoder_block_out_channels"]) - 1
        if (enlarged := int(vae.config["upsampling_scaling_factor"]) ** levels) != downsampling(vae):
            raise ValueError(
                f"{source}: its encoder shrinks frames by {downsampling(vae)}, but its decoder enlarges latents by "
                f"{enlarged}; both must be the same"
            )


def downsampling(vae: Autoencoder) -> int:
    """Side of a latent pixel in pixels: H / h."""
    if isinstance(vae, LavitaPatchAutoencoder):
        return int(vae.config["patch_size"])
    tiny = isinstance(vae, AutoencoderTiny)
    return 2 ** (len(vae.config["encoder_block_out_channels" if tiny else "block_out_channels"]) - 1)


def latent_size(vae: Autoencoder, resolution: int) -> int:
    """Side of the latents of frames with the given side in pixels.

    Raises:
        ValueError: if it is not a whole number.
    """
    factor = downsampling(vae)
    if resolution % factor:
        raise ValueError(f"resolution is {resolution}, but this autoencoder needs a multiple of {factor}")
    return resolution // factor


def to_pixels(frames: npt.NDArray[np.uint8], device: torch.device | str = "cpu") -> torch.Tensor:
    """Converts uint8 (..., H, W, 3) in 0..255 to float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, -3).float().div(127.5).sub(1.0)


def to_frames(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Converts floats (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3), rounded; FloatingPointError if not finite."""
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("the autoencoder gives pixels that are not finite")
    scaled = pixels.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def frames_at_once(device: torch.device, resolution: int) -> int:
    """Number of frames, of the given side in pixels, that go through the network at once."""
    return (
        min(MOST_FRAMES_AT_ONCE, max(1, PIXELS_AT_ONCE // resolution**2))
        if device.type == "cpu"
        else MOST_FRAMES_AT_ONCE
    )


def pieces(count: int, size: int, device: torch.device) -> Iterator[list[int]]:
    """Divides the indices of `count` frames into pieces of up to `size`.

    On a CPU the last piece repeats the last index until it has `size` of them. Libraries choose their kernels by shape,
    and kernels differ in the last bits: with pieces of one shape a frame's result does not depend on the number of
    frames.
    """
    for start in range(0, count, size):
        stop = start + size if device.type == "cpu" else min(start + size, count)
        yield [min(index, count - 1) for index in range(start, stop)]


def posterior(vae: Autoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes pixels to the mean and standard deviation of their latents, neither shifted nor scaled.

    Args:
        vae: the autoencoder.
        pixels: floats (N, 3, H, W) in [-1, 1].

    Returns:
        Two tensors (N, C, h, w). An `AutoencoderTiny` gives latents, not a distribution: its deviation is 0.
    """
    if isinstance(vae, AutoencoderTiny):
        latents = vae.encode(pixels).latents
        return latents, torch.zeros_like(latents)
    distribution = vae.encode(pixels).latent_dist
    return distribution.mean, distribution.std


@torch.no_grad()
def encode(
    vae: Autoencoder, frames: npt.NDArray[np.uint8], precision: Precision = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes frames to the mean and standard deviation of their scaled latents.

    A latent is `mean + std * noise` (Rombach et al. 2022, Sec. 3.1), already shifted and scaled, so that the latents of
    a data set have about unit variance. On a CPU a frame's latents depend on this frame alone, to the bit.

    Args:
        vae: the autoencoder.
        frames: uint8 (N, H, W, 3).
        precision: see `low_precision`; fp16 is treated as fp32.

    Returns:
        Two float32 tensors (N, C, h, w) on the CPU.
    """
    scale, shift = _scale_and_shift(vae)
    precision = without_fp16(vae.device, precision)
    means, stds = [], []
    for indices in pieces(len(frames), frames_at_once(vae.device, frames.shape[1]), vae.device):
        with autocast(vae.device, precision):
            mean, std = posterior(vae, to_pixels(frames[indices], vae.device))
        means.append(((mean.float() - shift) * scale).cpu())
        stds.append((std.float() * scale).cpu())
    return torch.cat(means)[: len(frames)], torch.cat(stds)[: len(frames)]


@torch.no_grad()
def decode(vae: Autoencoder, latents: torch.Tensor, precision: Precision = "auto") -> npt.NDArray[np.uint8]:
    """Decodes scaled latents (..., C, h, w) to frames, uint8 (..., H, W, 3).

    On a CPU a frame depends on its own latents alone, to the bit. `precision` is as in `encode`.
    """
    scale, shift = _scale_and_shift(vae)
    precision = without_fp16(vae.device, precision)
    flat = latents.flatten(0, -4)
    parts = []
    for indices in pieces(len(flat), frames_at_once(vae.device, flat.shape[-1] * downsampling(vae)), vae.device):
        unscaled = flat[indices].to(vae.device).float() / scale + shift
        with autocast(vae.device, precision):
            parts.append(to_frames(vae.decode(unscaled).sample))
    frames = np.concatenate(parts)[: len(flat)]
    return frames.reshape(*latents.shape[:-3], *frames.shape[1:])


def _scale_and_shift(vae: Autoencoder) -> tuple[float, float]:
    """Scale and shift of the latents: scaled = (latents - shift) * scale."""
    return float(vae.config["scaling_factor"]), float(vae.config["shift_factor"] or 0.0)
