"""8-bit inference: the arithmetic, what it costs in accuracy, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, Run
from sampling.sampled import relative
from torch import nn
from torch._dynamo.testing import CompileCounter

from lavita.models.blocks import TransformerBlock
from lavita.models.presets import VARIANTS
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.int8 import Int8Linear, PackedWeight, quantize_int8, token_levels
from lavita.sampling.pipeline import LavitaPipeline

LAYERS = 4  # of a block with one attention


def block(model: LavitaTransformer3DModel, index: int) -> TransformerBlock:
    found = model.blocks[index]
    assert isinstance(found, TransformerBlock)
    return found


def linear(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(num_in, num_out, bias=bias)


def inputs(model: LavitaTransformer3DModel, batch: int = 2) -> dict[str, torch.Tensor]:
    config = model.config
    shape = (batch, config["num_frames"], config["in_channels"], config["sample_size"], config["sample_size"])
    torch.manual_seed(4)
    found = {"latents": torch.randn(shape), "timesteps": torch.linspace(20, 900, batch)}
    if config["num_classes"]:
        found["class_labels"] = torch.arange(batch)
    return found


@torch.no_grad()
def evaluate(model: LavitaTransformer3DModel, **options: Any) -> torch.Tensor:
    return model(**inputs(model), **options).sample


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 8), (40, 100, 72), (300, 513, 130)])
def test_the_layer_is_its_formula_in_float64(shape: tuple[int, int, int], bias: bool) -> None:
    tokens, num_in, num_out = shape
    layer = linear(num_in, num_out, bias)
    x = torch.randn(tokens, num_in) * torch.logspace(-3, 3, tokens)[:, None] + 0.3
    weight = layer.weight.detach().double()
    scale = weight.abs().amax(dim=1) / 127
    quantized = (weight / scale[:, None]).round()
    least = x.amin(dim=1, keepdim=True)
    # The division that decides between two levels is taken in float32, as the layer does it.
    step = (x.amax(dim=1, keepdim=True) - least) / token_levels()
    levels = ((x - least) / step).round()
    assert levels.amin() == 0 and levels.amax() == token_levels()
    approximation = least.double() + step.double() * levels.double()
    expected = approximation @ (scale[:, None] * quantized).T + (layer.bias.detach().double() if bias else 0)
    found = Int8Linear(layer)(x).double()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2e-6


def test_no_sum_saturates() -> None:
    """The largest possible values in neighbouring positions, of which some processors add pairs in 16 bits."""
    layer = nn.Linear(512, 64, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    x = torch.ones(48, 512)
    x[:, 0] = 0.0
    assert relative(Int8Linear(layer)(x), torch.full((48, 64), 511 * 0.5)) < 1e-6


def test_the_layer_is_near_the_float_one() -> None:
    """The error is 1.2 % of the output for normal values with 127 levels per token, half of that with 255."""
    layer = linear(256, 192)
    x = torch.randn(500, 256)
    found, expected = Int8Linear(layer)(x), layer(x).detach()
    assert 1e-4 < relative(found, expected) < 0.02
    activations = torch.nn.functional.gelu(torch.randn(500, 256), approximate="tanh")  # most of them near the minimum
    assert relative(Int8Linear(layer)(activations), layer(activations).detach()) < 0.02


def test_a_token_does_not_depend_on_the_others() -> None:
    layer = Int8Linear(linear(96, 160))
    x = torch.randn(3, 50, 7, 96)
    together = layer(x)
    assert torch.equal(together[1, 17], layer(x[1, 17]))
    assert torch.equal(together[2:], layer(x[2:]))
    x[0] *= 1000
    assert torch.equal(together[1:], layer(x)[1:])


def test_tokens_without_a_range() -> None:
    layer = linear(64, 32)
    x = torch.tensor([0.0, 3.0, -1e6])[:, None].expand(3, 64)
    quantized = Int8Linear(layer)
    assert relative(quantized(x), layer(x).detach()) < 0.02
    assert torch.equal(quantized(x)[0], layer.bias)
    assert quantized(torch.full((1, 64), torch.nan)).isnan().all()
    nn.init.zeros_(layer.weight)
    assert torch.equal(Int8Linear(layer)(torch.randn(5, 64)), layer.bias.expand(5, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_type_of_the_input(dtype: torch.dtype) -> None:
    layer = linear(64, 32)
    x = torch.randn(9, 64).to(dtype)
    found = Int8Linear(layer)(x)
    assert found.dtype == dtype
    assert relative(found.float(), layer(x.float()).detach()) < 0.02


@pytest.mark.parametrize(
    "fields",
    [*({"variant": variant} for variant in VARIANTS), {"conditioning": "all_tokens"}],
    ids=lambda fields: "-".join(map(str, *fields.items())),
)
def test_a_model_is_near_the_float_one(make_transformer: MakeTransformer, fields: dict[str, Any]) -> None:
    model = make_transformer(num_classes=3, hidden_size=64, num_blocks=4, **fields)
    for parameter in model.blocks.parameters():
        parameter.data *= 0.5  # gates of about 1
    expected = evaluate(model)
    images = evaluate(model, use_temporal=False)
    assert quantize_int8(model) is model
    assert 1e-5 < relative(evaluate(model), expected) < 0.04
    assert 1e-5 < relative(evaluate(model, use_temporal=False), images) < 0.04
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_layers_are_quantized(make_transformer: MakeTransformer, variant: int) -> None:
    model = quantize_int8(make_transformer(variant=variant))
    quantized = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    attentions = ["attn", "temporal_attn"] if variant >= 3 else ["attn"]
    expected = {f"blocks.{i}.mlp.{layer}" for i in (0, 1) for layer in ("fc1", "fc2")}
    expected |= {
        f"blocks.{i}.{attention}.{layer}" for i in (0, 1) for attention in attentions for layer in ("qkv", "proj")
    }
    assert quantized == expected
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left and all("embedder" in name or "adaLN" in name or name == "final_layer.linear" for name in left)


def test_the_weights_take_a_quarter(make_transformer: MakeTransformer) -> None:
    model = make_transformer(hidden_size=128)
    blocks = [block(model, index) for index in (0, 1)]
    layers: list[Any] = [layer for part in blocks for layer in (*part.attn.children(), *part.mlp.children())]
    assert len(layers) == 2 * LAYERS
    before = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    floats = [weakref.ref(layer.weight) for layer in layers]
    del blocks, layers
    alive = len(PackedWeight._alive)
    quantize_int8(model)
    assert not any(weight() is not None for weight in floats)
    quantized = [module for module in model.modules() if isinstance(module, Int8Linear)]
    after = sum(buffer.nbytes for layer in quantized for buffer in layer.buffers())
    after += sum(layer.packed_weight.tensor.nbytes for layer in quantized)
    assert not any(True for layer in quantized for _ in layer.parameters())
    assert before / 4 < after < before / 3.5
    assert len(PackedWeight._alive) == alive + 2 * LAYERS
    del model, quantized
    assert len(PackedWeight._alive) == alive


def test_a_copy_outlives_its_model(make_transformer: MakeTransformer) -> None:
    model = quantize_int8(make_transformer())
    expected = evaluate(model)
    other = copy.deepcopy(model)
    del model
    assert torch.equal(evaluate(other), expected)


def test_compiled_blocks_share_a_graph(make_transformer: MakeTransformer) -> None:
    model = quantize_int8(make_transformer(variant=4))
    expected = evaluate(model)
    counter = CompileCounter()
    model.compile_repeated_blocks(backend=counter, dynamic=False, fullgraph=True)
    # Compiled, GELU is computed in another form: some values are rounded to the next level.
    assert relative(evaluate(model), expected) < 0.02
    assert counter.frame_count == 1
    first: Any = block(model, 0).attn.qkv
    second: Any = block(model, 1).attn.qkv
    assert first.weight_number != second.weight_number


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same() -> None:
    layer = Int8Linear(linear(64, 48))
    x = torch.randn(2, 10, 64)
    compiled = torch.compile(layer, dynamic=False, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), layer(x)) < 1e-6


@pytest.mark.slow
def test_a_compiled_model_is_near_the_float_one(make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=4, num_classes=3)
    for parameter in model.blocks.parameters():
        parameter.data *= 0.5
    expected = evaluate(model)
    quantize_int8(model).compile_repeated_blocks(dynamic=False, fullgraph=True)
    assert 1e-5 < relative(evaluate(model), expected) < 0.04


def test_what_is_refused(make_transformer: MakeTransformer) -> None:
    with pytest.raises(ValueError, match="the model is in training mode, but int8 is for inference"):
        quantize_int8(make_transformer().train())
    with pytest.raises(ValueError, match="the model is on meta, but int8 is for CPUs"):
        quantize_int8(make_transformer().to("meta"))
    model = quantize_int8(make_transformer())
    with pytest.raises(ValueError, match="the model is already quantized to int8"):
        quantize_int8(model)
    for save in (model.state_dict, lambda: pickle.dumps(model)):
        with pytest.raises(ValueError, match="quantized to int8 and cannot be saved"):
            save()
    model = make_transformer()
    last: Any = block(model, 1).mlp
    last.fc2 = nn.Sequential(last.fc2)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2 is a .*Sequential, .*merge adapters first"):
        quantize_int8(model)
    assert type(block(model, 0).attn.qkv) is nn.Linear, "nothing was changed"


def test_a_folder_says_so_and_takes_one_kind(tmp_path: Path, pipeline: LavitaPipeline, run: Run) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    options = ("--classes", "pong", "--seeds", "0", "--steps", "2", "--device", "cpu", "--format", "mkv")
    written = {}
    for name, more in {"float": (), "int8": ("--quantize", "int8")}.items():
        code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / name, *options, *more)
        assert code == 0, stderr
        settings = json.loads((tmp_path / name / "generation.json").read_text())
        written[name] = settings
        other = ("--quantize", "int8") if name == "float" else ()
        code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / name, *options, *other)
        assert code == 2 and "holds videos made with quantize=" in stderr
    assert "quantize" not in written["float"]
    assert written["int8"] == {**written["float"], "quantize": "int8"}
    paths = [tmp_path / name / "pong" / "0.mkv" for name in written]
    assert paths[0].read_bytes() != paths[1].read_bytes()
