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

from lavita.core.config import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The rank of this process among those that work together; by default it works alone.

    Processes may work in groups, which do together what a process would do alone: `rank` and `count` are then those of
    the groups, and every process of a group calls the methods below alike.
    """

    rank: int = 0
    count: int = 1
    member: int = 0
    """Rank of this process in its group."""
    members: int = 1
    """Processes of a group."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == self.member == 0

    @property
    def everyone(self) -> Processes:
        """The same processes, each on its own."""
        return Processes(self.rank * self.members + self.member, self.count * self.members)

    def grouped(self, members: int) -> Processes:
        """The same processes in groups of `members`, each of successive ranks, that share clips.

        Raises:
            ConfigError: if that does not divide their number.
        """
        each = self.everyone
        if members < 1 or each.count % members:
            several = "" if each.count > 1 else "; start several with torchrun"
            raise ConfigError(f"sequence_parallel is {members}, but must divide the processes ({each.count}){several}")
        return Processes(each.rank // members, each.count // members, each.rank % members, members)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of a list: every `count`-th item."""
        return items[self.rank :: self.count]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks, one per group; the same list in each process."""
        count = self.everyone.count
        if count == 1:
            return [value]
        values: list[Any] = [None] * count
        dist.all_gather_object(values, value)
        return values[:: self.members]

    def collect(self, results: Sequence[Item]) -> list[Item]:
        """The results of all processes in the order of the list that `share` divided.

        Args:
            results: one result for each item of this process's share.
        """
        shares = self.gather(list(results))
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def first_says(self, value: Any) -> Any:
        """The value of the first process, in each process."""
        if self.everyone.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process; the same answer in each of them."""
        return bool(sum_over(self.everyone, torch.tensor([float(flag)])).item())

    def wait(self) -> None:
        """Returns once every process has called it."""
        if self.everyone.count > 1:
            dist.barrier()


@contextmanager
def processes(timeout: timedelta = timedelta(days=2), members: int = 1) -> Iterator[Processes]:
    """Joins the processes that `torchrun` started; without torchrun, yields a single process.

    Args:
        timeout: how long the processes wait for each other; the default allows one to sample or encode alone for long.
        members: processes that share a clip, see `Processes.grouped`.

    Raises:
        ConfigError: if `members` does not divide the number of processes.
    """
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size()).grouped(members)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes().grouped(members)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    try:
        team = Processes(dist.get_rank(), dist.get_world_size()).grouped(members)
        yield team
        team.wait()  # a process that leaves early would break the others' communication
    finally:
        dist.destroy_process_group()


def sum_over(team: Processes, values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of a CPU tensor over processes, or groups, in each process; `values` itself is changed."""
    if team.member:
        values.zero_()  # a group counts once
    if team.everyone.count > 1:
        dist.all_reduce(values)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered in every process; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
