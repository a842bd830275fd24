"""The transformer: its weights at the start, their names, and its files.

Its output against a slow re-implementation: test_variants.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from models.passes import batch, every_condition, every_embedding, every_kind, fresh_model
from torch import nn

from lavita.models.blocks import FrameLayout
from lavita.models.transformer import LavitaTransformer3DModel

# ---- initialisation


@every_condition
@every_embedding
@every_kind
def test_starts_at_zero_and_trains_every_parameter_once_the_gates_open(
    kind: dict[str, Any], patch_embedding: str, given: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = fresh_model(**kind, **given, patch_embedding=patch_embedding, num_frames=4)
    output = model(**batch(model)).sample
    assert output.shape == (2, 4, 8, 8, 8)
    assert not output.any()

    for module in (*model.blocks, model.final_layer):
        if module.adaLN_modulation is not None:
            nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
    nn.init.normal_(model.final_layer.linear.weight)
    model(**batch(model)).sample.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert not [name for name, _ in model.named_parameters() if "embed" in name and "embedder" not in name]


@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
def test_without_sigma_the_output_has_the_latents_shape(patch_embedding: str) -> None:
    model = fresh_model(learn_sigma=False, patch_embedding=patch_embedding)
    (output,) = model(**batch(model), return_dict=False)
    assert output.shape == (2, 2, 4, 8, 8)


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_a_fresh_block_is_the_identity(variant: int) -> None:
    torch.manual_seed(0)
    x, condition = torch.randn(2, 3, 5, 32), torch.randn(2, 1, 1, 32)
    for block in fresh_model(variant=variant).blocks:
        assert torch.equal(block(x, condition, FrameLayout(3)), x)


def test_a_fresh_tube_hands_out_the_decoders_channels_to_its_frames() -> None:
    patch, tube, channels = 2, 3, 8
    model = fresh_model(patch_embedding="compression", tube_size=tube, num_frames=6, patch_size=patch)
    with torch.no_grad():
        bias = model.final_layer.linear.bias
        bias.copy_(torch.arange(len(bias)))
        output = model(torch.randn(1, 6, 4, 8, 8), torch.tensor([5])).sample
    for frame, channel, row, column in itertools.product(range(6), range(channels), range(8), range(8)):
        of_pixel = (row % patch) * patch + column % patch
        assert output[0, frame, channel, row, column] == (of_pixel * tube + frame % tube) * channels + channel


# ---- names and files


@every_condition
@every_embedding
@every_kind
def test_names_are_dits_and_lattes(kind: dict[str, Any], patch_embedding: str, given: dict[str, int]) -> None:
    model = fresh_model(**kind, **given, patch_embedding=patch_embedding)
    steered = kind["conditioning"] == "s_adaln"
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1"] if steered else ["final_layer.norm"]
    layers += ["y_embedder.mlp.0", "y_embedder.mlp.2"] if "text_dim" in given else []
    layers += ["temporal_upsample"] if patch_embedding == "compression" else []
    for i in range(2):
        parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        parts += ["adaLN_modulation.1"] if steered else ["norm1", "norm2"]
        if kind["variant"] >= 3:
            parts += ["temporal_attn.qkv", "temporal_attn.proj"]
        if kind["variant"] == 3 and not steered:
            parts += ["norm_temporal"]
        layers += [f"blocks.{i}.{part}" for part in parts]
    expected = {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")} | {"pos_embed"}
    expected |= {"temp_embed"} if kind["temporal_position"] == "absolute" else set()
    expected |= {"y_embedder.embedding_table.weight"} if "num_classes" in given else set()
    assert set(model.state_dict()) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"num_classes": 3, "class_names": ["boxing", "enduro", "pong"], "fps": 4.0},
        {
            "variant": 3,
            "patch_embedding": "compression",
            "tube_size": 3,
            "num_frames": 6,
            "conditioning": "all_tokens",
            "temporal_position": "rope",
            "text_dim": 5,
            "text_encoder": "openai/clip-vit-large-patch14",
            "prediction_type": "v_prediction",
            "frame_interval": 3,
        },
        {"variant": 4, "patch_embedding": "compression", "temporal_position": "rope", "learn_sigma": False},
        {"variant": 1, "conditioning": "all_tokens", "num_blocks": 4, "num_classes": 2},
    ],
)
def test_round_trip_through_a_folder(fields: dict[str, Any], tmp_path: Path, make_transformer: MakeTransformer) -> None:
    model = make_transformer(**fields)
    model.save_pretrained(tmp_path)
    loaded = LavitaTransformer3DModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in fields} == fields
    assert not loaded.training
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    given = batch(model)
    with torch.no_grad():
        assert torch.equal(loaded(**given).sample, model(**given).sample)
