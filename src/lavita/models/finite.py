"""Checks that weights are complete and finite, before anything is computed with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_finite(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Checks the values of weights.

    Args:
        source: where they come from, for the message.
        tensors: the weights by name, of any dtype.

    Raises:
        ValueError: for the first tensor that is missing (on the meta device), infinite, or not a number.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{source}: its weights lack {name}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{source}: {name} holds {count:,} of {tensor.numel():,} values that are not finite (NaN or infinite)"
            )
