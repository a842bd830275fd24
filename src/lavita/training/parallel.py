"""One model on the processes of `torchrun`: whole on each (DDP), or a share of it on each (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lavita.core.config import ConfigError
from lavita.core.processes import Processes
from lavita.models.transformer import LavitaTransformer3DModel

Kind = Literal["auto", "ddp", "fsdp"]


class ParallelModel:
    """Calls a model so that the gradients of its parameters are means over all processes.

    Every process sees as many clips, so the mean over processes is the mean over the clips.
    """

    def __init__(self, model: LavitaTransformer3DModel, kind: Kind, team: Processes, device: torch.device) -> None:
        """Wraps or shards `model`, which all processes built alike; before optimizers and averages are made of it.

        Raises:
            ConfigError: where a single process is asked to share.
        """
        if kind != "auto" and team.count == 1:
            raise ConfigError(f"parallel is {kind}, but there is one process; start several with torchrun, or use auto")
        self.model = model
        self.is_sharded = kind == "fsdp"
        self._wrapped: nn.Module = model
        if self.is_sharded:
            mesh = init_device_mesh(device.type, (team.count,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            # The output is a view, which nothing here changes in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        elif team.count > 1:
            devices = [device] if device.type == "cuda" else None
            # Buffers are constants.
            self._wrapped = DistributedDataParallel(model, device_ids=devices, forward_sync_buffers=False)

    def __call__(self, *inputs: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """The model's `sample`, see `LavitaTransformer3DModel.forward`."""
        output: torch.Tensor = self._wrapped(*inputs, **options).sample
        return output

    @contextmanager
    def gradients_later(self, later: bool) -> Iterator[None]:
        """Within, gradients stay with their process and add up, where `later`: the last micro-batch exchanges them."""
        module: nn.Module = self.model
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not later)
        quiet = later and isinstance(self._wrapped, DistributedDataParallel)
        with self._wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield
