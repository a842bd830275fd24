"""The diffusion process: noise schedule, q(z_t | z_0), and the hybrid objective L_simple + L_vlb.

Notation of Ho et al. 2020 and Nichol & Dhariwal 2021; timesteps t count from 0 here, T - 1 the noisiest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Losses:
    """Per-sample losses, float32 (B,)."""

    total: torch.Tensor
    """`mse + vlb`."""
    mse: torch.Tensor
    """L_simple: mean squared error of the noise (Eq. 1 of the paper), or of the velocity."""
    vlb: torch.Tensor
    """The timestep's term of L_vlb, in bits per value; 0 without a learned variance."""


class GaussianDiffusion:
    """A linear noise schedule, beta from 1e-4 to 0.02, with its objective; the tables are float64 (T,)."""

    def __init__(self, prediction_type: str = "epsilon", num_timesteps: int = NUM_TIMESTEPS) -> None:
        """Computes the tables of the schedule.

        Args:
            prediction_type: what the model's first channels predict: `epsilon`, the noise, as in the paper; or
                `v_prediction`, the velocity sqrt(alpha-bar_t) noise - sqrt(1 - alpha-bar_t) z_0 (Salimans & Ho 2022,
                App. D), whose error weighs the same at all noise levels.
            num_timesteps: T.

        Raises:
            ValueError: for an unknown prediction type.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}")
        self.prediction_type = prediction_type
        self.num_timesteps = num_timesteps
        self.betas = torch.linspace(BETA_START, BETA_END, num_timesteps, dtype=torch.float64)
        alphas = 1.0 - self.betas
        self.alphas_cumprod = alphas.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        # q(z_{t-1} | z_t, z_0): Ho et al. 2020, Eq. 6-7.
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        # The first variance is 0 and has no logarithm; the second is used in its place.
        self.posterior_log_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()
        self.posterior_mean_start = self.betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_noisy = (1 - previous) * alphas.sqrt() / (1 - self.alphas_cumprod)

    def q_sample(self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Adds noise: z_t = sqrt(alpha-bar_t) z_0 + sqrt(1 - alpha-bar_t) noise (Sec. 3.1).

        Args:
            latents: z_0, (B, ...).
            timesteps: int64 (B,) in 0..T-1.
            noise: standard normal, of the shape of `latents`.
        """
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return signal * latents + sigma * noise

    def velocity(self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The velocity sqrt(alpha-bar_t) noise - sqrt(1 - alpha-bar_t) z_0; arguments as in `q_sample`."""
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return signal * noise - sigma * latents

    def _signal_and_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = _per_sample(self.alphas_cumprod.sqrt(), timesteps, like)
        return signal, _per_sample((1 - self.alphas_cumprod).sqrt(), timesteps, like)

    def losses(
        self, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> Losses:
        """The hybrid objective (Nichol & Dhariwal 2021, Eq. 16), weighted as DiT trains it: L_simple + L_vlb.

        Args:
            output: the model's output, (B, F, 2C, H, W) with a learned variance or (B, F, C, H, W) without.
            latents: z_0, (B, F, C, H, W).
            timesteps: int64 (B,) in 0..T-1.
            noise: the noise that `q_sample` added.

        Raises:
            ValueError: for an output with another number of channels.
        """
        output = output.float()
        channels = latents.shape[2]
        if output.shape[2] not in (channels, 2 * channels):
            raise ValueError(
                f"output has {output.shape[2]} channels, but latents of {channels} need {channels} or {2 * channels}"
            )
        prediction, variance = output[:, :, :channels], output[:, :, channels:]
        velocity = self.prediction_type == "v_prediction"
        target = self.velocity(latents, timesteps, noise) if velocity else noise
        mse = _mean_per_sample((target - prediction).square())
        if not variance.shape[2]:
            return Losses(mse, mse, torch.zeros_like(mse))
        # The bound trains only the variance: through the mean it would disturb L_simple.
        predicted_noise = prediction.detach()
        if velocity:
            noisy = self.q_sample(latents, timesteps, noise)
            signal, sigma = self._signal_and_sigma(timesteps, latents)
            predicted_noise = signal * predicted_noise + sigma * noisy
        vlb = self.vlb_term(predicted_noise, variance, latents, timesteps, noise)
        return Losses(mse + vlb, mse, vlb)

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Weights of the squared error that count no noise level of z_0 more than `gamma` (Hang et al. 2023, Sec. 3.4).

        In terms of z_0 the error is weighted by min(SNR, gamma), with SNR = alpha-bar / (1 - alpha-bar). For the error
        of the noise that is min(SNR, gamma) / SNR, for that of the velocity min(SNR, gamma) / (SNR + 1).

        Args:
            timesteps: int64 (B,) in 0..T-1.
            gamma: above 0; 5 in the paper.

        Returns:
            float32 (B,).
        """
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        table = snr.clamp(max=gamma) / (snr + 1 if self.prediction_type == "v_prediction" else snr)
        return table.float().to(timesteps.device)[timesteps]

    def vlb_term(
        self,
        predicted_noise: torch.Tensor,
        variance: torch.Tensor,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The term of L_vlb at each sample's timestep, in bits per value, (B,).

        For t > 0 it is KL(q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t)); at t = 0 it is the negative log-likelihood of z_0
        under a Gaussian integrated over bins of width 2/255, those of 8-bit images (Ho et al. 2020, Eq. 5 and 13).

        Args:
            predicted_noise: (B, F, C, H, W).
            variance: the model's v, which interpolates between the two bounds of the log-variance: -1 is beta-tilde, 1
                is beta (Nichol & Dhariwal 2021, Eq. 15).
            latents: z_0.
            timesteps: int64 (B,).
            noise: the noise that was added to `latents`.
        """
        noisy = self.q_sample(latents, timesteps, noise)
        start_scale = _per_sample(self.alphas_cumprod.rsqrt(), timesteps, latents)
        noise_scale = _per_sample((1 / self.alphas_cumprod - 1).sqrt(), timesteps, latents)
        predicted_start = start_scale * noisy - noise_scale * predicted_noise
        mean_start = _per_sample(self.posterior_mean_start, timesteps, latents)
        # Both means contain the same multiple of z_t, which cancels in their difference.
        mean_difference = mean_start * (latents - predicted_start)

        true_log = _per_sample(self.posterior_log_variance, timesteps, latents)
        log_beta = _per_sample(self.betas.log(), timesteps, latents)
        share = (variance + 1) / 2
        model_log = share * log_beta + (1 - share) * true_log
        kl = 0.5 * (
            model_log - true_log - 1 + (true_log - model_log).exp() + mean_difference.square() * (-model_log).exp()
        )
        mean_noisy = _per_sample(self.posterior_mean_noisy, timesteps, latents)
        model_mean = mean_start * predicted_start + mean_noisy * noisy
        likelihood = discretized_gaussian_log_likelihood(latents, model_mean, 0.5 * model_log)
        first = timesteps == 0
        return torch.where(first, -_mean_per_sample(likelihood), _mean_per_sample(kl)) / math.log(2)


def discretized_gaussian_log_likelihood(
    values: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Log-probability, in nats, of the bin of width 2/255 around each value; the outermost bins are open.

    Args:
        values: centres of the bins; beyond +-0.999 a bin extends to infinity, as for images in [-1, 1].
        means: means of the Gaussian.
        log_scales: logarithms of its standard deviations.
    """
    centered = values - means
    inverse = (-log_scales).exp()
    upper = _normal_cdf(inverse * (centered + 1 / 255))
    lower = _normal_cdf(inverse * (centered - 1 / 255))
    upper = torch.where(values > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(values < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _per_sample(table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    values = table.to(like.device)[timesteps].to(like.dtype)
    return values.view(-1, *[1] * (like.ndim - 1))


def _mean_per_sample(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)
