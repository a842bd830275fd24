"""Sequence parallelism: the processes of a group share each clip, so that each keeps a part of its activations.

Spatial attention needs all places of a frame, temporal attention all frames of a place, and every other layer a single
token. A process therefore has some of the frames while a block attends in space, and some of the places, in all frames,
while it attends in time; an all-to-all between the two is the only communication (Zhao et al. 2024, "DSP: Dynamic
Sequence Parallelism for Multi-Dimensional Transformers"). Frames and places need not divide evenly: their number is
rounded up by tokens that are zero, that no other token attends to, and that are left out on arrival.

Each process takes the whole clip and returns the whole prediction, so its loss is that of a process which works alone.
The gradient that reaches its parameters is its part of that of the sum of the losses of the group: their mean over the
group is the gradient.

Legend: B batch, F frames of a clip (tokens in time), N places (tokens per frame), D width, k processes of a group,
f = F / k and n = N / k, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from lavita.core.processes import Processes

_GROUPS: dict[str, dist.ProcessGroup] = {}
"""Torch's process groups by name: an operator takes no other arguments than tensors, numbers and texts."""


@torch.library.custom_op("lavita::exchange", mutates_args=())
def exchange(parts: torch.Tensor, group: str) -> torch.Tensor:
    """All-to-all: sends part i to the i-th process of a group, and returns the parts that the processes sent here.

    An operator of its own, which compiled blocks and rehearsals without data take as one step.

    Args:
        parts: (k, ...), contiguous.
        group: name of a group of `open_group`.
    """
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_GROUPS[group])
    return received


@exchange.register_fake
def _exchange_without_data(parts: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty_like(parts)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.group = inputs[1]


def _exchange_back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return exchange(gradient.contiguous(), ctx.group), None


exchange.register_autograd(_exchange_back, setup_context=_keep_group)


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a clip, seen from one of them."""

    name: str
    """Name of torch's process group."""
    rank: int
    count: int
    """k."""


@dataclass(frozen=True)
class SharedClip:
    """The tokens of a clip that a group shares."""

    group: SequenceGroup
    num_frames: int
    """F, images included."""

    def own(self, x: torch.Tensor, axis: int = 1, unit: int = 1) -> torch.Tensor:
        """This process's frames, f of F, the last ones zero if k does not divide F.

        Args:
            x: any tensor with F frames, of `unit` entries each, along the axis.
            axis: the axis.
            unit: entries of a frame, which stay together.
        """
        part = unit * -(-self.num_frames // self.group.count)
        start = min(part * self.group.rank, x.shape[axis])
        own = x.narrow(axis, start, min(part, x.shape[axis] - start))
        return _padded(own, axis, part)

    def to_places(self, x: torch.Tensor) -> torch.Tensor:
        """From some frames with all places, (B, f, N, D), to all frames with some places, (B, F, n, D)."""
        count = self.group.count
        parts = _padded(x, 2, -(-x.shape[2] // count) * count).unflatten(2, (count, -1))  # (B, f, k, n, D)
        received = exchange(parts.movedim(2, 0).contiguous(), self.group.name)  # (k, B, f, n, D)
        return received.movedim(0, 1).flatten(1, 2)[:, : self.num_frames]

    def to_frames(self, x: torch.Tensor, num_places: int) -> torch.Tensor:
        """From all frames with some places, (B, F, n, D), to some frames with all N places, (B, f, N, D)."""
        count = self.group.count
        parts = _padded(x, 1, -(-self.num_frames // count) * count).unflatten(1, (count, -1))  # (B, k, f, n, D)
        received = exchange(parts.movedim(1, 0).contiguous(), self.group.name)  # (k, B, f, n, D)
        return received.movedim(0, 2).flatten(2, 3)[:, :, :num_places]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """From the frames of each process, (B, f, ...), to all of them in every process, (B, F, ...)."""
        copies = x.expand(self.group.count, *x.shape).contiguous()
        return exchange(copies, self.group.name).movedim(0, 1).flatten(1, 2)[:, : self.num_frames]

    def attend_in_time(
        self, attend: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_video: int
    ) -> torch.Tensor:
        """Temporal attention within a block that works on frames: there to the places and back.

        Args:
            attend: the attention, of the video's frames at some places, (B, V, n, D).
            x: (B, f, N, D).
            num_video: V; the other frames are images, which get zeros.
        """
        mixed = attend(self.to_places(x)[:, :num_video])
        return self.to_frames(_padded(mixed, 1, self.num_frames), x.shape[2])


def open_group(team: Processes, device: torch.device) -> SequenceGroup | None:
    """The group of this process, for a model's `sequence_group`; None if each process works alone.

    All processes of the team call this together. From then on those of a group evaluate the model together, with the
    same inputs.

    Args:
        team: the processes; `Processes.grouped` divides them.
        device: the device of the model.
    """
    if team.members == 1:
        return None
    mesh = init_device_mesh(device.type, (team.count, team.members), mesh_dim_names=("data", "sequence"))
    group = mesh.get_group("sequence")
    _GROUPS[group.group_name] = group
    return SequenceGroup(group.group_name, team.member, team.members)


def own_frames(x: torch.Tensor, shared: SharedClip | None, axis: int = 1, unit: int = 1) -> torch.Tensor:
    """See `SharedClip.own`; all frames of a clip that is not shared."""
    return x if shared is None else shared.own(x, axis, unit)


def arranged(x: torch.Tensor, shared: SharedClip | None, before: str, after: str, num_places: int) -> torch.Tensor:
    """The tokens as a block needs them: by places for one that attends in time only, by frames for any other.

    Args:
        x: the tokens, as the block before it left them.
        shared: the clip; None if it is not shared, and nothing is to be done.
        before: what the block before it mixes (see `blocks.Mixing`).
        after: what this block mixes.
        num_places: N.
    """
    if shared is None or (before == "time") == (after == "time"):
        return x
    return shared.to_places(x) if after == "time" else shared.to_frames(x, num_places)


def _padded(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A tensor with zeros at the end of an axis, up to a size."""
    missing = size - x.shape[axis]
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing)) if missing else x
