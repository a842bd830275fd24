"""Statistics of latents: against numpy, and undone exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lavita.models.latent_statistics import LatentMoments, LatentStatistics


def test_moments_are_those_of_samples_of_the_posterior() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal([1.0, -2.0, 0.0], [0.5, 2.0, 0.1], (40, 9, 9, 3)).transpose(0, 3, 1, 2)
    std = rng.uniform(0.0, 0.3, mean.shape)
    moments = LatentMoments()
    for part in (slice(0, 1), slice(1, 25), slice(25, 40)):
        moments.add(torch.from_numpy(mean[part]).float(), torch.from_numpy(std[part]).float())
    found = moments.statistics()
    np.testing.assert_allclose(found.mean, mean.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))), rtol=1e-6)
    samples = torch.from_numpy(mean + std * rng.normal(size=mean.shape))
    normal = found.normalize(samples)
    np.testing.assert_allclose(normal.mean((0, 2, 3)), 0, atol=0.01)
    np.testing.assert_allclose(normal.std((0, 2, 3)), 1, rtol=0.01)
    torch.testing.assert_close(found.denormalize(normal), samples)


def test_they_travel_in_a_configuration() -> None:
    statistics = LatentStatistics((0.5, -1.0), (2.0, 3.0))
    assert statistics.fields() == {"latent_mean": [0.5, -1.0], "latent_std": [2.0, 3.0]}
    assert LatentStatistics.of(statistics.fields()) == statistics
    assert LatentStatistics.of({}) is None and LatentStatistics.of({"latent_mean": None, "latent_std": None}) is None
    latents = torch.ones(2, 3, 2, 4, 4)
    normal = statistics.normalize(latents)
    assert normal.dtype == torch.float32 and normal.shape == latents.shape
    torch.testing.assert_close(normal[0, 0, :, 0, 0], torch.tensor([0.25, 2 / 3]))


def test_a_constant_channel_is_not_blown_up() -> None:
    moments = LatentMoments()
    mean = torch.stack([torch.full((8, 2, 2), 3.0), torch.randn(8, 2, 2)], dim=1)
    moments.add(mean, torch.zeros_like(mean))
    assert moments.statistics().std[0] == 1 and moments.statistics().mean[0] == pytest.approx(3)
    with pytest.raises(ValueError, match="no frame could be read"):
        LatentMoments().statistics()
