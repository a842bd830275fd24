"""The rectified flow: its line and loss against closed forms for Gaussian data."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import MakeTransformer

from lavita.core.config import ConfigError, load_config
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.fingerprint import fingerprint
from lavita.models.flow import RectifiedFlow, auto_shift, make_objective, shift_time
from lavita.training.config import RunConfig

MEAN, STD = 0.3, 0.6
# The transformer's fields when sample folders first recorded fingerprints.
FIRST_FIELDS = [
    "sample_size",
    "num_frames",
    "in_channels",
    "patch_size",
    "hidden_size",
    "num_blocks",
    "num_heads",
    "mlp_ratio",
    "variant",
    "patch_embedding",
    "tube_size",
    "conditioning",
    "temporal_position",
    "num_classes",
    "class_names",
    "text_dim",
    "text_encoder",
    "learn_sigma",
    "prediction_type",
    "frame_interval",
    "fps",
]


def test_it_goes_straight_from_data_to_noise() -> None:
    latents, noise = torch.randn(2, 5, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    flow = RectifiedFlow()
    timesteps = torch.tensor([0.0, 250.0, 500.0, 999.5, 1000.0])
    points = flow.q_sample(latents, timesteps, noise)
    torch.testing.assert_close(points[0], latents[0], rtol=0, atol=0)
    torch.testing.assert_close(points[4], noise[4], rtol=0, atol=0)
    torch.testing.assert_close(points[1], 0.75 * latents[1] + 0.25 * noise[1])
    whole = torch.tensor([0, 250, 500, 999, 1000])
    torch.testing.assert_close(flow.q_sample(latents, whole, noise)[:3], points[:3], rtol=0, atol=0)
    speed = (flow.q_sample(latents, timesteps + 1, noise) - points) * 1000
    torch.testing.assert_close(speed, noise - latents, rtol=0, atol=2e-3)


def test_the_velocity_costs_nothing_and_an_error_its_square() -> None:
    latents, noise, error = torch.randn(3, 4, 3, 4, 2, 2, dtype=torch.float64)
    timesteps = torch.tensor([0.0, 10.0, 500.0, 1000.0])
    flow = RectifiedFlow()
    assert not flow.losses(noise - latents, latents, timesteps, noise).total.abs().max() > 1e-12
    losses = flow.losses((noise - latents + error).bfloat16(), latents.float(), timesteps, noise.float())
    expected = error.square().numpy().mean((1, 2, 3, 4))
    np.testing.assert_allclose(losses.total.numpy(), expected, rtol=2e-2)
    assert losses.total.dtype == torch.float32 and not losses.vlb.any()
    with pytest.raises(ValueError, match="output has 8 channels, but a flow needs those 4"):
        flow.losses(torch.zeros(4, 3, 8, 2, 2), latents.float(), timesteps, noise.float())


@pytest.mark.parametrize("time", [0.05, 0.3, 0.5, 0.9])
def test_the_minimiser_is_the_velocity_of_gaussian_data(time: float) -> None:
    """Of all affine predictors of the velocity the loss prefers E[noise - z_0 | z_t], up to the sampling error."""
    random = torch.Generator().manual_seed(1)
    latents = MEAN + STD * torch.randn(1, 200, 4, 32, 32, generator=random, dtype=torch.float64)
    noise = torch.randn(latents.shape, generator=random, dtype=torch.float64)
    flow, timesteps = RectifiedFlow(), torch.tensor([1000 * time], dtype=torch.float64)
    noisy = flow.q_sample(latents, timesteps, noise)

    def loss(factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        target = noise - latents
        found = (target - factor * noisy - offset).square().mean()
        given = flow.losses(factor * noisy + offset, latents, timesteps, noise).mse.double().mean()
        torch.testing.assert_close(given, found, rtol=1e-5, atol=0)
        return found

    start = (torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    gradient = torch.stack(torch.autograd.functional.jacobian(loss, start))
    hessian = torch.stack([torch.stack(row) for row in torch.autograd.functional.hessian(loss, start)])
    factor, offset = (-torch.linalg.solve(hessian, gradient)).tolist()
    expected = (time - (1 - time) * STD**2) / ((1 - time) ** 2 * STD**2 + time**2)
    assert factor == pytest.approx(expected, abs=5e-3)
    assert offset == pytest.approx(-MEAN - expected * (1 - time) * MEAN, abs=5e-3)


def test_the_shift_is_its_formula() -> None:
    times = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_time(times, 1.0), times)
    shifted = shift_time(times, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > times[1:-1]).all()
    # It multiplies the ratio of noise and data.
    torch.testing.assert_close(shifted[1:-1] / (1 - shifted[1:-1]), 3 * times[1:-1] / (1 - times[1:-1]))
    assert auto_shift(16 * 32 * 32) == 4 and auto_shift(1024) == 1 and auto_shift(2 * 8 * 8) == 1
    assert auto_shift(16 * 16 * 16) == pytest.approx(math.sqrt(4))


def test_a_prediction_type_chooses_the_objective() -> None:
    assert isinstance(make_objective("flow"), RectifiedFlow)
    for kind in ("epsilon", "v_prediction"):
        diffusion = make_objective(kind)
        assert isinstance(diffusion, GaussianDiffusion) and diffusion.prediction_type == kind
    with pytest.raises(ValueError, match="prediction_type is 'x0'; allowed: epsilon, v_prediction, flow"):
        make_objective("x0")


def test_models_of_before_keep_their_fingerprints(make_transformer: MakeTransformer) -> None:
    """The fields of `LATER_FIELDS` do not count until they are set."""
    model = make_transformer(num_classes=3)
    digest = hashlib.sha256(json.dumps({key: model.config[key] for key in sorted(FIRST_FIELDS)}).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()
    flow = make_transformer(learn_sigma=False, prediction_type="flow")
    shifted = make_transformer(learn_sigma=False, prediction_type="flow", flow_shift=2.0)
    assert fingerprint(flow) != fingerprint(shifted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "flow"}, "learn_sigma is true, but must be false with prediction_type flow"),
        ({"flow_shift": 2.0}, "flow_shift is 2.0, but must be above 0, and None for a model of no flow"),
        ({"prediction_type": "flow", "learn_sigma": False, "flow_shift": 0.0}, "flow_shift is 0.0, but must be above"),
    ],
)
def test_fields_that_do_not_fit_a_flow(
    fields: dict[str, object], message: str, make_transformer: MakeTransformer
) -> None:
    with pytest.raises(ValueError, match=message):
        make_transformer(**fields)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.prediction_type=flow"], "learn_sigma is true, but must be false with prediction_type=flow"),
        (
            ["train.timestep_sampling=logit_normal"],
            "train.timestep_sampling is logit_normal, but has no effect with model.prediction_type=epsilon",
        ),
        (
            ["train.timestep_shift=auto", "model.prediction_type=v_prediction"],
            "train.timestep_shift is auto, but has no effect with model.prediction_type=v_prediction",
        ),
        (["train.timestep_shift=0"], "train.timestep_shift is 0: Input should be greater than 0"),
        (
            ["train.timestep_shift=high"],
            "train.timestep_shift is 'high': must be a number, without quotes or leading zeros, or auto",
        ),
    ],
)
def test_keys_that_do_not_fit_a_flow(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, {}, overrides)
