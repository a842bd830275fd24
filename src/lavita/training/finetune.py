"""Fine-tuning: which parameters of a pretrained model are trained, and low-rank adapters.

A low-rank adapter adds `alpha / rank * B A` to the matrix of a layer, and only A and B are trained (Hu et al. 2021,
Sec. 4.1). During training the layer `blocks.0.attn.qkv` then has the parameters `base_layer.weight`,
`base_layer.bias`, `lora_A.default.weight` and `lora_B.default.weight`, which are peft's names.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from lavita.core.files import write_text
from lavita.models.adapters import is_adapter, plain_name
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.config import TrainConfig

LAYERS = {
    "qkv": "qkv",
    "q": "q",
    "kv": "kv",
    "proj": "proj",
    "fc1": "fc1",
    "fc2": "fc2",
    "adaLN_modulation": "adaLN_modulation.1",
}
DEFAULT_TARGETS = ("qkv", "q", "kv", "proj", "fc1", "fc2")
_FRESH = "init.json"


def temporal_parameters(model: LavitaTransformer3DModel) -> set[str]:
    """Names of the parameters that only videos use: images skip the temporal modules (A.4).

    In Variants 1 and 2 these are the temporal blocks, in Variants 3 and 4 the temporal attention of each block (in
    Variant 3 also its norm, with all tokens); with tubes also the layer that turns tubes into frames.
    """
    prefixes = ["temporal_upsample."]
    for index, block in enumerate(model.blocks):
        if block.mixing == "time":
            prefixes.append(f"blocks.{index}.")
        elif block.temporal_attn is not None:
            prefixes += [f"blocks.{index}.temporal_attn.", f"blocks.{index}.norm_temporal."]
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}


def prepare(model: LavitaTransformer3DModel, settings: TrainConfig, fresh: Set[str]) -> None:
    """Freezes parameters and adds adapters as a run asks; without `freeze` and `lora_rank` nothing changes.

    These parameters are trained:
        `train.freeze=temporal`: all except `temporal_parameters`.
        `train.freeze=spatial`: only the temporal parameters, so that the model generates the same images as before.
        `train.lora_rank`: adapters of the layers that would be trained without them; at first they change nothing.
        In each case also the fresh parameters, without adapters: nothing else can give them values.

    Args:
        model: on the training device, before an optimizer, an average or a wrapper is made of it. Its weights do not
            matter, so that the same call builds the structure that a checkpoint is loaded into.
        settings: the configuration of the training.
        fresh: names of the parameters that are random or zero because they have no pretrained weights
            (`LoadReport.fresh`).

    Raises:
        ValueError: if fresh temporal parameters would be frozen, no layer can get an adapter, or peft is missing.
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
            f"train.freeze is 'temporal', but {settings.init_from} has no weights for some temporal parameters "
            f"({', '.join(unlearned[:2])}{more}); allowed: 'spatial' or none"
        )
    if settings.lora_rank:
        _add_adapters(model, settings, learning - fresh)
        learning = set()
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        parameter.requires_grad_(is_adapter(name) or plain in fresh or plain in learning)


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
            f"train.lora_targets is {list(chosen)}, but this model has no such layer to adapt; allowed: "
            f"{', '.join(LAYERS)}, in blocks that train.freeze does not freeze and that have pretrained weights"
        )
    # Annotated as int by peft, but a float works.
    alpha: Any = settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=alpha,
        target_modules=layers,
        base_model_name_or_path=settings.init_from,
    )
    # A generator state of its own: the adapters must be the same whatever numbers were drawn before, and drawing them
    # must not change the numbers drawn after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(adapters, model)


def trained_parameters(model: LavitaTransformer3DModel) -> str:
    """The number of parameters and of trained ones as text, for example `9.8 M parameters, 0.33 M of them trained`."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    some = "" if learning == everything else f", {learning / 1e6:.3g} M of them trained"
    return f"{everything / 1e6:.1f} M parameters{some}"


def write_fresh(run_dir: Path, fresh: Set[str]) -> None:
    """Writes the names of the fresh parameters to `init.json`: a resumed run does not read `train.init_from` again."""
    write_text(run_dir / _FRESH, json.dumps({"fresh": sorted(fresh)}, indent=1))


def read_fresh(run_dir: Path) -> set[str]:
    """The names that `write_fresh` wrote; ValueError if the file is missing or damaged."""
    try:
        return set(json.loads((run_dir / _FRESH).read_text(encoding="utf-8"))["fresh"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run_dir / _FRESH}: missing or damaged, but needed to resume a run with train.freeze or train.lora_rank; "
            "use another run_dir"
        ) from error
