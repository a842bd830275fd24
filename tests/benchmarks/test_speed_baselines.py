"""The floor, counted in another way, and the baselines: the same function, the same sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import MakeTransformer

from benchmarks.speed.baselines import PlainModel, make_dit, make_latte
from benchmarks.speed.products import Floor, record, total_macs
from benchmarks.speed.setup import Setup, build_model, model_inputs
from lavita.studies.complexity import measure

TINY = Setup("tiny/2", num_frames=3, sample_size=8, batch_size=2)


def test_recorded_products_are_those_of_the_formula() -> None:
    model, inputs = build_model(TINY), model_inputs(TINY)
    products = record(lambda: model(*inputs))
    cost = measure(TINY.config, TINY.batch_size)
    assert total_macs(products) == cost.macs - cost.attention_products
    # Two for the timestep, patches and decoder; four and S-AdaLN per block; S-AdaLN at the end.
    assert len(products) == 2 + 2 + 2 * 5 + 1
    assert Floor(products, torch.float32).macs == total_macs(products)
    assert Floor(products, torch.float32, backward=True).macs == 3 * total_macs(products)


def test_the_floor_calls_the_same_products() -> None:
    layers = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Conv2d(8, 8, 3, groups=4, bias=False)
    module: Any = torch.nn.Sequential(*layers)
    module.to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    products = record(lambda: torch.nn.functional.linear(module(image), torch.ones(5, 6)))
    again = record(Floor(products, torch.float32))
    shapes = [(each.input_shape, each.weight.shape, each.output_shape, each.convolution) for each in products]
    assert shapes == [(each.input_shape, each.weight.shape, each.output_shape, each.convolution) for each in again]
    assert [each.channels_last for each in again[:2]] == [True, True]
    assert again[0].weight.data_ptr() == layers[0].weight.data_ptr()
    assert [each.macs for each in products] == [2 * 64 * 8 * 27, 2 * 36 * 8 * 18, 2 * 8 * 6 * 5 * 6]
    Floor(products, torch.bfloat16, backward=True)()
    assert {each.weight.dtype for each in record(Floor(products, torch.bfloat16))} == {torch.bfloat16}


@pytest.mark.parametrize("frames", [4, 3])
def test_the_plain_model_computes_the_same_as_ours(make_transformer: MakeTransformer, frames: int) -> None:
    model = make_transformer(num_frames=4, num_blocks=4, num_classes=3, sample_size=16)
    latents, timesteps = torch.randn(2, frames, 4, 16, 16), torch.tensor([3, 977])
    labels = torch.tensor([2, 3])
    plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), model.config)
    with torch.no_grad():
        expected = model(latents, timesteps, labels).sample
        torch.testing.assert_close(plain(latents, timesteps, labels), expected, rtol=1e-4, atol=1e-4)
    cost = measure(model.config, 2, num_frames=frames)
    # Its S-AdaLN is repeated as Table 3 counts it.
    macs = total_macs(record(lambda: plain(latents, timesteps, labels)))
    width, tokens = 32, 64
    once = 2 * (4 * 6 + 2) * width**2
    repeated = 2 * ((frames + tokens) * 2 * 6 + frames * 2) * width**2
    assert macs == cost.macs - cost.attention_products - once + repeated


def test_the_plain_model_has_the_same_gradient(make_transformer: MakeTransformer) -> None:
    model = make_transformer().double()
    latents, timesteps = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64), torch.tensor([500])
    plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), model.config)
    gradients = []
    for run in (lambda: model(latents, timesteps).sample, lambda: plain(latents, timesteps)):
        model.zero_grad()
        run().square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-9)


def test_the_plain_model_refuses_other_kinds(make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=3)
    with pytest.raises(ValueError, match="variant is 3, but the plain model has only 2"):
        PlainModel(model.state_dict(), model.config)


def test_the_baselines_of_diffusers_have_our_width_and_depth() -> None:
    setup = replace(TINY, preset="mini/2")
    config, ours = setup.config, build_model(setup)
    inputs = model_inputs(setup)
    blocks = {name: p.numel() for name, p in ours.named_parameters() if name.startswith("blocks.")}
    body = sum(count for name, count in blocks.items() if "adaLN" not in name)
    width, depth = config["hidden_size"], config["num_blocks"]

    latte = make_latte(config)
    model: Any = latte.model
    in_pairs = [*model.transformer_blocks, *model.temporal_transformer_blocks]
    tables = depth * 6 * width
    assert len(in_pairs) == depth
    assert sum(parameter.numel() for block in in_pairs for parameter in block.parameters()) - tables == body

    dit = make_dit(config)
    model = dit.model
    assert len(model.transformer_blocks) == depth
    assert sum(p.numel() for name, p in model.transformer_blocks.named_parameters() if ".norm1." not in name) == body
    # The S-AdaLN layer of a block is as large as ours.
    assert model.transformer_blocks[0].norm1.linear.weight.shape == (6 * width, width)

    with torch.no_grad():
        expected = ours(*inputs).sample.shape
        assert latte.run(*inputs).shape == dit.run(*inputs).shape == expected
    own = total_macs(record(lambda: ours(*inputs)))
    assert 0.9 < total_macs(record(lambda: latte.run(*inputs))) / own < 1.0
    assert 1.0 < total_macs(record(lambda: dit.run(*inputs))) / own < 1.2
