"""The models that ship with the package, and the names they go by."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

STABLE_DIFFUSION = "stabilityai/sd-vae-ft-ema"

BUILTIN = "builtin"


def model_source(name: str) -> str:
    """The path or hub id that a name stands for; `builtin` is the arcade model of the package."""
    return str(files("lavita") / "weights" / "arcade") if name == BUILTIN else name


def autoencoder_source(name: str, resolution: int) -> str:
    """The path or hub id that a configuration's name stands for.

    Args:
        name: a path or hub id; `builtin`; or `auto`: `builtin` up to 128 pixels, Stable Diffusion's above.
        resolution: side of the frames in pixels.
    """
    if name == "auto":
        name = BUILTIN if resolution <= 128 else STABLE_DIFFUSION
    return str(Path(model_source(BUILTIN)) / "vae") if name == BUILTIN else name
