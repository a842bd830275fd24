"""Weights of others to ours, and back: image DiTs, models of this package, Latte's files.

Whatever the source, its tensors are read first, under DiT's names (which are Latte's and ours, too). Then they are
handed to a model one by one, and a `LoadReport` says what became of each.
"""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.utils.logging import disable_progress_bar

from lavita.autoencoder import STABLE_DIFFUSION, autoencoder_source, load_autoencoder
from lavita.models.embeddings import spatial_positions, temporal_positions
from lavita.models.transformer import SIZES, LavitaTransformer3DModel, block_plan
from lavita.pipeline import LavitaPipeline, make_scheduler

Weights = Literal["ema", "model"]
Tensors = Mapping[str, torch.Tensor]

BUILTIN = "builtin"
BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
OTHER_LAYERS = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2")
FINAL_LAYERS = ("final_layer.adaLN_modulation.1", "final_layer.linear")
LABEL_TABLE = "y_embedder.embedding_table.weight"
# What Latte's files are, in the fields of our constructor.
LATTE: dict[str, Any] = {
    "variant": 2,
    "patch_embedding": "uniform",
    "conditioning": "s_adaln",
    "temporal_position": "absolute",
    "prediction_type": "epsilon",
}


@dataclass
class LoadReport:
    """What became of every tensor; printed, it fits a screen.

    Each of the model's names is in exactly one of `loaded`, `adapted` and `new`, each of the source's in exactly one
    of `used` and `dropped`.
    """

    source: str
    """Where the weights come from."""
    loaded: list[str] = field(default_factory=list)
    """Parameters of the model that are the source's as they stand."""
    adapted: dict[str, str] = field(default_factory=dict)
    """Parameters that are made from the source's, and how."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors of the source that the model has no use for, and why."""
    new: dict[str, str] = field(default_factory=dict)
    """Parameters that owe nothing to the source, and why."""
    used: list[str] = field(default_factory=list)
    """Tensors of the source that `loaded` and `adapted` come from."""

    def __str__(self) -> str:
        lines = [f"weights of {self.source}", *_paragraph(f"loaded {len(self.loaded)}: ", self.loaded)]
        for title, reasons in (("adapted", self.adapted), ("dropped", self.dropped), ("new", self.new)):
            if reasons:
                lines.append(f"{title} {len(reasons)}:")
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines += _paragraph("  ", names, f" - {reason}")
        return "\n".join(lines)


