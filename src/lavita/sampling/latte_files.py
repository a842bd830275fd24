"""Weights of others to ours, and back: image DiTs, models of this package, Latte's files.

Whatever the source, its tensors are read first, under DiT's names (which are Latte's and ours, too). Then they are
handed to a model one by one, and a `LoadReport` says what became of each.
"""

from __future__ import annotations

import shutil
from math import isqrt
from pathlib import Path
from typing import Any

import torch

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
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.schedulers import make_scheduler


def latte_config(state: Tensors, num_heads: int | None = None) -> dict[str, Any]:
    """The fields of our constructor that a Latte file's tensors stand for.

    Args:
        state: its tensors, by name.
        num_heads: which no tensor tells; by default that of the published size of the same width.

    Raises:
        ValueError: where they are not Latte's, or the width is of no published size.
    """
    config = config_of_file("state", state)
    if "temp_embed" not in state:
        raise ValueError("state has no temp_embed: it is an image model's, not Latte's")
    width = config["hidden_size"]
    if num_heads is None:
        num_heads = {size[0]: size[2] for size in SIZES.values()}.get(width)
    if num_heads is None:
        known = ", ".join(str(size[0]) for size in SIZES.values())
        raise ValueError(f"hidden_size is {width}, not that of a known size ({known}): num_heads must be given")
    table = state.get(LABEL_TABLE)
    return {
        **config,
        "num_heads": num_heads,
        "num_frames": state["temp_embed"].shape[1],
        "sample_size": isqrt(state["pos_embed"].shape[1]) * config["patch_size"],
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
) -> LoadReport:
    """Writes the pipeline of a Latte file.

    Args:
        file: a `.pt` of unconditional or class-conditional Latte.
        out: a folder that is empty or not there yet.
        weights: see `initialize`.
        vae: the autoencoder that its latents are of: a folder, hub id or `builtin`.
        num_heads: see `latte_config`.
        class_names: names of its classes, in the order of their labels.
        frame_interval: that of its training clips.
        fps: frames a second of a generated video.

    Raises:
        ValueError: for a file that is no such model, an autoencoder that is none or another's, or a folder in use.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; give another")
    if Path(file).is_dir():
        raise ValueError(f"{file}: is a folder, not a Latte file; a pipeline is exported to a file that ends in .pt")
    source = read_file(str(file), weights)
    if source.kind != "video":
        raise ValueError(f"{file}: holds an image model, not Latte's; train from it with train.init_from={file}")
    try:
        config = latte_config(source.tensors, num_heads)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    autoencoder = load_autoencoder(autoencoder_source(vae, 256))
    model = LavitaTransformer3DModel(**config, class_names=class_names, frame_interval=frame_interval, fps=fps).eval()
    report = transfer_weights(model, source)
    pipeline = LavitaPipeline(model, autoencoder, make_scheduler("unipc", config["learn_sigma"]))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return report


def export_latte(folder: str | Path, out_file: Path) -> LoadReport:
    """Writes a pipeline's transformer as a Latte file, `{"ema": tensors}`.

    Args:
        folder: a LAVITA pipeline (folder, hub id or `builtin`), of Variant 2 with everything as in Latte.
        out_file: must not exist.

    Raises:
        ValueError: for another kind of model, with what it is that Latte's files cannot hold.
    """
    if out_file.exists():
        raise ValueError(f"{out_file}: exists; give another file")
    if Path(folder).is_file():
        raise ValueError(f"{folder}: is a file, not a pipeline")
    source = open_source(str(folder), None)
    if source.kind != "video":
        raise ValueError(f"{folder}: holds an image model; only LAVITA's are exported")
    for key, allowed in {**LATTE, "text_dim": 0}.items():
        if source.config[key] != allowed:
            raise ValueError(f"{folder}: {key} is {source.config[key]!r}, but Latte's files only hold {allowed!r}")
    state = {name: tensor.contiguous() for name, tensor in source.tensors.items()}
    out_file.parent.mkdir(parents=True, exist_ok=True)
    partial = out_file.with_name(f"{out_file.name}.partial")
    torch.save({"ema": state}, partial)
    partial.replace(out_file)
    return LoadReport(source.name, loaded=list(state), used=list(state))
