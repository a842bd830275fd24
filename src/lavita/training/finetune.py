"""Fine-tuning: which parameters of a model with weights learn on, low-rank adapters, and how they are folded in.

A low-rank adapter adds `alpha / rank * B A` to the matrix of a layer and is all that learns of it (Hu et al. 2021,
Sec. 4.1). In a training model the layer `blocks.0.attn.qkv` then has the parameters `base_layer.weight`,
`base_layer.bias`, `lora_A.default.weight` and `lora_B.default.weight`, which are peft's names.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from lavita.core.files import write_text
from lavita.models.adapters import _BASE, _HIGH, _LOW
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.config import TrainConfig

LAYERS = {"qkv": "qkv", "proj": "proj", "fc1": "fc1", "fc2": "fc2", "adaLN_modulation": "adaLN_modulation.1"}
DEFAULT_TARGETS = ("qkv", "proj", "fc1", "fc2")
_FRESH = "init.json"


def temporal_parameters(model: LavitaTransformer3DModel) -> set[str]:
    """Names of the parameters that only videos pass: an image, which skips the temporal modules (A.4), needs none.

    In Variants 1 and 2 the temporal blocks whole, in Variant 3 the temporal attention of each block (and its norm,
    with all tokens), and in each of them what makes frames of tubes. In Variant 4 a layer's heads of both kinds share
    its parameters, so that only the latter is left.
    """
    prefixes = ["temporal_upsample."]
    for index, block in enumerate(model.blocks):
        if block.mixing == "time":
            prefixes.append(f"blocks.{index}.")
        elif block.mixing == "space_then_time":
            prefixes += [f"blocks.{index}.temporal_attn.", f"blocks.{index}.norm_temporal."]
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}


def prepare(model: LavitaTransformer3DModel, settings: TrainConfig, fresh: Set[str]) -> None:
    """Freezes what a run does not train, and adds its adapters; without `freeze` and `lora_rank` nothing changes.

    What learns:
        `train.freeze=temporal`: all but `temporal_parameters`.
        `train.freeze=spatial`: the temporal parameters only, so that the model's images stay what they were.
        `train.lora_rank`: adapters, which change nothing at first, of the layers that would learn without it.
        In each case the fresh parameters besides, whole: nothing else can give them values.

    Args:
        model: a plain one, on the device of the training; before optimizer, average, or anything that wraps it. Its
            weights play no part, so that the same call makes the structure that a checkpoint is loaded into.
        settings: the configuration of the training.
        fresh: names of the parameters that owe something to chance or to zeros (`LoadReport.fresh`).

    Raises:
        ValueError: where what should freeze has learned nothing, no layer is left to adapt, or peft is missing.
    """
    if settings.freeze is None and not settings.lora_rank:
        return
    names = {name for name, _ in model.named_parameters()}
    temporal = temporal_parameters(model)
    learning = {None: names, "temporal": names - temporal, "spatial": temporal}[settings.freeze]
    unlearned = sorted(fresh & temporal)
    if settings.freeze == "temporal" and unlearned:
        more = f" and {len(unlearned) - 2} more" if len(unlearned) > 2 else ""
        raise ValueError(
            f"train.freeze is 'temporal', but {settings.init_from} leaves temporal parameters to be learned "
            f"({', '.join(unlearned[:2])}{more}); allowed: 'spatial' or none"
        )
    if settings.lora_rank:
        _add_adapters(model, settings, learning - fresh)
        learning = set()
    for name, parameter in model.named_parameters():
        plain = name.replace(_BASE, ".")
        parameter.requires_grad_(name.endswith((_LOW, _HIGH)) or plain in fresh or plain in learning)


def _add_adapters(model: LavitaTransformer3DModel, settings: TrainConfig, learning: Set[str]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f'train.lora_rank is {settings.lora_rank}, but needs the extra "lora": pip install "lavita[lora]"'
        ) from error
    chosen = settings.lora_targets or DEFAULT_TARGETS
    endings = tuple(f".{LAYERS[target]}.weight" for target in chosen)
    layers = [
        name.removesuffix(".weight")
        for name, _ in model.named_parameters()
        if name in learning and name.startswith("blocks.") and name.endswith(endings)
    ]
    if not layers:
        raise ValueError(
            f"train.lora_targets is {list(chosen)}, but no such layer of this model is there to adapt; allowed: "
            f"{', '.join(LAYERS)}, in blocks that train.freeze leaves and that start with weights"
        )
    alpha: Any = settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha  # peft says int, takes both
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=alpha,
        target_modules=layers,
        base_model_name_or_path=settings.init_from,
    )
    # Seeded on its own: a resumed run has drawn other numbers before, but must not draw others after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(adapters, model)


def trained_parameters(model: LavitaTransformer3DModel) -> str:
    """How many parameters a model has and how many learn, for people: `9.8 M parameters, 0.33 M of them learn`."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    some = "" if learning == everything else f", {learning / 1e6:.3g} M of them learn"
    return f"{everything / 1e6:.1f} M parameters{some}"


def write_fresh(run_dir: Path, fresh: Set[str]) -> None:
    """Keeps the names of the fresh parameters in `init.json`: a resumed run does not read its source again."""
    write_text(run_dir / _FRESH, json.dumps({"fresh": sorted(fresh)}, indent=1))


def read_fresh(run_dir: Path) -> set[str]:
    """What `write_fresh` kept; ValueError where there is no such file."""
    try:
        return set(json.loads((run_dir / _FRESH).read_text())["fresh"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run_dir / _FRESH}: missing or damaged, but a run with train.freeze or train.lora_rank is not resumed "
            "without it; use another run_dir"
        ) from error
