"""A single optimizer step: compared with float64, accumulation, skipped steps, the loss scale, resuming."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from torch import nn

from lavita.core.config import ConfigError, load_config
from lavita.models.diffusion import GaussianDiffusion
from lavita.training.batches import Batch, random_batch
from lavita.training.checkpoint import Keep, load_last_checkpoint, save_checkpoint
from lavita.training.config import RunConfig, TrainConfig
from lavita.training.stability import ENOUGH, LossScale
from lavita.training.state import TrainState
from lavita.training.step import compute_gradients, learning_rate, train_step

CPU = torch.device("cpu")
MakeState = Callable[..., TrainState]


def make_settings(**fields: Any) -> TrainConfig:
    values = {"batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "ema_decay": 0.5}
    return load_config(TrainConfig, {**values, **fields})


@pytest.fixture
def make_state(make_transformer: MakeTransformer) -> MakeState:
    """The state before the first step of a tiny model; further fields are those of the transformer."""

    def make(settings: TrainConfig, **fields: Any) -> TrainState:
        return TrainState.build(make_transformer(**fields).train(), settings, CPU)

    return make


def snapshot(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def assert_untouched(state: TrainState, before: dict[str, torch.Tensor]) -> None:
    after = state.tensors()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert all(parameter.grad is None for parameter in state.parameters), "the gradients are gone"


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_the_error_and_not_the_bound(
    prediction_type: str, learn_sigma: bool, make_state: MakeState
) -> None:
    fields: dict[str, Any] = {"prediction_type": prediction_type, "learn_sigma": learn_sigma}
    settings = make_settings(loss_weighting="min_snr", min_snr_gamma=2.0)
    state, plain = make_state(settings, **fields), make_state(make_settings(), **fields)
    batch = random_batch(state.model.config, 4)
    with torch.no_grad():
        noisy = state.diffusion.q_sample(batch.latents, batch.timesteps, batch.noise)
        output = state.model(noisy, batch.timesteps).sample
        losses = state.diffusion.losses(output, batch.latents, batch.timesteps, batch.noise)
    alphas_cumprod = GaussianDiffusion().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = (snr.clamp(max=2) / (snr + (prediction_type == "v_prediction")))[batch.timesteps]
    expected = weights.float() * losses.mse + losses.vlb
    torch.testing.assert_close(compute_gradients(state, batch, settings), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compute_gradients(plain, batch, make_settings()), losses.total, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, losses.total)


def test_min_snr_is_refused_for_a_flow(make_state: MakeState) -> None:
    settings = make_settings(loss_weighting="min_snr")
    state = make_state(settings, prediction_type="flow", learn_sigma=False)
    with pytest.raises(ValueError, match="loss_weighting is min_snr, but has no effect with prediction_type=flow"):
        train_step(state, random_batch(state.model.config, 4), settings)
    flow = ("model.prediction_type=flow", "model.learn_sigma=false", "train.loss_weighting=min_snr")
    with pytest.raises(ConfigError, match=r"loss_weighting is min_snr, but is for model\.prediction_type=epsilon"):
        load_config(RunConfig, {}, flow)
    with pytest.raises(ConfigError, match="min_snr_gamma is 1, but has no effect with loss_weighting=uniform"):
        load_config(TrainConfig, {"min_snr_gamma": 1})


def test_a_step_equals_one_written_out_in_float64(make_state: MakeState) -> None:
    settings = make_settings(clip_grad_norm=0.05, weight_decay=0.1, warmup_steps=2)
    state = make_state(settings, num_classes=3, learn_sigma=False)
    model, batch = copy.deepcopy(state.model).double(), random_batch(state.model.config, 4)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)[batch.timesteps].view(-1, 1, 1, 1, 1)
    latents, noise = batch.latents.double(), batch.noise.double()
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    losses = (model(noisy, batch.timesteps, batch.class_labels).sample - noise).square().flatten(1).mean(1)
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert norm > 0.05, "the gradient is clipped"

    result = train_step(state, batch, settings)
    assert (result.verdict, result.taken, state.step) == ("good", True, 1)
    assert result.learning_rate == 0.5e-3
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5) == state.losses[0]
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(result.clip_losses.double(), losses.detach(), rtol=1e-5, atol=0)
    tensors = state.tensors()
    for name, gradient in gradients.items():
        clipped = gradient * (0.05 / norm)
        torch.testing.assert_close(tensors[f"optimizer.{name}.exp_avg"].double(), 0.1 * clipped, rtol=1e-3, atol=1e-9)
        # The first step of AdamW is the sign of the gradient, which is noise where the gradient is 0 but for rounding.
        expected = start[name] * (1 - 0.5e-3 * 0.1) - 0.5e-3 * clipped / (clipped.abs() + 1e-8)
        clear = clipped.abs() > 1e-6
        assert clear.any(), name
        weight, average = tensors[f"model.{name}"].double(), tensors[f"ema.{name}"].double()
        torch.testing.assert_close(weight[clear], expected[clear], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(average, start[name].lerp(weight, 1 - 2 / 11), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_images", [0, 2])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_one_batch(make_state: MakeState, parts: int, num_images: int) -> None:
    whole, cut = (make_settings(clip_grad_norm=0.1, accumulation=count) for count in (1, parts))
    one, several = make_state(whole, num_classes=3), make_state(cut, num_classes=3)
    for seed in range(3):
        batch = random_batch(one.model.config, 4, num_images=num_images, seed=seed)
        expected, result = train_step(one, batch, whole), train_step(several, batch, cut)
        assert expected.grad_norm > 0.1, "gradients are clipped once, together"
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        torch.testing.assert_close(result.clip_losses, expected.clip_losses, rtol=1e-4, atol=0)
    others = several.tensors()
    for name, tensor in one.tensors().items():
        if name.endswith(".exp_avg"):
            torch.testing.assert_close(others[name], tensor, rtol=1e-2, atol=1e-6, msg=name)


def test_a_batch_that_cannot_be_cut_is_refused(make_state: MakeState) -> None:
    settings = make_settings(accumulation=2)
    state = make_state(settings)
    with pytest.raises(ValueError, match="accumulation is 2, but must divide the 3 clips of a batch"):
        train_step(state, random_batch(state.model.config, 3), settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("verdict", ["spike", "not-finite"])
def test_a_skipped_step_changes_nothing(make_state: MakeState, verdict: str, optimizer: str) -> None:
    settings = make_settings(bad_steps="skip", optimizer=optimizer)
    state = make_state(settings)
    batch = random_batch(state.model.config, 4)
    assert train_step(state, batch, settings).taken
    before = snapshot(state)
    bad = random_batch(state.model.config, 4, seed=1)
    if verdict == "spike":
        state.guard.norms.extend([1e-6] * ENOUGH)
    else:
        bad.noise[1] = math.nan
    result = train_step(state, bad, settings)
    assert (result.verdict, result.taken) == (verdict, False)
    assert_untouched(state, before)
    assert (state.step, state.guard.skipped, len(state.losses)) == (2, 1, 1)
    finite = [math.isfinite(loss) for loss in result.clip_losses.tolist()]
    assert finite == [True, verdict == "spike", True, True]

    state.guard.norms.clear()
    assert train_step(state, batch, settings).taken
    assert state.guard.skipped == 0


def test_a_spike_is_taken_unless_it_is_to_be_skipped(make_state: MakeState) -> None:
    settings = make_settings(bad_steps="stop")
    state = make_state(settings)
    state.guard.norms.extend([1e-6] * ENOUGH)
    before = snapshot(state)
    result = train_step(state, random_batch(state.model.config, 4), settings)
    assert (result.verdict, result.taken, state.guard.skipped) == ("spike", True, 0)
    assert not torch.equal(state.tensors()["model.x_embedder.proj.weight"], before["model.x_embedder.proj.weight"])


def test_an_overflow_halves_the_loss_scale_and_skips_the_step(make_state: MakeState) -> None:
    settings = make_settings(precision="fp16")
    state = make_state(settings)
    assert state.scale.enabled
    state.scale.value = 2.0**8
    batch = random_batch(state.model.config, 4)
    assert train_step(state, batch, settings).taken
    before = snapshot(state)
    state.scale.value = 2.0**120
    result = train_step(state, batch, settings)
    assert (result.verdict, result.taken, state.scale.value) == ("overflow", False, 2.0**119)
    assert_untouched(state, before)
    assert state.guard.skipped == 0, "an overflow does not count as a bad step"
    assert math.isfinite(result.loss)
    state.scale.value = 2.0**8
    assert train_step(state, batch, settings).taken


def test_the_loss_scale_changes_no_gradient(make_state: MakeState) -> None:
    """Powers of two are exact in float32."""
    settings = make_settings()
    plain, scaled = make_state(settings), make_state(settings)
    scaled.scale = LossScale(True)
    batch = random_batch(plain.model.config, 4)
    expected, result = train_step(plain, batch, settings), train_step(scaled, batch, settings)
    assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    tensors = scaled.tensors()
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_state_takes_the_same_steps(make_state: MakeState, tmp_path: Path, optimizer: str) -> None:
    settings = make_settings(optimizer=optimizer)
    state = make_state(settings)
    batches = [random_batch(state.model.config, 4, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        train_step(state, batch, settings)
    save_checkpoint(tmp_path, state.step, state.tensors(), json.loads(json.dumps(state.facts())), Keep(1))
    restored = make_state(settings)
    nn.init.normal_(restored.model.x_embedder.proj.weight)
    checkpoint = load_last_checkpoint(tmp_path)
    assert checkpoint is not None
    restored.restore(checkpoint)
    assert (restored.step, restored.losses) == (2, state.losses)
    for batch in batches[2:]:
        expected, result = train_step(state, batch, settings), train_step(restored, batch, settings)
        assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    tensors = restored.tensors()
    for name, tensor in state.tensors().items():
        assert torch.equal(tensors[name], tensor), name
    assert restored.facts() == state.facts()


def test_without_a_limit_no_gradient_is_scaled_down(make_state: MakeState) -> None:
    """The gradients of AdamW's moments are those that a limit far above their norm leaves."""
    settings = make_settings(clip_grad_norm=None)
    plain, limited, clipped = (make_state(settings) for _ in range(3))
    batch = random_batch(plain.model.config, 4)
    result = train_step(plain, batch, settings)
    train_step(limited, batch, make_settings(clip_grad_norm=1e6))
    train_step(clipped, batch, make_settings(clip_grad_norm=result.grad_norm / 2))
    tensors, others = limited.tensors(), clipped.tensors()
    moments = [name for name in tensors if name.endswith("exp_avg")]
    assert moments
    for name in moments:
        assert torch.equal(plain.tensors()[name], tensors[name]), name
        torch.testing.assert_close(others[name], tensors[name] / 2, rtol=1e-4, atol=1e-9)


