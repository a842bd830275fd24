"""The state of a training run: what a checkpoint holds."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from lavita.core.processes import Processes
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.fingerprint import fingerprint
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.checkpoint import Checkpoint, load_last_checkpoint
from lavita.training.config import RunConfig
from lavita.training.ema import EMA
from lavita.training.stability import LossScale, StepGuard


def training_tensors(model: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """All tensors of a training run by name: weights, their averages, and the optimizers' state."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.weights.items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": tensor for key, tensor in state.items()}
    return tensors


def restore_training(
    checkpoint: Checkpoint, model: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Reads what `training_tensors` named into model, averages and optimizers.

    Raises:
        ValueError: where the checkpoint is of another model.
    """
    for optimizer in optimizers:
        learning = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            for key, outline in checkpoint.outlines.items():
                if parameter in learning and key.startswith(prefix):
                    # Moments are sharded as their parameter is.
                    alike = outline.shape == parameter.shape
                    place = torch.zeros_like(parameter) if alike else torch.zeros_like(outline, device="cpu")
                    optimizer.state[parameter][key.removeprefix(prefix)] = place.detach()
    checkpoint.read(training_tensors(model, ema, optimizers))


def resume(
    config: RunConfig,
    team: Processes,
    vae: AutoencoderKL,
    model: LavitaTransformer3DModel,
    ema: EMA,
    optimizers: list[torch.optim.Optimizer],
    guard: StepGuard,
    scale: LossScale,
) -> tuple[int, list[float]]:
    """Loads the last checkpoint of the run folder into all of them.

    Returns:
        The steps done, and the losses since the last line of the metrics.

    Raises:
        ValueError: where the checkpoint is of another model or autoencoder.
    """
    checkpoint = load_last_checkpoint(config.run_dir / "checkpoints", team)
    if checkpoint is None:
        return 0, []
    facts = model_facts(model)
    for key, value in checkpoint.facts["model_config"].items():
        if facts.get(key) != value:
            raise ValueError(
                f"{config.run_dir} holds a model with {key}={value}, but this data and configuration give "
                f"{facts.get(key)}; use another run_dir"
            )
    if checkpoint.facts["autoencoder"] != fingerprint(vae):
        raise ValueError(f"{config.run_dir} was trained with another autoencoder; use another run_dir")
    restore_training(checkpoint, model, ema, optimizers)
    guard.restore(checkpoint.facts["guard"])
    scale.restore(checkpoint.facts["loss_scale"])
    return checkpoint.step, checkpoint.facts["losses"]


def model_facts(model: LavitaTransformer3DModel) -> dict[str, Any]:
    """The fields of a model's configuration that a checkpoint must agree with, as JSON holds them."""
    return json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
