"""Optimizers: AdamW, as in the paper, or Muon for the matrices of the blocks and AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from lavita.core.precision import Precision, low_precision
from lavita.core.processes import whole

# Coefficients of the quintic polynomial whose iteration moves singular values in (0, 1] to about 1 in the fewest steps
# (Jordan et al. 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def make_optimizers(
    model: nn.Module,
    kind: Literal["adamw", "muon"],
    learning_rate: float,
    weight_decay: float,
    precision: Precision = "fp32",
) -> list[torch.optim.Optimizer]:
    """The optimizers of a transformer; each parameter that requires gradients belongs to exactly one of them.

    Args:
        model: a `LavitaTransformer3DModel`.
        kind: `adamw` for all parameters; `muon` for the matrices of attention and MLP, with steps as large as those of
            AdamW at the same learning rate, and AdamW for embeddings, biases, S-AdaLN and the decoder.
        learning_rate: the learning rate of all parameters.
        weight_decay: decoupled weight decay of all parameters.
        precision: of the training; with bf16, Muon's iterations are in bf16, too, which takes less than half the time
            where the device has it.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [
        parameter
        for name, parameter in named
        if kind == "muon" and parameter.ndim == 2 and name.startswith("blocks.") and "adaLN_modulation" not in name
    ]
    chosen = set(map(id, matrices))
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay, fused=True))
    if matrices:
        bf16 = low_precision(matrices[0].device, precision) == torch.bfloat16
        optimizers.append(Muon(matrices, learning_rate, weight_decay, dtype=torch.bfloat16 if bf16 else torch.float32))
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Sets the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class Muon(torch.optim.Optimizer):
    """Steps along the semi-orthogonal matrix nearest to the momentum of each matrix (Jordan et al. 2024).

    The steps are scaled to the usual size of AdamW's (Liu et al. 2025, Eq. 4), so that the two share a learning rate.
    `torch.optim.Muon` computes the same, but always in bfloat16, which is 16 times slower on a CPU without bfloat16
    products, and without sharded matrices.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Takes two-dimensional parameters, the coefficient of Nesterov momentum and the iterations' dtype."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters from their gradients; closures are not supported."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                # Sharded matrices are gathered: each process computes the whole step and applies its share of it.
                averages = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                updates = orthogonalize(torch.stack([whole(average) for average in averages]), self._dtype)
                scale = 0.2 * max(shape) ** 0.5
                for parameter, average, update in zip(parameters, averages, updates, strict=True):
                    if isinstance(average, DTensor):
                        mesh = average.device_mesh
                        everywhere = DTensor.from_local(update, mesh, [Replicate()], run_check=False)
                        update = everywhere.redistribute(mesh, average.placements)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Moves the singular values of matrices close to 1 and keeps their singular vectors, by Newton-Schulz iterations.

    Args:
        matrices: float32 (M, rows, columns).
        dtype: of the iterations; bfloat16 changes the singular values by a few percent, which is less than they differ.

    Returns:
        Like `matrices`; singular values that were not tiny are between about 0.7 and 1.2.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    first, third, fifth = _COEFFICIENTS
    x = wide / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    x = x.to(dtype)
    for _ in range(_ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    x = x.to(matrices.dtype)
    return x if wide is matrices else x.transpose(1, 2)
