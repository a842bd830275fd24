"""The objective, against a float64 closed form in numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from scipy.stats import norm  # type: ignore[import-untyped]

from lavita.models.diffusion import GaussianDiffusion, discretized_gaussian_log_likelihood

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)
SHAPE = (2, 3, 4, 4)  # F, C, H, W of a sample
TIMESTEPS = (0, 0, 1, 2, 17, 250, 600, 998, 999)


def posterior(start: np.ndarray, noisy: np.ndarray, t: int) -> tuple[np.ndarray, float]:
    """Mean and variance of q(z_{t-1} | z_t, z_0), as the product of two Gaussians in z_{t-1}."""
    prior_precision = 1 / (1 - ALPHA_BAR[t - 1])
    step_precision = (1 - BETAS[t]) / BETAS[t]
    variance = 1 / (prior_precision + step_precision)
    mean = variance * (
        prior_precision * np.sqrt(ALPHA_BAR[t - 1]) * start + step_precision * noisy / np.sqrt(1 - BETAS[t])
    )
    return mean, variance


def reference_vlb(predicted: np.ndarray, v: np.ndarray, start: np.ndarray, t: int, noise: np.ndarray) -> float:
    """One sample's term of L_vlb in bits a value."""
    noisy = np.sqrt(ALPHA_BAR[t]) * start + np.sqrt(1 - ALPHA_BAR[t]) * noise
    predicted_start = (noisy - np.sqrt(1 - ALPHA_BAR[t]) * predicted) / np.sqrt(ALPHA_BAR[t])
    smallest = posterior(start, noisy, max(t, 1))[1]
    scale = np.sqrt(np.exp(np.interp(v, [-1, 1], [np.log(smallest), np.log(BETAS[t])])))
    if t:
        true_mean, variance = posterior(start, noisy, t)
        mean = posterior(predicted_start, noisy, t)[0]
        ratio = variance / scale**2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + (true_mean - mean) ** 2 / scale**2)
    else:
        # Of z_0 given z_0 and z_1 nothing is left but z_0.
        upper = np.where(start > 0.999, np.inf, start + 1 / 255)
        lower = np.where(start < -0.999, -np.inf, start - 1 / 255)
        nats = -np.log(norm.cdf(upper, predicted_start, scale) - norm.cdf(lower, predicted_start, scale))
    return float(nats.mean() / np.log(2))


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps, noise, a prediction and a v in (-1, 1), all float64."""
    rng = np.random.default_rng(seed)
    latents, noise, error = rng.normal(size=(3, len(TIMESTEPS), *SHAPE))
    v = rng.uniform(-1, 1, latents.shape)
    arrays = (latents, np.array(TIMESTEPS), noise, noise + 0.5 * error, v)
    return tuple(map(torch.from_numpy, arrays))  # type: ignore[return-value]


def test_vlb_equals_the_closed_form_in_float64() -> None:
    latents, timesteps, noise, predicted, v = draw()
    assert (latents.abs() > 0.999).any(), "the open bins have to be met"
    vlb = GaussianDiffusion().vlb_term(predicted, v, latents, timesteps, noise)
    expected = [
        reference_vlb(predicted[i].numpy(), v[i].numpy(), latents[i].numpy(), t, noise[i].numpy())
        for i, t in enumerate(TIMESTEPS)
    ]
    np.testing.assert_allclose(vlb.numpy(), expected, rtol=1e-7)


def test_losses_in_float32_stay_close_to_float64() -> None:
    latents, timesteps, noise, predicted, v = draw(1)
    output = torch.cat([predicted, v], dim=2).float()
    losses = GaussianDiffusion().losses(output, latents.float(), timesteps, noise.float())
    expected = [
        reference_vlb(predicted[i].numpy(), v[i].numpy(), latents[i].numpy(), t, noise[i].numpy())
        for i, t in enumerate(TIMESTEPS)
    ]
    mse = ((predicted - noise) ** 2).numpy().mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(losses.mse.numpy(), mse, rtol=1e-5)
    np.testing.assert_allclose(losses.vlb.numpy(), expected, rtol=2e-3)
    np.testing.assert_allclose(losses.total.numpy(), mse + expected, rtol=2e-3)
    assert losses.total.shape == (len(TIMESTEPS),)


def test_losses_are_float32_under_autocast() -> None:
    latents, timesteps, noise, predicted, v = (x.float() if x.is_floating_point() else x for x in draw())
    output = torch.cat([predicted, v], dim=2).bfloat16()
    losses = GaussianDiffusion().losses(output, latents, timesteps, noise)
    assert losses.total.dtype == losses.mse.dtype == losses.vlb.dtype == torch.float32


def test_without_a_learned_variance_the_mse_is_all() -> None:
    latents, timesteps, noise, predicted, _ = (x.float() if x.is_floating_point() else x for x in draw())
    losses = GaussianDiffusion().losses(predicted, latents, timesteps, noise)
    torch.testing.assert_close(losses.total, (noise - predicted).square().mean((1, 2, 3, 4)))
    torch.testing.assert_close(losses.mse, losses.total)
    assert not losses.vlb.any()


def test_a_perfect_prediction_costs_nothing() -> None:
    latents, timesteps, noise, _, _ = (x.float() if x.is_floating_point() else x for x in draw())
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=2)
    losses = GaussianDiffusion().losses(output, latents, timesteps, noise)
    assert not losses.mse.any()
    later = timesteps > 0
    # v = -1 is the posterior's own variance, so the two Gaussians are the same.
    torch.testing.assert_close(losses.vlb[later], torch.zeros(int(later.sum())), atol=1e-6, rtol=0)
    assert (losses.vlb[~later] > 0).all(), "a bin's probability stays below 1"


def test_the_bound_trains_the_variance_and_the_mse_the_noise() -> None:
    latents, timesteps, noise, predicted, v = (x.float() if x.is_floating_point() else x for x in draw())
    output = torch.cat([predicted, v], dim=2).requires_grad_()
    losses = GaussianDiffusion().losses(output, latents, timesteps, noise)
    channels = SHAPE[1]
    (of_vlb,) = torch.autograd.grad(losses.vlb.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses.mse.sum(), output, retain_graph=True)
    (of_total,) = torch.autograd.grad(losses.total.sum(), output)
    assert not of_vlb[:, :, :channels].any()
    assert of_vlb[:, :, channels:].flatten(1).any(dim=1).all()
    assert not of_mse[:, :, channels:].any()
    torch.testing.assert_close(of_mse[:, :, :channels], 2 * (predicted - noise) / noise[0].numel())
    torch.testing.assert_close(of_total, of_vlb + of_mse)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_sample_has_the_schedules_moments(t: int) -> None:
    noise = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(t))
    noisy = GaussianDiffusion().q_sample(torch.full_like(noise, 2.0), torch.tensor([t]), noise)
    assert noisy.mean().item() == pytest.approx(2 * np.sqrt(ALPHA_BAR[t]), abs=0.01)
    assert noisy.std().item() == pytest.approx(np.sqrt(1 - ALPHA_BAR[t]), rel=0.01)


def test_q_sample_equals_diffusers() -> None:
    latents, timesteps, noise, _, _ = draw()
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    noisy = GaussianDiffusion().q_sample(latents, timesteps, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps), atol=1e-5, rtol=1e-4)


def test_an_output_of_other_channels_is_refused() -> None:
    latents = torch.zeros(1, 2, 4, 8, 8)
    with pytest.raises(ValueError, match="output has 5 channels, but latents of 4 need 4 or 8"):
        GaussianDiffusion().losses(torch.zeros(1, 2, 5, 8, 8), latents, torch.tensor([3]), latents)


def test_the_bins_of_all_pixel_values_sum_to_one() -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in ((0.1, 0.3), (-0.98, 0.05), (1.4, 0.5)):
        mean_, log_scale = torch.full_like(values, mean), torch.full_like(values, scale).log()
        total = discretized_gaussian_log_likelihood(values, mean_, log_scale).exp().sum().item()
        assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("timestep", [0, 1, 40, 500, 999])
def test_a_velocity_has_the_bound_of_the_noise_that_it_stands_for(timestep: int) -> None:
    torch.manual_seed(0)
    latents, noise, predicted = torch.randn(3, 2, 2, 4, 3, 3, dtype=torch.float64)
    variance = torch.rand(2, 2, 4, 3, 3, dtype=torch.float64) * 2 - 1
    timesteps = torch.full((2,), timestep)
    by_noise, by_velocity = GaussianDiffusion(), GaussianDiffusion("v_prediction")
    alpha_bar = by_noise.alphas_cumprod[timestep]
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    # z_0 = sqrt(a) z_t - sqrt(1 - a) v and noise = sqrt(a) v + sqrt(1 - a) z_t: a rotation and its inverse.
    velocity = (predicted - (1 - alpha_bar).sqrt() * noisy) / alpha_bar.sqrt()
    expected = by_noise.vlb_term(predicted, variance, latents, timesteps, noise)
    output = torch.cat([velocity, variance], dim=2).float()
    losses = by_velocity.losses(output, latents, timesteps, noise)
    assert torch.allclose(losses.vlb.double(), expected, rtol=1e-3, atol=1e-4)
    true = by_velocity.velocity(latents, timesteps, noise)
    assert torch.allclose(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * true, latents, atol=1e-12)
    assert torch.allclose(
        losses.mse.double(), (true - velocity.float()).square().flatten(1).mean(1), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_their_formula(gamma: float) -> None:
    timesteps = torch.arange(1000)
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    capped = np.minimum(snr, gamma)
    by_noise = GaussianDiffusion().min_snr_weights(timesteps, gamma)
    by_velocity = GaussianDiffusion("v_prediction").min_snr_weights(timesteps, gamma)
    np.testing.assert_allclose(by_noise, capped / snr, rtol=1e-6)
    np.testing.assert_allclose(by_velocity, capped / (snr + 1), rtol=1e-6)
    assert by_noise.dtype == torch.float32 and by_noise.max() == 1 and by_velocity.max() < 1
    # Both weight an error of z_0 by the capped ratio: that of the noise is its sqrt(SNR)-fold, and that of the velocity
    # its sqrt(SNR + 1)-fold.
    latents, noise, error = torch.randn(3, 1000, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for diffusion, weights in ((GaussianDiffusion(), by_noise), (GaussianDiffusion("v_prediction"), by_velocity)):
        noisy = diffusion.q_sample(latents, timesteps, noise)
        signal, sigma = (torch.from_numpy(np.sqrt(x)).float().view(-1, 1, 1, 1, 1) for x in (ALPHA_BAR, 1 - ALPHA_BAR))
        start = latents + error
        predicted = (noisy - signal * start) / sigma
        if diffusion.prediction_type == "v_prediction":
            predicted = signal * predicted - sigma * start
        losses = diffusion.losses(predicted, latents, timesteps, noise)
        expected = capped * error.square().mean((1, 2, 3, 4)).numpy()
        np.testing.assert_allclose(weights * losses.mse, expected, rtol=2e-2, atol=1e-6)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'x0'; allowed: epsilon, v_prediction"):
        GaussianDiffusion("x0")
