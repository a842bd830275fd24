"""Post-hoc EMA: tracked averages against their profile, and reconstructed ones against directly tracked ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig, Run
from scipy import integrate  # type: ignore[import-untyped]
from torch import nn

from lavita.core.config import ConfigError, load_config
from lavita.sampling.pipeline import load_pipeline
from lavita.training.config import TrainConfig
from lavita.training.power_ema import PowerEMA, Profile, exponent, reconstruct, save_snapshot, solve
from lavita.training.train import train


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def wander(model: nn.Module, number: int) -> None:
    """A stand-in for an optimizer's step: the weights settle while they move at random."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.97).add_(0.1 * torch.randn(parameter.shape, generator=generator) + 0.02)


@pytest.mark.parametrize(("sigma_rel", "expected"), [(0.05, 16.97), (0.1, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel: float, expected: float) -> None:
    gamma = exponent(sigma_rel)
    assert gamma == pytest.approx(expected, abs=0.01)
    # The standard deviation of the density (gamma + 1) tau^gamma on 0..1.
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9)
    with pytest.raises(ValueError, match=r"sigma_rel is 0\.3, but must be in 0\.01 to 0\.28"):
        exponent(0.3)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_a_tracked_average_has_the_profile_in_float64(sigma_rel: float) -> None:
    """Between two steps the weights stand still, so each step weighs the integral of the density over its time."""
    model = make_model()
    average, seen = PowerEMA(model, sigma_rel), []
    for number in range(1, 41):
        wander(model, number)
        average.update(number)
        seen.append(model.weight.detach().double().clone())
    shares = np.diff((np.arange(41) / 40) ** (exponent(sigma_rel) + 1))
    assert shares.sum() == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    torch.testing.assert_close(average.weights["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_overlaps_are_integrals() -> None:
    profiles = [Profile(100, 0.05), Profile(100, 0.2), Profile(250, 0.1), Profile(30, 0.15)]

    def density(profile: Profile, time: float) -> float:
        gamma = exponent(profile.sigma_rel)
        return (gamma + 1) * time**gamma / profile.step ** (gamma + 1) if time <= profile.step else 0.0

    for one in profiles:
        for other in profiles:
            end = min(one.step, other.step)
            found = integrate.quad(lambda time, a=one, b=other: density(a, time) * density(b, time), 0, end)[0]
            assert one.overlap(other) == pytest.approx(found, rel=1e-6)


def test_a_stored_profile_is_reproduced_exactly() -> None:
    stored = [Profile(step, length) for step in (10, 20, 30) for length in (0.05, 0.1)]
    coefficients, error = solve(stored, Profile(20, 0.1))
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1, 0, 0], atol=1e-6)
    assert error < 1e-5


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.1, 0.15, 0.22])
def test_a_reconstruction_equals_a_directly_tracked_average(sigma_rel: float, tmp_path: Path) -> None:
    model = make_model()
    tracked = [PowerEMA(model, length) for length in (0.05, 0.1)]
    direct = PowerEMA(model, sigma_rel)
    wanted: dict[int, torch.Tensor] = {}
    for number in range(1, 321):
        wander(model, number)
        for average in (*tracked, direct):
            average.update(number)
        if number % 20 == 0:
            save_snapshot(tmp_path, number, tracked)
            wanted[number] = direct.weights["weight"].clone()
    for step in (320, 240):
        found = reconstruct(tmp_path, sigma_rel, None if step == 320 else step)
        assert found.step == step and found.weights.keys() == {"weight", "bias"}
        spread = (model.weight.detach() - wanted[step]).norm()
        distance = (found.weights["weight"] - wanted[step]).norm()
        assert distance < 0.02 * spread, "the difference of the last weights from their average"
        assert found.error < 0.07 and found.num_snapshots == step // 20
    with pytest.raises(ValueError, match=r"step is 25, but .* has no snapshot of it; the nearest are of 20, 40, 60"):
        reconstruct(tmp_path, sigma_rel, 25)


OPTIONS = ("train.power_ema=[0.05,0.1]", "train.checkpoint_every=2", "train.learning_rate=1e-2")


def test_a_run_keeps_snapshots_and_resumes_exactly(make_config: MakeConfig) -> None:
    whole = make_config("whole", *OPTIONS, "train.steps=6")
    train(whole)
    names = [f"step-{step:08d}.safetensors" for step in (2, 4, 6)]
    assert sorted(path.name for path in (whole.run_dir / "averages").iterdir()) == names
    part = make_config("part", *OPTIONS, "train.steps=3")
    train(part)
    resumed = make_config("part", *OPTIONS, "train.steps=6")
    train(resumed)
    for name in (names[0], names[2]):
        one, other = ((config.run_dir / "averages" / name).read_bytes() for config in (whole, resumed))
        assert one == other
    plain = make_config("plain", *OPTIONS[1:], "train.steps=6")
    train(plain)
    weights = [load_pipeline(config.run_dir / "pipeline").transformer.state_dict() for config in (whole, plain)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()), "training is the same"


def test_the_command_writes_a_pipeline(make_config: MakeConfig, run: Run, tmp_path: Path) -> None:
    config = make_config("run", *OPTIONS, "train.steps=4")
    train(config)
    out = tmp_path / "longer"
    code, printed, err = run("average", config.run_dir, "--sigma-rel", "0.08", "--out", out)
    assert code == 0, err
    assert printed.startswith(f"{out}: average of relative length 0.08 up to step 4, from 2 snapshots")
    averaged, found = load_pipeline(out).transformer, reconstruct(config.run_dir, 0.08)
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter, found.weights[name]), name
    code, _, err = run("average", config.run_dir, "--sigma-rel", "0.08", "--out", out)
    assert code == 2 and err == f"error: {out}: exists and is not an empty folder; give another\n"
    code, _, err = run("average", config.run_dir, "--sigma-rel", "0.5", "--out", tmp_path / "x")
    assert code == 2 and "sigma_rel is 0.5, but must be in 0.01 to 0.28" in err
    code, _, err = run("average", tmp_path, "--sigma-rel", "0.1", "--out", tmp_path / "x")
    assert code == 2 and "has no snapshots of averages; train with train.power_ema=[0.05,0.1]" in err
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "LavitaPipeline"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"power_ema": [0.5]}, "power_ema is .0.5., but each must be in 0.01 to 0.28"),
        ({"power_ema": [0.1, 0.1]}, "power_ema is .0.1, 0.1., but each may be given once"),
        (
            {"power_ema": [0.1], "init_from": "x", "lora_rank": 2},
            "power_ema is .0.1., but adapters have no such averages: set lora_rank=0",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, fields)
