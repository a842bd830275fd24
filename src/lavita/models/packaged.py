"""Models by name: those in the package, and Stable Diffusion's autoencoder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

BUILTIN = "builtin"
ARCADE = "arcade"
# Stable Diffusion's autoencoder, the paper's: hub id and architecture. The presets are for its latents.
STABLE_DIFFUSION = "stabilityai/sd-vae-ft-ema"
STABLE_DIFFUSION_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def model_source(name: str) -> str:
    """Path or hub id of a model; the name `builtin` means the package's arcade model."""
    return str(files("lavita") / "weights" / "arcade") if name == BUILTIN else name


def autoencoder_source(name: str, resolution: int) -> str:
    """Path or hub id of an autoencoder.

    Args:
        name: a path or hub id; `builtin`, the package's for videos of all kinds; `arcade`, that of the package's arcade
            model; or `auto`: `builtin` up to 128 pixels, Stable Diffusion's above.
        resolution: side of the frames in pixels.
    """
    if name == "auto":
        name = BUILTIN if resolution <= 128 else STABLE_DIFFUSION
    if name == ARCADE:
        return str(Path(model_source(BUILTIN)) / "vae")
    return str(files("lavita") / "weights" / "autoencoder") if name == BUILTIN else name
