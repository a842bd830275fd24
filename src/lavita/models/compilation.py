"""Compiling a transformer's blocks: one graph for all blocks that are alike."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from lavita.models.blocks import TransformerBlock
from lavita.models.transformer import LavitaTransformer3DModel

# Batches with guidance and without, the last, smaller batch, training and validation: each has its own graph.
GRAPHS = 32


def compile_blocks(model: LavitaTransformer3DModel) -> None:
    """Makes a model's blocks run compiled, in training and in inference.

    Blocks that mix along the same axis share a graph for each shape, so that a model of 28 compiles as fast as one of
    two. Graphs are kept on disk, below `~/.cache/lavita` unless TORCHINDUCTOR_CACHE_DIR says otherwise: the second
    start finds them. The output differs from the uncompiled model's by rounding.

    Args:
        model: changed in place.

    Raises:
        ValueError: where there is no C++ compiler, which a CPU's code needs.
    """
    if model.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("compile needs a C++ compiler, g++ or clang++, and there is none; install one, or go without")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "lavita" / "compiled"))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        block.compiled = True
