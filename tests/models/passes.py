"""Inputs of tiny transformers, their passes and gradients, and processes that train one model together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from lavita.models.cross_attention import text_shape
from lavita.models.transformer import LavitaTransformer3DModel

Gradients = dict[str, torch.Tensor]

KINDS = [
    {"variant": variant, "conditioning": conditioning, "temporal_position": position}
    for variant, conditioning, position in itertools.product(
        (1, 2, 3, 4), ("s_adaln", "all_tokens"), ("absolute", "rope")
    )
]
CONDITIONS: dict[str, dict[str, int]] = {"classes": {"num_classes": 3}, "texts": {"text_dim": 5}, "nothing": {}}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
every_embedding = pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
every_condition = pytest.mark.parametrize("given", CONDITIONS.values(), ids=CONDITIONS)
bf16 = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def batch(model: LavitaTransformer3DModel, num_images: int = 0, seed: int = 0) -> dict[str, Any]:
    """Two clips, the images after them, and the conditions of all that have their own."""
    random = torch.Generator().manual_seed(seed)
    frames, size = model.config["num_frames"] + num_images, model.config["sample_size"]
    rows = (2, 1 + num_images) if num_images else (2,)
    given: dict[str, Any] = {
        "latents": torch.randn(2, frames, 4, size, size, generator=random),
        "timesteps": torch.tensor([3, 900]),
        "num_images": num_images,
    }
    if model.config["num_classes"]:
        given["class_labels"] = torch.randint(3, rows, generator=random)
    if model.config["text_dim"]:
        given["text_embeds"] = torch.randn(*rows, *text_shape(model.config), generator=random)
    return given


def backward(network: nn.Module, given: dict[str, Any], bf16: bool = False) -> torch.Tensor:
    """The output, whose mean square has been differentiated."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = network(**given).sample
    output.float().square().mean().backward()
    return output.detach()


def gradients(model: nn.Module) -> Gradients:
    """Gradients of all parameters, by name; sharded ones are gathered."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = whole.clone()
    return found


def fresh_model(**fields: Any) -> LavitaTransformer3DModel:
    """A tiny model with its initial weights."""
    return LavitaTransformer3DModel(**{**TINY, **fields})


@contextmanager
def process_group(rank: int, meeting: str, count: int = 2) -> Iterator[None]:
    """Joins processes that meet at a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    yield
    dist.barrier()  # gloo may hang if one process leaves while the other is still at work
    dist.destroy_process_group()


def run_in_two_processes(function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Runs `function(rank, meeting, *arguments)`, which enters `process_group`, in two processes."""
    spawn(function, (str(folder / "meeting"), *arguments), nprocs=2)
