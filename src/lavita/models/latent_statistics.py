"""Mean and standard deviation of each channel of the latents, with which they are normalised for the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LEAST_STD = 1e-4
"""A channel that varies less is constant but for rounding; it is not blown up to unit variance."""


@dataclass(frozen=True)
class LatentStatistics:
    """One mean and one standard deviation for each channel of the scaled latents (see `autoencoder.encode`)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentStatistics | None:
        """The statistics in the configuration of a transformer or the manifest of a cache; None if there are none."""
        if config.get("latent_mean") is None or config.get("latent_std") is None:
            return None
        return cls(tuple(config["latent_mean"]), tuple(config["latent_std"]))

    def fields(self) -> dict[str, list[float]]:
        """What `of` reads: the fields `latent_mean` and `latent_std`."""
        return {"latent_mean": [*self.mean], "latent_std": [*self.std]}

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (..., C, h, w) with mean 0 and variance 1 in each channel, if they have these statistics."""
        mean, std = self._like(latents)
        return (latents - mean) / std

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`."""
        mean, std = self._like(latents)
        return latents * std + mean

    def _like(self, latents: torch.Tensor) -> list[torch.Tensor]:
        return [latents.new_tensor(values)[:, None, None] for values in (self.mean, self.std)]


class LatentMoments:
    """Adds up the latents of frames, in float64, to their statistics."""

    def __init__(self) -> None:
        """Starts without frames."""
        self._sums: torch.Tensor | None = None
        self._count = 0

    def add(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Adds frames by mean and standard deviation of their latents' posterior, (F, C, h, w) each."""
        mean, variance = mean.double(), std.double().square()
        # A sample of the posterior has the mean's square and the variance as the expectation of its square.
        sums = torch.stack([mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3))])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += mean[:, 0].numel()

    def statistics(self) -> LatentStatistics:
        """Mean and standard deviation of each channel; 1 in place of a deviation below `LEAST_STD`.

        Raises:
            ValueError: if no frames were added.
        """
        if self._sums is None:
            raise ValueError("no frame could be read to measure the latents")
        mean, square = self._sums / self._count
        std = (square - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std < LEAST_STD, torch.ones_like(std), std)
        return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()))
