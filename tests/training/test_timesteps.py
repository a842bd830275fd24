"""The distribution of the timesteps of training, and that those of earlier runs stay as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from run_folders import lines_of
from scipy import stats  # type: ignore[import-untyped]

from lavita.core.seeds import generator
from lavita.models.autoencoder import AutoencoderKL
from lavita.training.batches import BatchMaker
from lavita.training.timesteps import Timesteps
from lavita.training.train import train

FLOW = ("model.prediction_type=flow", "model.learn_sigma=false")


def draws(timesteps: Timesteps, count: int = 4000) -> np.ndarray:
    return np.array([timesteps.draw(generator(0, "step", index)).item() for index in range(count)])


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_logit_normal_times_have_their_distribution(shift: float) -> None:
    """The logit of t is normal with the mean log(shift), for which the density of t is that of Esser et al. 2024."""
    times = draws(Timesteps(True, "logit_normal", shift)) / 1000
    assert ((times > 0) & (times < 1)).all()
    assert stats.kstest(np.log(times / (1 - times)), stats.norm(np.log(shift)).cdf).pvalue > 1e-3

    def density(t: np.ndarray) -> np.ndarray:
        logit = np.log(t / (1 - t)) - np.log(shift)
        return np.asarray(np.exp(-(logit**2) / 2) / np.sqrt(2 * np.pi) / (t * (1 - t)))

    grid = (np.arange(20_000) + 0.5) / 20_000
    cumulative = np.cumsum(density(grid)) / 20_000
    assert cumulative[-1] == pytest.approx(1, abs=1e-4)
    assert stats.kstest(times, lambda t: np.interp(t, grid, cumulative)).pvalue > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times_are_shifted(shift: float) -> None:
    times = draws(Timesteps(True, "uniform", shift)) / 1000
    assert stats.kstest(times / (shift - (shift - 1) * times), stats.uniform().cdf).pvalue > 1e-3


def test_draws_of_earlier_runs_are_unchanged(make_config: MakeConfig, tiny_vae: AutoencoderKL) -> None:
    config = make_config("run", "model.class_dropout=0.5")
    batch = BatchMaker(config.data, config.train, tiny_vae, 0.5, Timesteps.of(config, tiny_vae)).make(7)
    flow_config = make_config("flow", "model.class_dropout=0.5", *FLOW, "train.timestep_sampling=logit_normal")
    flow = BatchMaker(config.data, config.train, tiny_vae, 0.5, Timesteps.of(flow_config, tiny_vae)).make(7)
    assert batch.timesteps.dtype == torch.int64 and flow.timesteps.dtype == torch.float32
    for index in range(4):
        random = generator(0, "step", 7, index)
        torch.randn(batch.latents[index].shape, generator=random)
        noise = torch.randn(batch.latents[index].shape, generator=random)
        assert torch.equal(batch.noise[index], noise) and torch.equal(flow.noise[index], noise)
        assert torch.equal(batch.timesteps[index], torch.randint(0, 1000, (), generator=random))
    assert torch.equal(batch.latents, flow.latents)
    assert torch.equal(flow.part(1, 2, torch.device("cpu")).timesteps, flow.timesteps[1:3])


def test_the_automatic_shift_follows_the_size_of_a_clip(make_config: MakeConfig, tiny_vae: AutoencoderKL) -> None:
    def shift(*overrides: str) -> float:
        return Timesteps.of(make_config("run", *FLOW, "train.timestep_shift=auto", *overrides), tiny_vae).shift

    # 8 x 8 latent pixels at 16 pixels.
    assert shift() == 1 and shift("data.num_frames=64") == 2
    assert shift("data.resolution=64", "data.num_frames=4") == 2 and shift("data.resolution=128") == pytest.approx(
        8**0.5
    )
    assert Timesteps.of(make_config("run", *FLOW, "train.timestep_shift=2.5"), tiny_vae) == Timesteps(True, shift=2.5)
    assert Timesteps.of(make_config("run"), tiny_vae) == Timesteps()


def test_a_flow_learns_and_leaves_samples(make_config: MakeConfig) -> None:
    """The whole way: the loss falls, and the pipeline knows the shift."""
    config = make_config(
        "run",
        *FLOW,
        "train.timestep_shift=2",
        "train.timestep_sampling=logit_normal",
        "train.steps=60",
        "train.learning_rate=1e-2",
        "train.sample_every=60",
        "train.num_samples=2",
        "model.preset=tiny/2",
    )
    folder = train(config)
    losses = [line["loss"] for line in lines_of(config)]
    assert np.mean(losses[-20:]) < 0.97 * np.mean(losses[:5])
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (transformer["prediction_type"], transformer["flow_shift"]) == ("flow", 2.0)
    assert (scheduler["_class_name"], scheduler["flow_shift"]) == ("UniPCMultistepScheduler", 2.0)
    assert (config.run_dir / "samples" / "step-00000060" / "1.mp4").exists()