def _paragraph(start: str, names: Iterable[str], end: str = "") -> list[str]:
    text = f"{start}{', '.join(_grouped(names)) or 'none'}{end}"
    return textwrap.wrap(text, 120, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _grouped(names: Iterable[str]) -> list[str]:
    """`blocks.0.mlp`, `blocks.1.mlp`, `blocks.2.mlp` as `blocks.{0..2}.mlp`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?blocks)\.(\d+)\.(.*)", name)
        pattern = f"{match[1]}.*.{match[3]}" if match else name
        numbers.setdefault(pattern, []).extend([int(match[2])] if match else [])
    return [pattern.replace("*", _ranges(found), 1) if found else pattern for pattern, found in numbers.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """`{0..3}` for 0 1 2 3, `{1,3..7}` for 1 3 5 7, `{1,2,5}` for 1 2 5, `4` for 4."""
    rest, parts = sorted(numbers), []
    if len(rest) == 1:
        return str(rest[0])
    while rest:
        steps = np.diff(rest)
        length = 1 if not len(steps) else 1 + int(np.argmin(np.append(steps == steps[0], False)))
        if length > 2:
            first = f"{rest[0]}" if steps[0] == 1 else f"{rest[0]},{rest[1]}"
            parts.append(f"{first}..{rest[length - 1]}")
        else:
            length = 1
            parts.append(str(rest[0]))
        rest = rest[length:]
    return "{" + ",".join(parts) + "}"


def initialize(model: LavitaTransformer3DModel, source: str, weights: Weights | None = None) -> LoadReport:
    """Gives a model the weights of a source, as far as they fit.

    An image model's weights make a video model that starts as that image model applied to every frame: what mixes
    frames is closed, by a zero gate or a zero projection, and opens in training (Sec. 3.6). Only the fixed temporal
    positions (of `absolute`) tell its frames apart.

    Args:
        model: a fresh one; what the source has nothing for keeps its initial values, or becomes zero (labels, texts,
            and a decoder that would decode something else).
        source: `builtin`, the arcade model of the package; a folder or hub id of a LAVITA or DiT pipeline in
            diffusers' layout, or of its transformer; a `.pt` file of facebookresearch/DiT or of Latte.
        weights: which of a file's two: the averaged (`ema`) or the others. Needed where it has both.

    Returns:
        What became of each tensor. Values that come from diffusers' `DiTTransformer2DModel` count on DiT's own
        timestep frequencies, 10000^(-i/128), with which the published weights were trained; that class has i/127.

    Raises:
        ValueError: for a source that is missing, damaged, of another kind or size, or holds more than tensors. The
            model is then as it was.
    """
    return _initialize(model, _open(source, weights))


def latte_config(state: Tensors, num_heads: int | None = None) -> dict[str, Any]:
    """The fields of our constructor that a Latte file's tensors stand for.

    Args:
        state: its tensors, by name.
        num_heads: which no tensor tells; by default that of the published size of the same width.

    Raises:
        ValueError: where they are not Latte's, or the width is of no published size.
    """
    config = _config_of_file("state", state)
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
    source = _read_file(str(file), weights)
    if source.kind != "video":
        raise ValueError(f"{file}: holds an image model, not Latte's; train from it with train.init_from={file}")
    try:
        config = latte_config(source.tensors, num_heads)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    autoencoder = load_autoencoder(autoencoder_source(vae, 256))
    model = LavitaTransformer3DModel(**config, class_names=class_names, frame_interval=frame_interval, fps=fps).eval()
    report = _initialize(model, source)
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
    source = _open(str(folder), None)
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


# --- sources


@dataclass
class _Source:
    """Tensors, and what is known of the model that they are of."""

    name: str
    kind: Literal["image", "video"]
    tensors: dict[str, torch.Tensor]
    """Under DiT's names."""
    config: dict[str, Any]
    """Fields of our constructor, those that are known."""
    origins: dict[str, list[str]] = field(default_factory=dict)
    """Which of the source's tensors one of `tensors` is made of; by default that of the same name."""
    notes: dict[str, str] = field(default_factory=dict)
    """What is to be said of a tensor that is taken as it stands."""
    useless: dict[str, str] = field(default_factory=dict)
    """The source's other tensors, and why they are not among `tensors`."""


def _resolve(source: str) -> str:
    return str(files("lavita") / "weights" / "arcade") if source == BUILTIN else source


def _open(source: str, weights: Weights | None) -> _Source:
    source = _resolve(source)
    path = Path(source)
    is_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix not in (".pt", ".pth")
    if path.is_file():
        return _read_file(source, weights)
    if not path.exists() and not is_id:
        raise ValueError(f"{source}: no such file or folder; weights are a .pt file, a folder, a hub id, or `builtin`")
    if weights is not None:
        raise ValueError(f"weights is {weights!r}, but {source} holds one set of weights: leave it out")
    return _read_folder(source)


def _read_folder(source: str) -> _Source:
    """A model in diffusers' layout, or a pipeline's `transformer`: a folder, or a hub id."""
    config: dict[str, Any] = {}
    subfolder: str | None = None
    for subfolder in ("transformer", None):
        try:
            config = LavitaTransformer3DModel.load_config(source, subfolder=subfolder)
            break
        except OSError:
            continue
    if not config:
        raise ValueError(f"{source}: holds no model (no config.json in it or in its folder `transformer`)")
    name = config.get("_class_name")
    # diffusers called its DiT `Transformer2DModel` when the published weights were converted.
    is_dit = name == "DiTTransformer2DModel" or (
        name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    )
    if not is_dit and name != "LavitaTransformer3DModel":
        raise ValueError(f"{source}: holds a {name}; allowed: LavitaTransformer3DModel, DiTTransformer2DModel")
    disable_progress_bar()
    try:
        model, loading = (DiTTransformer2DModel if is_dit else LavitaTransformer3DModel).from_pretrained(
            source, subfolder=subfolder, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        raise ValueError(f"{source}: cannot load its weights ({' '.join(str(error).split())[:200]})") from error
    # Early versions of diffusers stored this table, which is computed.
    unknown = set(loading["unexpected_keys"]) - ({"pos_embed.pos_embed"} if is_dit else set())
    _check_names(source, loading["missing_keys"], unknown)
    if is_dit:
        return _from_diffusers(source, model)
    return _Source(source, "video", dict(model.state_dict()), dict(model.config))


def _from_diffusers(source: str, model: Any) -> _Source:
    """The DiT of diffusers under DiT's names."""
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
                    f"{source}: {name} is not that of block 0, but a DiT has one embedding of the timestep"
                )
            useless[name] = "equal to block 0's"
        elif rest == "norm1.emb.class_embedder.embedding_table.weight":
            useless[name] = "the classes of images (Sec. 3.6)"
    _check_names(source, (), set(state) - {origin for own in origins.values() for origin in own} - set(useless))
    inferred = _config_of_file(source, tensors)
    note = "as it stands, for DiT's timestep frequencies 10000^(-i/128); diffusers' class, not its weights, has i/127"
    return _Source(
        source,
        "image",
        tensors,
        {**inferred, "num_heads": config["num_attention_heads"]},
        origins,
        {"t_embedder.mlp.0.weight": note},
        dict(sorted(useless.items())),
    )


def _read_file(file: str, weights: Weights | None) -> _Source:
    """A `.pt` in the layout of DiT or Latte."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    # DiT's own checkpoints have the arguments of the run beside the weights, a plain bag of values.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds for a damaged file
        why = "damaged, or no such file at all"
        if "unsupported" in str(error).lower() or "allowed global" in str(error):
            why = "it holds more than tensors, which could run code"
        raise ValueError(f"{file}: is not read as weights ({why})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: holds a {type(loaded).__name__}, not tensors by name")
    if "model_config" in loaded:
        raise ValueError(f"{file}: is a checkpoint of `lavita train`; give the pipeline folder of its run")
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
        tensors[key.removeprefix("module.")] = value
    config = _config_of_file(name, tensors)
    return _Source(name, "video" if "temp_embed" in tensors else "image", tensors, config)


def _config_of_file(name: str, state: Tensors) -> dict[str, Any]:
    """What the tensors of a DiT or a Latte tell of it; ValueError where they are neither's."""
    numbers = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    projection = state.get("x_embedder.proj.weight")
    if not numbers or projection is None or projection.ndim != 4:
        few = ", ".join(sorted(state)[:3])
        raise ValueError(f"{name}: holds neither a DiT nor a Latte, but {len(state)} tensors such as {few or 'none'}")
    layers = [*OTHER_LAYERS, *FINAL_LAYERS]
    layers += [f"blocks.{number}.{layer}" for number in range(len(numbers)) for layer in BLOCK_LAYERS]
    needed = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if "temp_embed" in state:
        needed |= {"temp_embed", "pos_embed"}
    _check_names(name, needed - state.keys(), state.keys() - needed - {"pos_embed", LABEL_TABLE})
    width, channels, patch = projection.shape[:3]
    out_channels = state["final_layer.linear.weight"].shape[0] / patch**2
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{name}: its final layer makes {out_channels:g} channels of {channels}: neither as many nor two"
        )
    for table in ("pos_embed", "temp_embed"):
        if table in state and (state[table].ndim != 3 or state[table].shape[::2] != (1, width)):
            raise ValueError(f"{name}: {table} is {tuple(state[table].shape)}, but must be (1, any, {width})")
    if "pos_embed" in state and isqrt(state["pos_embed"].shape[1]) ** 2 != state["pos_embed"].shape[1]:
        raise ValueError(f"{name}: pos_embed has {state['pos_embed'].shape[1]} places, which make no square")
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
    for problem, names in (("lack", sorted(missing)), ("have, unknown here,", sorted(unknown))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{name}: its weights {problem} {', '.join(names[:3])}{more}")


# --- from a source to a model


def _initialize(model: LavitaTransformer3DModel, source: _Source) -> LoadReport:
    _check_fields(model, source)
    transfer = _Transfer(model, source)
    if source.kind == "image":
        _transfer_image(transfer)
    else:
        _transfer_video(transfer)
    return transfer.finish()


def _check_fields(model: LavitaTransformer3DModel, source: _Source) -> None:
    here, there = dict(model.config), dict(source.config)
    for fields in (here, there):
        fields["width of the MLPs"] = int(fields["hidden_size"] * fields["mlp_ratio"])
    keys = ["hidden_size", "num_heads", "patch_size", "in_channels", "width of the MLPs"]
    if source.kind == "video":
        keys += ["variant", "num_blocks", "patch_embedding", "conditioning"]
        if here["patch_embedding"] == "compression":
            keys += ["tube_size", "learn_sigma"]
    for key in keys:
        if key in there and there[key] != here[key]:
            raise ValueError(f"{source.name}: {key} is {there[key]}, but this model's is {here[key]}; they must agree")


class _Transfer:
    """Keeps the books while tensors go from a source to a model; writes nothing before the end."""

    def __init__(self, model: LavitaTransformer3DModel, source: _Source) -> None:
        self.model, self.source = model, source
        self.targets: dict[str, torch.Tensor] = model.state_dict()
        self.values: dict[str, torch.Tensor] = {}
        self.report = LoadReport(source.name)
        self.used: set[str] = set()
        self.useless: dict[str, str] = {}

    def take(
        self,
        name: str,
        how: str = "",
        value: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
        origin: str | None = None,
    ) -> None:
        """Gives the model's `name` the source's `origin` (by default of the same name), or a value made of it."""
        origin = origin or name
        tensor = self.source.tensors[origin]
        result = tensor if value is None else value if isinstance(value, torch.Tensor) else value(tensor)
        if result.shape != self.targets[name].shape:
            shapes = f"{tuple(tensor.shape)}, but {name} of this model {tuple(self.targets[name].shape)}"
            raise ValueError(f"{self.source.name}: {origin} has the shape {shapes}")
        self.values[name] = result
        self.used.add(origin)
        how = "; ".join(filter(None, (how, self.source.notes.get(origin))))
        if how:
            self.report.adapted[name] = how
        else:
            self.report.loaded.append(name)

    def new(self, name: str, why: str, zero: bool = False) -> None:
        """Leaves the model's `name` at its initial value, or makes it zero."""
        self.report.new[name] = why
        if zero:
            self.values[name] = torch.zeros_like(self.targets[name])

    def new_condition(self, why: str) -> None:
        """Labels or texts add nothing at first."""
        last = (LABEL_TABLE, "y_embedder.mlp.2.weight", "y_embedder.mlp.2.bias")
        for name in self.targets:
            if name.startswith("y_embedder."):
                self.new(name, f"{why}; it adds nothing at first", zero=name in last)

    def drop(self, prefix: str, why: str) -> None:
        """Says why the source's tensors of a prefix that were not taken were not."""
        for name in self.source.tensors:
            if name.startswith(prefix) and name not in self.used:
                self.useless.setdefault(name, why)

    def open(self) -> list[str]:
        """The model's names that nothing was said of yet."""
        report = self.report
        said = {*report.loaded, *report.adapted, *report.new}
        return [name for name in self.targets if name not in said]

    @torch.no_grad()
    def finish(self) -> LoadReport:
        """Writes the values into the model."""
        assert not self.open()
        for name, value in self.values.items():
            self.targets[name].copy_(value)
        for name in self.source.tensors:
            own = self.source.origins.get(name, [name])
            if name in self.used:
                self.report.used += own
            else:
                self.report.dropped |= dict.fromkeys(own, self.useless[name])
        self.report.dropped |= self.source.useless
        return self.report


def _transfer_video(transfer: _Transfer) -> None:
    """By name: source and model are built alike."""
    _transfer_condition(transfer)
    _transfer_positions(transfer)
    _transfer_decoder(transfer)
    for name in transfer.open():
        if name in transfer.source.tensors:
            transfer.take(name)
        else:
            transfer.new(name, "the source has none")
    transfer.drop("temp_embed", f"positions in time are {transfer.model.config['temporal_position']} here")
    transfer.drop("", "this model has no such part")


def _transfer_condition(transfer: _Transfer) -> None:
    """Labels and texts, where they are the same ones."""
    here, there = transfer.model.config, transfer.source.config
    names = [name for name in transfer.targets if name.startswith("y_embedder.")]
    given = [name for name in transfer.source.tensors if name.startswith("y_embedder.")]
    if not names:
        transfer.drop("y_embedder.", "this model has neither labels nor texts")
        return
    why = ""
    if sorted(names) != sorted(given):
        why = "the source has " + ("another kind of condition" if given else "neither labels nor texts")
    elif any(transfer.source.tensors[name].shape != transfer.targets[name].shape for name in names):
        sizes = [transfer.source.tensors[names[0]].shape, transfer.targets[names[0]].shape]
        index, off, what = (0, 1, "classes") if LABEL_TABLE in names else (1, 0, "numbers a text")
        why = f"{sizes[0][index] - off} {what} there, {sizes[1][index] - off} here"
    elif here["class_names"] and there.get("class_names") and list(here["class_names"]) != list(there["class_names"]):
        why = "the classes are others there"
    if why:
        transfer.new_condition(why)
        transfer.drop("y_embedder.", why)
        return
    encoders = there.get("text_encoder"), here["text_encoder"]
    note = "" if encoders[0] == encoders[1] or LABEL_TABLE in names else "as it stands, for texts of {} there, {} here"
    for name in names:
        transfer.take(name, note.format(*encoders))


def _transfer_positions(transfer: _Transfer) -> None:
    """Fixed tables, of space and of time: the source's, or computed where they are longer or shorter here."""
    tensors, width = transfer.source.tensors, transfer.model.config["hidden_size"]
    num_tokens = transfer.model.config["num_frames"] // transfer.model.tube_size
    for name in ("pos_embed", "temp_embed"):
        here, there = transfer.targets.get(name), tensors.get(name)
        if here is None:
            continue
        if there is None:
            transfer.new(name, "fixed sin-cos, computed; the source stores none")
        elif here.shape == there.shape:
            is_image = transfer.source.kind == "image"
            transfer.take(name, f"replicated over {num_tokens} frames" if is_image else "")
        else:
            length = there.shape[1]
            steps = np.arange(length, dtype=np.float64)
            is_space = name == "pos_embed"
            table = spatial_positions(isqrt(length), width) if is_space else temporal_positions(steps, width)
            # Half precision is what the tolerance is for.
            if there.shape != table.shape or not torch.allclose(there.float(), table, rtol=0, atol=1e-2):
                raise ValueError(
                    f"{transfer.source.name}: {name} is not fixed sin-cos, so it cannot be computed for "
                    f"{here.shape[1]} places, which this model has, from {length}"
                )
            what = "places of a frame" if is_space else "frames"
            transfer.take(name, f"recomputed: {here.shape[1]} {what} here, {length} there", here)


def _transfer_decoder(transfer: _Transfer) -> None:
    """The final linear layer: channels cut or added for the variance, repeated for the frames of a tube."""
    config, known = transfer.model.config, transfer.source.config
    is_image = transfer.source.kind == "image"
    why = ""
    if config["prediction_type"] != known["prediction_type"]:
        why = (
            f"the source predicts {known['prediction_type']}, this model {config['prediction_type']}; it starts at zero"
        )
    elif is_image and config["conditioning"] == "all_tokens":
        why = "behind another norm than the source's; it starts at zero"
    tube = transfer.model.tube_size if is_image else 1
    there = config["in_channels"] * (1 + known["learn_sigma"])
    here = transfer.model.out_channels
    changes = []
    if here < there:
        changes.append("noise without variance")
    if here > there:
        changes.append("the variance, which the source has not, starts at zero")
    if tube > 1:
        changes.append(f"repeated for the {tube} frames of a tube")

    def adapt(value: torch.Tensor) -> torch.Tensor:
        rows = value.reshape(config["patch_size"] ** 2, there, -1)[:, :here]  # (P P, C, D), of a bias (P P, C, 1)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, here - rows.shape[1]))
        return rows.repeat(1, tube, 1).reshape(-1, *value.shape[1:])  # a tube's channel is s C + c

    for part in ("weight", "bias"):
        name = f"final_layer.linear.{part}"
        if why:
            transfer.new(name, why, zero=True)
            transfer.drop(name, why)
        else:
            transfer.take(name, "; ".join(changes), adapt if changes else None)
    if why:
        for name in transfer.open():
            if name.startswith("temporal_upsample."):
                transfer.new(name, "behind the final layer, which starts anew")
        transfer.drop("temporal_upsample.", why)


def _transfer_image(transfer: _Transfer) -> None:
    """An image model in every frame; nothing passes between frames at first."""
    tensors, config = transfer.source.tensors, transfer.model.config
    transfer.new_condition("the source's are classes of images (Sec. 3.6)")
    _transfer_decoder(transfer)
    _transfer_positions(transfer)
    tube = transfer.model.tube_size
    if config["patch_embedding"] == "compression":
        how = f"repeated over the {tube} frames of a tube, divided by {tube}"
        transfer.take("x_embedder.proj.weight", how, lambda value: value[:, :, None].repeat(1, 1, tube, 1, 1) / tube)
    for name in transfer.open():
        if name.startswith(("x_embedder.", "t_embedder.", "final_layer.adaLN_modulation.")):
            transfer.take(name)
    _transfer_image_blocks(transfer)
    starts = {
        ".temporal_attn.proj.": ("zero: attention in time adds nothing at first", True),
        ".temporal_attn.": ("attention in time, which an image model has not", False),
        "norm": ("a norm of all_tokens, which the source has not", False),
        "temporal_upsample.": ("hands each frame of a tube its own channels", False),
    }
    for name in transfer.open():
        why, zero = next(start for part, start in starts.items() if part in name)
        transfer.new(name, why, zero)
    transfer.drop("y_embedder.", "the classes of images (Sec. 3.6)")
    for name in tensors:
        if config["conditioning"] == "all_tokens" and ".adaLN_modulation." in name:
            transfer.drop(name, "all_tokens has no modulation")
    transfer.drop("blocks.", "not among the blocks, or the parts of them, that were taken")


def _transfer_image_blocks(transfer: _Transfer) -> None:
    config = transfer.model.config
    width, here, there = config["hidden_size"], config["num_blocks"], transfer.source.config["num_blocks"]
    plain = config["conditioning"] == "all_tokens"
    picks = [round(index * (there - 1) / max(here - 1, 1)) for index in range(here)]
    spaced = "" if here == there else f"of blocks {' '.join(map(str, picks))} of the source's {there}"

    def close_gate(value: torch.Tensor) -> torch.Tensor:
        closed = value.clone()
        closed[2 * width : 3 * width] = 0  # after shift and scale
        return closed

    def close_heads(value: torch.Tensor) -> torch.Tensor:
        closed = value.clone()
        closed[:, width // 2 :] = 0  # the second half of the heads looks along time
        return closed

    for index, mixing in enumerate(block_plan(config["variant"], here)):
        for layer in BLOCK_LAYERS:
            for part in ("weight", "bias"):
                name, origin = f"blocks.{index}.{layer}.{part}", f"blocks.{picks[index]}.{layer}.{part}"
                if name not in transfer.targets:
                    continue
                if mixing == "time" and layer == "adaLN_modulation.1":
                    how, change = "the gate of attention in time is zero at first", close_gate
                elif mixing == "time" and layer == "attn.proj" and plain:
                    transfer.new(name, "zero: attention in time adds nothing at first", zero=True)
                    continue
                elif mixing == "space_and_time" and (layer, part) == ("attn.proj", "weight"):
                    how, change = "columns of the heads that look along time are zero at first", close_heads
                else:
                    how, change = "", None
                transfer.take(name, "; ".join(filter(None, (how, spaced))), change, origin)
