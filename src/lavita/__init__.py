"""LAVITA: latent video diffusion transformers, trained, sampled and evaluated.

The public names load what they need when they are first used: importing torch and diffusers takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavita.models.transformer import LavitaTransformer3DModel
    from lavita.sampling.pipeline import LavitaPipeline

__version__ = "0.1.0"
__all__ = ["LavitaPipeline", "LavitaTransformer3DModel"]

_HOMES = {"LavitaPipeline": "lavita.sampling.pipeline", "LavitaTransformer3DModel": "lavita.models.transformer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lavita' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
