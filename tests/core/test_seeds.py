"""Generators: as many different streams as seeds, and the numbers of a Mersenne twister, which numpy has, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lavita.core.seeds import generator


def words_of(random: torch.Generator) -> npt.NDArray[np.uint64]:
    return random.get_state().numpy().view(np.uint64)[3 : 3 + 624]


@pytest.mark.slow
def test_300_000_seeds_are_distinct() -> None:
    """With 32 bits, about ten pairs of them would be alike."""
    first = [torch.randn(2, generator=generator(seed, "sample")).numpy().tobytes() for seed in range(300_000)]
    assert len(set(first)) == len(first)


def test_samples_26970_and_160031_differ() -> None:
    one, other = (torch.randn(100, generator=generator(seed, "sample")) for seed in (26970, 160031))
    assert (one - other).abs().mean() > 0.5


def test_the_numbers_are_a_mersenne_twisters() -> None:
    found = generator(5, "step", 3)
    words = words_of(found).astype(np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = twister.random_raw(2000) % 2**20
    assert torch.randint(2**20, (2000,), generator=found).tolist() == expected.tolist()


def test_no_seed_of_32_bits_gives_the_state() -> None:
    """Torch's seeding sets the first word to the seed, and computes the others from it."""
    words = words_of(generator(5, "step", 3))
    others = words_of(torch.Generator().manual_seed(int(words[0])))
    assert words[0] == others[0]
    assert (words[1:] != others[1:]).all()


def test_a_generator_is_fresh() -> None:
    """Normal numbers come in pairs: none may be left over from another generator."""
    used = generator(0)
    torch.randn(3, generator=used)
    one, other = generator(1, "a"), generator(1, "a")
    assert torch.equal(torch.randn(5, generator=one), torch.randn(5, generator=other))
    assert torch.equal(torch.randn(50, generator=one), torch.randn(50, generator=other))


def test_every_part_of_the_place_counts() -> None:
    places: list[Any] = [(0,), (1,), (0, 0), (0, "a"), (0, "a", 1), (0, "b", 1), (0, 1, "a"), (2**32,), (2**64 + 1,)]
    drawn = [torch.randn(4, generator=generator(*place)).numpy().tobytes() for place in places]
    assert len(set(drawn)) == len(places)
    assert len({generator(*place).initial_seed() for place in places}) == len(places)


def test_normal_numbers_are_normal() -> None:
    first = torch.stack([torch.randn(64, generator=generator(seed, "sample")) for seed in range(3000)])
    for values in (first[:, 0], first.flatten()):
        assert abs(values.mean().item()) < 5 / len(values) ** 0.5
        assert abs(values.var().item() - 1) < 5 * (2 / len(values)) ** 0.5
    assert abs(torch.corrcoef(first[:, :2].T)[0, 1].item()) < 0.1  # within a sample
    assert abs(torch.corrcoef(torch.stack([first[:-1, 0], first[1:, 0]]))[0, 1].item()) < 0.1  # and from seed to seed
