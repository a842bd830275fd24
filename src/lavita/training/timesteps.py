"""The distribution of the timesteps that a model is trained at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lavita.models.autoencoder import Autoencoder, latent_frames, latent_grid
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.flow import FLOW, auto_shift, shift_time
from lavita.training.config import RunConfig, TimestepSampling


@dataclass(frozen=True)
class Timesteps:
    """Draws one timestep for each clip of a batch."""

    continuous: bool = False
    """Draw floats in 0..T, for a flow, instead of integers in 0..T-1."""
    sampling: TimestepSampling = "uniform"
    shift: float = 1.0
    """Shift of the times, see `flow.shift_time`; only with `continuous`."""

    @classmethod
    def of(cls, config: RunConfig, vae: Autoencoder) -> Timesteps:
        """The distribution of a run, with its automatic shift worked out."""
        settings, data = config.train, config.data
        if config.model.prediction_type != FLOW:
            return cls()
        shift = settings.timestep_shift
        if shift == "auto":
            frames = latent_frames(vae.config, data.num_frames, "data.num_frames")
            shift = auto_shift(frames * math.prod(latent_grid(vae, data.resolution)))
        return cls(True, settings.timestep_sampling, shift)

    def draw(self, random: torch.Generator) -> torch.Tensor:
        """One timestep, a scalar: int64, or float32 if `continuous`."""
        if not self.continuous:
            return torch.randint(0, NUM_TIMESTEPS, (), generator=random)
        if self.sampling == "logit_normal":
            time = torch.randn((), generator=random).sigmoid()  # Esser et al. 2024, Eq. 19, with m = 0 and s = 1
        else:
            time = torch.rand((), generator=random)
        return NUM_TIMESTEPS * shift_time(time, self.shift)
