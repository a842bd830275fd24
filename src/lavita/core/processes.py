"""The processes that `torchrun` started: who this one is, and what all of them say."""

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
    """Which of how many processes this is; a lone one by default."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes what only one may."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of a list that are this process's work: every `count`-th."""
        return items[self.rank :: self.count]

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, in the order of their ranks, in each of them."""
        if self.count == 1:
            return [mine]
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return everyone

    def collect(self, mine: Sequence[Item]) -> list[Item]:
        """What each process made of the items that `share` gave it, one of each, in the order of the whole list."""
        everyone = self.gather(list(mine))
        return [everyone[i % self.count][i // self.count] for i in range(sum(map(len, everyone)))]

    def first_says(self, mine: Any) -> Any:
        """What the first process has, in each of them."""
        if self.count == 1:
            return mine
        said = [mine]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process; the same answer in each of them."""
        return bool(sum_over(self, torch.tensor([float(flag)])).item())

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(timeout: timedelta = timedelta(days=2)) -> Iterator[Processes]:
    """Joins the processes that `torchrun` started; a lone one elsewhere.

    Args:
        timeout: how long they wait for each other; by default as long as one may sample or encode alone.
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
        team.wait()  # one that leaves early would cut off what the others still exchange
    finally:
        dist.destroy_process_group()


def sum_over(team: Processes, values: torch.Tensor) -> torch.Tensor:
    """Sums of CPU values over all processes, in each of them."""
    if team.count > 1:
        dist.all_reduce(values)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together in every process; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
