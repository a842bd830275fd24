"""Gradient checkpointing: of whole blocks, or only of what is cheap to compute again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lavita.models.transformer import LavitaTransformer3DModel

# What is computed again in the backward pass: nothing (False), whole blocks (True), or all of a block except its matrix
# products ("cheap").
Checkpointing = bool | Literal["cheap"]

_PRODUCTS = {
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.lavita.exchange.default,  # communication is not cheap
}


def checkpoint_blocks(model: LavitaTransformer3DModel, kind: Checkpointing) -> None:
    """Enables a model's gradient checkpointing, unless `kind` is False."""
    if kind:
        model.enable_gradient_checkpointing(checkpoint_cheap if kind == "cheap" else None)


def _keep_products(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_cheap(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Calls a function such that autograd keeps its matrix products; norms, gates, GELU and softmax run again."""
    contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    result: torch.Tensor = checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
    return result
