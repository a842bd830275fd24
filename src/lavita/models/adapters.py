"""Low-rank adapters (LoRA): merging them into a model, saving them, and applying saved ones.

A low-rank adapter adds `alpha / rank * B A` to the matrix of a layer (Hu et al. 2021, Sec. 4.1). In a model with
adapters, the layer `blocks.0.attn.qkv` has the parameters `base_layer.weight`, `base_layer.bias`,
`lora_A.default.weight` and `lora_B.default.weight`: these names, and those of the files, are peft's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lavita.core.processes import whole
from lavita.models.finite import check_finite
from lavita.models.transformer import LavitaTransformer3DModel

_BASE, _LOW, _HIGH = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
# In a file, names begin with the prefix, and the adapter's own name, `default`, is left out.
_PREFIX, _SAVED_LOW, _SAVED_HIGH = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


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
        save_file(self.tensors, folder / _WEIGHTS_FILE, metadata={"format": "pt"})


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
        f"{_PREFIX}{name.replace('.default.', '.')}": whole(tensor).cpu().contiguous()
        for name, tensor in weights.items()
    }
    return Adapters(adapters["default"], tensors)


def apply_adapter(model: LavitaTransformer3DModel, folder: Path, scale: float = 1.0) -> None:
    """Merges saved adapters into a plain model, in place; peft is not needed.

    Args:
        model: the model that the adapters were trained on.
        folder: a folder in peft's layout, as written by `Adapters.save`.
        scale: factor of the adapters' change; 1 is the trained strength.

    Raises:
        ValueError: for a folder without adapters, with adapters of another model or another kind, or with values that
            are not finite.
    """
    try:
        settings = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS_FILE)
    except Exception as error:  # safetensors has its own class of errors for a damaged file
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: cannot be read as adapters ({_CONFIG_FILE}, {_WEIGHTS_FILE}): {why}") from error
    plain = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none"}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}
    for key, allowed in plain.items():
        if settings.get(key, allowed) != allowed:
            raise ValueError(f"{folder}: {key} is {settings[key]!r}; allowed: {allowed!r}")
    try:
        factor = scale * float(settings["lora_alpha"]) / float(settings["r"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: {_CONFIG_FILE} needs numbers lora_alpha and r, r above 0") from error
    state, changes = model.state_dict(), {}
    layers = {name.removesuffix(_SAVED_LOW) for name in tensors if name.endswith(_SAVED_LOW)}
    expected = {f"{layer}{part}" for layer in layers for part in (_SAVED_LOW, _SAVED_HIGH)}
    if not layers or tensors.keys() != expected:
        unpaired = sorted(tensors.keys() ^ expected)[:1]
        raise ValueError(f"{folder}: holds an incomplete set of adapters" + (f" ({unpaired[0]})" if unpaired else ""))
    for layer in sorted(layers):
        name = f"{layer.removeprefix(_PREFIX)}.weight"
        low, high = tensors[f"{layer}{_SAVED_LOW}"].float(), tensors[f"{layer}{_SAVED_HIGH}"].float()
        shape = (high.shape[0], low.shape[1])
        if name not in state or state[name].shape != shape:
            has = f"has {tuple(state[name].shape)}" if name in state else "has none"
            raise ValueError(f"{folder}: adapts {name} {shape}, but this model {has}: they are of another model")
        changes[name] = factor * (high @ low)
    check_finite(f"{folder}, with a factor of {factor:g}", changes)
    with torch.no_grad():
        for name, change in changes.items():
            state[name].add_(change.to(state[name]))
