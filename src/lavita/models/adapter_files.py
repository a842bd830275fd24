"""Files of low-rank adapters, in the two forms that the community shares them in.

- A folder of peft: `adapter_config.json` and `adapter_model.safetensors`, whose tensors are called
  `base_model.model.<layer>.lora_A.weight`.
- One file of diffusers, such as `pytorch_lora_weights.safetensors`: `transformer.<layer>.lora_A.weight`, and perhaps
  `transformer.<layer>.alpha`. The strength is alpha / rank; without an alpha, and without peft's settings in the file's
  metadata, it is 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lavita.core.files import replacing, write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
_LOW, _HIGH, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_METADATA = "lora_adapter_metadata"
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
}
"""Settings of peft without which an adapter is not `alpha / rank * B A`."""


@dataclass(frozen=True)
class Change:
    """The change of one layer's matrix: `factor * high @ low`."""

    low: torch.Tensor
    """A: float32 (rank, in)."""
    high: torch.Tensor
    """B: float32 (out, rank)."""
    factor: float


def read_changes(source: Path) -> dict[str, Change]:
    """Reads adapters by the name of their layer.

    Args:
        source: a folder of peft or of diffusers, or a file of diffusers (.safetensors).

    Raises:
        ValueError: for what holds no adapters, an incomplete set, or adapters of another kind.
    """
    file = source
    if source.is_dir():
        found = sorted(source.glob("*.safetensors"))
        file = source / WEIGHTS_FILE
        if not file.exists() and len(found) == 1:
            file = found[0]
    in_folder = file.name == WEIGHTS_FILE
    try:
        settings = _settings(file, in_folder)
        tensors = load_file(file)
    except Exception as error:  # safetensors has its own class of errors for a damaged file
        why = " ".join(str(error).split())[:200]
        what = f"({CONFIG_FILE}, {WEIGHTS_FILE})" if source.is_dir() or in_folder else "(.safetensors)"
        raise ValueError(f"{source}: cannot be read as adapters {what}: {why}") from error
    for key, allowed in _PLAIN.items():
        if settings.get(key, allowed) != allowed:
            raise ValueError(f"{source}: {key} is {settings[key]!r}; allowed: {allowed!r}")
    prefix = PEFT_PREFIX if in_folder else DIFFUSERS_PREFIX
    alphas = {name.removesuffix(_ALPHA): tensors.pop(name) for name in list(tensors) if name.endswith(_ALPHA)}
    layers = {name.removesuffix(_LOW) for name in tensors if name.endswith(_LOW)}
    expected = {f"{layer}{part}" for layer in layers for part in (_LOW, _HIGH)}
    if not layers or tensors.keys() != expected or not alphas.keys() <= layers:
        unpaired = sorted((tensors.keys() ^ expected) | (alphas.keys() - layers))[:1]
        raise ValueError(f"{source}: holds an incomplete set of adapters" + (f" ({unpaired[0]})" if unpaired else ""))
    changes = {}
    for layer in sorted(layers):
        low, high = tensors[f"{layer}{_LOW}"].float(), tensors[f"{layer}{_HIGH}"].float()
        if low.ndim != 2 or high.ndim != 2 or len(low) != high.shape[1]:
            raise ValueError(
                f"{source}: the matrices of {layer} are {tuple(low.shape)} and {tuple(high.shape)}, and do not fit"
            )
        if layer in alphas:
            factor = float(alphas[layer]) / len(low)
        elif "lora_alpha" in settings or "r" in settings or in_folder:
            try:
                factor = float(settings["lora_alpha"]) / float(settings["r"])
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise ValueError(f"{source}: {CONFIG_FILE} needs numbers lora_alpha and r, r above 0") from error
        else:
            factor = 1.0
        changes[layer.removeprefix(prefix)] = Change(low, high, factor)
    return changes


def _settings(file: Path, in_folder: bool) -> dict[str, Any]:
    """Peft's settings: beside the file, or in its metadata; empty if there are none."""
    if in_folder:
        settings = json.loads((file.parent / CONFIG_FILE).read_text(encoding="utf-8"))
    else:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_METADATA, "{}")
        prefix = DIFFUSERS_PREFIX
        settings = {key.removeprefix(prefix): value for key, value in json.loads(text).items()}
    if not isinstance(settings, dict):
        raise TypeError("its settings are no object")
    return settings


def write_changes(out: Path, changes: Mapping[str, Change]) -> None:
    """Writes adapters: a file of diffusers if `out` ends in .safetensors, else a folder of peft.

    The strength goes into the second matrix, so that it is 1 for every reader.
    """
    weights = {}
    as_file = out.suffix == ".safetensors"
    prefix = DIFFUSERS_PREFIX if as_file else PEFT_PREFIX
    for layer, change in changes.items():
        weights[f"{prefix}{layer}{_LOW}"] = change.low.contiguous()
        weights[f"{prefix}{layer}{_HIGH}"] = (change.factor * change.high).contiguous()
    ranks = {len(change.low) for change in changes.values()}
    if as_file:
        with replacing(out) as partial:
            save_file(weights, partial, metadata={"format": "pt"})
        return
    rank = max(ranks)
    for layer, change in changes.items():  # peft has one rank for all layers: zeros fill the smaller ones
        missing = rank - len(change.low)
        low, high = weights[f"{prefix}{layer}{_LOW}"], weights[f"{prefix}{layer}{_HIGH}"]
        weights[f"{prefix}{layer}{_LOW}"] = torch.nn.functional.pad(low, (0, 0, 0, missing))
        weights[f"{prefix}{layer}{_HIGH}"] = torch.nn.functional.pad(high, (0, missing))
    out.mkdir(parents=True, exist_ok=True)
    settings = {**_PLAIN, "r": rank, "lora_alpha": rank, "target_modules": sorted(changes), "task_type": None}
    write_json(out / CONFIG_FILE, {**settings, "inference_mode": True, "base_model_name_or_path": None})
    with replacing(out / WEIGHTS_FILE) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
