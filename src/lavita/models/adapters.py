"""Low-rank adapters (LoRA): training, merging, saving."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lavita.core.processes import whole
from lavita.models.transformer import LavitaTransformer3DModel

_LOW, _HIGH, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
# Peft's names on disk: these in front, and no name of the adapter.
_PREFIX, _SAVED_LOW, _SAVED_HIGH = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_scale(model: LavitaTransformer3DModel) -> float | None:
    """Alpha / rank of a model's adapters; None for a model without."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            return float(layer.scaling["default"])
    return None


def merge_state(state: Mapping[str, torch.Tensor], scale: float | None) -> dict[str, torch.Tensor]:
    """Folds the adapters of a state dict into its matrices.

    Args:
        state: by the names of a training model, with whole tensors.
        scale: `adapter_scale` of that model.

    Returns:
        The plain model's state dict; a matrix W with an adapter becomes W + scale B A, other tensors are the same.
    """
    merged = {}
    for name, tensor in state.items():
        if name.endswith((_LOW, _HIGH)):
            continue
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name and scale is not None:
            change = state[f"{layer}{_HIGH}"].float() @ state[f"{layer}{_LOW}"].float()
            tensor = (tensor.float() + scale * change).to(tensor.dtype)
        merged[name.replace(_BASE, ".")] = tensor
    return merged


@dataclass(frozen=True)
class Adapters:
    """Adapters apart from their model."""

    config: Any
    """Peft's `LoraConfig`."""
    tensors: dict[str, torch.Tensor]
    """By peft's names on disk."""

    def save(self, folder: Path) -> None:
        """Writes peft's `adapter_config.json` and `adapter_model.safetensors`; the folder is made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_file(self.tensors, folder / _ADAPTER_WEIGHTS, metadata={"format": "pt"})


def saved_adapters(model: LavitaTransformer3DModel, weights: Mapping[str, torch.Tensor]) -> Adapters | None:
    """The adapters of a training model, for others to add to the model that it started from.

    Every process calls it where the weights are sharded.

    Args:
        model: from `prepare`.
        weights: of its parameters that learn, by name: their averages, say.

    Returns:
        None for a model without adapters, and for one that trains other parameters besides, such as a table of new
        classes: without them, its adapters are of no use.
    """
    if adapter_scale(model) is None or not all(name.endswith((_LOW, _HIGH)) for name in weights):
        return None
    adapters: Any = model.peft_config
    tensors = {
        f"{_PREFIX}{name.replace('.default.', '.')}": whole(tensor).cpu().contiguous()
        for name, tensor in weights.items()
    }
    return Adapters(adapters["default"], tensors)


def apply_adapter(model: LavitaTransformer3DModel, folder: Path, scale: float = 1.0) -> None:
    """Folds saved adapters into a plain model, in place and without peft.

    Args:
        model: that which the adapters were trained on.
        folder: in peft's layout, as `Adapters.save` writes it.
        scale: how much of their change is added; 1 is what was trained.

    Raises:
        ValueError: for a folder without adapters, or with those of another model or of another kind.
    """
    try:
        settings = json.loads((folder / _ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / _ADAPTER_WEIGHTS)
    except Exception as error:  # safetensors raises its own kind for a damaged file
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: cannot be read as adapters ({_ADAPTER_CONFIG}, {_ADAPTER_WEIGHTS}): {why}"
        ) from error
    plain = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none"}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}
    for key, allowed in plain.items():
        if settings.get(key, allowed) != allowed:
            raise ValueError(f"{folder}: {key} is {settings[key]!r}; allowed: {allowed!r}")
    state, changed = model.state_dict(), {}
    layers = {name.removesuffix(_SAVED_LOW) for name in tensors if name.endswith(_SAVED_LOW)}
    expected = {f"{layer}{part}" for layer in layers for part in (_SAVED_LOW, _SAVED_HIGH)}
    if not layers or tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)[:1]
        raise ValueError(f"{folder}: holds no whole set of adapters" + (f" ({odd[0]})" if odd else ""))
    for layer in sorted(layers):
        name = f"{layer.removeprefix(_PREFIX)}.weight"
        low, high = tensors[f"{layer}{_SAVED_LOW}"].float(), tensors[f"{layer}{_SAVED_HIGH}"].float()
        shape = (high.shape[0], low.shape[1])
        if name not in state or state[name].shape != shape:
            has = f"has {tuple(state[name].shape)}" if name in state else "has none"
            raise ValueError(f"{folder}: adapts {name} {shape}, but this model {has}: they are of another model")
        changed[name] = scale * settings["lora_alpha"] / settings["r"] * (high @ low)
    with torch.no_grad():
        for name, change in changed.items():
            state[name].add_(change.to(state[name]))
