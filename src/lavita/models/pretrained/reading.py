"""Reads pretrained weights: files of DiT and Latte, and folders of diffusers and of this package.

Whatever the format, the tensors get DiT's names, which are also Latte's and ours.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.utils.logging import disable_progress_bar

from lavita.models.finite import check_finite
from lavita.models.hub import cannot_load, hub_options
from lavita.models.packaged import model_source
from lavita.models.transformer import LavitaTransformer3DModel

Weights = Literal["ema", "model"]
Tensors = Mapping[str, torch.Tensor]

BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
OTHER_LAYERS = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2")
FINAL_LAYERS = ("final_layer.adaLN_modulation.1", "final_layer.linear")
LABEL_TABLE = "y_embedder.embedding_table.weight"
# Fields of our constructor that describe every Latte file.
LATTE: dict[str, Any] = {
    "variant": 2,
    "patch_embedding": "uniform",
    "conditioning": "s_adaln",
    "temporal_position": "absolute",
    "prediction_type": "epsilon",
}


@dataclass
class Source:
    """Pretrained weights, and what is known about their model."""

    name: str
    """Path or hub id, for messages."""
    kind: Literal["image", "video"]
    """Kind of the model."""
    tensors: dict[str, torch.Tensor]
    """The weights, under DiT's names."""
    config: dict[str, Any]
    """The known fields of our constructor."""
    origins: dict[str, list[str]] = field(default_factory=dict)
    """For a name in `tensors`, the file's tensors that it is made of; by default the one of the same name."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks on tensors, for the report."""
    useless: dict[str, str] = field(default_factory=dict)
    """The file's tensors that are not part of `tensors`, and why."""


