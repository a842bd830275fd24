"""The autoencoder between frames and latents, one of the classes in `AUTOENCODERS`.

Those of diffusers see each frame alone; a `LavitaCausalAutoencoder` merges groups of frames of a clip. The
configuration of each holds the scaling factor of its latents.

Legend: N frames, K latents, fewer than N only with temporal downsampling, H W pixels, C channels of the latents, h w
latent size. Frames are uint8 (..., H, W, 3), latents float32 (..., C, h, w).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

# mypy knows these classes by their own modules only: diffusers' lazy `__init__` hides them. Import them from here.
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as AutoencoderTiny

from lavita.core.precision import Precision, autocast, without_fp16
from lavita.core.sizes import AnySize, Size
from lavita.models.causal_autoencoder import (
    FRAME_AUTOENCODERS,
    FrameAutoencoder,
    LavitaCausalAutoencoder,
    Past,
    Posterior,
    frames_problem,
)
from lavita.models.finite import check_finite
from lavita.models.hub import cannot_load, hub_options
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.models.pooled_autoencoder import load_tiny_files, tiny_files

Autoencoder = AutoencoderKL | AutoencoderTiny | LavitaPatchAutoencoder | LavitaCausalAutoencoder
"""An autoencoder of any class that loads."""
AUTOENCODERS: dict[str, type[Autoencoder]] = {
    **FRAME_AUTOENCODERS,
    LavitaCausalAutoencoder.__name__: LavitaCausalAutoencoder,
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
        tiny: Any = load_tiny_files(*files)
        check_autoencoder(source, tiny)
        return cast(Autoencoder, tiny.eval().requires_grad_(False).to(device))
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"{source}: no such folder; an autoencoder is a folder, a hub id, `builtin` or `arcade`")
    path = str(folder) if folder.exists() else source
    options = hub_options(path)
    try:
        kind: Any = autoencoder_class(AutoencoderKL.load_config(path, **options))
        vae, report = kind.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        raise cannot_load(source, "an autoencoder", error, options) from error
    if report["missing_keys"]:
        raise ValueError(f"{source}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    check_autoencoder(source, vae)
    return cast(Autoencoder, vae.float().eval().requires_grad_(False).to(device))


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
    vae = frame_network(vae)
    if isinstance(vae, AutoencoderTiny):
        levels = len(vae.config["decoder_block_out_channels"]) - 1
        if (enlarged := int(vae.config["upsampling_scaling_factor"]) ** levels) != downsampling(vae):
            raise ValueError(
                f"{source}: its encoder shrinks frames by {downsampling(vae)}, but its decoder enlarges latents by "
                f"{enlarged}; both must be the same"
            )


def frame_network(vae: Autoencoder) -> FrameAutoencoder:
    """The autoencoder of frames whose layers an autoencoder has: its own network if it is causal, else itself."""
    return cast(FrameAutoencoder, vae.network if isinstance(vae, LavitaCausalAutoencoder) else vae)


def downsampling(vae: Autoencoder) -> int:
    """Side of a latent pixel in pixels: H / h."""
    vae = frame_network(vae)
    if isinstance(vae, LavitaPatchAutoencoder):
        return int(vae.config["patch_size"])
    tiny = isinstance(vae, AutoencoderTiny)
    return 2 ** (len(vae.config["encoder_block_out_channels" if tiny else "block_out_channels"]) - 1)


def latent_size(vae: Autoencoder, resolution: int) -> int:
    """Side of the latents of square frames with the given side in pixels; see `latent_grid`."""
    return latent_grid(vae, resolution)[0]


def latent_grid(vae: Autoencoder, resolution: AnySize) -> tuple[int, int]:
    """Height and width (h, w) of the latents of frames with the given size in pixels.

    Raises:
        ValueError: if they are not whole numbers.
    """
    factor, size = downsampling(vae), Size.of(resolution)
    if size.height % factor or size.width % factor:
        sides = "" if isinstance(resolution, int) else " in height and width"
        raise ValueError(f"resolution is {resolution}, but this autoencoder needs a multiple of {factor}{sides}")
    return size.height // factor, size.width // factor


def temporal_downsampling(config: Mapping[str, Any]) -> int:
    """Frames that an autoencoder merges into one latent, after the first one, by its configuration; 1 for none."""
    return int(config.get("temporal_downsampling", 1))


def latent_frames(config: Mapping[str, Any], num_frames: int, name: str = "num_frames") -> int:
    """Number of latents of a clip.

    Args:
        config: the autoencoder's.
        num_frames: frames of the clip.
        name: what the message calls their number.

    Raises:
        ValueError: if the autoencoder takes no clip of so many frames.
    """
    factor = temporal_downsampling(config)
    if (num_frames - 1) % factor:
        raise ValueError(frames_problem(name, num_frames, factor))
    return 1 + (num_frames - 1) // factor


def pixel_frames(config: Mapping[str, Any], num_latents: int) -> int:
    """Number of frames of a clip with so many latents, by the autoencoder's configuration."""
    return 1 + (num_latents - 1) * temporal_downsampling(config)


