"""Low-rank adapters (LoRA): merging them into a model, saving them, and applying saved ones.

A low-rank adapter adds `alpha / rank * B A` to the matrix of a layer (Hu et al. 2021, Sec. 4.1). In a model with
adapters, the layer `blocks.0.attn.qkv` has the parameters `base_layer.weight`, `base_layer.bias`,
`lora_A.default.weight` and `lora_B.default.weight`: these names, and those of the files, are peft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lavita.core.processes import whole
from lavita.models.adapter_files import PEFT_PREFIX, WEIGHTS_FILE, Change, read_changes
from lavita.models.finite import check_finite
from lavita.models.transformer import LavitaTransformer3DModel

_BASE, _LOW, _HIGH = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return name.endswith((_LOW, _HIGH))


def plain_name(name: str) -> str:
    """The name that a parameter has in a model without adapters."""
    return name.replace(_BASE, ".")


def adapter_scale(model: LavitaTransformer3DModel) -> float | None:
    """Alpha / rank of a model's adapters; None for a model without adapters."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            return float(layer.scaling["default"])
    return None


def merge_state(state: Mapping[str, torch.Tensor], scale: float | None) -> dict[str, torch.Tensor]:
    """Merges the adapters in a state dict into its matrices.

    Args:
        state: state dict of a model with or without adapters; no tensor is sharded.
        scale: `adapter_scale` of that model.

    Returns:
        State dict of a plain model: a matrix W with an adapter becomes W + scale B A; other tensors stay the same.
    """
    merged = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name and scale is not None:
            change = state[f"{layer}{_HIGH}"].float() @ state[f"{layer}{_LOW}"].float()
            tensor = (tensor.float() + scale * change).to(tensor.dtype)
        merged[plain_name(name)] = tensor
    return merged


@dataclass(frozen=True)
class Adapters:
    """Adapters without their model."""

    config: Any
    """Peft's `LoraConfig`."""
    tensors: dict[str, torch.Tensor]
    """Matrices of the adapters, under the names that they have in a file."""

    def save(self, folder: Path) -> None:
        """Writes peft's `adapter_config.json` and `adapter_model.safetensors`; creates the folder if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_file(self.tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def saved_adapters(model: LavitaTransformer3DModel, weights: Mapping[str, torch.Tensor]) -> Adapters | None:
    """Extracts the adapters of a model in training, which fit the model that the training started from.

    If the weights are sharded, every process must call this function.

    Args:
        model: the model, with its adapters.
        weights: values of its trainable parameters by name, for example their averages.

    Returns:
        The adapters. None for a model without adapters, and for a model that trains other parameters, too (a table of
        new classes, for example), because its adapters are useless without them.
    """
    if adapter_scale(model) is None or not all(map(is_adapter, weights)):
        return None
    adapters: Any = model.peft_config
    tensors = {
        f"{PEFT_PREFIX}{name.replace('.default.', '.')}": whole(tensor).cpu().contiguous()
        for name, tensor in weights.items()
    }
    return Adapters(adapters["default"], tensors)


def apply_adapter(model: LavitaTransformer3DModel, source: Path, scale: float = 1.0) -> None:
    """Merges saved adapters into a plain model, in place; peft is not needed.

    Args:
        model: the model that the adapters were trained on.
        source: see `adapter_files.read_changes`.
        scale: factor of the adapters' change; 1 is the trained strength.

    Raises:
        ValueError: for what holds no adapters, adapters of another model or another kind, or values that are not
            finite.
    """
    state, changes = model.state_dict(), {}
    factor = scale
    for layer, change in read_changes(source).items():
        factor = scale * change.factor
        name, shape = f"{layer}.weight", (change.high.shape[0], change.low.shape[1])
        if name not in state or state[name].shape != shape:
            has = f"has {tuple(state[name].shape)}" if name in state else "has none"
            raise ValueError(f"{source}: adapts {name} {shape}, but this model {has}: they are of another model")
        changes[name] = factor * (change.high @ change.low)
    check_finite(f"{source}, with a factor of {factor:g}", changes)
    with torch.no_grad():
        for name, difference in changes.items():
            state[name].add_(difference.to(state[name]))


def extract_changes(
    base: LavitaTransformer3DModel, tuned: LavitaTransformer3DModel, rank: int
) -> tuple[dict[str, Change], dict[str, float]]:
    """The best adapters of a rank for the difference of two models: its largest singular vectors.

    Args:
        base: the model that the adapters are for.
        tuned: a model with the same tensors, such as a fine-tuned one.
        rank: rank of each adapter, >= 1; a smaller matrix has a smaller one.

    Returns:
        The adapters by layer, and for each layer the norm of what they leave out, relative to that of the difference.
        Layers without a difference have none.

    Raises:
        ValueError: if the models have other tensors, or differ in tensors that adapters do not change.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, but must be at least 1")
    before, after = base.state_dict(), tuned.state_dict()
    layers = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    changes, left_out = {}, {}
    for name, tensor in before.items():
        if name not in after or after[name].shape != tensor.shape:
            raise ValueError(f"the models are of different kinds: {name} is not in both, or has another shape")
        difference = after[name].double() - tensor.double()
        if not difference.any():
            continue
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            raise ValueError(f"the models differ in {name}, which no adapter changes: keep the whole model")
        left, singular, right = torch.linalg.svd(difference, full_matrices=False)
        kept = min(rank, int((singular > singular[0] * 1e-7).sum()))
        root = singular[:kept].sqrt()
        high, low = left[:, :kept] * root, root[:, None] * right[:kept]
        changes[layer] = Change(low.float().contiguous(), high.float().contiguous(), 1.0)
        left_out[layer] = float(singular[kept:].norm() / singular.norm())
    return changes, left_out