def test_the_average_moves_at_the_rate_of_its_step(make_state: MakeState) -> None:
    """Steps count from 1: after the first one the average keeps 2 / 11 of the initial weights."""
    settings = make_settings(ema_decay=0.9999)
    state = make_state(settings)
    expected = {name: weights.double() for name, weights in state.ema.weights.items()}
    for number in (1, 2, 3):
        train_step(state, random_batch(state.model.config, 4, seed=number), settings)
        rate = (1 + number) / (10 + number)
        for name, parameter in state.model.named_parameters():
            expected[name] = rate * expected[name] + (1 - rate) * parameter.detach().double()
    for name, weights in state.ema.weights.items():
        torch.testing.assert_close(weights.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_frozen_parameters_stay(make_transformer: MakeTransformer) -> None:
    settings, model = make_settings(), make_transformer().train()
    model.x_embedder.requires_grad_(False)
    state = TrainState.build(model, settings, CPU)
    before = model.x_embedder.proj.weight.clone()
    train_step(state, random_batch(model.config, 4), settings)
    assert torch.equal(model.x_embedder.proj.weight, before)
    assert not any("x_embedder" in name for name in state.tensors() if not name.startswith("model."))


def test_the_rate_rises_stays_and_falls() -> None:
    settings = TrainConfig(steps=10, learning_rate=2.0, warmup_steps=2, decay_steps=4)
    rates = [learning_rate(settings, step) for step in range(10)]
    assert rates == pytest.approx([1, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4])
    constant = TrainConfig(steps=3, learning_rate=2.0)
    assert [learning_rate(constant, step) for step in range(3)] == [2, 2, 2]


# --- batches


@pytest.mark.parametrize(
    ("fields", "num_images", "labels", "embeds"),
    [
        ({}, 0, None, None),
        ({"num_classes": 3}, 0, (4,), None),
        ({"num_classes": 3}, 2, (4, 3), None),
        ({"text_dim": 6}, 2, None, (4, 3, 6)),
    ],
)
def test_random_batches_suit_the_model(
    make_transformer: MakeTransformer, fields: dict[str, int], num_images: int, labels: Any, embeds: Any
) -> None:
    config = make_transformer(**fields).config
    batch = random_batch(config, 4, num_images=num_images)
    assert batch.latents.shape == batch.noise.shape == (4, 2 + num_images, 4, 8, 8)
    assert not torch.equal(batch.latents, batch.noise)
    assert (None if batch.class_labels is None else batch.class_labels.shape) == labels
    assert (None if batch.text_embeds is None else batch.text_embeds.shape) == embeds
    assert torch.equal(random_batch(config, 4, num_images=num_images).noise, batch.noise)
    assert not torch.equal(random_batch(config, 4, num_images=num_images, seed=1).noise, batch.noise)


def test_a_part_of_a_batch_is_its_clips(make_transformer: MakeTransformer) -> None:
    batch = random_batch(make_transformer(num_classes=3).config, 4, num_images=1)
    part: Batch = batch.part(1, 2, CPU)
    assert part.num_images == 1 and part.text_embeds is None
    assert torch.equal(part.latents, batch.latents[1:3]) and torch.equal(part.timesteps, batch.timesteps[1:3])
    assert part.class_labels is not None and batch.class_labels is not None
    assert torch.equal(part.class_labels, batch.class_labels[1:3])
