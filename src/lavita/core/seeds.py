"""Random number generators that are pure functions of a seed and a stream name."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A CPU generator seeded by a pure function of `seed` and the names and numbers of a stream.

    There is no other random state, so a resumed run draws exactly what an uninterrupted one would have drawn.
    """
    return torch.Generator().manual_seed(int(numpy_generator(seed, *stream).integers(2**63)))


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    """The numpy counterpart of `generator`."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
