"""The processes that `torchrun` started: the rank of this one, and collective operations on Python values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The rank of this process among those that work together; by default it works alone."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of a list: every `count`-th item."""
        return items[self.rank :: self.count]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks; the same list in each process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def collect(self, results: Sequence[Item]) -> list[Item]:
        """The results of all processes in the order of the list that `share` divided.

        Args:
            results: one result for each item of this process's share.
        """
        shares = self.gather(list(results))
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def first_says(self, value: Any) -> Any:
        """The value of the first process, in each process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process; the same answer in each of them."""
        return bool(sum_over(self, torch.tensor([float(flag)])).item())

    def wait(self) -> None:
        """Returns once every process has called it."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(timeout: timedelta = timedelta(days=2)) -> Iterator[Processes]:
    """Joins the processes that `torchrun` started; without torchrun, yields a single process.

    Args:
        timeout: how long the processes wait for each other; the default allows one to sample or encode alone for long.
    """
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    team = Processes(dist.get_rank(), dist.get_world_size())
    try:
        yield team
        team.wait()  # a process that leaves early would break the others' communication
    finally:
        dist.destroy_process_group()


def sum_over(team: Processes, values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of a CPU tensor over all processes, in each process; `values` itself is changed."""
    if team.count > 1:
        dist.all_reduce(values)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered in every process; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
