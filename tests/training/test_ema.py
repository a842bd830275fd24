"""The exponential moving average, against its recursion in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavita.training.ema import EMA, decay_at


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    return model


def step(model: nn.Module, seed: int) -> None:
    """A stand-in for an optimizer's step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_equals_the_recursion_in_float64(decay: float, warmup: bool) -> None:
    model = make_model()
    ema = EMA(model, decay, warmup)
    expected = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    for number in range(1, 41):
        step(model, number)
        ema.update(number)
        rate = min(decay, (1 + number) / (10 + number)) if warmup else decay
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected[name] = rate * expected[name] + (1 - rate) * parameter.detach().double()
    assert ema.weights.keys() == expected.keys(), "frozen weights have no average"
    for name, value in expected.items():
        torch.testing.assert_close(ema.weights[name].double(), value, rtol=1e-5, atol=1e-6)


def test_the_decay_warms_up_to_its_limit() -> None:
    assert decay_at(0.999, 1) == pytest.approx(2 / 11)
    rates = [decay_at(0.999, number) for number in range(1, 20_000)]
    assert rates == sorted(rates)
    assert rates[-1] == 0.999
    assert decay_at(0.0, 5) == 0.0
    assert decay_at(0.9999, 89_989) < decay_at(0.9999, 89_990) == 0.9999
    assert decay_at(0.9999, 1, warmup=False) == 0.9999
