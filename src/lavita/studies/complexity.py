"""What a model costs: parameters and multiply-accumulates; and the paper's Table 3 beside our own count.

Everything is counted on a model that runs without numbers (`FakeTensorMode`): its tensors have shapes and storages, and
the layers are those that really execute, so that XL/2 takes a second and no memory.

Legend: B batch, F frames (a clip's, then images), C channels, H W latent size, N tokens a frame, D width.
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
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lavita.models.packaged import model_source
from lavita.models.presets import preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.memory import meta_model

PATCH_EMBEDDING = "patch embedding"
CONDITION_EMBEDDING = "condition embedding"
SPATIAL_ATTENTION = "spatial attention"
TEMPORAL_ATTENTION = "temporal attention"
JOINT_ATTENTION = "spatial and temporal attention"
MLP = "MLP"
MODULATION = "modulation"
NORMS = "norms"
DECODER = "decoder"

TABLE3_BATCH = 3
"""Clips that they are counted on, each (16, 4, 32, 32)."""


@dataclass(frozen=True)
class Part:
    """What one kind of layer has and does."""

    num_parameters: int
    macs: int


@dataclass(frozen=True)
class Complexity:
    """Size of a model, and work of one forward pass."""

    config: dict[str, Any]
    """The model's configuration."""
    batch_size: int
    num_frames: int
    """Frames of the clip, without the images."""
    num_images: int
    num_tokens: int
    """Tokens a clip and its images, conditions among them where they are tokens."""
    parts: dict[str, Part]
    """The model, part by part; they add up to all of it. Attention's multiply-accumulates include its products."""
    attention_products: int
    """Multiply-accumulates of all q k^T and of all products with the values."""
    table3_parameters: int
    """As Table 3 counts, see `measure`."""
    table3_macs: int
    """As Table 3 counts, for `TABLE3_BATCH` clips."""

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(part.num_parameters for part in self.parts.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of the batch, as executed; FLOPs are twice as many."""
        return sum(part.macs for part in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {**dataclasses.asdict(self), "num_parameters": self.num_parameters, "macs": self.macs}


def model_config(name: str, fields: Mapping[str, Any], num_frames: int | None = None) -> dict[str, Any]:
    """The configuration of what `lavita info` is asked about.

    Args:
        name: a preset such as `XL/2`; a folder of a transformer, a pipeline or a training run; or `builtin`.
        fields: for a preset, further fields of the model's constructor.
        num_frames: for a preset, the length of the training clips, 16 by default; a folder's model has its own.

    Raises:
        ValueError: for neither a preset nor a folder with a model, or fields beside a folder.
    """
    try:
        return {**preset_sizes(name, fields.get("variant", 2)), "num_frames": num_frames or 16, **fields}
    except ValueError as unknown:
        folder = Path(model_source(name))
        if not folder.is_dir():
            raise ValueError(f"{unknown}; and there is no folder of that name") from None
    if fields:
        field, value = next(iter(fields.items()))
        raise ValueError(f"{field} is {value!r}, but {folder} has its own: only a preset takes it")
    for place in (folder, folder / "transformer", folder / "pipeline" / "transformer"):
        if (place / "config.json").is_file():
            config = LavitaTransformer3DModel.load_config(place)
            if config.get("_class_name") == LavitaTransformer3DModel.__name__:
                return config
    raise ValueError(
        f"{folder} has no model: no config.json of a {LavitaTransformer3DModel.__name__} in it, in transformer/ or in "
        "pipeline/transformer/"
    )


def measure(
    config: Mapping[str, Any], batch_size: int = 1, num_frames: int | None = None, num_images: int = 0
) -> Complexity:
    """Counts a model's parameters and the multiply-accumulates of one forward pass.

    As executed, these are the products of all linear and convolution layers, S-AdaLN's once a condition, and of the
    attentions by the shapes that they meet. As Table 3 counts (the profiler thop on the authors' code), they are
    those of linear and convolution layers only, S-AdaLN's repeated for every frame in front of attention in space and
    for every patch in front of attention in time, and 2 more for each element of a LayerNorm. Table 3 leaves the patch
    embedding of Variant 3 out, weights and work.

    Args:
        config: fields of the model's constructor, for example `model.config`.
        batch_size: B.
        num_frames: of the clip; the configuration's by default.
        num_images: images that follow it, each with a condition of its own in a conditional model.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    norm_counts = {torch.ops.aten.native_layer_norm: _norm_operations}
    counter = FlopCounterMode(display=False, custom_mapping=norm_counts)
    shapes: dict[nn.Module, torch.Size] = {}
    with meta_model(config, batch_size, num_frames, num_images) as (model, inputs):
        for module in (*model.blocks, model.final_layer):
            module.register_forward_pre_hook(lambda module, args: shapes.update({module: args[0].shape}))
        # The unfused attention consists of operations that the counter knows, on any device.
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
            whole, qkv, proj = (_macs(counts.get(f"{root}.{path}{child}", {})) for child in ("", ".qkv", ".proj"))
            products += whole - qkv - proj
        assert sum(macs.values()) == _macs(counts["Global"]), "a layer belongs to no part"

        paper_macs = sum(macs.values()) - products + counts["Global"].get(torch.ops.aten.native_layer_norm, 0)
        paper_macs += _repeated_modulation(shapes) - macs[MODULATION]
        paper_parameters = sum(parameters.values())
        if model.config["variant"] == 3:
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
    """Prints what a model costs as a table and what the numbers mean.

    Args:
        name: what the table is titled with.
        cost: of `measure`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    config = cost.config
    table = Table(title=f"{name}: variant {config['variant']}, {config['num_blocks']} blocks", title_justify="left")
    for heading in ("part", "parameters, M", "share", "MACs, G", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for label, part in cost.parts.items():
        shares = (f"{part.num_parameters / cost.num_parameters:.1%}", f"{part.macs / cost.macs:.1%}")
        table.add_row(label, f"{part.num_parameters / 1e6:,.2f}", shares[0], f"{part.macs / 1e9:,.2f}", shares[1])
    table.add_section()
    table.add_row("whole", f"{cost.num_parameters / 1e6:,.2f}", "", f"{cost.macs / 1e9:,.2f}", "")
    console.print(table)
    images = f" and {cost.num_images} images" if cost.num_images else ""
    size = config["sample_size"]
    console.print(
        f"A batch of {cost.batch_size}: {cost.num_frames} frames{images} of {size} x {size} latents, "
        f"{cost.num_tokens:,} tokens a clip. MACs are the multiply-accumulates of one forward pass as executed "
        f"(FLOPs: twice as many), {cost.attention_products / 1e9:,.2f} G of them attention's products q k^T and with "
        f"the values. By the convention of Table 3: {truncated(cost.table3_parameters, 10**6)} M and, for "
        f"{TABLE3_BATCH} clips, {truncated(cost.table3_macs, 10**9)} G (lavita info --table 3 explains it).\n",
        highlight=False,
    )


def truncated(count: int, unit: int) -> str:
    """A count in a unit with two decimals, the others cut off, as Table 3 has them: `5,572.69`."""
    return f"{count * 100 // unit / 100:,.2f}"


def _parts(model: LavitaTransformer3DModel) -> dict[str, str]:
    """Which part a module is of, by its path; every layer is in exactly one of these modules."""
    parts = {"x_embedder": PATCH_EMBEDDING, "t_embedder": CONDITION_EMBEDDING, "y_embedder": CONDITION_EMBEDDING}
    attention = {"space": SPATIAL_ATTENTION, "time": TEMPORAL_ATTENTION, "space_and_time": JOINT_ATTENTION}
    for index, block in enumerate(model.blocks):
        parts[f"blocks.{index}.attn"] = attention.get(str(block.mixing), SPATIAL_ATTENTION)
        parts[f"blocks.{index}.temporal_attn"] = TEMPORAL_ATTENTION
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
    """Multiply-accumulates among a module's counts by operation, which are of FLOPs, but for the norms."""
    return sum(flops for operation, flops in counts.items() if operation is not torch.ops.aten.native_layer_norm) // 2


def _norm_operations(shape: torch.Size, *_: Any, **__: Any) -> int:
    """What thop takes a LayerNorm without weights for."""
    return 2 * math.prod(shape)


def _repeated_modulation(shapes: Mapping[nn.Module, torch.Size]) -> int:
    """Multiply-accumulates of S-AdaLN's layers if repeated as in Table 3, by the tokens (B, F, N, D) of each module."""
    macs = 0
    for module, (batch, frames, tokens, _) in shapes.items():
        if isinstance(module.adaLN_modulation, nn.Sequential):
            linear = module.adaLN_modulation[1]
            assert isinstance(linear, nn.Linear)
            mixing = getattr(module, "mixing", "space")  # the decoder works frame by frame
            rows = (mixing != "time") * frames + (mixing != "space") * tokens
            macs += batch * rows * linear.in_features * linear.out_features
    return macs
