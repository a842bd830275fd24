"""Recipes, and the precision that they store weights in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import MakeTransformer

from lavita.core.names import RecipeName
from lavita.core.precision import store_linear_weights
from lavita.core.seeds import generator
from lavita.models.presets import VARIANTS
from lavita.sampling.generate import generate
from lavita.sampling.int8 import quantize_int8
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.recipes import RECIPES, Recipe, find_recipe
from lavita.video.reading import read_clip


def test_recipes_are_those_of_the_command_line(pipeline: LavitaPipeline) -> None:
    assert get_args(RecipeName) == tuple(RECIPES)
    assert RECIPES["paper"].num_steps == 250 and RECIPES["paper"].sampler == "ddpm"
    for recipe in RECIPES.values():
        pipeline.use_sampler(recipe.sampler, recipe.spacing)
    with pytest.raises(ValueError, match="recipe is 'slow'; allowed: default, "):
        find_recipe("slow")


def test_what_recipes_refuse() -> None:
    unknown: Any = "all"
    with pytest.raises(ValueError, match="cache is 'all'; allowed: pab, fastercache, taylorseer"):
        Recipe(cache=unknown)
    with pytest.raises(ValueError, match="quantize is 'all'; allowed: int8"):
        Recipe(quantize=unknown)
    with pytest.raises(ValueError, match="cache is pab, which does not work with compiled blocks; allowed: taylorseer"):
        Recipe(cache="pab", compiled=True)
    assert Recipe(cache="taylorseer", compiled=True).compiled


def test_options_change_parts_of_a_recipe() -> None:
    recipe = Recipe(sampler="dpm++", steps=7).changed(steps=9, spacing=None, guidance_interval=(1, 2))
    assert recipe == Recipe(sampler="dpm++", steps=9, guidance_interval=(1, 2))
    assert Recipe().changed(sampler="ddpm").num_steps == 250
    assert Recipe().num_steps == 25


@pytest.mark.parametrize("fields", [{}, {"temporal_position": "rope"}, {"conditioning": "all_tokens"}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_weights_change_no_bit(variant: int, fields: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=variant, num_classes=3, **fields)
    given = {"latents": torch.randn(2, 2, 4, 8, 8), "timesteps": torch.tensor([3, 900])}
    given["class_labels"] = torch.tensor([0, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, before = model(**given).sample, sum(p.nbytes for p in model.blocks.parameters())
        store_linear_weights(model.blocks, None)
        assert sum(p.nbytes for p in model.blocks.parameters()) == before
        store_linear_weights(model.blocks, torch.bfloat16)
        assert torch.equal(model(**given).sample, expected)
    assert sum(p.nbytes for p in model.blocks.parameters()) < 0.52 * before


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_samples_in_bf16_are_those_of_float32_weights(
    quantize: Any, tmp_path: Path, pipeline: LavitaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose processor multiplies bf16."""
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("LAVITA_BF16", "on")
    recipe = Recipe(steps=3, quantize=quantize)
    path = generate(
        str(tmp_path / "model"), tmp_path / "out", classes="pong", seeds="0", recipe=recipe, suffix=".mkv", device="cpu"
    )[0]
    if quantize:
        quantize_int8(pipeline.transformer)
    frames = pipeline(
        ["pong"],
        num_inference_steps=3,
        guidance_scale=1.5,
        generator=[generator(0, "sample")],
        precision="bf16",
    ).frames
    np.testing.assert_array_equal(read_clip(path, 0, 2), frames[0])
