"""The same evaluation on several processes of `torchrun`: each does whole batches of one list, all get all results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, in the order of their ranks, in each of them."""
        if self.count == 1:
            return [mine]
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return everyone


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that `torchrun` started, joined by gloo; a lone one elsewhere."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        yield Processes()
        return
    # One process may sample or compute while the others wait.
    dist.init_process_group("gloo", timeout=timedelta(days=2))
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
