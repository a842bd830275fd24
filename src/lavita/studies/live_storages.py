"""Tracks how much memory operations on tensors need, part by part."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer's state"
AVERAGE = "moving average"
BATCH = "batch"
EXCHANGE = "exchange of processes"
AUTOENCODER = "autoencoder"
ACTIVATIONS = "activations and temporaries"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, AUTOENCODER, BATCH, EXCHANGE, ACTIVATIONS)


@dataclass(frozen=True)
class Peak:
    """The moment at which a process uses the most memory."""

    phase: str
    """What the process was doing."""
    parts: dict[str, int]
    """Bytes that were alive, by purpose, see `PARTS`."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """The peak as values that JSON can hold."""
        return {**asdict(self), "total": self.total}


class LiveStorages(TorchDispatchMode):
    """Tracks the storages that operations allocate and how long they live, and keeps the peak."""

    def __init__(self) -> None:
        """Starts without storages; `name` registers those that exist already."""
        super().__init__()
        self.phase = ""
        self.peak = Peak("", {})
        self._alive: dict[int, tuple[str, int, Any]] = {}  # the weak reference reports when the storage is freed
        self._bytes: Counter[str] = Counter()
        self._highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # `Tensor.item` without data: any finite value will do
        result = func(*args, **(kwargs or {}))
        self.name(ACTIVATIONS, tensors_in(result), keep=True)
        self._look()
        return result

    def name(self, part: str, tensors: Iterable[torch.Tensor], keep: bool = False) -> None:
        """Assigns the storages of tensors to a part; with `keep`, those that have a part keep it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._alive.get(key)
            if known is not None and keep:
                continue
            self._forget(key)
            size = storage.nbytes()
            self._alive[key] = (part, size, weakref.ref(storage, lambda _, key=key: self._forget(key)))  # type: ignore[misc]
            self._bytes[part] += size

    def begin(self, phase: str) -> None:
        """Names the phase that starts now."""
        self.phase = phase

    def restart(self) -> None:
        """Forgets the peak so far."""
        self._highest, self.peak = 0, Peak("", {})
        self._look()

    def _forget(self, key: int) -> None:
        if (known := self._alive.pop(key, None)) is not None:
            self._bytes[known[0]] -= known[1]

    def _look(self) -> None:
        total = sum(self._bytes.values())
        if total > self._highest:
            self._highest = total
            phase = "backward pass" if torch._C._current_graph_task_id() >= 0 else self.phase
            self.peak = Peak(phase, {part: self._bytes[part] for part in PARTS if self._bytes[part]})


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors of nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
