"""Compilation of a transformer's blocks, which share one graph per kind of block and shape."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from lavita.models.blocks import TransformerBlock
from lavita.models.transformer import LavitaTransformer3DModel

# Graphs that torch may compile for one block: batches with and without guidance, the last, smaller batch, training and
# validation each need their own.
GRAPHS = 32


def compile_blocks(model: LavitaTransformer3DModel) -> None:
    """Makes a model's blocks run compiled, in training and in inference.

    Blocks that mix along the same axis share a graph per shape, so 28 blocks compile as fast as two. Graphs are cached
    on disk, in `~/.cache/lavita` unless TORCHINDUCTOR_CACHE_DIR names another folder, so only the first start compiles.
    The output differs from the uncompiled model's by rounding.

    Args:
        model: changed in place.

    Raises:
        ValueError: if the model is on a CPU and there is no C++ compiler.
    """
    if model.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("compile needs a C++ compiler, g++ or clang++, and there is none; install one, or go without")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "lavita" / "compiled"))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        block.compiled = True