def open_source(source: str, weights: Weights | None) -> Source:
    """Reads the weights of a file, a folder, a hub id, or `builtin`; arguments and errors as in `initialize`."""
    source = model_source(source)
    path = Path(source)
    if path.is_file():
        return read_file(source, weights)
    if not path.exists() and not _is_hub_id(source):
        raise ValueError(f"{source}: no such file or folder; weights are a .pt file, a folder, a hub id, or `builtin`")
    if (path / "state.json").is_file() and path.parent.name == "checkpoints":
        raise ValueError(f"{source}: is a checkpoint of `lavita train`; give the folder of its run")
    is_run = path.is_dir() and (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()
    if is_run or (path / "pipeline" / "transformer").is_dir():
        if not (path / "pipeline" / "transformer").is_dir():
            raise ValueError(f"{source}: this run has no pipeline yet; it writes one with each checkpoint")
        if weights == "model":
            raise ValueError(f"weights is 'model', but the pipeline of the run {source} has the averaged ones: 'ema'")
        return _read_folder(str(path / "pipeline"))
    if weights is not None:
        raise ValueError(f"weights is {weights!r}, but {source} holds one set of weights: leave it out")
    return _read_folder(source)


def read_config(source: str) -> dict[str, Any]:
    """The configuration of pretrained weights, without reading these.

    Args:
        source: as for `open_source`.

    Returns:
        The fields of the constructor of its class; empty for a file, a folder without one, and a missing folder.

    Raises:
        ValueError: for a hub id, if the hub cannot be reached.
    """
    source = model_source(source)
    if Path(source).is_file() or not (Path(source).exists() or _is_hub_id(source)):
        return {}
    if (Path(source) / "pipeline" / "transformer").is_dir():
        source = str(Path(source) / "pipeline")
    return _find_config(source, hub_options(source))[0]


def _is_hub_id(source: str) -> bool:
    """Whether a name can be that of a model of the hub."""
    return (
        source.count("/") == 1 and not source.startswith((".", "/", "~")) and Path(source).suffix not in (".pt", ".pth")
    )


def _find_config(source: str, options: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The configuration of a model in diffusers' layout and the folder that it is in; empty if there is none."""
    problem: Exception | None = None
    for subfolder in ("transformer", None):
        try:
            return dict(LavitaTransformer3DModel.load_config(source, subfolder=subfolder, **options)), subfolder
        except OSError as error:
            problem = error
    if problem is not None and options:
        raise cannot_load(source, "a model", problem, options) from problem
    return {}, None


def _read_folder(source: str) -> Source:
    """Reads a model in diffusers' layout, or a pipeline's `transformer`: a folder, or a hub id."""
    options = hub_options(source)
    config, subfolder = _find_config(source, options)
    if not config:
        raise ValueError(f"{source}: holds no model (no config.json in it or in its folder `transformer`)")
    name = config.get("_class_name")
    # The published weights were converted when diffusers' class was still called `Transformer2DModel`.
    is_dit = name == "DiTTransformer2DModel" or (
        name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    )
    if not is_dit and name != "LavitaTransformer3DModel":
        raise ValueError(f"{source}: holds a {name}; allowed: LavitaTransformer3DModel, DiTTransformer2DModel")
    disable_progress_bar()
    try:
        model, loading = (DiTTransformer2DModel if is_dit else LavitaTransformer3DModel).from_pretrained(
            source, subfolder=subfolder, output_loading_info=True, **options
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        raise cannot_load(source, "its weights", error, options) from error
    # Early versions of diffusers stored this fixed table.
    unknown = set(loading["unexpected_keys"]) - ({"pos_embed.pos_embed"} if is_dit else set())
    missing = set(loading["missing_keys"]) - {"pos_embed", "temp_embed"}  # fixed tables, which the model has computed
    _check_names(source, missing, unknown)
    check_finite(source, model.state_dict())
    model.float()
    if is_dit:
        return _from_diffusers(source, model)
    return Source(source, "video", dict(model.state_dict()), dict(model.config))


def _from_diffusers(source: str, model: Any) -> Source:
    """Gives the tensors of diffusers' DiT their names in facebookresearch/DiT."""
    config, state = model.config, model.state_dict()
    for key, allowed in {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
    }.items():
        if config[key] != allowed:
            raise ValueError(f"{source}: {key} is {config[key]!r}; allowed: {allowed!r}")
    embedder = "norm1.emb.timestep_embedder.linear_"
    layers = {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": [f"transformer_blocks.0.{embedder}1"],
        "t_embedder.mlp.2": [f"transformer_blocks.0.{embedder}2"],
        "final_layer.adaLN_modulation.1": ["proj_out_1"],
        "final_layer.linear": ["proj_out_2"],
    }
    for index in range(config["num_layers"]):
        there, here = f"transformer_blocks.{index}", f"blocks.{index}"
        layers[f"{here}.attn.qkv"] = [f"{there}.attn1.to_{letter}" for letter in "qkv"]
        layers[f"{here}.attn.proj"] = [f"{there}.attn1.to_out.0"]
        layers[f"{here}.mlp.fc1"] = [f"{there}.ff.net.0.proj"]
        layers[f"{here}.mlp.fc2"] = [f"{there}.ff.net.2"]
        layers[f"{here}.adaLN_modulation.1"] = [f"{there}.norm1.linear"]
    origins = {
        f"{layer}.{part}": [f"{origin}.{part}" for origin in own]
        for layer, own in layers.items()
        for part in ("weight", "bias")
    }
    tensors = {name: torch.cat([state[origin] for origin in own]) for name, own in origins.items()}
    useless = {}
    for name in state.keys() - {origin for own in origins.values() for origin in own}:
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        if rest.startswith(embedder) and block.isdigit():
            if not torch.equal(state[name], state[f"transformer_blocks.0.{rest}"]):
                raise ValueError(
                    f"{source}: {name} differs from block 0's, but a DiT has one embedding of the timestep"
                )
            useless[name] = "equal to block 0's"
        elif rest == "norm1.emb.class_embedder.embedding_table.weight":
            useless[name] = "the classes of images (Sec. 3.6)"
    _check_names(source, (), set(state) - {origin for own in origins.values() for origin in own} - set(useless))
    inferred = config_of_file(source, tensors)
    note = "unchanged, for DiT's timestep frequencies 10000^(-i/128); diffusers' class computes others, with i/127"
    return Source(
        source,
        "image",
        tensors,
        config={**inferred, "num_heads": config["num_attention_heads"]},
        origins=origins,
        notes={"t_embedder.mlp.0.weight": note},
        useless=dict(sorted(useless.items())),
    )


def read_file(file: str, weights: Weights | None) -> Source:
    """Reads a `.pt` file in the layout of DiT or Latte; arguments and errors as in `initialize`."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    # DiT's own checkpoints also hold the arguments of their run, in an `argparse.Namespace`.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        why = "damaged, or not a file of torch's"
        if "unsupported" in str(error).lower() or "allowed global" in str(error):
            why = "it holds more than tensors, which could run code"
        raise ValueError(f"{file}: cannot be read as weights ({why})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: holds a {type(loaded).__name__}, not tensors by name")
    choices = [key for key in ("ema", "model") if isinstance(loaded.get(key), dict)]
    name = file
    if choices:
        if weights is None and len(choices) > 1:
            raise ValueError(f"{file}: holds two sets of weights, so weights must be given: {' or '.join(choices)}")
        chosen = weights or choices[0]
        if chosen not in choices:
            raise ValueError(f"weights is {weights!r}, but {file} only holds {choices[0]!r}")
        loaded, name = loaded[chosen], f"{file} ({chosen})"
    elif weights is not None:
        raise ValueError(f"weights is {weights!r}, but {file} holds one set of weights: leave it out")
    tensors = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: {key!r} is a {type(value).__name__}, not a tensor")
        # DDP and torch.compile put these before the names of what they wrap.
        plain = key.replace("_orig_mod.", "").removeprefix("module.")
        if plain in tensors:
            raise ValueError(f"{name}: has {plain} twice, once as {key}")
        tensors[plain] = value
    check_finite(name, tensors)
    config = config_of_file(name, tensors)
    return Source(name, "video" if "temp_embed" in tensors else "image", tensors, config)


def config_of_file(name: str, state: Tensors) -> dict[str, Any]:
    """Infers fields of our constructor from the tensors of a DiT or a Latte.

    Raises:
        ValueError: for the tensors of another model.
    """
    numbers = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    projection = state.get("x_embedder.proj.weight")
    if not numbers or projection is None or projection.ndim != 4:
        few = ", ".join(sorted(state)[:3])
        raise ValueError(f"{name}: holds neither a DiT nor a Latte, but {len(state)} tensors such as {few or 'none'}")
    layers = [*OTHER_LAYERS, *FINAL_LAYERS]
    layers += [f"blocks.{number}.{layer}" for number in range(len(numbers)) for layer in BLOCK_LAYERS]
    needed = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if "temp_embed" in state:
        needed |= {"temp_embed"}
    _check_names(name, needed - state.keys(), state.keys() - needed - {"pos_embed", LABEL_TABLE})
    width, channels, patch = projection.shape[:3]
    out_channels = state["final_layer.linear.weight"].shape[0] / patch**2
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{name}: its final layer has {out_channels:g} output channels, but must have {channels} or {2 * channels}"
        )
    for table in ("pos_embed", "temp_embed"):
        if table in state and (state[table].ndim != 3 or state[table].shape[::2] != (1, width)):
            raise ValueError(f"{name}: {table} is {tuple(state[table].shape)}, but must be (1, any, {width})")
    if "pos_embed" in state and isqrt(state["pos_embed"].shape[1]) ** 2 != state["pos_embed"].shape[1]:
        raise ValueError(f"{name}: pos_embed has {state['pos_embed'].shape[1]} places, which do not form a square")
    return {
        **LATTE,
        "hidden_size": width,
        "num_blocks": len(numbers),
        "patch_size": patch,
        "in_channels": channels,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": out_channels == 2 * channels,
    }


def _check_names(name: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Raises a ValueError that names the first missing, or else unknown, tensors."""
    for problem, names in (("lack", sorted(missing)), ("include the unknown", sorted(unknown))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{name}: its weights {problem} {', '.join(names[:3])}{more}")
