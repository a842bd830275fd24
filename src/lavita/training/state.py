"""The state of a training run: everything that an optimizer step changes and a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lavita.core.precision import low_precision
from lavita.core.processes import Processes
from lavita.models.flow import Objective, make_objective
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.checkpoint import Checkpoint
from lavita.training.config import TrainConfig
from lavita.training.ema import EMA
from lavita.training.optimizers import make_optimizers
from lavita.training.parallel import ParallelModel
from lavita.training.power_ema import PowerEMA
from lavita.training.stability import LossScale, StepGuard


@dataclass
class TrainState:
    """A model in training and everything that changes with it."""

    model: LavitaTransformer3DModel
    """In training mode; only the parameters that require gradients are trained. Sharded if `parallel` shards it."""
    parallel: ParallelModel
    """Calls the model; its gradients are means over all processes."""
    diffusion: Objective
    """The objective."""
    ema: EMA
    optimizers: list[torch.optim.Optimizer]
    guard: StepGuard
    scale: LossScale
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    power: list[PowerEMA] = field(default_factory=list)
    """Further averages, for `power_ema.reconstruct`."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of the metrics."""

    def __post_init__(self) -> None:
        """Lists the parameters that are trained."""
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @classmethod
    def build(
        cls,
        model: LavitaTransformer3DModel,
        settings: TrainConfig,
        device: torch.device,
        team: Processes | None = None,
    ) -> TrainState:
        """The state before the first step.

        Args:
            model: on `device`, in training mode, already with frozen parameters and adapters; all processes have built
                the same one.
            settings: parallelism, optimizer, EMA decay, precision and spike factor.
            device: the device of the model.
            team: the processes that share each batch; by default one.

        Raises:
            ConfigError: if `settings.parallel` needs several processes and there is one.
        """
        parallel = ParallelModel(model, settings.parallel, team or Processes(), device)
        return cls(
            model=model,
            parallel=parallel,
            diffusion=make_objective(model.config["prediction_type"]),
            ema=EMA(model, settings.ema_decay, settings.ema_warmup),
            optimizers=make_optimizers(
                model, settings.optimizer, settings.learning_rate, settings.weight_decay, settings.precision
            ),
            guard=StepGuard(settings.spike_factor),
            power=[PowerEMA(model, length) for length in settings.power_ema],
            scale=LossScale(low_precision(device, settings.precision) == torch.float16),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint: `training_tensors`, and the further averages."""
        return training_tensors(self.model, self.ema, self.optimizers) | self._power_tensors()

    def _power_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"power_ema.{average.sigma_rel:g}.{name}": tensor
            for average in self.power
            for name, tensor in average.weights.items()
        }

    def facts(self) -> dict[str, Any]:
        """The other contents of a checkpoint, except for the step: values that JSON can hold."""
        return {"losses": self.losses, "guard": self.guard.state(), "loss_scale": self.scale.state()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint of the same model, written by any number of processes, sharded or not.

        Raises:
            ValueError: if the checkpoint belongs to another model.
        """
        restore_training(checkpoint, self.model, self.ema, self.optimizers)
        checkpoint.read(self._power_tensors())
        self.guard.restore(checkpoint.facts["guard"])
        self.scale.restore(checkpoint.facts["loss_scale"])
        self.step, self.losses = checkpoint.step, checkpoint.facts["losses"]


def training_tensors(
    model: nn.Module, ema: EMA | None, optimizers: list[torch.optim.Optimizer], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """All tensors of a training run by name: the weights, their averages if any, and the state of the optimizers.

    The names begin with `prefix`, so that a checkpoint can hold several models.
    """
    tensors = {f"{prefix}model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"{prefix}ema.{name}": tensor for name, tensor in ema.weights.items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"{prefix}optimizer.{names[parameter]}.{key}": tensor for key, tensor in state.items()}
    return tensors


def restore_training(
    checkpoint: Checkpoint,
    model: nn.Module,
    ema: EMA | None,
    optimizers: list[torch.optim.Optimizer],
    prefix: str = "",
) -> None:
    """Reads the tensors that `training_tensors` named into a model, its averages and its optimizers.

    Raises:
        ValueError: if the checkpoint belongs to another model.
    """
    for optimizer in optimizers:
        learning = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            start = f"{prefix}optimizer.{name}."
            for key, outline in checkpoint.outlines.items():
                if parameter in learning and key.startswith(start):
                    # A moment has its parameter's shape and is sharded like it; step counts are scalars on the CPU.
                    is_moment = outline.shape == parameter.shape
                    empty = torch.zeros_like(parameter) if is_moment else torch.zeros_like(outline, device="cpu")
                    optimizer.state[parameter][key.removeprefix(start)] = empty.detach()
    checkpoint.read(training_tensors(model, ema, optimizers, prefix))
