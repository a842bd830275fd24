"""A model on several processes of `torchrun`: a copy on each (DDP), or a shard of it on each (FSDP2).

Either way, groups of processes may share each clip (`models.sequence_parallel`).
"""

from __future__ import annotations

import inspect
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
from lavita.models.sequence_parallel import open_group
from lavita.models.transformer import LavitaTransformer3DModel

Kind = Literal["auto", "ddp", "fsdp"]


class ParallelModel:
    """Calls a model so that the gradients of its parameters are means over all processes.

    Every process has the same number of clips, so the mean over processes is the mean over clips; and the mean over a
    group that shares clips is their gradient.
    """

    def __init__(self, model: LavitaTransformer3DModel, kind: Kind, team: Processes, device: torch.device) -> None:
        """Wraps or shards a model, before optimizers and averages are made of it.

        Args:
            model: on `device`; all processes have built the same one.
            kind: `ddp`, `fsdp`, or `auto`, which is `ddp` with several processes.
            team: the processes.
            device: the device of the model.

        Raises:
            ConfigError: if `kind` is not `auto` and there is a single process.
        """
        count = team.everyone.count
        if kind != "auto" and count == 1:
            raise ConfigError(f"parallel is {kind}, but there is one process; start several with torchrun, or use auto")
        self.model = model
        model.sequence_group = open_group(team, device)
        self.is_sharded = kind == "fsdp"
        self._wrapped: nn.Module = model
        if self.is_sharded:
            mesh = init_device_mesh(device.type, (count,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            # The warning is about in-place changes of outputs that are views; nothing changes the output in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        elif count > 1:
            devices = [device] if device.type == "cuda" else None
            # The buffers are constants and need no synchronization.
            # Torch 2.13 renamed the argument.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {name: False}
            self._wrapped = DistributedDataParallel(model, device_ids=devices, **options)

    def __call__(self, *inputs: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """The `sample` of the model's output, see `LavitaTransformer3DModel.forward`."""
        output: torch.Tensor = self._wrapped(*inputs, **options).sample
        return output

    @contextmanager
    def gradients_later(self, later: bool) -> Iterator[None]:
        """A context in which gradients only add up locally if `later`; the last micro-batch exchanges them."""
        module: nn.Module = self.model
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not later)
        quiet = later and isinstance(self._wrapped, DistributedDataParallel)
        with self._wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield
