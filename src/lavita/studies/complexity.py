"""Parameters and multiply-accumulates of a model.

They are counted while the real model runs on fake tensors (`FakeTensorMode`), which have shapes and storages but no
values, so XL/2 takes one second and no memory.

Legend: B batch, F frames (of the clip, then images), C channels, H W latent size, N tokens per frame, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lavita.models.packaged import model_source
from lavita.models.presets import preset_sizes
from lavita.models.shapes import sample_grid
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.memory import meta_model

PATCH_EMBEDDING = "patch embedding"
CONDITION_EMBEDDING = "condition embedding"
SPATIAL_ATTENTION = "spatial attention"
TEMPORAL_ATTENTION = "temporal attention"
CROSS_ATTENTION = "attention to texts"
MLP = "MLP"
MODULATION = "modulation"
NORMS = "norms"
DECODER = "decoder"

TABLE3_BATCH = 3
"""Batch size of Table 3: clips of (16, 4, 32, 32) each."""


@dataclass(frozen=True)
class Part:
    """Parameters and work of one kind of layer."""

    num_parameters: int
    macs: int


@dataclass(frozen=True)
class Complexity:
    """Size of a model, and the work of one forward pass."""

    config: dict[str, Any]
    """The model's configuration."""
    batch_size: int
    num_frames: int
    """Frames of the clip, without the images."""
    num_images: int
    num_tokens: int
    """Tokens per clip with its images, including conditions if they are tokens."""
    parts: dict[str, Part]
    """The parts of the model; they add up to the whole. Attention includes its products."""
    attention_products: int
    """Multiply-accumulates of the attention products, q k^T and the product with the values."""
    table3_parameters: int
    """Parameters by the convention of Table 3, see `measure`."""
    table3_macs: int
    """Multiply-accumulates by the convention of Table 3, for `TABLE3_BATCH` clips."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(part.num_parameters for part in self.parts.values())

    @property
    def macs(self) -> int:
        """Executed multiply-accumulates of one forward pass of the batch; FLOPs are twice as many."""
        return sum(part.macs for part in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {**dataclasses.asdict(self), "num_parameters": self.num_parameters, "macs": self.macs}


def model_config(name: str, fields: Mapping[str, Any], num_frames: int | None = None) -> dict[str, Any]:
    """The configuration of the model that `lavita info` describes.

    Args:
        name: a preset such as `XL/2`; the folder of a transformer, a pipeline or a training run; or `builtin`.
        fields: for a preset, further fields of the model's constructor.
        num_frames: for a preset, the length of the training clips, 16 by default; ignored for a folder.

    Raises:
        ValueError: if `name` is neither a preset nor a folder with a model, or if fields are given with a folder.
    """
    try:
        return {**preset_sizes(name, fields.get("variant", 2)), "num_frames": num_frames or 16, **fields}
    except ValueError as unknown:
        folder = Path(model_source(name))
        if not folder.is_dir():
            raise ValueError(f"{unknown}; and no folder has that name") from None
    if fields:
        field, value = next(iter(fields.items()))
        raise ValueError(f"{field} is {value!r}, but {folder} has its own; it can be set for a preset only")
    for place in (folder, folder / "transformer", folder / "pipeline" / "transformer"):
        if (place / "config.json").is_file():
            config = LavitaTransformer3DModel.load_config(place)
            if config.get("_class_name") == LavitaTransformer3DModel.__name__:
                return config
    raise ValueError(
        f"{folder} holds no model: there is no config.json of a {LavitaTransformer3DModel.__name__} in it, in "
        "transformer/ or in pipeline/transformer/"
    )


def measure(
    config: Mapping[str, Any], batch_size: int = 1, num_frames: int | None = None, num_images: int = 0
) -> Complexity:
    """Counts a model's parameters and the multiply-accumulates of one forward pass.

    The executed ones are the products of all linear and convolution layers, with S-AdaLN computed once per condition,
    and the products of all attentions. Table 3 counts as the profiler thop does on the authors' code: linear and
    convolution layers only, S-AdaLN repeated for every frame before spatial attention and for every patch before
    temporal attention, and 2 per element of a LayerNorm. It also leaves out the weights and the work of the
    patch embedding in Variants 3 and 4.

    Args:
        config: fields of the model's constructor, for example `model.config`.
        batch_size: B.
        num_frames: frames of the clip; by default those of the configuration.
        num_images: images after the clip, each with its own condition if the model is conditional.

    Raises:
        ValueError: if the sizes do not fit together.
    """
    norm_counts = {torch.ops.aten.native_layer_norm: _norm_operations}
    counter = FlopCounterMode(display=False, custom_mapping=norm_counts)
    shapes: dict[nn.Module, torch.Size] = {}
    with meta_model(config, batch_size, num_frames, num_images) as (model, inputs):
        for module in (*model.blocks, model.final_layer):
            module.register_forward_pre_hook(lambda module, args: shapes.update({module: args[0].shape}))
        # The counter knows the operations of the unfused attention on every device.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(**inputs)
        counts = counter.get_flop_counts()
        root = type(model).__name__
        part_of = _parts(model)
        parameters = dict.fromkeys(part_of.values(), 0)
        macs = dict.fromkeys(part_of.values(), 0)
        for name, parameter in model.named_parameters():
            path = next(path for path in part_of if name.startswith(f"{path}."))
            parameters[part_of[path]] += parameter.numel()
        for path, part in part_of.items():
            macs[part] += _macs(counts.get(f"{root}.{path}", {}))
        products = 0
        for path in (path for path in part_of if path.endswith("attn")):
            layers = (_macs(counts.get(f"{root}.{path}.{child}", {})) for child in ("qkv", "q", "kv", "proj"))
            products += _macs(counts.get(f"{root}.{path}", {})) - sum(layers)
        assert sum(macs.values()) == _macs(counts["Global"]), "a layer does not belong to any part"

        paper_macs = sum(macs.values()) - products + counts["Global"].get(torch.ops.aten.native_layer_norm, 0)
        paper_macs += _repeated_modulation(shapes) - macs[MODULATION]
        paper_parameters = sum(parameters.values())
        if model.config["variant"] in (3, 4):
            paper_macs -= macs[PATCH_EMBEDDING]
            paper_parameters -= parameters[PATCH_EMBEDDING]
        first = shapes[model.blocks[0]]
        return Complexity(
            config={key: value for key, value in model.config.items() if not key.startswith("_")},
            batch_size=batch_size,
            num_frames=inputs["latents"].shape[1] - num_images,
            num_images=num_images,
            num_tokens=first[1] * first[2],
            parts={part: Part(parameters[part], macs[part]) for part in parameters if parameters[part] or macs[part]},
            attention_products=products,
            table3_parameters=paper_parameters,
            table3_macs=paper_macs // batch_size * TABLE3_BATCH,
        )


def print_complexity(name: str, cost: Complexity, console: Console | None = None) -> None:
    """Prints a table of a model's parts, and what the numbers mean.

    Args:
        name: title of the table.
        cost: result of `measure`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    config = cost.config
    title = escape(f"{name}: variant {config['variant']}, {config['num_blocks']} blocks")
    table = Table(title=title, title_justify="left")
    for heading in ("part", "parameters, M", "share", "MACs, G", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for label, part in cost.parts.items():
        shares = (f"{part.num_parameters / cost.num_parameters:.1%}", f"{part.macs / cost.macs:.1%}")
        table.add_row(label, f"{part.num_parameters / 1e6:,.2f}", shares[0], f"{part.macs / 1e9:,.2f}", shares[1])
    table.add_section()
    table.add_row("total", f"{cost.num_parameters / 1e6:,.2f}", "", f"{cost.macs / 1e9:,.2f}", "")
    console.print(table)
    images = f" and {cost.num_images} images" if cost.num_images else ""
    height, width = sample_grid(config)
    console.print(
        f"A batch of {cost.batch_size}: {cost.num_frames} frames{images} of {height} x {width} latents, "
        f"{cost.num_tokens:,} tokens per clip. MACs are the multiply-accumulates of one forward pass as executed "
        f"(FLOPs: twice as many), {cost.attention_products / 1e9:,.2f} G of them attention's products q k^T and with "
        f"the values. By the convention of Table 3: {truncated(cost.table3_parameters, 10**6)} M and, for "
        f"{TABLE3_BATCH} clips, {truncated(cost.table3_macs, 10**9)} G (lavita info --table 3 explains it).\n",
        highlight=False,
    )


def truncated(count: int, unit: int) -> str:
    """A count in a unit, truncated to two decimals as in Table 3: `5,572.69`."""
    return f"{count * 100 // unit / 100:,.2f}"


def _parts(model: LavitaTransformer3DModel) -> dict[str, str]:
    """The part that each module belongs to, by its path; every layer is in exactly one of these modules."""
    parts = {"x_embedder": PATCH_EMBEDDING}
    parts |= dict.fromkeys(("t_embedder", "y_embedder", "text_proj"), CONDITION_EMBEDDING)
    for index, block in enumerate(model.blocks):
        parts[f"blocks.{index}.attn"] = TEMPORAL_ATTENTION if block.mixing == "time" else SPATIAL_ATTENTION
        parts[f"blocks.{index}.temporal_attn"] = TEMPORAL_ATTENTION
        parts[f"blocks.{index}.cross_attn"] = CROSS_ATTENTION
        parts[f"blocks.{index}.mlp"] = MLP
        parts[f"blocks.{index}.adaLN_modulation"] = MODULATION
        for norm in ("norm1", "norm_temporal", "norm2"):
            parts[f"blocks.{index}.{norm}"] = NORMS
    parts["final_layer.adaLN_modulation"] = MODULATION
    parts["final_layer.norm"] = NORMS
    parts["final_layer.linear"] = DECODER
    parts["temporal_upsample"] = DECODER
    return parts


def _macs(counts: Mapping[Any, int]) -> int:
    """Multiply-accumulates from the FLOPs that are counted per operation, without the norms."""
    return sum(flops for operation, flops in counts.items() if operation is not torch.ops.aten.native_layer_norm) // 2


def _norm_operations(shape: torch.Size, *_: Any, **__: Any) -> int:
    """The operations that thop counts for a LayerNorm without weights."""
    return 2 * math.prod(shape)


def _repeated_modulation(shapes: Mapping[nn.Module, torch.Size]) -> int:
    """Multiply-accumulates of the S-AdaLN layers repeated as in Table 3, from the shape (B, F, N, D) of each module."""
    macs = 0
    for module, (batch, frames, tokens, _) in shapes.items():
        if isinstance(module.adaLN_modulation, nn.Sequential):
            linear = module.adaLN_modulation[1]
            assert isinstance(linear, nn.Linear)
            mixing = getattr(module, "mixing", "space")  # the decoder works frame by frame
            rows = (mixing != "time") * frames + (mixing != "space") * tokens
            macs += batch * rows * linear.in_features * linear.out_features
    return macs
