"""The exponential moving average, against its recursion in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavita.ema import EMA, decay_at


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


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_equals_the_recursion_in_float64(decay: float) -> None:
    model = make_model()
    ema = EMA(model, decay)
    expected = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    for number in range(1, 41):
        step(model, number)
        ema.update(number)
        rate = min(decay, (1 + number) / (10 + number))
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


def test_applied_lends_the_average_and_gives_back_bit_for_bit() -> None:
    model = make_model()
    ema = EMA(model, 0.9)
    step(model, 1)
    ema.update(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.applied():
        for name, value in ema.weights.items():
            assert torch.equal(model.get_parameter(name), value)
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_applied_does_not_touch_the_average() -> None:
    model = make_model()
    ema = EMA(model, 0.9)
    step(model, 1)
    ema.update(1)
    before = {name: value.clone() for name, value in ema.weights.items()}
    with ema.applied():
        step(model, 2)
    assert all(torch.equal(value, before[name]) for name, value in ema.weights.items())


def test_saved_weights_continue_the_same_average() -> None:
    model = make_model()
    ema = EMA(model, 0.9)
    step(model, 1)
    ema.update(1)
    resumed = EMA(model, 0.9)
    resumed.load({name: value.clone() for name, value in ema.weights.items()})
    step(model, 2)
    ema.update(2)
    resumed.update(2)
    assert all(torch.equal(resumed.weights[name], value) for name, value in ema.weights.items())
    with pytest.raises(KeyError):
        resumed.load({})
