"""Checks of the transformer's inputs."""

from __future__ import annotations

import torch


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, but must have {expected}")
