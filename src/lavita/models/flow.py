"""Rectified flow: straight lines between data and noise, and the velocity along them (Liu et al. 2022).

Time t goes from 0, the data, to 1, the noise; a model is given the timestep T t, a float in 0..T.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

import torch

from lavita.models.diffusion import NUM_TIMESTEPS, PREDICTION_TYPES, GaussianDiffusion, Losses

FLOW = "flow"
BASE_POSITIONS = 32 * 32
"""Latent positions at which `auto_shift` is 1: those of one image of 256 x 256 pixels, 8x downsampled."""

Time = TypeVar("Time", float, torch.Tensor)


class Objective(Protocol):
    """How latents are noised, and what the model's prediction of a noised clip costs."""

    prediction_type: str

    def q_sample(self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Adds noise to z_0, (B, ...), at timesteps (B,)."""

    def losses(
        self, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> Losses:
        """The losses of a model's output for what `q_sample` gave for the other arguments."""


def make_objective(prediction_type: str) -> Objective:
    """The objective of a model: `flow` trains a rectified flow, the others the diffusion of `GaussianDiffusion`.

    Raises:
        ValueError: for an unknown prediction type.
    """
    if prediction_type == FLOW:
        return RectifiedFlow()
    if prediction_type not in PREDICTION_TYPES:
        allowed = ", ".join((*PREDICTION_TYPES, FLOW))
        raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {allowed}")
    return GaussianDiffusion(prediction_type)


class RectifiedFlow:
    """z_t = (1 - t) z_0 + t noise, whose velocity dz_t / dt = noise - z_0 the model predicts."""

    prediction_type = FLOW

    def q_sample(self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Goes from data towards noise: z_t = (1 - t) z_0 + t noise.

        Args:
            latents: z_0, (B, ...).
            timesteps: T t, floats or integers (B,) in 0..T.
            noise: standard normal, of the shape of `latents`.
        """
        time = (timesteps.to(latents.dtype) / NUM_TIMESTEPS).view(-1, *[1] * (latents.ndim - 1))
        return (1 - time) * latents + time * noise

    def losses(
        self, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> Losses:
        """The mean squared error of the velocity noise - z_0 (Liu et al. 2022, Eq. 1).

        Args:
            output: the model's output, (B, F, C, H, W).
            latents: z_0, of the same shape.
            timesteps: (B,); they have no weight in the loss.
            noise: the noise that `q_sample` added.

        Raises:
            ValueError: for an output with another number of channels.
        """
        if output.shape[2] != latents.shape[2]:
            raise ValueError(f"output has {output.shape[2]} channels, but a flow needs those {latents.shape[2]} of z_0")
        mse = (noise - latents - output.float()).square().flatten(1).mean(1)
        return Losses(mse, mse, torch.zeros_like(mse))


def shift_time(time: Time, shift: float) -> Time:
    """Moves times towards the noise, for shifts above 1: s t / (1 + (s - 1) t) (Esser et al. 2024, Eq. 23)."""
    return shift * time / (1 + (shift - 1) * time)


def auto_shift(num_positions: int) -> float:
    """The shift for clips of F h w latent positions: sqrt(F h w / 1024), at least 1 (Esser et al. 2024, Eq. 23).

    The more positions show the same content, the better it can be seen through noise: more noise has to be added before
    the model must learn to decide what a clip shows.
    """
    return max(1.0, math.sqrt(num_positions / BASE_POSITIONS))