def to_pixels(frames: npt.NDArray[np.uint8], device: torch.device | str = "cpu") -> torch.Tensor:
    """Converts uint8 (..., H, W, 3) in 0..255 to float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, -3).float().div(127.5).sub(1.0)


def to_frames(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Converts floats (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3), rounded; FloatingPointError if not finite."""
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("the autoencoder gives pixels that are not finite")
    scaled = pixels.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def frames_at_once(device: torch.device, resolution: AnySize) -> int:
    """Number of frames, of the given size in pixels, that go through the network at once."""
    return (
        min(MOST_FRAMES_AT_ONCE, max(1, PIXELS_AT_ONCE // Size.of(resolution).area))
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


def clip_parts(config: Mapping[str, Any], count: int, resolution: AnySize, device: torch.device) -> Iterator[slice]:
    """Divides the latents of a clip into parts that a causal autoencoder takes one after the other.

    Args:
        config: the autoencoder's.
        count: K.
        resolution: size of the frames in pixels.
        device: where they are encoded or decoded.

    Yields:
        Slices of the latents, of about `frames_at_once` frames.
    """
    size = max(1, frames_at_once(device, resolution) // temporal_downsampling(config))
    yield slice(0, min(count, 1 + size))
    for start in range(1 + size, count, size):
        yield slice(start, min(count, start + size))


def posterior(vae: Autoencoder, pixels: torch.Tensor) -> Posterior:
    """Encodes pixels to the distribution of their latents, neither shifted nor scaled; differentiable.

    Args:
        vae: the autoencoder.
        pixels: floats (N, 3, H, W) in [-1, 1]; (B, F, 3, H, W) for a `LavitaCausalAutoencoder`.

    Returns:
        Tensors (N, C, h, w) or (B, K, C, h, w).
    """
    if isinstance(vae, LavitaCausalAutoencoder):
        return vae.encode(pixels)
    encoded: Any = vae.encode(pixels)
    if isinstance(vae, AutoencoderTiny):
        return Posterior(encoded.latents, torch.zeros_like(encoded.latents), None)
    found = encoded.latent_dist
    return Posterior(found.mean, found.std, found.logvar)


def reconstruct(vae: Autoencoder, latents: torch.Tensor, past: Past | None = None) -> torch.Tensor:
    """Decodes latents that are neither shifted nor scaled; differentiable.

    Args:
        vae: the autoencoder.
        latents: floats (N, C, h, w); (B, K, C, h, w) for a `LavitaCausalAutoencoder`.
        past: see `LavitaCausalAutoencoder.decode`; has no meaning for others.

    Returns:
        Pixels (N, 3, H, W) in about [-1, 1]; (B, F, 3, H, W) for a `LavitaCausalAutoencoder`.
    """
    if isinstance(vae, LavitaCausalAutoencoder):
        return vae.decode(latents, past)
    output: Any = vae.decode(latents)
    return cast(torch.Tensor, output.sample)


@torch.no_grad()
def encode(
    vae: Autoencoder, frames: npt.NDArray[np.uint8], precision: Precision = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes frames to the mean and standard deviation of their scaled latents.

    A latent is `mean + std * noise` (Rombach et al. 2022, Sec. 3.1), already shifted and scaled, so that the latents of
    a data set have about unit variance. On a CPU a frame's latents depend on this frame alone, to the bit; with
    temporal downsampling they depend on the clip, up to the last of the frames that they are of.

    Args:
        vae: the autoencoder.
        frames: uint8 (N, H, W, 3); with temporal downsampling they are one clip.
        precision: see `low_precision`; fp16 is treated as fp32.

    Returns:
        Two float32 tensors (K, C, h, w) on the CPU.

    Raises:
        ValueError: if the autoencoder takes no clip of N frames.
    """
    count = latent_frames(vae.config, len(frames))
    scale, shift = _scale_and_shift(vae)
    precision = without_fp16(vae.device, precision)
    means, stds = [], []
    for found in _encoded(vae, frames, count, precision):
        means.append(((found.mean.float() - shift) * scale).cpu())
        stds.append((found.std.float() * scale).cpu())
    return torch.cat(means)[:count], torch.cat(stds)[:count]


def _encoded(vae: Autoencoder, frames: npt.NDArray[np.uint8], count: int, precision: Precision) -> Iterator[Posterior]:
    """The latents of frames, in parts of (N, C, h, w); there may be more than `count` of them."""
    size, past = Size(*frames.shape[1:3]), Past()
    if isinstance(vae, LavitaCausalAutoencoder):
        for part in clip_parts(vae.config, count, size, vae.device):
            first, last = (pixel_frames(vae.config, latents) if latents else 0 for latents in (part.start, part.stop))
            with autocast(vae.device, precision):
                found = vae.encode(to_pixels(frames[first:last], vae.device)[None], past)
            yield Posterior(found.mean[0], found.std[0], None)
        return
    for indices in pieces(len(frames), frames_at_once(vae.device, size), vae.device):
        with autocast(vae.device, precision):
            yield posterior(vae, to_pixels(frames[indices], vae.device))


@torch.no_grad()
def decode(vae: Autoencoder, latents: torch.Tensor, precision: Precision = "auto") -> npt.NDArray[np.uint8]:
    """Decodes scaled latents (..., C, h, w) to frames, uint8 (..., H, W, 3).

    On a CPU a frame depends on its own latents alone, to the bit. With temporal downsampling the latents (..., K, C, h,
    w) are those of clips, of which there are more frames, see `pixel_frames`. `precision` is as in `encode`.
    """
    precision = without_fp16(vae.device, precision)
    frames = np.concatenate(list(map(to_frames, decoded(vae, latents, lambda: autocast(vae.device, precision)))))
    if isinstance(vae, LavitaCausalAutoencoder):
        return frames.reshape(*latents.shape[:-4], -1, *frames.shape[1:])
    frames = frames[: latents.shape[:-3].numel()]
    return frames.reshape(*latents.shape[:-3], *frames.shape[1:])


def decoded(
    vae: Autoencoder, latents: torch.Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[torch.Tensor]:
    """Decodes latents in parts.

    Args:
        vae: the autoencoder.
        latents: scaled (..., C, h, w); (..., K, C, h, w) for a `LavitaCausalAutoencoder`.
        autocast: makes the context of a pass.

    Yields:
        Pixels (N, 3, H, W) in about [-1, 1]; at the end there may be more than belong to the latents, see `pieces`.
    """
    scale, shift = _scale_and_shift(vae)
    height, width = (side * downsampling(vae) for side in latents.shape[-2:])
    size = Size(height, width)

    def decode_part(part: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        unscaled = part.to(vae.device).float() / scale + shift
        with autocast():
            return reconstruct(vae, unscaled, past)

    # Nothing is bound to a name here, which would keep it while the next part is computed.
    if isinstance(vae, LavitaCausalAutoencoder):
        for clip in latents.flatten(0, -5) if latents.dim() > 4 else [latents]:
            past = Past()
            for part in clip_parts(vae.config, len(clip), size, vae.device):
                yield decode_part(clip[part][None], past)[0]
        return
    flat = latents.flatten(0, -4)
    for indices in pieces(len(flat), frames_at_once(vae.device, size), vae.device):
        yield decode_part(flat[indices])


def _scale_and_shift(vae: Autoencoder) -> tuple[float, float]:
    """Scale and shift of the latents: scaled = (latents - shift) * scale."""
    return float(vae.config["scaling_factor"]), float(vae.config["shift_factor"] or 0.0)
