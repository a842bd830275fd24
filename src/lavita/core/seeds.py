"""Random number generators that are pure functions of a seed and a stream name."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

DRAWS = 2
"""Version of what is drawn from a seed: runs, samples and classifiers of another one cannot be continued."""

_WORDS = 624
"""Words of 32 bits in the state of a Mersenne twister."""


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A CPU generator whose state is a pure function of `seed` and the names and numbers of a stream.

    There is no other random state, so a resumed run draws exactly what an uninterrupted one would have drawn. Torch's
    `manual_seed` uses the low 32 bits of a seed only, so that two of 100,000 samples would probably have the same
    noise; here a hash as long as the state of the Mersenne twister fills it.
    """
    digest = hashlib.shake_256(repr((seed, *stream)).encode()).digest(8 + 4 * _WORDS)
    state = _fresh_state().copy()
    # Torch's layout: the seed, the position in two fields, then the words, each in 8 bytes.
    state[0] = np.frombuffer(digest, "<u8", 1)[0]
    state[3 : 3 + _WORDS] = np.frombuffer(digest, "<u4", offset=8)
    found = torch.Generator()
    found.set_state(torch.from_numpy(state.view(np.uint8)))
    return found


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    """The numpy counterpart of `generator`."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


@cache
def _fresh_state() -> npt.NDArray[np.uint64]:
    """The state of a generator that has drawn nothing."""
    state = torch.Generator().manual_seed(0).get_state().numpy().view(np.uint64)
    assert len(state) == _WORDS + 8, "another version of torch, with another layout"
    return state
