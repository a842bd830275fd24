"""Latte's checkpoint files: conversion to a pipeline, and export of a pipeline's transformer."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any

import torch

from lavita.core.files import replacing
from lavita.models.autoencoder import load_autoencoder
from lavita.models.packaged import STABLE_DIFFUSION, autoencoder_source
from lavita.models.presets import SIZES
from lavita.models.pretrained.load_report import LoadReport
from lavita.models.pretrained.reading import (
    LABEL_TABLE,
    LATTE,
    Tensors,
    Weights,
    config_of_file,
    open_source,
    read_file,
)
from lavita.models.pretrained.transfer import transfer_weights
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import make_pipeline


def latte_config(state: Tensors, num_heads: int | None = None, sample_size: int | None = None) -> dict[str, Any]:
    """Infers the fields of our constructor from the tensors of a Latte file.

    Args:
        state: tensors by name.
        num_heads: number of attention heads, which no tensor shows; by default that of the published size of the same
            width.
        sample_size: side of the latents; only needed by files without `pos_embed`, which has a place for each patch.

    Raises:
        ValueError: if the tensors are not Latte's, `num_heads` is missing and no published size has their width, or
            `sample_size` is missing or does not agree with them.
    """
    config = config_of_file("state", state)
    if "temp_embed" not in state:
        raise ValueError("state has no temp_embed: it belongs to an image model, not to Latte")
    width = config["hidden_size"]
    if num_heads is None:
        num_heads = {size[0]: size[2] for size in SIZES.values()}.get(width)
    if num_heads is None:
        known = ", ".join(str(size[0]) for size in SIZES.values())
        raise ValueError(f"hidden_size is {width}, not that of a known size ({known}): num_heads must be given")
    if "pos_embed" in state:
        stored = isqrt(state["pos_embed"].shape[1]) * config["patch_size"]
        if sample_size not in (None, stored):
            raise ValueError(f"sample_size is {sample_size}, but its pos_embed has places for {stored}")
        sample_size = stored
    if sample_size is None:
        raise ValueError(
            "has no pos_embed, so sample_size must be given, the side of the latents: 32 for 256 pixels with Stable "
            "Diffusion's autoencoder"
        )
    table = state.get(LABEL_TABLE)
    return {
        **config,
        "num_heads": num_heads,
        "num_frames": state["temp_embed"].shape[1],
        "sample_size": sample_size,
        "num_classes": 0 if table is None else table.shape[0] - 1,
    }


def convert_latte(
    file: str | Path,
    out: Path,
    weights: Weights | None = None,
    vae: str = STABLE_DIFFUSION,
    num_heads: int | None = None,
    class_names: list[str] | None = None,
    frame_interval: int = 3,
    fps: float = 8.0,
    sample_size: int | None = None,
) -> LoadReport:
    """Converts a Latte file to a pipeline.

    Args:
        file: a `.pt` file of unconditional or class-conditional Latte.
        out: folder to write; empty or missing.
        weights: see `models.pretrained.transfer.initialize`.
        vae: autoencoder of its latents: folder, hub id, `builtin` or `auto`.
        num_heads: see `latte_config`.
        class_names: names of the classes, in the order of their labels.
        frame_interval: frame interval of the training clips.
        fps: frames per second of generated videos.
        sample_size: see `latte_config`.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: if the file holds no such model, the autoencoder is missing or does not fit, or the folder is in
            use.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; give another")
    if Path(file).is_dir():
        raise ValueError(f"{file}: is a folder, not a Latte file; a pipeline is exported to a file that ends in .pt")
    source = read_file(str(file), weights)
    if source.kind != "video":
        raise ValueError(f"{file}: holds an image model, not Latte; to train from it, use train.init_from={file}")
    try:
        config = latte_config(source.tensors, num_heads, sample_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    autoencoder = load_autoencoder(autoencoder_source(vae, 256))
    model = LavitaTransformer3DModel(**config, class_names=class_names, frame_interval=frame_interval, fps=fps).eval()
    report = transfer_weights(model, source)
    with replacing(out) as partial:
        make_pipeline(model, autoencoder).save_pretrained(partial)
    return report


def export_latte(folder: str | Path, out_file: Path) -> LoadReport:
    """Exports a pipeline's transformer as a Latte file, `{"ema": tensors}`.

    Args:
        folder: a LAVITA pipeline (folder, hub id or `builtin`) whose model Latte's format can hold: Variant 2 with
            Latte's embeddings and conditioning.
        out_file: file to write; must not exist.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: for another kind of model, naming the first field that Latte's format cannot hold.
    """
    if out_file.exists():
        raise ValueError(f"{out_file}: exists; give another file")
    if Path(folder).is_file():
        raise ValueError(f"{folder}: is a file, not a pipeline")
    source = open_source(str(folder), None)
    if source.kind != "video":
        raise ValueError(f"{folder}: holds an image model; only LAVITA models can be exported")
    for key, allowed in {
        **LATTE,
        "text_dim": 0,
        "latent_mean": None,
        "given_frames": None,
        "action_names": None,
        "trained_shapes": None,
    }.items():
        if source.config[key] != allowed:
            raise ValueError(f"{folder}: {key} is {source.config[key]!r}, but Latte's format only holds {allowed!r}")
    if not isinstance(source.config["sample_size"], int):
        raise ValueError(
            f"{folder}: sample_size is {source.config['sample_size']}, but Latte's format has squares only"
        )
    state = {name: tensor.contiguous() for name, tensor in source.tensors.items()}
    with replacing(out_file) as partial:
        torch.save({"ema": state}, partial)
    return LoadReport(source.name, loaded=list(state), used=list(state))
